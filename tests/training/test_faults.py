"""Faults: a disk that fills up, fails or becomes read-only, a kill -9, damaged and forged files.

After each the same run goes on and ends as if nothing had been, or says in a sentence why it cannot.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, config_in
from launchers.commands import SMALL as COMMAND
from launchers.commands import command, python
from outcome import folder, outcome, status
from steps import Steps, rewritten

from normlab import runs
from normlab.common.errors import UserError
from normlab.config.schema import RunConfig
from normlab.training import checkpoint
from normlab.training.run import train_run

RECORD = {"config.yaml", "correct.json", "metrics.jsonl", "probes", "provenance.json", "run.log", "status.json"}
# Six steps and two evaluations that write all there is to write, a checkpoint after every step.
SMALL = (*TINY, "checkpoint_seconds=0", "probe=[gradients]")


@pytest.fixture
def small(tmp_path) -> Callable[..., RunConfig]:
    return partial(config_in, tmp_path, *SMALL)


def result(config: RunConfig) -> tuple[Any, ...]:
    """What a finished run came to; all of it readable, and nothing else left in the run's folder."""
    assert {path.name for path in folder(config).iterdir()} == RECORD
    assert {path.name for path in (folder(config) / "probes").iterdir()} == {"gradients.jsonl"}
    assert status(config)["state"] == "done"
    return outcome(config)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Any, ...]:
    config = config_in(tmp_path_factory.mktemp("undisturbed"), *SMALL)
    train_run(config)
    return result(config)


def failure(config: RunConfig) -> str:
    """The sentence with which a run fails; "" if it does not."""
    try:
        train_run(config)
    except UserError as error:
        sentence = str(error)
    else:
        return ""
    assert 0 < len(sentence.splitlines()) <= 5
    return sentence


# The disk


class Disk:
    """A file system in memory, whose space and whose permissions a test can take away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, free_bytes: int) -> None:
        now = os.statvfs(self.folder)
        self._mount("remount", size=(now.f_blocks - now.f_bfree) * now.f_frsize + free_bytes)

    def grow(self) -> None:
        self._mount("remount", size=2**26)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """By a second mount on top of the first: files that are open stay writable, as they do after an error."""
        subprocess.run(["mount", "--bind", self.folder, self.folder], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", self.folder], check=True)
            yield
        finally:
            subprocess.run(["umount", self.folder], check=True)

    def _mount(self, *options: str, size: int) -> None:
        self.command(",".join([*options, f"size={max(size, 4096)}"]), self.folder).check_returncode()

    @staticmethod
    def command(options: str, folder: Path) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() or Disk.command("size=64m", folder).returncode:
        pytest.skip("a full disk needs the right to mount a small file system")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_disk_too_small_by_any_amount_is_a_sentence_and_with_space_the_run_goes_on(small, disk, undisturbed) -> None:
    failures = 0
    for free in range(0, 2**20, 2**14):  # four pages more each time, until a whole run fits
        config = small(f"output_dir={disk.folder}", f"study={free}")
        disk.leave(free)
        sentence = failure(config)
        if not sentence:
            break
        assert "The disk is full" in sentence
        failures += 1
        disk.grow()
        train_run(config)
        assert result(config) == undisturbed
        shutil.rmtree(folder(config))
    assert 5 < failures < 50
    assert result(config) == undisturbed


@pytest.mark.parametrize("case", range(6))
def test_a_disk_that_fills_up_at_any_moment_costs_only_what_came_after(small, disk, undisturbed, steps, case) -> None:
    config = small(f"output_dir={disk.folder}")
    moments = random.Random(case)
    steps.after(moments.randint(1, 6), lambda: disk.leave(moments.choice([0, 0, 4096, 16384])))
    assert "The disk is full" in failure(config)
    assert "The disk is full" in failure(config), "and again while nothing is done about it"
    disk.grow()
    train_run(config)
    assert result(config) == undisturbed


@pytest.mark.parametrize("step", range(1, 7))
def test_a_folder_that_becomes_read_only_is_a_sentence_and_mended(small, disk, undisturbed, steps, step) -> None:
    config = small(f"output_dir={disk.folder}")
    with contextlib.ExitStack() as until_mended:
        steps.after(step, lambda: until_mended.enter_context(disk.read_only()))
        assert "It is not writable" in failure(config)
        assert "It is not writable" in failure(config), "from its start"
    train_run(config)
    assert result(config) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_disk_that_fails_at_any_write_is_a_sentence_and_mended(small, undisturbed, monkeypatch, lasting) -> None:
    fsync, calls, failing = os.fsync, 0, 0

    def unreliable(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing or (lasting and calls > failing):
            raise OSError(errno.EIO, "Input/output error")
        fsync(file)

    for failing in range(1, 100, 3):
        config = small(f"study={failing}")
        with monkeypatch.context() as patch:
            calls = 0
            patch.setattr(os, "fsync", unreliable)
            sentence = failure(config)
        if not sentence:
            break
        assert "Input/output error" in sentence
        train_run(config)
        assert result(config) == undisturbed
    assert failing > 6 + 2 + 6, "each checkpoint, evaluation and measurement, at least"
    assert result(config) == undisturbed


@pytest.mark.slow
def test_a_sweep_on_a_full_disk_ends_in_a_sentence_and_goes_on_when_there_is_space(disk, tmp_path) -> None:
    sweep = ("train.py", "-m", *COMMAND, "batch=8", "checkpoint_seconds=0", f"output_dir={disk.folder}/out")
    disk.leave(48 * 1024)  # for less than two checkpoints
    code, _, error = command(tmp_path, *sweep)
    assert code == 1
    assert "The disk is full" in error
    assert "Traceback" not in error
    disk.grow()
    assert command(tmp_path, *sweep)[0] == 0
    [run] = runs.find(disk.folder / "out" / "default")
    assert {path.name for path in run.iterdir()} == RECORD - {"probes"}


# A kill -9 before any operation on a file of the run. One process imports torch; its children are killed.

EVERY = 10  # of about 120 operations: all of them take a minute
KILLED = """
    import json, os, signal, sys
    from normlab.config.schema import RunConfig
    from normlab.training.run import train_run

    settings, folder, every = json.loads(sys.argv[1])
    operations = ("open", "os.rename", "os.remove", "os.chmod", "os.utime")

    def kill_at(moment):
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            if event in operations and folder in str(arguments[0]):
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)

    for moment in range(1, 1000, every):
        child = os.fork()
        if not child:
            try:
                kill_at(moment)
                train_run(RunConfig.model_validate({**settings, "study": str(moment)}))
            finally:
                os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            break
        print(moment)
"""


@pytest.mark.slow
def test_a_kill_at_any_operation_on_a_file_leaves_a_run_that_goes_on(small, undisturbed, tmp_path) -> None:
    arguments = json.dumps([small().as_dict(), small().output_dir, EVERY])
    with python(tmp_path, "-c", textwrap.dedent(KILLED), arguments) as process:
        moments = process.communicate(timeout=300)[0].split()
    assert len(moments) > 80 / EVERY
    for moment in moments:
        train_run(small(f"study={moment}"))
        assert result(small(f"study={moment}")) == undisturbed, f"killed at operation {moment}"


# Damaged files


class _DeadError(BaseException):
    """No Exception: nobody is to catch it."""


@pytest.fixture(scope="module")
def died(tmp_path_factory) -> RunConfig:
    """A run that ended without a word in its fifth step: two checkpoints, after its third and fourth."""
    config = config_in(tmp_path_factory.mktemp("died"), *SMALL)

    def die() -> None:
        raise _DeadError

    with Steps().counted() as steps:
        steps.after(5, die)
        with pytest.raises(_DeadError):
            train_run(config)
    return config


@pytest.fixture
def interrupted(died, small) -> RunConfig:
    """A copy of it."""
    config = small()
    shutil.copytree(died.output_dir, config.output_dir)
    file = folder(config) / "config.yaml"
    file.write_text(file.read_text().replace(str(Path(died.data_dir).parent), str(Path(config.data_dir).parent)))
    return config


def test_a_run_that_died_goes_on_from_its_last_checkpoint(interrupted, undisturbed, steps) -> None:
    assert status(interrupted)["state"] == "running"
    train_run(interrupted)
    assert steps.taken == 6 - 4
    assert result(interrupted) == undisturbed


def damaged(content: bytes, how: str, chance: random.Random) -> bytes:
    """Empty, cut off at a random length, or with a byte of it changed at a random position."""
    position = chance.randrange(len(content)) if how != "empty" else 0
    if how in ("empty", "truncated"):
        return content[:position]
    return content[:position] + bytes([content[position] ^ chance.randrange(1, 256)]) + content[position + 1 :]


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_of_a_hundred_damaged_checkpoints_none_is_used(interrupted, how) -> None:
    run, chance = runs.Run(interrupted.as_dict()), random.Random(0)
    newest = run.folder / checkpoint.NEWEST
    content = newest.read_bytes()
    for _ in range(100):
        newest.write_bytes(damaged(content, how, chance))
        warnings: list[str] = []
        _, saved = next(checkpoint.load(run.folder, run.run_id, warnings.append))
        assert (saved["position"]["epoch"], saved["position"]["batch"]) == (0, 3)
        assert len(warnings) == 1
        assert f"{newest} cannot be used and is left out (it is truncated or altered)" in warnings[0]
    newest.write_bytes(content)
    _, saved = next(checkpoint.load(run.folder, run.run_id, pytest.fail))
    assert (saved["position"]["epoch"], saved["position"]["batch"]) == (1, 1)


@pytest.mark.parametrize("which", [(checkpoint.NEWEST,), (checkpoint.NEWEST, checkpoint.PREVIOUS)])
@pytest.mark.parametrize(
    ("how", "case"), [*((how, case) for how in ("truncated", "flipped") for case in range(3)), ("empty", 0)]
)
def test_a_run_with_damaged_checkpoints_ends_as_undisturbed(interrupted, undisturbed, capfd, which, how, case) -> None:
    chance, unused = random.Random(case), "cannot be used and is left out"
    for name in which:
        path = folder(interrupted) / name
        path.write_bytes(damaged(path.read_bytes(), how, chance))
    train_run(interrupted)
    assert result(interrupted) == undisturbed
    log = (folder(interrupted) / "run.log").read_text()
    assert capfd.readouterr().err.count(unused) == log.count(unused) == len(which)


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("which", "form", "trailer"),
    [
        ((checkpoint.NEWEST,), "archive", False),  # else with its digest
        ((checkpoint.NEWEST,), "archive", True),
        ((checkpoint.INCOMING,), "legacy", True),
        ((checkpoint.NEWEST, checkpoint.PREVIOUS), "legacy", True),
        ((checkpoint.NEWEST, checkpoint.PREVIOUS), "pickle", True),
    ],
)
def test_a_forged_checkpoint_is_not_executed(interrupted, undisturbed, tmp_path, capfd, which, form, trailer) -> None:
    run = runs.Run(interrupted.as_dict())
    value, file = {"run_id": run.run_id, "network": _Malicious(tmp_path / "executed")}, io.BytesIO()
    if form == "pickle":
        pickle.dump(value, file)
    else:
        torch.save(value, file, _use_new_zipfile_serialization=form == "archive")
    forged = file.getvalue()
    for name in which:
        (run.folder / name).write_bytes(forged + hashlib.sha256(forged).digest() * trailer)
    train_run(interrupted)
    assert not (tmp_path / "executed").exists()
    assert capfd.readouterr().err.count("cannot be used and is left out") == len(which)
    assert result(interrupted) == undisturbed
    torch.load(io.BytesIO(forged), weights_only=False) if form != "pickle" else pickle.loads(forged)
    assert (tmp_path / "executed").exists(), "the forgery would not have worked at all"


Content = dict[str, Any]
ODD: dict[str, Callable[[Content], object]] = {
    "a key is missing": lambda saved: saved.pop("position"),
    "a key is unknown": lambda saved: saved.update(more=1),
    "no mapping": lambda saved: saved.update(network=None),
    "a truth as a number": lambda saved: saved.update(threads=True),
    "threads out of range": lambda saved: saved.update(threads=10**9),
    "another run": lambda saved: saved.update(run_id="0123456789"),
    "other images": lambda saved: saved.update(data_fingerprint="other"),
    "a format nobody knows": lambda saved: saved.update(memory_format="none"),
    "memory without end": lambda saved: saved.update(peak_memory_bytes=2**80),
    "a tensor is missing": lambda saved: saved["network"].pop("head.bias"),
    "another shape": lambda saved: saved["network"].update({"head.bias": torch.zeros(11)}),
    "another dtype": lambda saved: saved["network"].update({"head.bias": torch.zeros(10, dtype=torch.int64)}),
    "a sparse tensor": lambda saved: saved["network"].update({"head.bias": torch.zeros(10).to_sparse()}),
    "weights that are not finite": lambda saved: saved["network"]["head.bias"].fill_(float("nan")),
    "an average where there is none": lambda saved: saved.update(averaged={}),
    "no groups": lambda saved: saved["optimizer"].pop("param_groups"),
    "a group is no mapping": lambda saved: saved["optimizer"]["param_groups"].__setitem__(0, 3),
    "one group": lambda saved: saved["optimizer"].update(param_groups=[{"params": list(range(7))}]),
    "the state of one parameter is missing": lambda saved: saved["optimizer"]["state"].pop(2),
    "a state is empty": lambda saved: saved["optimizer"]["state"].update({2: {}}),
    "a state of another shape": lambda saved: saved["optimizer"]["state"][2].update(momentum_buffer=torch.zeros(3)),
    "a state of nobody": lambda saved: saved["optimizer"]["state"].update({99: saved["optimizer"]["state"][2]}),
    "a scaler of fp16": lambda saved: saved["scaler"].update(scale=1.0),
    "another probe": lambda saved: saved.update(probes={"ics": {}}),
    "a probe of another state": lambda saved: saved["probes"].update(gradients={"edges": 3}),
    "an epoch beyond the end": lambda saved: saved["position"].update(epoch=3),
    "a batch beyond the epoch": lambda saved: saved["position"].update(batch=4),
    "an epoch that is no number": lambda saved: saved["position"].update(epoch="1"),
    "seconds that are no number": lambda saved: saved["position"].update(wall_seconds=float("nan")),
    "losses of another epoch": lambda saved: saved["position"].update(losses=torch.zeros(2)),
}


@pytest.mark.parametrize("how", ODD)
def test_a_checkpoint_with_odd_contents_counts_as_damaged(interrupted, undisturbed, capfd, steps, how) -> None:
    rewritten(folder(interrupted) / checkpoint.NEWEST, ODD[how])
    train_run(interrupted)
    assert capfd.readouterr().err.count("cannot be used and is left out") == 1
    assert steps.taken == 6 - 3, "the previous one is used"
    assert result(interrupted) == undisturbed


def test_without_a_checkpoint_that_can_be_used_a_run_starts_anew(interrupted, undisturbed, capfd, steps) -> None:
    newest, previous = (folder(interrupted) / name for name in (checkpoint.NEWEST, checkpoint.PREVIOUS))
    rewritten(newest, ODD["an epoch beyond the end"])
    previous.unlink()
    previous.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a link, to /dev/zero"):
        train_run(interrupted)
    previous.unlink()
    previous.write_bytes(b"")
    capfd.readouterr()
    train_run(interrupted)
    assert capfd.readouterr().err.count("cannot be used and is left out") == 2
    assert steps.taken == 6
    assert result(interrupted) == undisturbed


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", ""),
        ("status.json", '{"state": "done", "ru'),
        ("status.json", '{"state": "running"}'),
        ("config.yaml", ""),
        ("config.yaml", "seed: 0\nnorm: {na"),
        ("provenance.json", ""),
        ("run.log", "\x00" * 4096),
        ("run.claim", ""),
    ],
)
def test_a_damaged_record_is_mended_by_the_next_start(interrupted, undisturbed, name, content) -> None:
    path = folder(interrupted) / name
    path.write_text(content)
    if name == "run.claim":  # what a process left that was killed while it was making it, an hour ago
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    train_run(interrupted)
    assert result(interrupted) == undisturbed
    assert runs.read_config(folder(interrupted)) == interrupted.as_dict()
    assert json.loads((folder(interrupted) / "provenance.json").read_text())["versions"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "probes/gradients.jsonl"])
@pytest.mark.parametrize("tail", ['{"epoch": 2, "step": 6, "la', '{"epoch": 2, "step": 6}', "\x00" * 512])
def test_a_torn_last_line_is_measured_again(interrupted, undisturbed, name, tail) -> None:
    """A row after the last checkpoint: without its end, or without the line's end, or of zeros, after a power cut."""
    with (folder(interrupted) / name).open("a") as file:
        file.write(tail)
    train_run(interrupted)
    assert result(interrupted) == undisturbed
    is_row = tail.endswith("}")
    assert ("cannot be read and is left out" in (folder(interrupted) / "run.log").read_text()) is not is_row


@pytest.mark.parametrize("lost", [1, 10, None], ids=["the line's end", "the row's end", "everything"])
def test_evaluations_lost_from_before_the_checkpoint_are_measured_again(interrupted, undisturbed, lost) -> None:
    path = folder(interrupted) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-lost] if lost else b"")
    train_run(interrupted)
    assert result(interrupted) == undisturbed


def test_a_lost_end_of_the_last_line_costs_no_row(interrupted, undisturbed) -> None:
    path = folder(interrupted) / "probes/gradients.jsonl"
    at_checkpoint = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < 4]
    path.write_text("\n".join(at_checkpoint))
    train_run(interrupted)
    assert result(interrupted) == undisturbed


def test_what_a_killed_process_left_half_written_goes_with_the_next_start(interrupted, undisturbed) -> None:
    for name in ("status.json", "config.yaml", "metrics.jsonl", "checkpoint.incoming.pt", "probes/gradients.jsonl"):
        path = folder(interrupted) / name
        path.with_name(f".{path.name}.abcd1234.tmp").write_bytes(b"half")
    train_run(interrupted)
    assert result(interrupted) == undisturbed


def test_files_of_a_process_killed_after_its_last_record_go_with_the_next_start(small, undisturbed) -> None:
    train_run(small())
    for name in (checkpoint.NEWEST, checkpoint.PREVIOUS, ".status.json.abcd1234.tmp"):
        (folder(small()) / name).write_bytes(b"left")
    train_run(small())
    assert result(small()) == undisturbed
