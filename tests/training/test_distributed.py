"""Several processes that train one run: together they are one process, they resume each other, and they end alike."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import several
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor, nn

from normlab import models, runs
from normlab.common.errors import UserError
from normlab.config import hydra as cli
from normlab.config import schema as config
from normlab.config.schema import RunConfig
from normlab.data.batches import Split, unit_interval
from normlab.data.datasets import load
from normlab.data.resident import Resident
from normlab.training.distributed import checks
from normlab.training.distributed.processes import Processes, find

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SPEED = ("wall_seconds", "images_per_second")  # what depends on the machine
NETWORK = ("model=custom", "model.target=small.SmallResNet", "model.name=small")
RUN = ("batch=32", "eval_batch=16", "epochs=2", "device=cpu", "threads=1", "save_weights=true")
DIGITS = ("dataset.train_size=82", "dataset.test_size=21")  # the last batch has 18 images
IMAGES = ("dataset=image_folder", "dataset.path={images}", "dataset.storage=stream", "dataset.workers=0", "batch=6")
REGRESSION = ("model=deep_linear", "depth=2", "dataset=linear_regression", "dataset.features=6")

ARMS = {
    "sync": "norm=bn sync_stats=true",
    "augmented": "norm=bn sync_stats=true dataset.flip=true dataset.crop_padding=1 label_smoothing=0.1",
    "precise": "norm=bn sync_stats=true eval_stats=precise weight_average=0.9",
    "batch": "norm=bn sync_stats=true eval_stats=batch input_norm=bn",
    "groups": "norm=bn norm_batch=16 drop_last=true",
    "small_groups": "norm=renorm norm_batch=4 drop_last=true",
    "paired": "norm=bn norm_batch=8 sampler=paired sampler.images_per_label=2",
    "gradients": "norm=mabn norm_batch=8 drop_last=true",  # has moving averages of gradients
    "affine": "norm=affine",
    "group_norm": "norm=gn",
    "from_data": "norm=wn_mean norm.init=data sync_stats=true",
    "streamed": "norm=bn sync_stats=true dataset.crop_scale=[0.3,1] dataset.flip=true",
    "regression": "norm=bn sync_stats=true dataset.train_size=50 dataset.test_size=21 dataset.split_seed=1",
}
RESUMED = {"by_two": 2, "by_one": 4}  # of six steps, three an epoch: the one before which a stop is requested


def configured(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.parse(cli.settings_of(compose("config", list(overrides))))


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    """`config_of(arm, who)`: the run of an arm, in a folder of who carries it out."""
    folder = tmp_path_factory.mktemp("distributed")
    images = folder / "images"
    for number in range(28):
        part = images / ("train" if number < 20 else "val") / "ab"[number % 2]
        part.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (12, 12, 3), generator=torch.Generator().manual_seed(number)).byte()
        Image.fromarray(pixels.numpy()).save(part / f"{number}.png")

    @functools.cache
    def make(arm: str, who: str) -> RunConfig:
        data = {"streamed": [word.format(images=images) for word in IMAGES], "regression": [*REGRESSION]}
        network = () if arm == "regression" else NETWORK
        folders = (f"output_dir={folder / who}", f"data_dir={folder}", f"study={arm}")
        settings = ARMS.get(arm, ARMS["augmented"]).split()
        return configured(*network, *RUN, *data.get(arm, DIGITS), *settings, *folders)

    return make


@pytest.fixture(scope="module")
def carried_out(config_of, tmp_path_factory):
    """Every arm by one process and by two; what was interrupted by one and went on by the others."""
    threads = torch.get_num_threads()
    for arm in (*ARMS, *RESUMED):
        several.train_here(config_of(arm, "one").as_dict())
    several.train_here(config_of("by_two", "two").as_dict(), stop_at=RESUMED["by_two"])
    plans: list[dict[str, Any]] = [{"settings": config_of(arm, "two").as_dict()} for arm in (*ARMS, "by_two")]
    plans.append({"settings": config_of("by_one", "two").as_dict(), "stop_at": RESUMED["by_one"]})
    plans.append({"settings": config_of("affine", "failing").as_dict(), "fail_at": 5})
    file = tmp_path_factory.mktemp("plans") / "plans.json"
    file.write_text(json.dumps(plans))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, several.__file__, str(file)], env=environment(), capture_output=True, text=True, timeout=300
    )
    by_one = runs.Run(config_of("by_one", "two").as_dict())
    assert by_one.state == "interrupted", done.stderr
    status = runs.read_status(by_one.folder)
    assert status is not None
    assert (status["step"], status["error"]) == (RESUMED["by_one"], "interrupted by SIGUSR2")
    several.train_here(config_of("by_one", "two").as_dict())
    torch.set_num_threads(threads)
    return lambda arm, who: runs.Run(config_of(arm, who).as_dict()).folder


@pytest.mark.parametrize("arm", [*ARMS, *RESUMED])
def test_two_processes_are_one(carried_out, arm) -> None:
    """Also if one went on where two had been interrupted, or two where one had, in the middle of an epoch."""
    one, two = carried_out(arm, "one"), carried_out(arm, "two")
    weights, others = (torch.load(folder / "weights.pt", weights_only=True) for folder in (one, two))
    for name, value in weights.items():
        # The regression's loss is taken in float32.
        rtol, atol = (1e-4, 1e-5) if arm == "regression" else (1e-9, 1e-12)
        torch.testing.assert_close(others[name], value, rtol=rtol, atol=atol, msg=f"{arm}: {name}")
    (rows, torn), (other_rows, others_torn) = runs.read_metrics(one), runs.read_metrics(two)
    assert not torn + others_torn
    assert [row["epoch"] for row in other_rows] == [1, 2]
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        measured = {key: value for key, value in row.items() if key not in SPEED}
        assert {key: other[key] for key in measured} == pytest.approx(measured, rel=1e-5)
        assert other["images_per_second"] > 0
    status, other_status = runs.read_status(one), runs.read_status(two)
    assert status is not None
    assert other_status is not None
    assert (status["processes"], other_status["processes"]) == (1, 1 if arm == "by_one" else 2)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert status.keys() == other_status.keys()


def test_an_error_of_one_process_ends_the_other_and_is_recorded(carried_out) -> None:
    folder = carried_out("affine", "failing")
    status = runs.read_status(folder)
    assert status is not None
    assert status["state"] == "failed"
    assert status["error"] == "Process 1 of this run failed: TypeError: a bug"
    assert 'raise TypeError("a bug")' in (folder / "run.log").read_text()


# --- each process's share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1])
def test_shares_make_up_the_batches(start) -> None:
    def split(rank: int, processes: int) -> Split:
        pixels = torch.arange(22 * 3 * 4).view(22, 3, 2, 2).byte()
        normalization = unit_interval(CPU)
        rows = torch.arange(22)
        return Split(Resident(pixels), rows, rows, normalization, CPU, batch=8, rank=rank, processes=processes)

    def labels(batches) -> list[list[int]]:
        return [labels.tolist() for _, labels in batches]

    whole = labels(split(0, 1).batches(3, start))
    shares = [labels(split(rank, 4).batches(3, start)) for rank in range(4)]
    assert [batch[rank::4] for batch in whole for rank in range(4)] == [
        share for parts in zip(*shares, strict=True) for share in parts
    ]
    evaluated = [labels(split(rank, 4).batches()) for rank in range(4)]
    assert sorted(label for batches in evaluated for batch in batches for label in batch) == list(range(22))
    assert min(map(len, evaluated)) == split(0, 4).shared_batches


# --- what several cannot do ----------------------------------------------------------------------------------------

CANNOT = {
    "norm=affine batch=15": ["batch=15", "Nearest valid: batch=16"],
    "norm=affine probe=[gradients,ics]": ["probe=[gradients,ics]", "probe=[]"],
    "norm=bnp": ["optimizer.precondition=bnp", "one process"],
    "norm=affine device=cuda:1": ["device=cuda:1", "device=cuda:"],
    "norm=bn": ["norm=bn", "sync_stats=true", "norm_batch=8"],
    "norm=bn norm_batch=5": ["norm_batch=5", "Nearest valid: norm_batch=4"],
    "norm=affine input_norm=bn": ["sync_stats=true", "norm_batch=8"],
    "norm=noisy_none": ["norm=noisy_none", "noise"],
    "norm=affine dataset.train_size=33": ["last batch", "1 of 33 images", "drop_last=true"],
}


@pytest.mark.parametrize("settings", CANNOT)
def test_what_would_be_another_run_is_refused_in_a_sentence(tiny, settings) -> None:
    given = tiny(*settings.split())
    network = models.build(given, num_classes=10, image_size=8)
    data = load(given, CPU, log=print)

    def start() -> None:
        checks.check_settings(given, 2)
        checks.prepare_layers(given, network, data, 2)

    with pytest.raises(UserError) as caught:
        start()
    text = str(caught.value)
    for words in CANNOT[settings]:
        assert words in text
    assert len(text.splitlines()) <= 5


def test_a_batch_normalization_of_pytorch_is_named(tiny) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(10)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    given = tiny("norm=affine")
    with pytest.raises(UserError, match="norm is a BatchNorm1d of PyTorch"):
        checks.prepare_layers(given, Own(), load(given, CPU, log=print), 2)


# --- who they are --------------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
TASK = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "a,b",
}


def test_processes_are_those_of_torchrun_or_slurm() -> None:
    assert find({}) == Processes(0, 1, 0)
    assert find(TORCHRUN) == Processes(3, 4, 1, "a", 29500)
    assert find({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}) == Processes()
    assert find(TASK) == Processes(3, 4, 1, "a", 26711)
    assert find({**TASK, "MASTER_ADDR": "c", "MASTER_PORT": "99"}) == Processes(3, 4, 1, "c", 99)
    assert find({**TASK, **TORCHRUN}) == find(TORCHRUN)  # torchrun on every node of a job
    assert find({**TASK, "SLURM_STEP_NUM_TASKS": "1"}) == Processes()
    assert find({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "4711"}) == Processes()  # a batch script


def test_nodes_are_queried_from_scontrol(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="export MASTER_ADDR="):
        find({**TASK, "SLURM_STEP_NODELIST": "node[07-08]"})
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[07-08]" ] && echo node07 && echo node08\n')
    scontrol.chmod(0o755)
    assert find({**TASK, "SLURM_STEP_NODELIST": "node[07-08]"}).host == "node07"


# --- the commands --------------------------------------------------------------------------------------------------

COMMAND = (*NETWORK, *DIGITS, "batch=32", "device=cpu", "threads=1", "norm=affine")


def tasks(folder: Path, *arguments: str) -> "list[subprocess.Popen[str]]":
    """`srun --ntasks=2 python train.py ...`, as far as a process can see."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            cwd=folder,
            env=environment(**slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def ended(processes: "list[subprocess.Popen[str]]") -> tuple[int, str, str]:
    """The exit status, which is that of all, and the output of the first one; the others print nothing."""
    (out, error), *others = [process.communicate(timeout=120) for process in processes]
    assert others == [("", "")], others
    status, other = (process.returncode for process in processes)
    assert status == other, error
    return status, out, error


def test_one_process_speaks_and_all_end_alike(tmp_path) -> None:
    status, out, error = ended(tasks(tmp_path, *COMMAND, "epochs=1"))
    assert status == 0, error
    assert "[1/1]" in error
    (folder,) = runs.find(tmp_path / "outputs" / "default")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    status, out, error = ended(tasks(tmp_path, *COMMAND, "epochs=1"))
    assert status == 0, error
    assert "is finished" in out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    status, out, error = ended(tasks(tmp_path, "-m", *COMMAND, "hydra/launcher=basic"))
    assert status == 1
    assert error.startswith("A sweep (-m) under 2 processes")


def test_a_busy_run_is_left_alone_by_all(tmp_path) -> None:
    run = runs.Run(configured(*COMMAND, f"output_dir={tmp_path / 'outputs'}").as_dict())
    run.freeze()
    with run.lock():
        status, _, error = ended(tasks(tmp_path, *COMMAND))
    assert status == 1
    assert "is already being trained by process" in error
    assert run.state == "planned"


def test_torchrun_is_interrupted_with_a_checkpoint_and_goes_on(tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [*command, str(ROOT / "train.py"), *COMMAND, "epochs=3000"]
    with subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        status: dict[str, Any] = {}
        for _ in range(600):
            for folder in runs.find(tmp_path / "outputs" / "default"):
                status = runs.read_status(folder) or {}
            if status.get("step", 0) > 0:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    (folder,) = runs.find(tmp_path / "outputs" / "default")
    stopped = runs.read_status(folder)
    assert stopped is not None
    assert (stopped["state"], stopped["error"]) == ("interrupted", "interrupted by SIGTERM"), error
    assert error.count("Interrupted. The same command goes on") == 1
    assert (folder / "checkpoint.pt").exists()
