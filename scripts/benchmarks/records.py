"""`scripts/bench records`: from a study's records to DataFrames and tables, against reading them naively with pandas.

A study of 10 arms, 5 batch sizes and as many seeds as give the wanted number of runs, its files in the form of recorded
ones, its numbers made up. Each measurement is a process of its own, so that its peak memory is its own; seconds are
those of the work, without starting Python and importing pandas. All files are in the cache of the operating system.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "outputs" / "reference" / "digits_every_norm.normlab.zip"
ARMS = ("bn", "none", "affine", "gn", "ln", "lp1", "lp2", "lpinf", "renorm", "wn")
LR = 0.1  # of the runs that are taken: each arm has one
BATCHES = (8, 16, 32, 64, 128)
OPEN = 100  # runs that end between two reports
STUDY = "records"


class Synthetic:
    """A study on disk whose runs can go on: for each round, some are one epoch short."""

    def __init__(self, folder: Path, runs: int, epochs: int, rounds: int) -> None:
        from normlab import runs as records

        self.folder, self.epochs = folder / STUDY, epochs
        seeds = -(-runs // len(ARMS) // len(BATCHES))
        cells = list(islice(product(range(seeds), BATCHES, ARMS), runs))
        self.ending = min(OPEN, runs // 2 // rounds)  # in a round
        self.open = random.Random(0).sample(cells, self.ending * rounds)
        templates = {arm: _template(arm) for arm in ARMS}
        self.runs: dict[tuple[int, int, str], tuple[Path, dict[str, Any]]] = {}
        for cell in cells:
            seed, batch, arm = cell
            template, text, status, provenance = templates[arm]
            config = {**template, "study": STUDY, "seed": seed, "batch": batch, "epochs": epochs}
            run_id = records.run_id(config)
            text = text.replace(f"\nrun_id: {status['run_id']}\n", f"\nrun_id: {run_id}\n")
            for key in ("study", "seed", "batch", "epochs"):
                text = text.replace(f"\n{key}: {template[key]}\n", f"\n{key}: {config[key]}\n")
            run = self.folder / records.run_name(config)
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(text[1:])
            (run / "provenance.json").write_text(provenance)
            self.runs[cell] = run, {**status, "run_id": run_id}
        unfinished = set(self.open)
        for cell in cells:
            self._write(cell, epochs - (cell in unfinished))

    def go_on(self) -> None:
        """The next runs come to their end."""
        for cell in self.open[: self.ending]:
            self._write(cell, self.epochs)
        del self.open[: self.ending]

    def _write(self, cell: tuple[int, int, str], epochs: int) -> None:
        from normlab.runs import sums

        run, status = self.runs[cell]
        rows = list(islice(_rows(cell), epochs))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = ("config.yaml", "provenance.json", "metrics.jsonl")
        facts: dict[str, Any] = {
            "files": {name: sums.sum_of((run / name).read_bytes(), status["run_id"]) for name in names}
        }
        state = "done" if epochs == self.epochs else "running"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        facts |= {"name": run.name, "state": state, "heartbeat": now, "epoch": epochs, "epochs": self.epochs}
        facts |= {key: rows[-1][key] for key in ("step", "wall_seconds", "train_loss", "test_loss", "test_accuracy")}
        (run / "status.json").write_bytes(sums.sealed(status | facts, status["run_id"]))


def _template(arm: str) -> tuple[dict[str, Any], str, dict[str, Any], str]:
    """A recorded run of the arm: its configuration, that as text, its status, its provenance as text."""
    from normlab import runs as records
    from normlab.runs import archive

    with archive.opened(RECORDED) as study:
        name = f"cifar_resnet20-digits-{arm}-b32-s0-"
        found = ((run, records.read_config(run)) for run in records.find(study) if run.name.startswith(name))
        run, config = next(
            each for each in found if each[1]["init"]["name"] == "default" and each[1]["optimizer"]["lr"] == LR
        )
        status = records.read_status(run) or {}
        text, provenance = ((run / name).read_bytes().decode() for name in ("config.yaml", "provenance.json"))
    for there, here in (("tuned:\n- optimizer.lr", "tuned: []"), ("eval_every: 5", "eval_every: 1")):
        text = text.replace(f"\n{there}\n", f"\n{here}\n")
    config |= {"tuned": [], "eval_every": 1}
    return config, f"\n{text}", status, provenance


def _rows(cell: tuple[int, int, str]) -> Iterator[dict[str, Any]]:
    """Evaluations with as many digits as recorded ones have."""
    seed, batch, arm = cell
    source, steps, epoch = random.Random(f"{seed} {batch} {arm}"), -(-1437 // batch), 0
    level = 0.98 - 0.01 * ARMS.index(arm)
    while True:
        epoch += 1
        error = source.uniform(0.9, 1.1) / (epoch + 1)
        yield {
            "epoch": epoch,
            "step": epoch * steps,
            "train_loss": 2 * error,
            "train_accuracy": level * (1 - 0.8 * error),
            "test_loss": 2.2 * error,
            "test_accuracy": round(360 * level * (1 - error)) / 360,
            "lr": 0.02 * source.random(),
            "images_per_second": 1000 * source.uniform(0.9, 1.1),
            "wall_seconds": 1.5 * epoch + source.random(),
        }


# ---- what is measured, each in a process of its own


def naive(folder: Path) -> float:
    """Every file by the reader that comes first to mind."""
    import pandas as pd
    import yaml

    begun = time.perf_counter()
    frames = []
    for run in sorted(path.parent for path in folder.glob("*/config.yaml")):
        config = yaml.safe_load((run / "config.yaml").read_text())
        status = json.loads((run / "status.json").read_text())
        frame = pd.read_json(run / "metrics.jsonl", lines=True)
        place = {"run": run.name, "arm": config["norm"]["name"], "batch": config["batch"], "seed": config["seed"]}
        frames.append(frame.assign(**place, state=status["state"]))
    pd.concat(frames, ignore_index=True)
    return time.perf_counter() - begun


def ours(folder: Path) -> float:
    from normlab.report.study import load

    begun = time.perf_counter()
    load(folder)
    return time.perf_counter() - begun


def tables(folder: Path) -> float:
    """What `python report.py figures=false` does when the study is loaded."""
    from normlab.report import build, options, write

    study = write.load(folder, name=STUDY)
    write.load = lambda *_, **__: study  # type: ignore[assignment]
    chosen = options(figures=False)
    begun = time.perf_counter()
    build(STUDY, folder.parent, chosen)
    return time.perf_counter() - begun


MEASURED = {work.__name__: work for work in (naive, ours, tables)}


def measure(work: str, folder: Path) -> tuple[float, float]:
    """Seconds, and the peak memory of a process that does nothing else in MB."""
    command = [sys.executable, __file__, "--measure", work, "--folder", str(folder)]
    last = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    seconds, peak = json.loads(last)
    return seconds, peak


def peak_memory_mb() -> float:
    """Of this process since it began; getrusage would count what the one that started it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def bench(folder: Path, runs: int, epochs: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Per measurement, seconds and peak memory of each round."""
    study = Synthetic(folder, runs, epochs, rounds)
    index = study.folder / ".index.npz"
    found = {"naive pandas": [measure("naive", study.folder)]}
    for _ in range(rounds):
        index.unlink(missing_ok=True)
        found.setdefault("load, without an index", []).append(measure("ours", study.folder))
        found.setdefault("load, nothing has changed", []).append(measure("ours", study.folder))
        study.go_on()
        found.setdefault(f"load, {study.ending} runs have ended", []).append(measure("ours", study.folder))
        found.setdefault("tables and verdicts of a loaded study", []).append(measure("tables", study.folder))
    return found


def measure_all(runs: int, epochs: int, rounds: int, folder: Path | None, file: Path | None) -> None:
    """Print the measurements as a Markdown table, and write them as JSON."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        found = bench(Path(temporary), runs, epochs, rounds)
    heading = f"{machine()}; {runs} runs of {epochs} evaluations; files in the cache of the operating system"
    print(f"{heading}\n\n| what | seconds: median (min to max) | peak memory, MB |\n|---|---|---|")
    for what, rows in found.items():
        seconds, peaks = zip(*rows, strict=True)
        spread = f" ({min(seconds):.2f} to {max(seconds):.2f})" if len(seconds) > 1 else ""
        print(f"| {what} | {statistics.median(seconds):.2f}{spread} | {max(peaks):.0f} |")
    if file:
        measured = {
            what: [{"seconds": seconds, "peak_memory_mb": peak} for seconds, peak in rows]
            for what, rows in found.items()
        }
        content = {"machine": machine(), "runs": runs, "epochs": epochs, "measured": measured}
        file.write_text(json.dumps(content, indent=1) + "\n")


def machine() -> str:
    import pandas as pd

    with Path("/proc/cpuinfo").open() as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    name = models[0] if models else platform.machine()
    return f"{name}, {cores} cores, Python {platform.python_version()}, pandas {pd.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary study goes: 0.9 GB for the default")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--measure", choices=[*MEASURED], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        taken = MEASURED[chosen.measure](chosen.folder)
        print(json.dumps([taken, peak_memory_mb()]))
    else:
        measure_all(chosen.runs, chosen.epochs, chosen.rounds, chosen.folder, chosen.json)


if __name__ == "__main__":
    main()
