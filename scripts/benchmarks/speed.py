"""normlab, a plain PyTorch loop, Lightning and a tuned loop side by side, with the same networks, images, optimizer,
schedule and precision. scripts/benchmarks/contenders.py has what each is.

speed   images per second while training, after an epoch that warms up and does not count; without evaluation, and
        without compiling and capturing, which are reported apart. And the peak memory of the process. Everything is
        measured once before anything is measured a second time; --json FILE --resume goes on where --limit stopped
sweep   seconds of a whole sweep, norm=bn,affine,bnminus,none batch=8,32,128 on the digits: of normlab's command, and of
        one process that trains the same networks one after the other
start   seconds from the command to the end of its first training step

Each measurement is a process of its own. In a round everybody is measured once, in an order that rotates from round to
round, and a ratio is that of one round.

--contender compile, a plain loop whose network is compiled, is measured where it is named: it compiles for a minute.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, configure, described, machine, machine_line, spread, table
from normlab import runs
from normlab.common.cpu import cores

CONTENDERS = {
    "normlab": "normlab",
    "plain": "plain PyTorch",
    "lightning": "Lightning",
    "tuned": "tuned PyTorch",
    "compile": "torch.compile",
}
USUAL = ("normlab", "plain", "lightning", "tuned")
UNTUNED = ("plain", "lightning")  # what people use
DATASETS = {
    "digits": ["dataset=digits"],
    "digits32": ["dataset=digits", "dataset.image_size=32"],
    "cifar10": ["dataset=cifar10", "dataset.crop_padding=4"],
    # A folder DATA_DIR/cifar10_jpeg, not augmented: the opponents augment on the CPU, image by image.
    "cifar10_jpeg": [
        *("dataset=image_folder", "dataset.path=${data_dir}/cifar10_jpeg", "dataset.name=cifar10_jpeg"),
        "dataset.flip=false",
    ],
}
TITLES = {
    "digits": "digits, 8x8",
    "digits32": "digits, 32x32",
    "cifar10": "CIFAR-10, 32x32",
    "cifar10_jpeg": "CIFAR-10 (JPEG), 32x32, not augmented",
}
TRAINING_IMAGES = {"digits": 1438, "digits32": 1438, "cifar10": 50_000, "cifar10_jpeg": 20_000}
# Images that count in a measurement, about: a few seconds of training on two slow cores, or on a GPU.
COUNTED = {"digits": 600, "digits32": 240, "cifar10": 240, "cifar10_jpeg": 240}
COUNTED_ON_GPU, COUNTED_STEPS_ON_GPU = 20_000, 600  # the fewer of both
COUNTED_STEPS = 3  # at least
WARM_STEPS = {"cpu": 1, "cuda": 5}  # at least, in whole epochs: on a GPU a step is captured after a few
LOADERS = {"cpu": (0, 2), "cuda": (0, 4, 8)}  # workers that are tried
NORMS, SWEPT_BATCHES = ("bn", "affine", "bnminus", "none"), (8, 32, 128)
POLL_SECONDS = 0.01
LONGEST_SECONDS = 150  # of a measurement, where there is a limit
UNFINISHED = 75  # the exit status of a command that reached its limit
TRAIN = str(ROOT / "train.py")


ends = math.inf  # when the limit is reached, by time.monotonic()


class UnavailableError(Exception):
    """Why a contender cannot be measured."""


class LimitError(Exception):
    """The time is over."""


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
        for _ in measure_round(title, contenders, turn, one, found):
            pass
    return found


def measure_round(
    title: str, contenders: Sequence[str], turn: int, one: Callable[[str], dict[str, Any]], found: Measured
) -> Iterator[None]:
    """Measure each contender whose round it is, and note it; yield after each."""
    first = turn % len(contenders)
    for contender in (*contenders[first:], *contenders[:first]):
        if contender in found.unavailable or len(found.rounds.setdefault(contender, [])) > turn:
            continue
        try:
            measured = one(contender)
        except UnavailableError as error:
            found.unavailable[contender] = f"n/a: {error}"
            say(f"{title}: {contender}: n/a: {error}")
        else:
            found.rounds[contender].append(measured)
            value = measured.get("images_per_second") or measured["seconds"]
            unit = "images/s" if "images_per_second" in measured else "s"
            say(f"{title}, round {turn + 1}: {contender}: {value:.4g} {unit}")
        yield


def summary(found: Measured, key: str, faster: str) -> dict[str, Any]:
    """Medians and spreads of `key`, of which the `faster` ("more" or "less") is better; and how many times as fast as
    each other contender normlab is, round by round."""
    values = {who: found.values(who, key) for who in found.rounds}
    ours, theirs = values.get("normlab", []), {who: each for who, each in values.items() if each and who != "normlab"}
    best = max if faster == "more" else min
    untuned = [theirs[who] for who in UNTUNED if who in theirs]
    if untuned:
        theirs["faster of plain and lightning"] = [best(each) for each in zip(*untuned, strict=False)]
    ratios = {}
    for who, each in theirs.items() if ours else ():  # of rounds that both have: the last one may be under way
        pairs = zip(ours, each, strict=False) if faster == "more" else zip(each, ours, strict=False)
        ratios[who] = described([a / b for a, b in pairs])
    return {key: {who: described(each) for who, each in values.items() if each}, "times_as_fast_as": ratios}


def child(contender: str, **wanted: Any) -> dict[str, Any]:
    """What a fresh process of contenders.py found.

    Raises:
        UnavailableError: if it failed.
        LimitError: if the time is over.
    """
    if contender == "lightning" and importlib.util.find_spec("lightning") is None:
        raise UnavailableError("Lightning is not installed (pip install -e .[bench])")
    command = child_command(contender, **wanted)
    left = ends - time.monotonic()
    if left <= 0:
        raise LimitError
    limit = min(left, LONGEST_SECONDS) if math.isfinite(ends) else None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        if left <= LONGEST_SECONDS:
            raise LimitError from None
        raise UnavailableError(f"it took more than {LONGEST_SECONDS} s") from None
    if done.returncode:
        raise UnavailableError(reason(done.stderr))
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child_command(contender: str, **wanted: Any) -> list[str]:
    script = Path(__file__).with_name("contenders.py")
    return [sys.executable, str(script), json.dumps({"contender": contender, **wanted})]


def reason(stderr: str) -> str:
    return stderr.strip().splitlines()[-1][:200] if stderr.strip() else "it ended without a word"


def of_every_run(chosen: argparse.Namespace, precision: str) -> list[str]:
    folder = f"data_dir={Path(chosen.data_dir).expanduser().resolve()}"
    return [f"device={chosen.device}", f"precision={precision}", folder, *chosen.settings]


# Images per second, and memory


def counted_images(device: str, dataset: str, batch: int) -> int:
    return COUNTED[dataset] if device == "cpu" else min(COUNTED_ON_GPU, COUNTED_STEPS_ON_GPU * batch)


def sizes(device: str, dataset: str, batch: int, counted: int) -> tuple[int, int, int]:
    """Training images of an epoch, full batches all; epochs, and how many of them warm up."""
    images = max(1, min(TRAINING_IMAGES[dataset], counted) // batch) * batch
    warm = math.ceil(WARM_STEPS[device] * batch / images)
    return images, warm + math.ceil(max(counted, COUNTED_STEPS * batch) / images), warm


def speed(chosen: argparse.Namespace, before: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Measure every combination of precision, images and batch once, then again; yield all after each measurement.

    `before`: what an earlier command found, which is not measured again.
    """
    keys = [*itertools.product(chosen.precision, chosen.dataset, chosen.batch or (8, 32, 128, 512))]
    found = {(one["precision"], one["dataset"], one["batch"]): one for one in before}
    loaders = {(one["dataset"], one["batch"]): one["loader"] for one in before}
    for turn, key in itertools.product(range(chosen.rounds), keys):
        precision, dataset, batch = key
        images, epochs, warm = sizes(
            chosen.device, dataset, batch, chosen.images or counted_images(chosen.device, dataset, batch)
        )
        overrides = [
            *DATASETS[dataset],
            *(f"batch={batch}", f"epochs={epochs}", f"dataset.train_size={images}", "dataset.test_size=100"),
            *("drop_last=true", "schedule.per=step", f"threads={cores()}"),
            *of_every_run(chosen, precision),
        ]
        title = f"{dataset}, batch {batch}, {precision}"
        if (dataset, batch) not in loaders:
            loaders[dataset, batch] = loader_of(chosen, title, overrides, warm)
        loader = loaders[dataset, batch]
        facts = {
            **{"precision": precision, "dataset": dataset, "batch": batch},
            **{"images_of_an_epoch": images, "epochs": epochs, "loader": loader},
        }
        known = found.get(key, {})
        missing = known.get("unavailable", {})
        if turn == 0:  # who could not be measured by an earlier command is tried again
            missing = {who: why for who, why in missing.items() if who not in chosen.contender}
        measured = Measured(known.get("rounds", {}), missing)
        one = partial(speed_of, overrides, loader["workers"], warm)
        for _ in measure_round(title, chosen.contender, turn, one, measured):
            found[key] = facts | speed_summary(measured)
            yield [*found.values()]


def speed_summary(found: Measured) -> dict[str, Any]:
    others = ("peak_memory_bytes", "peak_device_bytes", "capture_seconds")
    return {
        **summary(found, "images_per_second", faster="more"),
        **{key: {who: described(each) for who in found.rounds if (each := found.values(who, key))} for key in others},
        **vars(found),
    }


def speed_of(overrides: list[str], workers: int, warm: int, contender: str) -> dict[str, Any]:
    config = configure("outputs", *overrides)
    found = child(contender, do="one run", settings=config.as_dict(), overrides=overrides, workers=workers)
    images = config.dataset.train_size
    assert images
    steps = config.epochs * images // config.batch
    if found["steps"] != steps:
        raise UnavailableError(f"it made {found['steps']} steps instead of {steps}")
    counted = found["epoch_seconds"][warm:]
    return {**found, "images_per_second": images * len(counted) / sum(counted)}


def loader_of(chosen: argparse.Namespace, title: str, overrides: list[str], warm: int) -> dict[str, Any]:
    """How many workers the DataLoader gets: those with which one measurement of the plain loop was fastest."""
    tried: dict[int, float] = {}
    if chosen.workers is None and set(UNTUNED) & set(chosen.contender):
        for workers in LOADERS[chosen.device]:
            try:
                tried[workers] = speed_of(overrides, workers, warm, "plain")["images_per_second"]
            except UnavailableError as error:
                say(f"{title}: a loader with {workers} workers: {error}")
            else:
                say(f"{title}: a loader with {workers} workers: {tried[workers]:.4g} images/s")
    return {"workers": max(tried, key=lambda workers: tried[workers], default=chosen.workers or 0), "tried": tried}


# Whole commands


def sweep(chosen: argparse.Namespace) -> dict[str, Any]:
    norms, batches = chosen.norm or list(NORMS), chosen.batch or list(SWEPT_BATCHES)
    general = of_every_run(chosen, chosen.precision[0])
    overrides = [*general, *([f"epochs={chosen.epochs}"] if chosen.epochs else [])]
    arms = list(itertools.product(norms, batches, range(chosen.seeds)))
    configs = [
        configure("outputs", f"norm={norm}", f"batch={batch}", f"seed={seed}", f"threads={cores()}", *overrides)
        for norm, batch, seed in arms
    ]
    short = ["batch=32", "dataset.train_size=576", "epochs=2", "drop_last=true", f"threads={cores()}"]
    loader = loader_of(chosen, "sweep", [*general, *short], warm=1)

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
    overrides = ["norm=bn", "batch=32", *of_every_run(chosen, chosen.precision[0])]
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
    ratios = {
        "faster of plain and lightning": "the faster of plain and Lightning",
        **{who: CONTENDERS[who] for who in contenders if who in ("tuned", "compile")},
    }
    titles = [CONTENDERS[who] for who in contenders]
    head = ["images", "precision", "batch", *titles, *(f"normlab / {title}" for title in ratios.values())]
    rows = []
    for one in found:
        cells = [cell(one, "images_per_second", who, ".0f") for who in contenders]
        over = [spread(one["times_as_fast_as"].get(who), ".2f") for who in ratios]
        rows.append([TITLES[one["dataset"]], one["precision"], str(one["batch"]), *cells, *over])
    return table(head, rows)


def memory_table(found: Sequence[dict[str, Any]], contenders: Sequence[str], key: str) -> str:
    head = ["images", "precision", "batch", *(CONTENDERS[who] for who in contenders)]
    return table(
        head,
        [
            [
                *(TITLES[one["dataset"]], one["precision"], str(one["batch"])),
                *(cell(one, key, who, ".0f", 2**20) for who in contenders),
            ]
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
        f"{machine_line(found['machine'])}; {options['device']}, {', '.join(options['precision'])}. Medians (min to"
        f" max) of {options['rounds']} {'round' if options['rounds'] == 1 else 'rounds'}, or of what there is of them."
    ]
    if "speed" in found:
        parts += [
            "Training, images/s after epochs that warm up, without evaluation; ratios above 1: normlab is faster.",
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
    by_workers: dict[int, dict[str, None]] = {}
    for one in found:
        where = f"{TITLES[one['dataset']]} at {one['batch']}"
        by_workers.setdefault(one["loader"]["workers"], {})[where] = None
    each = (f"{workers} for {', '.join(where)}" for workers, where in sorted(by_workers.items()))
    return f"Workers of the DataLoader: {'; '.join(each)}."


def capture_sentence(found: Sequence[dict[str, Any]]) -> str:
    each = [
        f"{CONTENDERS[who]} {spread(seconds, '.2f')} s ({TITLES[one['dataset']]}, {one['precision']}, batch"
        f" {one['batch']})"
        for one in found
        for who, seconds in one["capture_seconds"].items()
    ]
    return f"Compiling and capturing, apart: {'; '.join(each)}." if each else "Nobody compiles or captures anything."


def write_down(found: dict[str, Any], chosen: argparse.Namespace) -> None:
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if chosen.markdown:
        chosen.markdown.write_text(markdown(found), encoding="utf-8")


def measured_parts(chosen: argparse.Namespace, before: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if "speed" in chosen.what:
        for found in speed(chosen, before.get("speed", [])):
            yield "speed", found
    if "sweep" in chosen.what and "sweep" not in before:
        yield "sweep", sweep(chosen)
    if "start" in chosen.what and "start" not in before:
        yield "start", start(chosen)


def earlier(chosen: argparse.Namespace, now: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command with the same file found, which has to be of this machine and these settings."""
    if not (chosen.resume and chosen.json and chosen.json.is_file()):
        return {}
    before: dict[str, Any] = json.loads(chosen.json.read_text(encoding="utf-8"))
    names = {"machine": ("gpu", "processor", "versions"), "options": ("device", "settings", "images")}
    for part, name in ((part, name) for part, each in names.items() for name in each):
        if before[part][name] != now[part][name]:
            sys.exit(
                f"{chosen.json} was measured with another {name} ({before[part][name]}, now {now[part][name]})."
                " Leave out --resume to begin anew, or name another file."
            )
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--what", nargs="+", choices=["speed", "sweep", "start"], default=["speed", "sweep", "start"])
    add("--contender", nargs="+", choices=list(CONTENDERS), default=list(USUAL))
    add("--rounds", type=int, default=5)
    add("--dataset", nargs="+", choices=list(DATASETS), default=["digits", "digits32"], help="of speed")
    add("--data-dir", default=os.environ.get("NORMLAB_DATA", ROOT / "data"), help="where CIFAR-10 is")
    add("--batch", nargs="+", type=int, help="default: 8 32 128 512 of speed, 8 32 128 of the sweep")
    add("--images", type=int, help="images that count in a measurement of speed, about")
    add("--norm", nargs="+", help=f"of the sweep; default: {' '.join(NORMS)}")
    add("--seeds", type=int, default=1, help="of the sweep")
    add("--epochs", type=int, help="of each run of the sweep; default: as in conf/config.yaml")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", nargs="+", choices=["fp32", "tf32", "bf16"], default=["fp32"], help="of the sweep: the first")
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
    add("--resume", action="store_true", help="go on with the file of --json: measure what it lacks")
    add("--limit", type=float, help=f"seconds, after which it ends, with exit status {UNFINISHED} if it is not done")
    carry_out(parser.parse_args())


def carry_out(chosen: argparse.Namespace) -> None:
    global ends
    if chosen.limit:
        ends = time.monotonic() + chosen.limit
    left_out = ("data_dir", "json", "markdown", "resume", "limit")
    options = {key: value for key, value in vars(chosen).items() if key not in left_out}
    found: dict[str, Any] = {"machine": machine(chosen.device), "options": options}
    before = earlier(chosen, found)
    for key in ("contender", "precision") if before else ():
        named = {*options[key], *before["options"][key]}
        options[key] = [name for name in (*CONTENDERS, "fp32", "tf32", "bf16") if name in named]
    found |= {part: value for part, value in before.items() if part not in found}
    try:
        for part, value in measured_parts(chosen, before):
            found[part] = value
            write_down(found, chosen)
    except LimitError:
        say("The limit is reached; the same command with --resume goes on.")
        sys.exit(UNFINISHED)
    write_down(found, chosen)  # where nothing was left to measure, too
    print(markdown(found))
    missing = {who: why for one in found.get("speed", []) for who, why in one["unavailable"].items()}
    if chosen.limit and (missing := {who: why for who, why in missing.items() if who in chosen.contender}):
        sys.exit("; ".join(f"{who}: {why}" for who, why in missing.items()))  # a part of a check


if __name__ == "__main__":
    main()
