"""`scripts/bench loop`: the training loop against a bare PyTorch loop, in one process, turn by turn.

Both train the same ResNet-18 of torchvision (3x3 stem) on the digits with the same SGD and batch size. The bare
loop has its normalised float32 images in memory and does nothing but index, forward, backward, step. Ours
is what a run does: seeds, schedule, metrics, heartbeat, divergence checks. Evaluation is in neither.
`scripts/bench loop memory` compares the peak memory of two processes instead, each training two epochs.

`scripts/bench norms`: the time of a whole training step (forward, backward, update, and what a norm does around
it) with every file of conf/norm, over that with bn; ResNet-18, batch 32, 32x32 random images. Each round builds
every network anew, so that no norm keeps a lucky place in memory, and times bn between the others. What has
statistics of the batch is also timed with norm_batch=4.

`scripts/bench probes`: the time of one measurement of every file of conf/probe, over that of a training step; the same
network and images, at two steps of training. A probe that measures pairs of steps is timed at one.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from normlab import config, models, runs
from normlab.cli import settings_of
from normlab.data.load import Data
from normlab.norms import BatchStatistics, Steps, find_sites
from normlab.probes import Moment, Probes, Subject
from normlab.training import device
from normlab.training.gradients import build_transform
from normlab.training.interrupt import StopRequest
from normlab.training.loop import Position, train
from normlab.training.optimizers import build_optimizer
from normlab.training.run import carry_out, data_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def configure(folder: str, *overrides: str) -> config.RunConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = ["device=cpu", f"output_dir={folder}", f"data_dir={folder}", *overrides]
        return config.parse(settings_of(compose("config", settings)))


def ours(settings: config.RunConfig, data: Data, network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Images per second of one epoch, as a run records it."""
    run = runs.Run(settings.as_dict())
    run.freeze()
    rows: list[dict[str, float]] = []
    steps = data.train.steps
    at = Position(0, 0, torch.zeros(steps), torch.zeros(steps, dtype=torch.int64), 0.0, 0.0, 0)
    train(
        settings,
        network,
        data,
        optimizer,
        torch.amp.GradScaler("cpu", enabled=False),
        at,
        StopRequest(),
        beat=lambda at: beat(run, at),
        checkpoint=lambda at: None,
        record=rows.append,
    )
    return rows[0]["images_per_second"]


def beat(run: runs.Run, at: Position) -> None:
    run.write_status("running", durable=False, step=at.batch)


def bare(images: Tensor, labels: Tensor, batch: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Images per second of one epoch of the bare loop."""
    network.train()
    begun = time.perf_counter()
    for index in torch.randperm(len(labels)).split(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images[index]), labels[index])
        loss.backward()
        optimizer.step()
    return len(labels) / (time.perf_counter() - begun)


def in_memory(data: Data) -> tuple[Tensor, Tensor]:
    images, labels = zip(*data.train.batches(0), strict=True)
    return torch.cat(images), torch.cat(labels)


def loop(rounds: int) -> None:
    print_machine("digits, ResNet-18, fp32; one epoch a turn")
    print("| batch | ours, images/s | bare, images/s | ours / bare: median (min to max), pairs |")
    print("|---|---|---|---|")
    for batch, turns in ((8, rounds), (128, 3 * rounds)):  # an epoch at 128 is short, so its pairs scatter more
        with tempfile.TemporaryDirectory() as folder:
            settings = configure(folder, f"batch={batch}", "epochs=1", "dataset.test_size=10")
            data = data_of(settings, CPU, print)
            images, labels = in_memory(data)
            # One network for both: where its tensors happen to lie in memory can change the speed by a tenth.
            network = models.build(settings, num_classes=10, image_size=8)
            optimizer = build_optimizer(settings.optimizer, network)
            pairs = []
            for turn in range(turns + 1):
                first = turn % 2  # whoever goes second has the warmer cache
                speeds = {}
                for who in (first, 1 - first):
                    if who == 0:
                        speeds[0] = ours(settings, data, network, optimizer)
                    else:
                        speeds[1] = bare(images, labels, batch, network, optimizer)
                pairs.append((speeds[0], speeds[1]))
            pairs = pairs[1:]
            print_row(batch, [a for a, _ in pairs], [b for _, b in pairs])


def print_row(batch: int, ours: list[float], bare: list[float]) -> None:
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {len(ratios)}"
    print(f"| {batch} | {statistics.median(ours):.0f} | {statistics.median(bare):.0f} | {spread} |", flush=True)


def memory(rounds: int) -> None:
    """Peak resident memory of a whole process, ours and bare in turn."""
    print("| batch | a run, MiB | bare loop, MiB | ours / bare: median (min to max), pairs |")
    print("|---|---|---|---|")
    for batch in (8, 128):
        peaks = {who: [_peak(who, batch) / 2**20 for _ in range(rounds)] for who in ("ours", "bare")}
        print_row(batch, peaks["ours"], peaks["bare"])


def _peak(who: str, batch: int) -> int:
    command = [sys.executable, __file__, "loop", f"peak-{who}", "--batch", str(batch)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak(who: str, batch: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = configure(folder, f"batch={batch}", "epochs=2")
        if who == "ours":
            carry_out(settings)
        else:
            images, labels = in_memory(data_of(settings, CPU, print))
            network = models.build(settings, num_classes=10, image_size=8)
            optimizer = build_optimizer(settings.optimizer, network)
            for _ in range(2):
                bare(images, labels, batch, network, optimizer)
        print(device.peak_memory_bytes(CPU))


def norms(rounds: int, chosen: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = chosen or sorted(path.stem for path in (ROOT / "conf" / "norm").glob("*.yaml"))
        arms: dict[str, config.RunConfig] = {}
        for name in names:
            arms[name] = configure(folder, f"norm={name}", "batch=32")
            if has_statistics(arms[name]):
                arms[f"{name}, norm_batch=4"] = configure(folder, f"norm={name}", "batch=32", "norm_batch=4")
        reference = configure(folder, "norm=bn", "batch=32")
        ratios: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn in range(rounds):
            before = step_seconds(reference)
            for number, (arm, settings) in enumerate(arms.items()):
                seconds = step_seconds(settings)
                after = step_seconds(reference) if number % 3 == 2 or number + 1 == len(arms) else before
                ratios[arm].append(seconds / ((before + after) / 2))
                before = after
            print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        print_machine(f"ResNet-18, batch 32, 32x32, fp32; {rounds} rounds; bn: {before:.2f} s a step")
        print_ratios("norm | step time / bn's", ratios)


def has_statistics(settings: config.RunConfig) -> bool:
    network = models.build(settings, num_classes=10, image_size=32)
    return any(isinstance(module, BatchStatistics) for module in network.modules())


def step_seconds(settings: config.RunConfig) -> float:
    """The faster of two training steps, after one to warm up."""
    network = models.build(settings, num_classes=10, image_size=32)
    optimizer = build_optimizer(settings.optimizer, network)
    transform, layers = build_transform(settings.optimizer, network), Steps(network)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    network.train()
    times = []
    for step in range(3):
        begun = time.perf_counter()
        layers.begin(50 + step, 100)  # past every warm-up and ramp
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()
        if transform:
            transform()
        optimizer.step()
        layers.end()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def probes(rounds: int) -> None:
    """Each round times a training step before and after each probe, on one network that trains on."""
    with tempfile.TemporaryDirectory() as folder:
        names = sorted(path.stem for path in (ROOT / "conf" / "probe").glob("*.yaml"))
        settings = configure(folder, f"probe=[{','.join(names)}]", "batch=32")
        network = models.build(settings, num_classes=10, image_size=32)
        optimizer = build_optimizer(settings.optimizer, network)
        subject = Subject(network, tuple(site.norm for site in find_sites(network)))
        every = {name: Probes({name: one}, subject, 1, lambda *found: None) for name, one in settings.probe.items()}
        images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
        ratios: dict[str, list[float]] = {name: [] for name in names}
        network.train()
        train_seconds(network, optimizer, images, labels)
        for turn in range(rounds + 1):  # the first warms up, and finds out the order of the layers
            before = train_seconds(network, optimizer, images, labels)
            for name, probe in every.items():
                optimizer.zero_grad(set_to_none=True)
                begun = time.perf_counter()
                probe.measure(
                    Moment(
                        0,
                        settings.optimizer.lr,
                        images,
                        labels,
                        network=network,
                        optimizer=optimizer,
                        scaler=torch.amp.GradScaler("cpu", enabled=False),
                        transform=None,
                        loss=F.cross_entropy,
                        within=nullcontext,
                        seed=torch.manual_seed,
                    )
                )
                seconds = time.perf_counter() - begun
                after = train_seconds(network, optimizer, images, labels)
                ratios[name].append(seconds / ((before + after) / 2))
                before = after
            print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
        print_machine(f"ResNet-18, batch 32, 32x32, fp32; {rounds} rounds; a training step: {before:.2f} s")
        print_ratios("probe | a measurement / a training step", {name: times[1:] for name, times in ratios.items()})


def train_seconds(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One step of training."""
    begun = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(network(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - begun


def print_ratios(columns: str, ratios: dict[str, list[float]]) -> None:
    print(f"| {columns}: median | min to max |")
    print("|---|---|---|")
    for name, times in ratios.items():
        print(f"| `{name}` | {statistics.median(times):.2f} | {min(times):.2f} to {max(times):.2f} |")


def print_machine(what: str) -> None:
    found = device.provenance(CPU, "")
    versions = found["versions"]
    print(
        f"{found['device']}, {found['threads']} threads, Python {versions['python']}, torch {versions['torch']},"
        f" torchvision {versions['torchvision']}; {what}\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=["loop", "norms", "probes"])
    parser.add_argument("what", nargs="?", default="speed", choices=["speed", "memory", "peak-ours", "peak-bare"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--norm", nargs="*", default=[], help="for norms: these only")
    parser.add_argument("--batch", type=int, default=128, help="for peak-ours and peak-bare")
    chosen = parser.parse_args()
    if chosen.bench == "norms":
        norms(chosen.rounds, chosen.norm)
    elif chosen.bench == "probes":
        probes(chosen.rounds)
    elif chosen.what == "speed":
        loop(chosen.rounds)
    elif chosen.what == "memory":
        memory(min(chosen.rounds, 3))
    else:
        peak(chosen.what.removeprefix("peak-"), chosen.batch)
