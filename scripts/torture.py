"""Sweeps under circumstances that a long study meets sooner or later. Exit status 1 if one of them breaks its promise;
the last result of each is kept in docs/torture.md.

kill      kill -9 at random moments, of the launcher, of a worker or of all at once; the same command again each time.
          At the end every run is there once and bit-identical to an undisturbed sweep's, and nothing else is.
race      the same sweep from three processes at once: every run is trained by one of them, and by one only.
scale     the same command again over thousands of finished runs, and `report.py status` of them: time and memory.
overhead  what the pool adds to a run, against the same runs one after the other in one process.
fuzz      thousands of changes to the files of a study: each is told or changes nothing, and ends no report. `--only 7`
          carries out the seventh alone.
hostile   studies that somebody made to do harm, by kind, and every command over them. `--only WORDS`: the kinds that
          have these words in their names.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from attacks import fuzz, hostile, training, watched
from normlab import runs
from normlab.config import schema as config
from normlab.config.hydra import settings_of
from normlab.runs.lock import holder
from normlab.runs.provenance import code
from normlab.training import device

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "torture.md"
HEAD = """# Torture

The last results of `scripts/torture`, command by command; `scripts/torture --help` explains each. It writes this
page.
"""
SMALL = (
    *("model=custom", "model.target=small.SmallNet", "model.name=small"),
    *("dataset.train_size=160", "dataset.test_size=40", "device=cpu", "threads=1", "memory_format=contiguous"),
)
SIX = ("norm=bn,affine,none", "batch=8,16")
SPEED = ("wall_seconds", "images_per_second")  # what depends on the machine, and not on the run
RECORD = {"config.yaml", "correct.json", "metrics.jsonl", "provenance.json", "run.log", "status.json"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
Result = tuple[list[str], list[str]]  # lines for the page; what is wrong


# Commands, and what they leave


def start(folder: Path, script: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """A command in `folder`, in a process group of its own; its output is added to `folder`/output."""
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def sweep(folder: Path, study: str, *settings: str) -> "subprocess.Popen[bytes]":
    return start(folder, "train.py", "-m", *SIX, *SMALL, f"study={study}", *settings)


def result(folder: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """What a run came to: the digest of its weights, and its evaluations."""
    status, (rows, torn) = runs.read_status(folder) or {}, runs.read_metrics(folder)
    return status.get("weights_sha256"), [{k: v for k, v in row.items() if k not in SPEED} for row in rows] + [
        {"unreadable": line} for line in torn
    ]


def problems(study: Path, undisturbed: Path) -> list[str]:
    """Where the runs of a study differ from those of an undisturbed one, or hold more than their record."""
    found, wrong = {path.name: path for path in runs.find(study)}, []
    expected = {path.name: path for path in runs.find(undisturbed)}
    if set(found) != set(expected):
        wrong.append(f"{study.name}: other runs than the undisturbed sweep has: {set(found) ^ set(expected)}")
    for name in sorted(set(found) & set(expected)):
        state = (runs.read_status(found[name]) or {}).get("state")
        files = {path.name for path in found[name].iterdir()}
        if state != "done":
            wrong.append(f"{study.name}/{name} is {state}")
        if result(found[name]) != result(expected[name]):
            wrong.append(f"{study.name}/{name} has another result")
        if files != RECORD:
            wrong.append(f"{study.name}/{name} holds {files - RECORD or ''}, lacks {RECORD - files or 'nothing'}")
    return wrong


def processes(folder: Path) -> dict[int, str]:
    """The processes that work in `folder`, with their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cwd").readlink() == folder:
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def left_behind(folder: Path) -> list[str]:
    for _ in range(50):
        if not processes(folder):
            return []
        time.sleep(0.1)
    return [f"process {number} is left behind: {command}" for number, command in processes(folder).items()]


def undisturbed_sweep(folder: Path, epochs: int) -> tuple[float, list[str]]:
    """What the disturbed ones are compared with; returns the seconds until its first run began, and what is wrong."""
    begun = time.monotonic()
    process = sweep(folder, "undisturbed", f"epochs={epochs}", "checkpoint_seconds=null")
    while process.poll() is None and not at_work(folder / "outputs" / "undisturbed"):
        time.sleep(0.05)
    startup = time.monotonic() - begun
    status = process.wait(600)
    return startup, [f"the undisturbed sweep ended with status {status}"] if status else []


def at_work(study: Path) -> bool:
    """Whether any run is held by a process that lives."""
    holders = [holder(run) for run in runs.find(study)]
    return any(by and not by.gone for by in holders)


# Those of sweeps


def kill(chosen: argparse.Namespace, folder: Path) -> Result:
    chance = random.Random(chosen.seed)
    startup, wrong = undisturbed_sweep(folder, chosen.epochs)
    killed: Counter[str] = Counter()
    starts = rounds = trained = 0
    begun = time.monotonic()
    while killed.total() < chosen.kills and not wrong:
        rounds += 1
        study = folder / "outputs" / f"killed{rounds}"
        while not wrong:
            process = sweep(folder, study.name, f"epochs={chosen.epochs}", "checkpoint_seconds=0")
            starts += 1
            workers_killed = 0
            while killed.total() < chosen.kills:
                try:
                    process.wait(chance.choice([chance.uniform(0.3, startup), startup + chance.uniform(0.0, 5.0)]))
                    break
                except subprocess.TimeoutExpired:
                    trained += at_work(study)
                    whom = kill_one(("launcher", "worker", "group")[killed.total() % 3], process, folder, chance)
                    killed[whom] += 1
                    workers_killed += whom == "worker"
                    print(f"{killed.total()}: {whom}", file=sys.stderr, flush=True)
            status = process.wait(600)
            if status not in (0, -signal.SIGKILL) and not (workers_killed and status == 1):
                wrong.append(f"a sweep that nobody killed ended with status {status}")
            if status == 0 and all(is_done(path) for path in runs.find(study)):
                break  # else runs were left to a worker that was dying just then
        wrong += left_behind(folder) + problems(study, folder / "outputs" / "undisturbed")
    done = f"{killed.total()} kills (" + ", ".join(f"{number} of the {whom}" for whom, number in killed.items()) + ")"
    return [
        f"`kill -9` at random moments (seed {chosen.seed}) of sweeps of six runs of {chosen.epochs} epochs with a"
        f" checkpoint at every step: {done}, {trained} of them while runs were trained and the others before, between"
        f" and after; {starts} starts over {rounds} sweeps in {time.monotonic() - begun:.0f} s.",
        "Looked for: each run done once, weights and metrics bit-identical to an undisturbed sweep, no row twice or"
        " missing, no lock, claim, checkpoint or temporary file left, no process left.",
    ], wrong


def kill_one(whom: str, process: "subprocess.Popen[bytes]", folder: Path, chance: random.Random) -> str:
    """Kill the launcher alone, one of its workers (the launcher if there is none yet), or its whole group."""
    workers = [number for number, command in processes(folder).items() if "spawn_main" in command]
    with contextlib.suppress(ProcessLookupError):
        if whom == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif whom == "worker" and workers:
            os.kill(chance.choice(workers), signal.SIGKILL)
            return whom
        else:
            process.kill()
            whom = "launcher"
        process.wait()
    return whom


def is_done(run: Path) -> bool:
    with contextlib.suppress(Exception):
        return (runs.read_status(run) or {}).get("state") == "done"
    return False


def race(chosen: argparse.Namespace, folder: Path) -> Result:
    (_, wrong), shares = undisturbed_sweep(folder, chosen.epochs), []
    for turn in range(1, chosen.rounds + 1):
        study = folder / "outputs" / f"race{turn}"
        racing = [sweep(folder, study.name, f"epochs={chosen.epochs}") for _ in range(3)]
        statuses = [process.wait(600) for process in racing]
        if statuses != [0, 0, 0]:
            wrong.append(f"{study.name}: exit statuses {statuses}")
        wrong += left_behind(folder) + problems(study, folder / "outputs" / "undisturbed")
        for run in runs.find(study):
            first = re.findall(r'INFO \{"epoch": 1,', (run / "run.log").read_text())
            if len(first) != 1:
                wrong.append(f"{study.name}/{run.name} was begun {len(first)} times")
        hands = Counter((runs.read_status(run) or {}).get("pid") for run in runs.find(study))
        shares.append(f"{len(hands)} ({', '.join(map(str, sorted(hands.values())))})")
    return [
        f"A sweep of six runs of {chosen.epochs} epochs, started by three processes at once, {chosen.rounds} times."
        f" Workers that trained (runs of each): {'; '.join(shares)}.",
        "Looked for: exit status 0 of all three, each run begun once (its first evaluation is in run.log once), results"
        " bit-identical to an undisturbed sweep, nothing left.",
    ], wrong


NORMS = ("bn", "bn_scaled", "bnminus", "affine", "none", "renorm", "gn", "ln", "frn", "wn")
BATCHES = (8, 16, 32, 64, 128)
LIMIT_SECONDS, LIMIT_BYTES = 20.0, 1e9
LIMIT_ADDED_SECONDS = 0.2


def scale(chosen: argparse.Namespace, folder: Path) -> Result:
    os.fsync = lambda file: None  # type: ignore[assignment]  # these runs may be lost
    table = ["| finished runs | command | wall, s | CPU, s | peak memory, MB |", "|---|---|---|---|---|"]
    wrong: list[str] = []
    seconds: dict[str, list[float]] = {"train.py -m": [], "report.py status": []}
    made = 0
    for number in (chosen.runs // 4, chosen.runs // 2, chosen.runs):
        seeds = number // (len(NORMS) * len(BATCHES))
        finish_runs(folder, range(made, seeds))
        made, number = seeds, seeds * len(NORMS) * len(BATCHES)
        grid = (f"norm={','.join(NORMS)}", f"batch={','.join(map(str, BATCHES))}", f"seed=range(0,{seeds})")
        for name, arguments in (("train.py -m", grid), ("report.py status", ())):
            wall, cpu, memory, status = measured(folder, *name.split(), *arguments)
            seconds[name].append(cpu)  # of which other processes take none
            table.append(f"| {number} | `{name}` | {wall:.1f} | {cpu:.1f} | {memory / 1e6:.0f} |")
            print(table[-1], file=sys.stderr, flush=True)
            if status:
                wrong.append(f"{name} over {number} runs ended with status {status}")
            if wall > LIMIT_SECONDS or memory > LIMIT_BYTES:
                wrong.append(f"{name} over {number} runs took {wall:.1f} s and {memory / 1e6:.0f} MB")
    output = (folder / "output").read_text()
    if f"{number} of {number} runs are finished and skipped" not in output:
        wrong.append("the repeated sweep did not skip all of its runs")
    for name, (_, half, whole) in seconds.items():
        if whole > 2.5 * half:
            wrong.append(f"{name}: twice the runs took {whole / half:.1f} times as much CPU")
    return [
        f"A study of finished runs: {len(NORMS)} norms, {len(BATCHES)} batch sizes, and seeds.",
        "\n".join(table),
        f"Looked for: at most {LIMIT_SECONDS:.0f} s and {LIMIT_BYTES / 1e6:.0f} MB each, and at most 2.5 times"
        " the CPU time for twice the runs.",
    ], wrong


def finish_runs(folder: Path, seeds: range) -> None:
    """Runs in `folder`/outputs/default as if they had been trained."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        arms = [settings_of(compose("config", [f"norm={norm}", f"output_dir={folder}/outputs"])) for norm in NORMS]
    for settings in arms:
        for batch in BATCHES:
            for seed in seeds:
                run = runs.Run(config.parse({**settings, "batch": batch, "seed": seed}).as_dict())
                run.freeze()
                row = {"epoch": 4, "step": 100, "train_loss": 0.1, "test_loss": 0.2, "test_accuracy": 0.9}
                run.append_metrics(row)
                facts = {"started": runs.now(), "ended": runs.now(), "wall_seconds": 1.0, "weights_sha256": "0" * 64}
                run.write_status("done", durable=False, epochs=4, steps=100, **facts, **row)


MEASURED = """
import json, resource, subprocess, sys, time

begun = time.monotonic()
status = subprocess.call(sys.argv[1:], stdout=sys.stderr)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([time.monotonic() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, status]))
"""


def measured(folder: Path, script: str, *arguments: str) -> tuple[float, float, int, int]:
    """Seconds by the clock and of CPU, peak resident bytes and exit status of a command.

    By a small process between: a child counts its parent's memory until it has become the command.
    """
    command = [sys.executable, "-c", MEASURED, sys.executable, str(ROOT / script), *arguments]
    with (folder / "output").open("ab") as output:
        done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=output, check=True)
    wall, cpu, memory, status = json.loads(done.stdout)
    return wall, cpu, memory, status


ALONE = """
import json, sys
from normlab.config.schema import RunConfig
from normlab.training.run import Resources, train_run

for settings in json.load(sys.stdin):
    train_run(RunConfig.model_validate(settings), resources=Resources("cpu", 1))
"""


def overhead(chosen: argparse.Namespace, folder: Path) -> Result:
    wrong, ratios = [], []
    gaps: dict[str, list[float]] = {"pool": [], "alone": []}
    seeds = f"seed=range(0,{chosen.runs})"
    for turn in range(chosen.rounds + 1):  # the first warms up
        studies = {who: folder / "outputs" / f"{who}{turn}" for who in gaps}
        process = start(
            *(folder, "train.py", "-m", seeds, *SMALL, "batch=8", f"epochs={chosen.epochs}"),
            *(f"study={studies['pool'].name}", "hydra.launcher.slots=1"),
        )
        if process.wait(600):
            wrong.append(f"a sweep ended with status {process.returncode}")
        found = runs.find(studies["pool"])
        workers = {(runs.read_status(run) or {}).get("pid") for run in found}
        if len(workers) != 1:
            wrong.append(f"{len(workers)} processes trained the {chosen.runs} runs of one slot")
        settings = json.dumps([{**runs.read_config(run), "study": studies["alone"].name} for run in found])
        command = [sys.executable, "-c", ALONE]
        subprocess.run(command, input=settings, text=True, check=True, cwd=folder, env=ENVIRONMENT)
        walls = {}
        for who, study in studies.items():
            walls[who], between = timeline(study)
            if turn:
                gaps[who] += between
            print(f"{turn}: {who} {walls[who]:.2f} s", file=sys.stderr, flush=True)
        if turn:
            ratios.append(walls["pool"] / walls["alone"])
    added = statistics.median(gaps["pool"]) - statistics.median(gaps["alone"])
    if added > LIMIT_ADDED_SECONDS:
        wrong.append(f"the pool adds {added:.3f} s to a run")
    return [
        f"{chosen.runs} runs of {chosen.epochs} epochs of the small network, one slot, against the same runs in a bare"
        f" loop of one process, in {chosen.rounds} pairs. Neither counts the start of a process and the import of"
        " torch: both do that once, before the first run.",
        f"From the last file of a run to the first of the next, median of {len(gaps['pool'])} (middle half):"
        f" {spread(gaps['pool'])} in the pool, {spread(gaps['alone'])} in the loop, so the pool adds"
        f" {added * 1000:.0f} ms. All runs together, pool / loop:"
        f" {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}).",
        f"Looked for: at most {LIMIT_ADDED_SECONDS * 1000:.0f} ms, and one worker process for all runs of a slot.",
    ], wrong


def timeline(study: Path) -> tuple[float, list[float]]:
    """Seconds from the first run's provenance.json to the last run's last word, and those from each last word to the
    next provenance.json."""
    found = runs.find(study)
    begins = sorted((run / "provenance.json").stat().st_mtime for run in found)
    ends = sorted((run / "status.json").stat().st_mtime for run in found)
    return ends[-1] - begins[0], [begin - end for begin, end in zip(begins[1:], ends, strict=False)]


def spread(seconds: list[float]) -> str:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{middle * 1000:.0f} ms ({low * 1000:.0f} to {high * 1000:.0f})"


# Those of attacks/


def fuzzed(chosen: argparse.Namespace, folder: Path) -> Result:
    begun, counted = time.monotonic(), fuzz.fuzz(folder, chosen.seed, chosen.mutations, chosen.only, said)
    return [
        f"{counted.total} changes (seed {chosen.seed}) to the files of a study with runs in every state, one at a time,"
        f" in {time.monotonic() - begun:.0f} s: bits, lines and values, of the right type and of wrong ones. The"
        " tables, the states and numbers of each run, and the sentences are compared with those of the study before.",
        "\n".join(counted.table()),
        "same: all as before, nothing said. told: a sentence names the run, and no other run has changed. refused: a"
        " sentence in place of the report, which is right for a file that is the whole study. Looked for: no traceback"
        " (nor a hang, nor more than 1.5 GB), nothing else than before without a sentence, no number that no run can"
        " have, no file changed by a command that reads.",
    ], counted.faults


def attacked(chosen: argparse.Namespace, folder: Path) -> Result:
    begun = time.monotonic()
    more = (training.of_checkpoints, training.of_moments, training.of_surroundings)
    counts, wrong = hostile.hostile(folder, chosen.only, said, more)
    table = ["| attacks | kinds | with a fault |", "|---|---|---|"]
    table += [f"| {title} | {number} | {faulty} |" for title, (number, faulty) in counts.items()]
    return [
        f"{sum(number for number, _ in counts.values())} studies and surroundings in {time.monotonic() - begun:.0f} s,"
        " each with the commands that may meet it: report, status, claims, results, pack, verify, import, train.",
        "\n".join(table),
        f"Looked for: no traceback, no command of over {watched.SECONDS:.0f} s of CPU or {watched.BYTES / 1e9:.1f} GB,"
        " a report of the other runs that names this one, no file outside of the study changed or shown, no escape"
        " sequence in any output, no script in a page, no formula in a CSV file.",
    ], wrong


def said(line: str) -> None:
    print(" ".join(line.split())[:500], file=sys.stderr, flush=True)


# The page


def write_down(name: str, lines: list[str], wrong: list[str]) -> None:
    """Replace the section of a command on the page."""
    found = device.provenance(torch.device("cpu"))
    versions = found["versions"]
    machine = (
        f"{datetime.date.today()}; {found['device']}, {found['cores']} cores, {found['platform']},"
        f" Python {versions['python']}, torch {versions['torch']}; {code(found)}"
    )
    outcome = "\n".join(["**Failed:**", "", *[f"- {problem}" for problem in wrong[:10]]]) if wrong else "**Passed.**"
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = "\n\n".join([f"{begin}\n## `scripts/torture {name}`", *lines, outcome, f"{machine}\n{end}"])
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else HEAD
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2] or "\n"
    PAGE.write_text(f"{before.rstrip()}\n\n{section}{after}", encoding="utf-8")


def positive(word: str) -> int:
    if int(word) < 1:
        raise ValueError
    return int(word)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str,
        do: Callable[[argparse.Namespace, Path], Result],
        only: Callable[[str], Any] | None = None,
        **numbers: int,
    ) -> None:
        options = commands.add_parser(name)
        options.set_defaults(do=do, only=None)
        if only:
            options.add_argument("--only", type=only)
        for option, default in numbers.items():
            options.add_argument(f"--{option}", type=int if option == "seed" else positive, default=default)

    command("kill", kill, kills=50, seed=0, epochs=40)
    command("race", race, rounds=3, epochs=20)
    command("scale", scale, runs=10_000)
    command("overhead", overhead, runs=20, rounds=3, epochs=40)
    command("fuzz", fuzzed, only=positive, seed=0, mutations=3000)
    command("hostile", attacked, only=str)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name).resolve()
        lines, wrong = chosen.do(chosen, folder)
        if wrong and (folder / "output").exists():
            print((folder / "output").read_text()[-5000:], file=sys.stderr)
    if not chosen.only:
        write_down(chosen.command, lines, wrong)
    print("\n".join(wrong or [f"{chosen.command}: passed"]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
