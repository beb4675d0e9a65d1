"""How many runs share a GPU, and MPS, for which a script stands that notes what it is asked."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from normlab import runs
from normlab.common.errors import UserError
from normlab.config.schema import RunConfig
from normlab.data.inventory import Inventory
from normlab.launchers import pool, preflight, sharing
from normlab.launchers.pool import Worker
from normlab.launchers.sweep import Job

GIB = 1 << 30
GRAPH = "engine=auto"


def job(config: RunConfig, side: int = 32) -> Job:
    data = Inventory(train_images=1000, test_images=100, classes=10, image_size=side)
    return Job(config, runs.Run(config.as_dict()), data)


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpus=2, cores=8, gib=24)`"""

    def has(gpus: int = 1, cores: int = 16, gib: int = 80) -> None:
        monkeypatch.setattr(preflight, "gpu_count", lambda: gpus)
        monkeypatch.setattr(preflight, "gpu_memory_bytes", lambda: gib * GIB)
        for module in pool, sharing:
            monkeypatch.setattr(module, "cores", lambda: cores)

    return has


def chosen(jobs: list[Job], *given: int | None) -> tuple[int, int]:
    """The number of workers, and how many runs each trains at a time."""
    workers = pool.workers_for(jobs, *(given or (None,)))
    return len(workers), workers[0].pack


def test_processes_and_packs_are_chosen_from_runs_cores_and_memory(make, machine) -> None:
    eager, captured = (job(make(f"engine={engine}", "batch=128")) for engine in ("eager", "auto"))
    machine()
    assert chosen([captured] * 60) == (4, 4)
    assert chosen([eager] * 60) == (4, 1)  # whose Python leaves no time for another one of its process
    assert chosen([captured] * 7) == (4, 1)
    assert chosen([captured] * 2) == (2, 1)
    machine(gpus=2)
    assert chosen([captured] * 60) == (8, 4)
    assert chosen([captured] * 15) == (8, 4)
    machine(gpus=8)
    assert chosen([captured] * 60) == (8, 4)
    assert chosen([captured] * 56) == (8, 1)
    machine(cores=4)
    assert chosen([captured] * 60) == (2, 4)
    machine(cores=1)
    assert chosen([captured] * 60) == (1, 4)


def test_what_is_chosen_fits_into_memory(make, machine) -> None:
    """1 + 2 GiB for a run of 128 images of 32x32 pixels, of four fifths of the memory."""
    small = [job(make(GRAPH, "batch=128"))] * 60
    for gib, workers, pack in ((4, 1, 1), (8, 2, 1), (16, 4, 1), (31, 4, 2), (61, 4, 4)):
        machine(gib=gib)
        assert chosen(small) == (workers, pack), gib
    machine(gib=31)
    assert chosen([job(make(GRAPH, "batch=128", "depth=50")), *small]) == (3, 1)
    machine(gib=0)  # that the driver does not tell
    assert chosen(small) == (1, 1)


def test_runs_that_fill_a_gpu_have_it_for_themselves(make, machine, tmp_path) -> None:
    machine()
    small = [job(make(GRAPH))] * 60
    stream = job(make("dataset=image_folder", f"dataset.path={tmp_path}"))
    for alone in job(make(GRAPH), side=96), job(make("engine=compile")), stream:
        assert chosen([*small, alone]) == (1, 1)


def test_numbers_that_are_given_are_kept(make, machine) -> None:
    small = [job(make(GRAPH, "batch=128"))] * 60
    machine(gib=16)
    assert chosen(small, None, 2) == (2, 2)
    assert chosen(small, None, None, 2) == (2, 2)
    assert chosen(small, None, 6, 8) == (6, 8)
    assert chosen(small, 3) == (3, 1)
    assert chosen([job(make("device=cpu"))] * 60) == (16, 1)
    machine(gpus=0)
    assert chosen(small) == (16, 1)


def test_how_many_at_a_time_in_words(make) -> None:
    jobs = [job(make())] * 60
    assert pool.at_a_time(jobs, [Worker("cuda:0", 1, 4)] * 4) == (16, "16 at a time in 4 processes")
    assert pool.at_a_time(jobs, [Worker("cuda:0", 1, 8)]) == (8, "8 at a time in one process")
    assert pool.at_a_time(jobs[:3], [Worker("cpu", 1)] * 2) == (2, "2 at a time")


@pytest.fixture
def control(tmp_path, monkeypatch):
    """What `nvidia-cuda-mps-control` was asked, and its pipes' folder; another daemon answers if `daemon` exists."""
    log, program = tmp_path / "asked", tmp_path / "bin" / sharing.CONTROL
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        f'asked="$*$(cat)"; echo "$asked in ${{CUDA_MPS_PIPE_DIRECTORY:-none}}" >> {log}\n'
        f'[ "$asked" != get_server_list ] || [ -e {tmp_path}/daemon ]\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(sharing, "_TRIAL", "")
    return lambda: log.read_text().splitlines() if log.exists() else []


def test_mps_is_started_for_a_sweep_and_ended_with_it_whatever_happens(control) -> None:
    for error in None, ValueError, KeyboardInterrupt:
        said: list[str] = []
        before = len(control())
        with pytest.raises(error) if error else nullcontext(), sharing.mps(True, True, said.append):
            folder = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
            assert folder.is_dir()
            assert Path(os.environ["CUDA_MPS_LOG_DIRECTORY"]).is_dir()
            assert control()[before:] == ["get_server_list in none", f"-d in {folder}"]
            if error:
                raise error
        assert control()[before + 2 :] == [f"quit in {folder}"]
        assert not folder.exists()
        assert not {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"} & os.environ.keys()
        assert ["started for this sweep" in sentence for sentence in said] == [True]


def test_mps_that_lets_no_process_use_a_gpu_is_not_used(control, monkeypatch) -> None:
    monkeypatch.setattr(sharing, "_TRIAL", "raise SystemExit(True)")
    said: list[str] = []
    with sharing.mps(True, True, said.append):
        assert control()[-1].startswith("quit in /")
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert len(control()) == 3
    assert ["does not work here" in sentence for sentence in said] == [True]


def test_mps_is_left_alone_where_it_runs_or_is_not_wanted(control, tmp_path, monkeypatch) -> None:
    for wanted, shared in (False, True), (True, False):
        with sharing.mps(wanted, shared, pytest.fail):
            assert control() == []
    (tmp_path / "daemon").touch()
    with sharing.mps(True, True, pytest.fail):
        assert control() == ["get_server_list in none"]
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/mine")
    with sharing.mps(True, True, pytest.fail):
        assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/mine"
    assert len(control()) == 1
    with (
        pytest.raises(UserError, match=r"hydra\.launcher\.mps=maybe is out of range"),
        sharing.mps("maybe", True, print),
    ):
        pass


def test_the_gpus_of_a_daemon_are_not_numbered_anew(control, tmp_path, monkeypatch) -> None:
    """Its clients would look for theirs among those."""
    (tmp_path / "bin" / sharing.CONTROL).write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" > {tmp_path}/seen\n')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with sharing.mps(True, True, print):
        assert (tmp_path / "seen").read_text() == "\n"


@pytest.mark.slow
def test_a_sweep_whose_processes_share_a_gpu_has_mps_for_its_time(tiny, machine, control, capsys) -> None:
    """A GPU that the launcher sees and the processes do not, which train on the CPU."""
    machine()
    jobs = [job(tiny("device=auto", f"seed={seed}"), side=8) for seed in range(2)]
    assert pool.train_jobs(jobs, mps=True) == ([], [])
    assert [line.split(" in ")[0] for line in control()] == ["get_server_list", "-d", "quit"]
    printed = capsys.readouterr().err
    assert "Processes share a GPU by NVIDIA's MPS" in printed
    assert "Runs to train: 2, 2 at a time (GPU, threads of each: 1)" in printed


@pytest.mark.parametrize(("pack", "connections"), [(2, "32"), (1, None)])
@pytest.mark.slow
def test_the_streams_of_a_pack_have_connections_of_their_own(monkeypatch, pack, connections) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    worker = Worker("cpu", 1, pack)
    try:
        assert worker.submit(os.getenv, "CUDA_DEVICE_MAX_CONNECTIONS").result() == connections
    finally:
        worker.close()
