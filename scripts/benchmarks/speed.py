"""normlab, a plain PyTorch loop, Lightning and a tuned loop side by side, with the same networks, images, optimizer,
schedule and precision. scripts/benchmarks/contenders.py has what each is.

speed   images per second while training, after an epoch that warms up and does not count; without evaluation, and
        without compiling and capturing, which are reported apart. And the peak memory of the process.
sweep   seconds of a whole sweep, norm=bn,affine,bnminus,none batch=8,32,128 on the digits: of normlab's command, and of
        one process that trains the same networks one after the other
start   seconds from the command to the end of its first training step

Each measurement is a process of its own. In a round everybody is measured once, in an order that rotates from round to
round, and a ratio is that of one round.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, configure, machine, machine_line, spread, table
from normlab import runs
from normlab.common.cpu import cores

CONTENDERS = {"normlab": "normlab", "plain": "plain PyTorch", "lightning": "Lightning", "tuned": "tuned PyTorch"}
UNTUNED = ("plain", "lightning")  # what people use
DATASETS = {
    "digits": ["dataset=digits"],
    "digits32": ["dataset=digits", "dataset.image_size=32"],
    "cifar10": ["dataset=cifar10", "dataset.crop_padding=4"],
}
TITLES = {"digits": "digits, 8x8", "digits32": "digits, 32x32", "cifar10": "CIFAR-10, 32x32"}
TRAINING_IMAGES = {"digits": 1438, "digits32": 1438, "cifar10": 50_000}
# Images that count in a measurement, about: a few seconds of training on two slow cores.
COUNTED = {"cpu": {"digits": 600, "digits32": 240, "cifar10": 240}, "cuda": dict.fromkeys(DATASETS, 20_000)}
COUNTED_STEPS = 3  # at least
LOADERS = {"cpu": (0, 2), "cuda": (0, 4, 8)}  # workers that are tried
NORMS, SWEPT_BATCHES = ("bn", "affine", "bnminus", "none"), (8, 32, 128)
POLL_SECONDS = 0.01
TRAIN = str(ROOT / "train.py")


class UnavailableError(Exception):
    """Why a contender cannot be measured."""


@dataclass
class Measured:
    """What each round found of each contender; why others are left out."""

    rounds: dict[str, list[dict[str, Any]]]
    unavailable: dict[str, str] = field(default_factory=dict)

    def values(self, contender: str, key: str) -> list[float]:
        """Of all rounds, or nothing."""
        values = [] if contender in self.unavailable else [one[key] for one in self.rounds.get(contender, [])]
        return [value for value in values if value is not None]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(title: str, contenders: Sequence[str], rounds: int, one: Callable[[str], dict[str, Any]]) -> Measured:
    """Alternate between the contenders; whoever fails is left out from then on."""
    found = Measured({contender: [] for contender in contenders})
    for turn in range(rounds):
        first = turn % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            if contender in found.unavailable:
                continue
            try:
                measured = one(contender)
            except UnavailableError as error:
                found.unavailable[contender] = f"n/a: {error}"
                say(f"{title}: {contender}: n/a: {error}")
                continue
            found.rounds[contender].append(measured)
            value = measured.get("images_per_second") or measured["seconds"]
            unit = "images/s" if "images_per_second" in measured else "s"
            say(f"{title}, round {turn + 1} of {rounds}: {contender}: {value:.4g} {unit}")
    return found


def summary(found: Measured, key: str, faster: str) -> dict[str, Any]:
    """Medians and spreads of `key`, of which the `faster` ("more" or "less") is better; and how many times as fast as
    each other contender normlab is, round by round."""
    values = {who: found.values(who, key) for who in found.rounds}
    ours, theirs = values.get("normlab", []), {who: each for who, each in values.items() if each and who != "normlab"}
    best = max if faster == "more" else min
    untuned = [theirs[who] for who in UNTUNED if who in theirs]
    if untuned:
        theirs["faster of plain and lightning"] = [best(each) for each in zip(*untuned, strict=True)]
    ratios = {}
    for who, each in theirs.items() if ours else ():
        pairs = zip(ours, each, strict=True) if faster == "more" else zip(each, ours, strict=True)
        ratios[who] = described([a / b for a, b in pairs])
    return {key: {who: described(each) for who, each in values.items() if each}, "times_as_fast_as": ratios}


def described(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "each": values}


def child(contender: str, **wanted: Any) -> dict[str, Any]:
    """What a fresh process of contenders.py found.

    Raises:
        UnavailableError: if it failed.
    """
    done = subprocess.run(child_command(contender, **wanted), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(reason(done.stderr))
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child_command(contender: str, **wanted: Any) -> list[str]:
    script = Path(__file__).with_name("contenders.py")
    return [sys.executable, str(script), json.dumps({"contender": contender, **wanted})]


def reason(stderr: str) -> str:
    last = stderr.strip().splitlines()[-1] if stderr.strip() else "it ended without a word"
    return "Lightning is not installed (pip install -e .[bench])" if "No module named 'lightning'" in last else last


def of_every_run(chosen: argparse.Namespace) -> list[str]:
    folder = f"data_dir={Path(chosen.data_dir).expanduser().resolve()}"
    return [f"device={chosen.device}", f"precision={chosen.precision}", folder, *chosen.settings]


# Images per second, and memory


def sizes(dataset: str, batch: int, counted: int) -> tuple[int, int]:
    """Training images of an epoch, full batches all, and epochs, of which the first warms up."""
    images = max(1, min(TRAINING_IMAGES[dataset], counted) // batch) * batch
    return images, 1 + math.ceil(max(counted, COUNTED_STEPS * batch) / images)


def speed(chosen: argparse.Namespace, dataset: str, batch: int) -> dict[str, Any]:
    images, epochs = sizes(dataset, batch, chosen.images or COUNTED[chosen.device][dataset])
    overrides = [
        *DATASETS[dataset],
        *(f"batch={batch}", f"epochs={epochs}", f"dataset.train_size={images}", "dataset.test_size=100"),
        *("drop_last=true", "schedule.per=step", f"threads={cores()}"),
        *of_every_run(chosen),
    ]
    title = f"{dataset}, batch {batch}"
    loader = loader_of(chosen, title, overrides)
    found = measure(title, chosen.contender, chosen.rounds, partial(speed_of, overrides, loader["workers"]))
    others = ("peak_memory_bytes", "peak_device_bytes", "capture_seconds")
    return {
        "dataset": dataset,
        "batch": batch,
        "images_of_an_epoch": images,
        "epochs": epochs,
        "loader": loader,
        **summary(found, "images_per_second", faster="more"),
        **{key: {who: described(each) for who in found.rounds if (each := found.values(who, key))} for key in others},
        **vars(found),
    }


def speed_of(overrides: list[str], workers: int, contender: str) -> dict[str, Any]:
    config = configure("outputs", *overrides)
    found = child(contender, do="one run", settings=config.as_dict(), overrides=overrides, workers=workers)
    images = config.dataset.train_size
    assert images
    steps = config.epochs * images // config.batch
    if found["steps"] != steps:
        raise UnavailableError(f"it made {found['steps']} steps instead of {steps}")
    counted = found["epoch_seconds"][1:]
    return {**found, "images_per_second": images * len(counted) / sum(counted)}


def loader_of(chosen: argparse.Namespace, title: str, overrides: list[str]) -> dict[str, Any]:
    """How many workers the DataLoader gets: those with which one measurement of the plain loop was fastest."""
    tried: dict[int, float] = {}
    if chosen.workers is None and set(UNTUNED) & set(chosen.contender):
        for workers in LOADERS[chosen.device]:
            try:
                tried[workers] = speed_of(overrides, workers, "plain")["images_per_second"]
            except UnavailableError as error:
                say(f"{title}: a loader with {workers} workers: {error}")
            else:
                say(f"{title}: a loader with {workers} workers: {tried[workers]:.4g} images/s")
    return {"workers": max(tried, key=lambda workers: tried[workers], default=chosen.workers or 0), "tried": tried}


# Whole commands


def sweep(chosen: argparse.Namespace) -> dict[str, Any]:
    norms, batches = chosen.norm or list(NORMS), chosen.batch or list(SWEPT_BATCHES)
    overrides = [*of_every_run(chosen), *([f"epochs={chosen.epochs}"] if chosen.epochs else [])]
    arms = list(itertools.product(norms, batches, range(chosen.seeds)))
    configs = [
        configure("outputs", f"norm={norm}", f"batch={batch}", f"seed={seed}", f"threads={cores()}", *overrides)
        for norm, batch, seed in arms
    ]
    short = ["batch=32", "dataset.train_size=576", "epochs=2", "drop_last=true", f"threads={cores()}"]
    loader = loader_of(chosen, "sweep", [*of_every_run(chosen), *short])

    def one(contender: str) -> dict[str, Any]:
        begun = time.perf_counter()
        if contender == "normlab":
            seeds = ",".join(map(str, range(chosen.seeds)))
            lists = [f"norm={','.join(norms)}", f"batch={','.join(map(str, batches))}", f"seed={seeds}"]
            return sweep_of_normlab([*lists, *overrides], len(arms))
        settings = [config.as_dict() for config in configs]
        found = child(contender, do="many runs", settings=settings, workers=loader["workers"])
        return {"seconds": time.perf_counter() - begun, **found}

    found = measure("sweep", chosen.contender, chosen.rounds, one)
    return {
        **{
            "norm": norms,
            "batch": batches,
            "seeds": chosen.seeds,
            "epochs": configs[0].epochs,
            "runs": len(arms),
            "loader": loader,
        },
        **summary(found, "seconds", faster="less"),
        **vars(found),
    }


def sweep_of_normlab(overrides: list[str], number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        command = [sys.executable, TRAIN, "-m", *overrides, f"output_dir={folder}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise UnavailableError(reason(done.stderr))
        status = [runs.read_status(run) or {} for run in runs.find(Path(folder) / "default")]
        if len(status) != number:
            raise UnavailableError(f"it trained {len(status)} networks instead of {number}")
    return {"seconds": seconds, "test_accuracy": [one.get("test_accuracy") for one in status]}


def start(chosen: argparse.Namespace) -> dict[str, Any]:
    """With a loader without workers, which starts soonest."""
    overrides = ["norm=bn", "batch=32", *of_every_run(chosen)]
    found = measure("start", chosen.contender, chosen.rounds, partial(start_of, overrides))
    return {**summary(found, "seconds", faster="less"), **vars(found)}


def start_of(overrides: list[str], contender: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as stderr:
        config = configure(folder, *overrides)
        if contender == "normlab":
            command = [sys.executable, TRAIN, *overrides, f"output_dir={folder}"]
        else:
            command = child_command(contender, do="first step", settings=config.as_dict(), workers=0)
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert process.stdout
        try:
            if contender == "normlab":
                stepped = wait_for_status(process, runs.Run(config.as_dict()).folder)
            else:
                stepped = process.stdout.readline() != ""
            seconds = time.perf_counter() - begun
        finally:
            process.terminate()
            process.communicate()
        if not stepped:
            stderr.seek(0)
            raise UnavailableError(reason(stderr.read()))
    return {"seconds": seconds}


def wait_for_status(process: "subprocess.Popen[str]", run: Path) -> bool:
    """Whether the process made a step before it ended."""
    while process.poll() is None:
        if (runs.read_status(run) or {}).get("step", 0) >= 1:
            return True
        time.sleep(POLL_SECONDS)
    return False


# Tables


def speed_table(found: Sequence[dict[str, Any]], contenders: Sequence[str]) -> str:
    ratios = {"faster of plain and lightning": "the faster of plain and Lightning", "tuned": "tuned"}
    titles = [CONTENDERS[who] for who in contenders]
    head = ["images", "batch", *titles, *(f"normlab / {title}" for title in ratios.values())]
    rows = []
    for one in found:
        cells = [cell(one, "images_per_second", who, ".0f") for who in contenders]
        over = [spread(one["times_as_fast_as"].get(who), ".2f") for who in ratios]
        rows.append([TITLES[one["dataset"]], str(one["batch"]), *cells, *over])
    return table(head, rows)


def memory_table(found: Sequence[dict[str, Any]], contenders: Sequence[str], key: str) -> str:
    head = ["images", "batch", *(CONTENDERS[who] for who in contenders)]
    return table(
        head,
        [
            [TITLES[one["dataset"]], str(one["batch"]), *(cell(one, key, who, ".0f", 2**20) for who in contenders)]
            for one in found
        ],
    )


def seconds_table(found: dict[str, Any], contenders: Sequence[str], digits: str) -> str:
    head = ["", "seconds", "its seconds / normlab's"]
    ratios = found["times_as_fast_as"]
    rows = [
        [CONTENDERS[who], cell(found, "seconds", who, digits), spread(ratios.get(who), ".2f")] for who in contenders
    ]
    return table(head, rows)


def cell(one: dict[str, Any], key: str, contender: str, digits: str, unit: float = 1) -> str:
    return str(one["unavailable"].get(contender) or spread(one[key].get(contender), digits, unit))


def markdown(found: dict[str, Any]) -> str:
    """All tables, as far as they are measured."""
    contenders, options = found["options"]["contender"], found["options"]
    parts = [
        f"{machine_line(found['machine'])}; {options['device']}, {options['precision']}. Medians (min to max) of"
        f" {options['rounds']} {'round' if options['rounds'] == 1 else 'rounds'}."
    ]
    if "speed" in found:
        parts += [
            "Training, images/s after the first epoch, without evaluation; ratios above 1: normlab is faster.",
            speed_table(found["speed"], contenders),
            " ".join([loader_sentence(found["speed"]), capture_sentence(found["speed"])]),
            "Peak resident memory of the process (of a DataLoader's workers not), MiB.",
            memory_table(found["speed"], contenders, "peak_memory_bytes"),
        ]
        if options["device"] == "cuda":
            parts += [
                "Peak memory allocated on the GPU, MiB.",
                memory_table(found["speed"], contenders, "peak_device_bytes"),
            ]
    if "sweep" in found:
        one = found["sweep"]
        what = f"norm={','.join(one['norm'])} batch={','.join(map(str, one['batch']))}, epochs={one['epochs']}"
        parts += [
            f"A sweep of {one['runs']} runs, {what}: seconds of the whole command. The others train them one after the"
            f" other in one process (DataLoader with {one['loader']['workers']} workers).",
            seconds_table(one, contenders, ".1f"),
        ]
    if "start" in found:
        parts += [
            "From the command to the end of the first training step, batch 32.",
            seconds_table(found["start"], contenders, ".2f"),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def loader_sentence(found: Sequence[dict[str, Any]]) -> str:
    by_workers: dict[int, list[str]] = {}
    for one in found:
        by_workers.setdefault(one["loader"]["workers"], []).append(f"{TITLES[one['dataset']]} at {one['batch']}")
    each = (f"{workers} for {', '.join(where)}" for workers, where in sorted(by_workers.items()))
    return f"Workers of the DataLoader: {'; '.join(each)}."


def capture_sentence(found: Sequence[dict[str, Any]]) -> str:
    each = [
        f"{CONTENDERS[who]} {spread(seconds, '.2f')} s ({TITLES[one['dataset']]}, batch {one['batch']})"
        for one in found
        for who, seconds in one["capture_seconds"].items()
    ]
    return f"Compiling and capturing, apart: {'; '.join(each)}." if each else "Nobody compiles or captures anything."


def write_down(found: dict[str, Any], chosen: argparse.Namespace) -> None:
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if chosen.markdown:
        chosen.markdown.write_text(markdown(found), encoding="utf-8")


def measured_parts(chosen: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    if "speed" in chosen.what:
        done = []
        for dataset, batch in itertools.product(chosen.dataset, chosen.batch or (8, 32, 128, 512)):
            done.append(speed(chosen, dataset, batch))
            yield "speed", done
    if "sweep" in chosen.what:
        yield "sweep", sweep(chosen)
    if "start" in chosen.what:
        yield "start", start(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--what", nargs="+", choices=["speed", "sweep", "start"], default=["speed", "sweep", "start"])
    add("--contender", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    add("--rounds", type=int, default=5)
    add("--dataset", nargs="+", choices=list(DATASETS), default=["digits", "digits32"], help="of speed")
    add("--data-dir", default=os.environ.get("NORMLAB_DATA", ROOT / "data"), help="where CIFAR-10 is")
    add("--batch", nargs="+", type=int, help="default: 8 32 128 512 of speed, 8 32 128 of the sweep")
    add("--images", type=int, help="images that count in a measurement of speed, about")
    add("--norm", nargs="+", help=f"of the sweep; default: {' '.join(NORMS)}")
    add("--seeds", type=int, default=1, help="of the sweep")
    add("--epochs", type=int, help="of each run of the sweep; default: as in conf/config.yaml")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    add("--workers", type=int, help="of the DataLoader; default: the fastest of a few, tried first")
    add(
        "--settings",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="more of every run: model, depth, lr and the like; the opponents do not follow all of normlab's settings",
    )
    add("--json", type=Path, help="a file for everything measured, kept up to date while measuring")
    add("--markdown", type=Path, help="a file for the tables, likewise")
    chosen = parser.parse_args()
    options = {key: value for key, value in vars(chosen).items() if key not in ("data_dir", "json", "markdown")}
    found: dict[str, Any] = {"machine": machine(chosen.device), "options": options}
    for part, value in measured_parts(chosen):
        found[part] = value
        write_down(found, chosen)
    print(markdown(found))
