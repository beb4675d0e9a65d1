"""The parts of each stage, and their sizes."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_checks.parts import Part

STAGES = ("correct", "speed", "sweeps")


@dataclass(frozen=True)
class Sizes:
    """What differs between a check and a trial of this script; settings are those of train.py."""

    tests: Sequence[str]  # words to pytest
    compared: Sequence[str]  # the sweep that is trained by several engines
    profiled: Sequence[str]  # the run whose step is profiled
    precisions: Sequence[str]
    batches: Sequence[str]
    dataset: str  # of the benchmarks, where there is no CIFAR-10
    images: Sequence[str]  # that count in a measurement: words to scripts/bench
    network: Sequence[str]
    rounds: int
    sweep: Sequence[str]
    seeds: int  # of the sweep
    experiments: str  # where WORDS names none
    with_images: str  # before those, where CIFAR-10 (JPEG) is


SMALL = Sizes(
    tests=(),
    compared=(
        *("norm=bn,none,bnminus,gn", "batch=8,32", "seed=0,1", "epochs=2", "dataset.train_size=512"),
        *("optimizer.lr=0.005", "deterministic=true"),
    ),
    profiled=("dataset.image_size=32", "batch=32", "precision=bf16", "epochs=2", "drop_last=true"),
    precisions=("bf16", "tf32", "fp32"),
    batches=("8", "32", "128", "512"),
    dataset="digits32",
    images=(),
    network=(),
    rounds=5,
    sweep=("norm=bn,affine,bnminus,none", "batch=8,32,128"),
    seeds=5,
    experiments="experiment=small_batch budget=laptop; experiment=peerthum2023_accuracy budget=laptop",
    with_images="norm=bn,affine,bnminus,none batch=8,32,128 seed=0,1,2,3,4 epochs=6 precision=bf16 dataset=image_folder"
    " dataset.path=${data_dir}/cifar10_jpeg dataset.name=cifar10_jpeg dataset.crop_padding=4 study=cifar10_jpeg",
)
NETWORK = ("model=cifar_resnet", "depth=20", "threads=1")
TINY = Sizes(
    tests=("-k", "test_engine_auto_is_a_graph or test_divergence_is_noticed"),
    compared=(
        *("norm=bn,none", "batch=16", "seed=0", "epochs=1", "dataset.train_size=96", "dataset.test_size=20"),
        *("optimizer.lr=0.005", "deterministic=true", *NETWORK),
    ),
    profiled=("batch=4", "epochs=2", "dataset.train_size=100", "dataset.test_size=20", *NETWORK),
    precisions=("bf16",),
    batches=("8",),
    dataset="digits",
    images=("--images", "40"),
    network=NETWORK,
    rounds=1,
    sweep=("norm=bn,none", "batch=16", "epochs=1", "dataset.train_size=96", "dataset.test_size=20", *NETWORK),
    seeds=1,
    experiments="norm=affine batch=16 epochs=1 dataset.train_size=96 dataset.test_size=20 study=one_more"
    f" {' '.join(NETWORK)}",
    with_images="",
)


def stage_parts(name: str, sizes: Sizes, folder: Path, work: Path, images: Path | None) -> list[Part]:
    """The parts of a stage; `images`: where CIFAR-10 (JPEG) is, if it is."""
    parts = {"correct": correct, "speed": speed, "sweeps": sweeps}
    return parts[name](sizes, folder, work, images)


def check(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"gpu_checks.{name}", *words]


def correct(sizes: Sizes, folder: Path, work: Path, images: Path | None) -> list[Part]:
    found = {name: work / f"{name}.json" for name in ("tests", "engines", "profile")}
    return [
        Part("doctor", "what train.py doctor says", 60, [sys.executable, "train.py", "doctor"]),
        Part(
            "tests",
            "the tests marked gpu, each with a limit of its own",
            240,
            check("limited", str(found["tests"]), *sizes.tests),
            found["tests"],
        ),
        Part(
            "engines",
            "captured and packed runs beside eager ones",
            180,
            check("engines", str(found["engines"]), str(work / "engines"), *sizes.compared),
            found["engines"],
        ),
        Part(
            "profile",
            "the kernels of a replayed step",
            80,
            check("replays", str(found["profile"]), str(work / "profile"), *sizes.profiled),
            found["profile"],
        ),
    ]


def speed(sizes: Sizes, folder: Path, work: Path, images: Path | None) -> list[Part]:
    # As many as there are cores for: trying several numbers, as scripts/bench does by itself, would take minutes.
    workers = min(8, (os.cpu_count() or 1) // 4)
    tables = work / "speed.md"
    words = [
        *("speed", "--what", "speed", "--device", "cuda", "--dataset", "cifar10_jpeg" if images else sizes.dataset),
        *("--data-dir", str(images or work), "--precision", *sizes.precisions, "--batch", *sizes.batches),
        *("--workers", str(workers), *sizes.images, "--settings", "engine=graph", *sizes.network),
    ]
    files = ["--json", str(folder / "speed.json"), "--markdown", str(tables), "--resume", "--limit", "{limit}"]

    def part(name: str, what: str, limit: float, contenders: Sequence[str], rounds: int, fills: bool = False) -> Part:
        options = ["--contender", *contenders, "--rounds", str(rounds), *files]
        bench = [sys.executable, "scripts/bench.py", *words, *options]
        return Part(name, what, limit, bench, tables, fills=fills)

    lightning = ["lightning"] if importlib.util.find_spec("lightning") else []
    rounds = f"{sizes.rounds} rounds of those that do not compile, as far as there is time"
    return [
        part("loop", "normlab and a plain loop, one round", 330, ["normlab", "plain"], 1),
        *([part("lightning", "Lightning, one round", 220, lightning, 1)] if lightning else []),
        part("compile", "a plain loop under torch.compile, one round", 400, ["compile"], 1, fills=True),
        part("rounds", rounds, 560, ["normlab", "plain", *lightning], sizes.rounds, fills=True),
    ]


def sweeps(sizes: Sizes, folder: Path, work: Path, images: Path | None) -> list[Part]:
    seeds = f"seed={','.join(map(str, range(sizes.seeds)))}"
    found = {name: work / f"{name}.json" for name in ("sweep", "again", "plain", "experiments")}
    report = [sys.executable, "report.py", f"output_dir={work}", "study=sweep"]
    words = os.environ.get("WORDS") or f"{sizes.with_images if images else ''};{sizes.experiments}"
    data = [f"data_dir={images}"] if images else []
    return [
        Part(
            "sweep",
            "a sweep, timed as a whole",
            150,
            check("sweeps", "sweep", str(found["sweep"]), str(work), *sizes.sweep, seeds),
            found["sweep"],
        ),
        Part(
            "again",
            "the same command once more, which trains nothing",
            40,
            check("sweeps", "again", str(found["again"]), str(work), *sizes.sweep, seeds),
            found["again"],
        ),
        Part("report", "the sweep's report", 60, report),
        Part(
            "plain",
            "the same networks by a plain loop, one seed, the others extrapolated",
            150,
            check("sweeps", "plain", str(found["plain"]), str(work), str(sizes.seeds), *sizes.sweep),
            found["plain"],
        ),
        Part(
            "experiments",
            f"while there is time: {words.strip(';')}",
            500,
            check("sweeps", "experiments", str(found["experiments"]), str(work), "{limit}", words, *data),
            found["experiments"],
            kept=40,
            fills=True,
        ),
        Part(
            "pack",
            "all studies in records.zip",
            60,
            check("sweeps", "pack", str(folder / "records.zip"), str(work)),
            closes=True,
        ),
    ]
