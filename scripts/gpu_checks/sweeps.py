"""Sweeps, timed: python -m gpu_checks.sweeps WHAT FOUND FOLDER ...

sweep WORDS                 trains a sweep in FOLDER/sweep, from its beginning
again WORDS                 the same command, which must train nothing
plain SEEDS WORDS           trains the networks of one seed by a plain loop, one after the other
experiments LIMIT SWEEPS W  goes through sweeps (separated by semicolons, W added to each) in FOLDER/experiments
pack                        all studies in one file FOUND
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, table
from gpu_checks.engines import refusal
from normlab import runs

LAUNCHED = ["device=cuda", "engine=auto", "hydra.launcher.per_gpu=4", "hydra.launcher.pack=4"]
UNFINISHED = 75


def train(output: Path, words: list[str], limit: float | None = None) -> float:
    """The seconds of a sweep's command; ended at its limit, its runs write checkpoints."""
    command = [sys.executable, "train.py", "-m", *LAUNCHED, f"output_dir={output}", *words]
    print(" ".join(command), flush=True)
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
    return time.monotonic() - begun


def statuses(study: Path) -> dict[str, dict[str, Any]]:
    return {run.name: runs.read_status(run) or {"state": "not begun"} for run in runs.find(study)}


def sweep(found: Path, folder: Path, *words: str) -> int:
    shutil.rmtree(folder / "sweep", ignore_errors=True)  # a part of it would not be timed
    seconds = train(folder, [*words, "study=sweep"])
    ended = statuses(folder / "sweep")
    states = Counter(one["state"] for one in ended.values())
    told_of = {run.name: refusal(run) for run in runs.find(folder / "sweep")}
    captured = sum(bool(one.get("capture_seconds")) and not told_of.get(name) for name, one in ended.items())
    facts = {"seconds": seconds, "runs": len(ended), "states": states, "captured": captured}
    sentence = f"{len(ended)} runs in {seconds:.1f} s, {captured} of them captured; {told(states)}."
    found.write_text(json.dumps({**facts, "table": sentence}))
    print(sentence)
    return 0 if ended and states["done"] + states["diverged"] == len(ended) else 1


def told(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


def again(found: Path, folder: Path, *words: str) -> int:
    before = statuses(folder / "sweep")
    seconds = train(folder, [*words, "study=sweep"])
    changed = [name for name, one in statuses(folder / "sweep").items() if one != before.get(name)]
    sentence = f"{seconds:.1f} s; {len(changed)} of {len(before)} runs were trained."
    found.write_text(json.dumps({"seconds": seconds, "trained": len(changed), "table": sentence}))
    print(sentence)
    return 0 if before and not changed else 1


def plain(found: Path, folder: Path, seeds: str, *words: str) -> int:
    """By scripts/bench, which says which part of its time is the start of a process."""
    measured = folder / "plain_sweep.json"
    lists = dict(word.split("=", 1) for word in words)
    options = [
        *("--norm", *lists.pop("norm").split(","), "--batch", *lists.pop("batch").split(",")),
        *("--contender", "plain", "--rounds", "1", "--workers", "0", "--device", "cuda"),
        *("--json", str(measured), "--settings", *(f"{key}={value}" for key, value in lists.items())),
    ]
    measured.unlink(missing_ok=True)
    if code := subprocess.run([sys.executable, "scripts/bench.py", "sweep", *options], cwd=ROOT).returncode:
        return code
    result = json.loads(measured.read_text())["sweep"]
    if not result["rounds"]["plain"]:
        print(f"The plain loop: {result['unavailable']['plain']}")
        return 1
    (one,) = result["rounds"]["plain"]
    whole = one["seconds"] + (int(seeds) - 1) * one["trained_seconds"]
    ours = json.loads((folder / "sweep.json").read_text())
    rows = [
        ["normlab", str(ours["runs"]), f"{ours['seconds']:.1f}", ""],
        [
            f"plain PyTorch, extrapolated from {result['runs']} runs of one seed in {one['seconds']:.1f} s",
            *(str(result["runs"] * int(seeds)), f"{whole:.1f}", f"{whole / ours['seconds']:.2f}"),
        ],
    ]
    shown = table(["", "runs", "seconds", "over normlab's"], rows)
    found.write_text(json.dumps({"measured": one["seconds"], "extrapolated": whole, "table": shown}))
    print(shown)
    return 0


def experiments(found: Path, folder: Path, limit: str, sweeps: str, *more: str) -> int:
    ends = time.monotonic() + float(limit)
    rows, done, studies = [], True, dict[str, Counter[str]]()
    for words in filter(None, map(str.strip, sweeps.split(";"))):
        left = ends - time.monotonic()
        output = folder / "experiments"
        seconds = train(output, [*shlex.split(words), *more], left - 10) if left > 20 else 0.0
        done &= left > 20 and time.monotonic() < ends - 10
        rows.append([f"`{words}`", f"{seconds:.0f}" if seconds else "no time was left"])
        folders = sorted({path.parent.parent for path in output.glob("*/*/config.yaml")})
        studies = {study.name: Counter(one["state"] for one in statuses(study).values()) for study in folders}
        lines = [f"- {study}: {told(states)}" for study, states in studies.items()]
        shown = table(["sweep", "seconds"], rows) + "\n\n" + "\n".join(lines)
        found.write_text(json.dumps({"studies": studies, "table": shown}))
    failed = any(states["failed"] for states in studies.values()) or not studies
    return 1 if failed else 0 if done else UNFINISHED


def pack(found: Path, folder: Path) -> int:
    """Each study by `report.py pack`, and then all of them in one file."""
    files, failed = [], 0
    for output in (folder, folder / "experiments"):
        for study in sorted({path.parent.parent for path in output.glob("*/*/status.json")}):
            words = [f"output_dir={output}", f"study={study.name}", "replace=true"]
            failed |= subprocess.run([sys.executable, "report.py", "pack", *words], cwd=ROOT).returncode
            files.append(study.with_name(f"{study.name}.normlab.zip"))
    with zipfile.ZipFile(found, "w") as packed:
        for path in filter(Path.is_file, files):
            packed.write(path, path.name)
    return failed


def main() -> int:
    what = {"sweep": sweep, "again": again, "plain": plain, "experiments": experiments, "pack": pack}
    return what[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])


if __name__ == "__main__":
    sys.exit(main())
