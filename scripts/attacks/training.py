"""What happens to a run while it trains, starts or goes on: odd checkpoints, files taken away, odd surroundings."""

import functools
import hashlib
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from attacks import studies
from attacks.hostile import TRAIN, Kind, Scene, hold, replaced
from attacks.watched import WAIT, Ended, command, watched
from normlab import runs
from normlab.config import schema
from normlab.report import build, options
from normlab.training import checkpoint
from normlab.training.run import train_run

NEW = (*studies.SMALL, "norm=bn", "seed=9", f"study={studies.STUDY}")
PATH = {"PYTHONPATH": str(studies.ROOT / "tests")}


def problems_of(ended: Ended) -> list[str]:
    """Return what is wrong with a command that may refuse."""
    shown = "Traceback (most recent call last)" in ended.output
    return [ended._replace(fault=ended.fault or ended.output).cause] if ended.fault or shown else []


# Checkpoints with a right digest


def of_checkpoints() -> Iterator[Kind]:
    """Checkpoints with a right digest, and keys or values that no checkpoint has."""
    odd = (None, 3, -1, float("nan"), "text", [], {}, {"a": 1}, torch.zeros(2), 10**30)
    names = (
        "run_id",
        "position",
        "network",
        "optimizer",
        "scaler",
        "averaged",
        "probes",
        "data_fingerprint",
        "peak_memory_bytes",
    )
    for name in names:
        yield of_checkpoint(f"without {name}", lambda saved, name=name: saved.pop(name, None))
        for value in odd:
            yield of_checkpoint(
                f"{name} = {value!r}",
                lambda saved, name=name, value=value: saved.update({name: value}),
                refused=(name, value) in (("network", {}), ("network", {"a": 1}), ("data_fingerprint", "text")),
            )
    for value in (None, -1, 10**9, 0.5, "x", [1]):
        yield of_checkpoint(
            f"each part of the position = {value!r}",
            lambda saved, value=value: saved["position"].update(dict.fromkeys(saved["position"], value)),
        )
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "a tensor too few": lambda network: network.pop(next(iter(network))),
        "a tensor too many": lambda network: network.update(more=torch.zeros(1)),
        "tensors of another shape": lambda network: network.update(
            {k: v.repeat(2) for k, v in network.items() if v.ndim == 1}
        ),
        "tensors of integers": lambda network: network.update({k: v.long() for k, v in network.items()}),
        "complex tensors": lambda network: network.update({k: v.to(torch.complex64) for k, v in network.items()}),
        "tensors that are lists": lambda network: network.update({k: v.tolist() for k, v in network.items()}),
        "tensors on meta": lambda network: network.update({k: v.to("meta") for k, v in network.items()}),
        "keys that are numbers": lambda network: network.update({1: torch.zeros(1)}),
    }
    for name, change in changes.items():
        yield of_checkpoint(f"{name} as network", lambda saved, change=change: change(saved["network"]), refused=True)
    yield of_checkpoint("no groups of the optimizer", lambda saved: saved["optimizer"].update(param_groups=[]))
    yield of_checkpoint("odd groups of the optimizer", lambda saved: saved["optimizer"].update(param_groups=[3]))
    yield of_checkpoint(
        "an odd state of the optimizer", lambda saved: saved["optimizer"].update(state={0: 3, "x": None})
    )
    for whole in ([], 3, "text", torch.zeros(3), {}, {1: 2}, None):
        yield of_checkpoint(f"{whole!r} as a whole", lambda _, whole=whole: whole, whole=True)


def of_checkpoint(name: str, change: Callable[[Any], Any], *, whole: bool = False, refused: bool = False) -> Kind:
    def make(scene: Scene) -> None:
        path = lost(scene) / checkpoint.NEWEST
        saved = torch.load(io.BytesIO(path.read_bytes()[: -checkpoint.DIGEST_BYTES]), weights_only=True)
        changed = change(saved)
        file = io.BytesIO()
        torch.save(changed if whole else saved, file)
        path.write_bytes(file.getvalue() + hashlib.sha256(file.getvalue()).digest())

    return Kind(f"a checkpoint: {name}", make, check=functools.partial(goes_on, refused=refused))


def lost(scene: Scene) -> Path:
    return next(path for path in runs.find(scene.study) if (path / "run.claim").exists())


def goes_on(scene: Scene, *, refused: bool) -> Iterator[str]:
    """Look whether the run that was killed goes on, at the second try at the latest, unless it may be `refused`."""
    path = lost(scene)
    for _ in range(2):
        ended = watched(
            lambda: train_run(schema.parse(runs.read_config(path) | {"output_dir": str(scene.outputs)})) and None
        )
        yield from problems_of(ended)
        if (runs.read_status(path) or {}).get("state") == "done":
            return
    if not (refused and path.name in ended.refusal):
        yield f"the run does not go on: {ended.refusal}"


# What happens while a run trains


def of_moments() -> Iterator[Kind]:
    """What is taken away or put in place while a run trains."""
    deeds: dict[str, Callable[[Scene, Path], object]] = {
        "its folder is deleted": lambda scene, run: shutil.rmtree(run),
        "its study is deleted": lambda scene, run: shutil.rmtree(scene.study),
        "all studies are deleted": lambda scene, run: shutil.rmtree(scene.outputs),
        "its folder is renamed": lambda scene, run: run.rename(scene.study / "elsewhere"),
        "its folder is a link": lambda scene, run: replaced(run, lambda path: path.symlink_to(scene.precious)),
        "its configuration is deleted": lambda scene, run: (run / "config.yaml").unlink(),
        "its claim is deleted": lambda scene, run: (run / "run.claim").unlink(),
        "its claim is garbage": lambda scene, run: (run / "run.claim").write_bytes(b"\xff\0"),
        "its claim is a pipe": lambda scene, run: replaced(run / "run.claim", os.mkfifo),
        "its status is a pipe": lambda scene, run: replaced(run / "status.json", os.mkfifo),
        "its status is a folder": lambda scene, run: replaced(run / "status.json", Path.mkdir),
        "its status is a link": lambda scene, run: replaced(
            run / "status.json", lambda p: p.symlink_to(scene.precious / "secret.txt")
        ),
        "its metrics are a link": lambda scene, run: replaced(
            run / "metrics.jsonl", lambda p: p.symlink_to(scene.precious / "secret.txt")
        ),
        "its metrics are a folder": lambda scene, run: replaced(run / "metrics.jsonl", Path.mkdir),
        "its probes are a link": lambda scene, run: replaced(run / "probes", lambda p: p.symlink_to(scene.precious)),
        "its checkpoint is a folder": lambda scene, run: replaced(
            run / "checkpoint.pt", lambda p: (p / "x").mkdir(parents=True)
        ),
        "its log is deleted": lambda scene, run: (run / "run.log").unlink(missing_ok=True),
    }
    for name, deed in deeds.items():
        yield Kind(
            f"while a run trains, {name}",
            lambda _: None,
            check=lambda scene, deed=deed, name=name: disturbed(scene, deed, name),
        )


def disturbed(scene: Scene, deed: Callable[[Scene, Path], object], name: str) -> Iterator[str]:
    settings = runs.read_config(scene.victim) | {"seed": 9, "output_dir": str(scene.outputs), "checkpoint_seconds": 0.0}
    run, done = runs.Run(settings).folder, []

    def act(_: Any) -> None:
        if not done:
            done.append(True)
            deed(scene, run)

    ended = studies.train(settings, act)
    yield from problems_of(ended)
    if "deleted" in name and name.split()[1] in ("folder", "study", "studies"):
        sentence = ended.refusal.lower()
        if not any(word in sentence for word in ("deleted", "removed", "gone", "not there", "not exist", "moved")):
            yield f"the sentence does not say so: {ended.refusal!r}"


# Surroundings


def of_surroundings() -> Iterator[Kind]:
    """Variables of the environment, folders and rights that no command expects."""
    for name in (
        "SLURM_RESTART_COUNT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_PORT",
        "SLURM_PROCID",
        "SLURM_NTASKS",
    ):
        for value in ("abc", "-1", "", "9" * 30, "\x1b[31m"):
            yield of_variables(**{name: value})
    yield of_variables(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="abc")
    yield of_variables(RANK="5", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="nowhere", MASTER_PORT="1")
    yield of_variables(SLURM_JOB_ID="abc", SLURM_ARRAY_TASK_ID="abc", SLURM_NTASKS="abc", SLURM_STEP_ID="x")
    for name, values in {
        "COLUMNS": ("abc", "0", "-5", "1", "9" * 30),
        "LINES": ("abc",),
        "TERM": ("nonsense", ""),
        "LC_ALL": ("C", "xx_YY"),
        "PYTHONIOENCODING": ("ascii", "utf-16"),
        "HOME": ("/nonexistent", "", "/dev/null"),
        "TMPDIR": ("/nonexistent",),
        "OMP_NUM_THREADS": ("abc", "-1"),
        "CUDA_VISIBLE_DEVICES": ("abc", "-1"),
        "MPLBACKEND": ("nonsense",),
        "MPLCONFIGDIR": ("/dev/null",),
        "PATH": ("", "/nonexistent"),
        "GIT_DIR": ("/nonexistent",),
        "TZ": ("nonsense",),
        "NORMLAB_DATA": ("/dev/null", "", "\udcff"),
        "FORCE_COLOR": ("1",),
        "PYTHONWARNINGS": ("error",),
        "USER": ("",),
        "SOURCE_DATE_EPOCH": ("abc",),
        "XDG_CACHE_HOME": ("/dev/null",),
        "PYTHONUTF8": ("0",),
    }.items():
        for value in values:
            yield of_variables(**{name: value})
    for mask in (0o077, 0o027, 0o002):
        yield Kind(f"umask {mask:03o}", lambda _: None, check=lambda scene, mask=mask: masked(scene, mask))
    for script in ("train.py", "report.py"):
        yield Kind(
            f"{script} in a folder that is deleted",
            lambda _: None,
            check=lambda scene, script=script: in_no_folder(scene, script),
        )
    yield Kind("-0.0 is 0.0", lambda _: None, check=negative_zero)
    yield Kind("save_weights=true for a finished run", lambda _: None, check=unsaved_weights)
    yield Kind("a run that another process trains", lambda scene: hold(scene, "elsewhere"), check=left_alone)
    yield Kind("a sweep that has just begun", only_begun, check=of_begun)


def of_variables(**variables: str) -> Kind:
    def check(scene: Scene) -> Iterator[str]:
        for script, words in (("report.py", (f"study={studies.STUDY}",)), ("train.py", NEW)):
            yield from (
                f"{script}: {problem}" for problem in problems_of(started(scene.folder, script, *words, **variables))
            )

    return Kind(", ".join(f"{name}={value!r:.20}" for name, value in variables.items()), lambda _: None, check=check)


def started(folder: Path, script: str, *words: str, **variables: str) -> Ended:
    """Carry out a command as a process of its own, which reads its environment anew."""
    path = os.pathsep.join([PATH["PYTHONPATH"], os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(studies.ROOT / script), *words]
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=-1, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output = process.communicate(timeout=WAIT)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return Ended(
            None,
            "",
            f"it was still at work after {WAIT:.0f} s",
            process.communicate()[0].decode(errors="replace"),
            WAIT,
        )
    return Ended(process.returncode, "", "", output, 0.0)


def masked(scene: Scene, mask: int) -> Iterator[str]:
    def work() -> None:
        os.umask(mask)
        settings = runs.read_config(scene.victim) | {"seed": 9, "output_dir": str(scene.outputs)}
        train_run(schema.parse(settings))
        build(studies.STUDY, scene.outputs, options(figures=False, quiet=True))

    before = set(scene.study.rglob("*"))
    shutil.rmtree(scene.study / "report")
    yield from problems_of(watched(work))
    for path in sorted(set(scene.study.rglob("*")) - before | set((scene.study / "report").glob("*.csv"))):
        mode, expected = stat.S_IMODE(path.stat().st_mode), (0o777 if path.is_dir() else 0o666) & ~mask
        if mode != expected:
            yield f"{path.relative_to(scene.study)} has the mode {mode:03o}, not {expected:03o}"
            return


def in_no_folder(scene: Scene, script: str) -> Iterator[str]:
    gone = scene.folder / "gone"
    gone.mkdir()

    line = f"mkdir -p {gone}; cd {gone}; rmdir {gone}; exec {sys.executable} {studies.ROOT / script} study=x"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=WAIT, check=False)
    yield from problems_of(Ended(done.returncode, "", "", done.stdout + done.stderr, 0.0))


def negative_zero(scene: Scene) -> Iterator[str]:
    settings = runs.read_config(scene.victim)
    for group, name in (
        ("optimizer", "weight_decay"),
        ("", "label_smoothing"),
        ("schedule", "warmup_epochs"),
        ("optimizer", "momentum"),
    ):
        names = []
        for zero in (0.0, -0.0, 0):
            changed = {group: settings[group] | {name: zero}} if group else {name: zero}
            names.append(runs.Run(schema.parse(settings | changed).as_dict()).name)
        if len(set(names)) > 1:
            yield f"{group}.{name}: {names}"


def unsaved_weights(scene: Scene) -> Iterator[str]:
    ended = command(scene.folder, "train.py", *TRAIN, "save_weights=true", **PATH)
    yield from problems_of(ended)
    if "weights" not in ended.output:
        yield f"nothing is said of the weights: {ended.output.strip()[-150:]!r}"


def left_alone(scene: Scene) -> Iterator[str]:
    for words in ((), ("-m",)):
        ended = command(scene.folder, "train.py", *words, *TRAIN, **PATH)
        yield from problems_of(ended)
        if ended.value == 0:
            yield f"train.py {' '.join(words)} ends with status 0: {ended.output.strip()[-150:]!r}"


def only_begun(scene: Scene) -> None:
    for path in runs.find(scene.study):
        for file in ("status.json", "metrics.jsonl", "provenance.json", "correct.json", "run.log"):
            (path / file).unlink(missing_ok=True)
        shutil.rmtree(path / "probes", ignore_errors=True)


def of_begun(scene: Scene) -> Iterator[str]:
    for words in ([], ["status"], ["claims"], ["results"], ["pack", "replace=true"]):
        ended = command(scene.folder, "report.py", *words, f"study={studies.STUDY}", "figures=false")
        yield from problems_of(ended)
        if words == [] and "has no finished run yet" not in ended.output:
            yield f"the report is no sentence: {ended.output.strip()[-150:]!r}"
