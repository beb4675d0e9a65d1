import errno
import io
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from rich.console import Console

from normlab.cli import doctor
from normlab.data import inventory
from normlab.launchers import preflight


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(doctor, "unreachable", lambda url: "no network")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`programs(sinfo="echo main")`: shell scripts that are all there is on the PATH."""

    def make(**scripts: str) -> None:
        (tmp_path / "bin").mkdir()
        for name, body in scripts.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    return make


def test_the_doctor_shows_in_one_screen_that_a_machine_is_well_and_trains_nothing(command, tmp_path) -> None:
    status, out, error = command("train.py", "doctor", "hydra/launcher=basic")
    assert (status, error) == (0, ""), out
    for word in ("versions", "torchvision", "CPU", "dataset=digits", "output_dir", "data_dir", "SLURM", "0 problems"):
        assert word in out
    assert len(out.splitlines()) <= 24
    _, out, error = command("train.py", "doctor", "experiment=ioffe2017_small", "budget=smoke")
    assert ("dataset=" in out, error) == (True, "")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_what_stops_training_is_a_problem_and_another_exit_status(command, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    missing = ("output_dir=file/outputs", "dataset=image_folder", "dataset.path=missing")
    status, out, error = command("train.py", "doctor", *missing)
    assert (status, error) == (1, "")
    for sentence in ("Cannot write file/outputs.", "The folder dataset.path=missing does not exist", "2 problems"):
        assert sentence in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["docter"], "Did you mean doctor?"),
        (["affine"], "Did you mean norm=affine?"),
        (["doctor", "-m", "norm=bn,none"], "Leave out -m"),
        (["doctor", "batch=0"], "batch=0 is out of range"),
        (["doctor", "dataset=image_folder"], "dataset.path"),
    ],
)
def test_a_mistake_is_answered_by_a_sentence(command, arguments, words) -> None:
    status, out, error = command("train.py", *arguments)
    assert (status, out) == (1, "")
    assert words in error
    assert len(error.splitlines()) <= 5


def test_findings_are_shown_with_what_to_do(make, monkeypatch) -> None:
    found = [
        doctor.Finding("a", "is fine"),
        doctor.Finding("b", "is [odd]", "note", "Look."),
        doctor.Finding("c", "is bad", "problem", "Mend it."),
    ]
    for number, ready in ((2, True), (3, False)):
        monkeypatch.setattr(doctor, "findings", lambda *_, number=number: found[:number])
        console = Console(file=io.StringIO(), width=60)
        assert doctor.examine(make(), "pool", console) is ready
    text = console.file.getvalue()
    assert [line.split() for line in text.splitlines()[:5]] == [
        ["ok", "a", "is", "fine"],
        ["note", "b", "is", "[odd]"],
        ["->", "Look."],
        ["problem", "c", "is", "bad"],
        ["->", "Mend", "it."],
    ]
    assert "1 problem, 1 note: mend the problems" in text


# --- Versions ---------------------------------------------------------------------------------------


def test_a_torchvision_that_does_not_fit_is_a_problem(monkeypatch) -> None:
    def import_module(name: str) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    _, problem = doctor.versions()
    assert problem.level == "problem"
    assert problem.text.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert "torch torchvision" in problem.fix


def test_without_torch_that_alone_is_reported(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    versions, problem = doctor.versions()
    assert versions.level == "ok"
    assert (problem.subject, problem.level) == ("torch", "problem")
    assert list(doctor.gpus("auto")) == []


# --- Devices ----------------------------------------------------------------------------------------


def test_a_limit_of_a_container_or_a_job_is_respected(tmp_path) -> None:
    def limit(lines: str, **files: str) -> int | None:
        shutil.rmtree(tmp_path / "groups", ignore_errors=True)
        for name, text in files.items():
            path = tmp_path / "groups" / name.replace("__", "/").replace("DOT", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "mine").write_text(lines)
        return doctor.memory_limit(tmp_path / "groups", tmp_path / "mine")

    assert limit("0::/job/step", job__step__memoryDOTmax="max\n", job__memoryDOTmax="4096\n") == 4096
    assert limit("0::/", memoryDOTmax="512") == 512  # a container that sees itself as the root
    assert limit("4:memory:/job\n3:cpuset:/\n0::/", memory__memoryDOTlimit_in_bytes="99") == 99
    assert limit("0::/job") is None
    assert doctor.memory_limit(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("built", "seen", "driver", "kernel", "level", "wanted", "words"),
    [
        (True, 0, None, False, "ok", "problem", "no NVIDIA driver"),
        (False, 0, None, False, "ok", "problem", "no NVIDIA driver"),
        (True, 0, None, True, "note", "problem", "libcuda.so.1"),
        (True, 0, "13.0", True, "note", "problem", "shows none"),
        (True, 2, "12.2", True, "note", "problem", "built for CUDA"),
        (False, 2, "13.0", True, "note", "problem", "built for CPUs"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, tmp_path, built, seen, driver, kernel, level, wanted, words) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2" if built else None)
    monkeypatch.setattr(preflight, "gpu_count", lambda: seen)
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(doctor, "NVIDIA_IN_KERNEL", tmp_path if kernel else tmp_path / "none")
    for device, expected in (("auto", level), ("cpu", level), ("cuda", wanted), ("cuda:1", wanted)):
        [found] = doctor.gpus(device)
        assert found.level == expected
        assert words in found.text
        assert bool(found.fix) == (expected != "ok")


def test_a_gpu_that_torch_cannot_use_is_a_problem_for_whoever_would_use_it(monkeypatch) -> None:
    def fails(index: int) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    for device, levels in (("auto", ["problem"]), ("cpu", ["note"]), ("cuda:1", ["problem", "problem"])):
        found = list(doctor.gpus(device))
        assert [finding.level for finding in found] == levels
        assert found[0].text.endswith("no kernel image is available for execution on the device")
    assert "device=cuda:0" in found[1].fix


@pytest.mark.gpu
def test_a_gpu_is_listed_with_its_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = next(doctor.gpus("auto"))
    assert torch.cuda.get_device_name(0) in found.text
    assert found.level in ("ok", "note")  # others may hold its memory


# --- Data sets --------------------------------------------------------------------------------------


def test_cifar_is_found_unpacked_as_an_archive_or_in_reach(tmp_path, monkeypatch) -> None:
    facts = inventory.CIFARS["cifar10"]
    missing = doctor.cifar("cifar10", tmp_path)
    assert missing.level == "note"
    assert "no network" in missing.text
    assert facts.archive in missing.fix
    monkeypatch.setattr(doctor, "unreachable", lambda url: None)
    assert "on first use" in doctor.cifar("cifar10", tmp_path).text
    (tmp_path / facts.archive).write_text("")
    assert "its archive" in doctor.cifar("cifar10", tmp_path).text
    (tmp_path / facts.folder).mkdir()
    for name in facts.files:
        (tmp_path / facts.folder / name).write_text("")
    assert "unpacked" in doctor.cifar("cifar10", tmp_path).text


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        (["dataset=digits"], ["ok", "note", "note"]),
        (["dataset=digits", "dataset.train_size=5000"], ["problem", "note", "note"]),
        (["dataset=cifar10"], ["problem", "ok", "note"]),
        (["dataset=imagenet"], ["problem", "ok", "note", "note"]),
        (["dataset=linear_regression", "model=deep_linear"], ["ok", "ok", "note", "note"]),
    ],
)
def test_a_data_set_that_is_missing_is_a_problem_only_if_it_is_chosen(make, settings, levels) -> None:
    found = list(doctor.data_sets(make(*settings)))
    assert [finding.level for finding in found] == levels
    assert all(finding.fix for finding in found if finding.level != "ok")


# --- Folders ----------------------------------------------------------------------------------------


def test_a_folder_that_can_be_made_is_well_and_nothing_is_left_in_it(tmp_path) -> None:
    found = doctor.folder("output_dir", tmp_path / "new" / "outputs")
    assert found.level == "ok"
    assert "made on first use" in found.text
    assert "locks work" in found.text
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file_is_a_problem(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    found = doctor.folder("data_dir", tmp_path / "file" / "data")
    assert found.level == "problem"
    assert str(tmp_path / "file" / "data") in found.text
    assert "data_dir=..." in found.fix


def test_a_full_disk_is_a_problem(tmp_path, monkeypatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    found = doctor.folder("output_dir", tmp_path)
    assert found.level == "problem"
    assert "The disk is full" in found.fix


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), None])
def test_a_file_system_whose_locks_do_not_hold_is_noted(tmp_path, monkeypatch, error) -> None:
    def flock(*_: object) -> None:
        if error:
            raise error

    monkeypatch.setattr(doctor.fcntl, "flock", flock)
    found = doctor.folder("output_dir", tmp_path)
    assert found.level == "note"
    assert "no locks" in found.text


def test_little_room_is_noted(tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    assert doctor.folder("output_dir", tmp_path).level == "note"
    [found] = doctor.shared_memory()
    assert "--shm-size" in found.fix


def test_the_file_system_is_that_of_the_deepest_mount_and_of_the_last_there(tmp_path, monkeypatch) -> None:
    mount = namedtuple("mount", "mountpoint fstype")
    mounts = [
        *(mount("/", "ext4"), mount(str(tmp_path), "xfs"), mount(str(tmp_path), "nfs4")),
        mount(f"{tmp_path}/else where", "lustre"),
    ]
    monkeypatch.setattr(doctor.psutil, "disk_partitions", lambda all: mounts)
    assert doctor.file_system(tmp_path / "outputs") == "nfs4"
    assert doctor.file_system(tmp_path / "else where" / "x") == "lustre"
    assert doctor.file_system(tmp_path.parent) == "ext4"
    mounts.clear()
    assert doctor.file_system(tmp_path) == "unknown file system"


def test_without_a_folder_for_temporary_files_that_is_a_problem(monkeypatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    assert doctor.temporary_folder().level == "ok"
    monkeypatch.setattr(doctor.tempfile, "gettempdir", nowhere)
    assert doctor.temporary_folder().level == "problem"


# --- SLURM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("launcher", "level"), [("pool", "ok"), ("slurm", "problem")])
def test_a_machine_without_slurm_is_well_unless_slurm_is_chosen(programs, launcher, level) -> None:
    programs()
    [found] = doctor.slurm(launcher)
    assert found.level == level


@pytest.mark.parametrize(("launcher", "level"), [("pool", "note"), ("slurm", "problem")])
@pytest.mark.parametrize(
    ("sinfo", "words"),
    [
        (
            "echo 'sinfo: error: x' >&2; echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1",
            "Una",
        ),
        ("exec /bin/sleep 60", "timed out"),
        ("exit 3", "status 3"),
    ],
)
def test_a_controller_that_does_not_answer_is_reported(programs, monkeypatch, launcher, level, sinfo, words) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.5)
    programs(sbatch="exit 0", sinfo=sinfo)
    [found] = doctor.slurm(launcher)
    assert found.level == level
    assert words in found.text


def test_partitions_are_shown_with_their_limits(programs, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    programs(sbatch="exit 0", sinfo="echo 'main*|up|infinite|4|(null)'; echo 'gpu|up|1-00:00:00|2|gpu:h100:8'")
    [found] = doctor.slurm("slurm")
    assert found.level == "ok"
    assert "main* (up, at most infinite, 4 nodes)" in found.text
    assert "gpu (up, at most 1-00:00:00, 2 nodes with gpu:h100:8)" in found.text
    assert "job 17" in found.text
