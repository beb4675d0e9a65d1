"""`scripts/bench loop`: the training loop against a bare PyTorch loop, in one process, turn by turn.

Both train the same ResNet-18 of torchvision (3x3 stem) on the digits with the same SGD and batch size. The bare
loop has its normalized float32 images in memory and does nothing but index, forward, backward, step. Ours
is what a run does: seeds, schedule, metrics, heartbeat, divergence checks. Evaluation is in neither.
`scripts/bench loop memory` compares the peak memory of two processes instead, each training two epochs.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import CPU, ROOT, configure, print_machine
from normlab import loggers, models, runs
from normlab.config import schema as config
from normlab.data.datasets import Data, load
from normlab.norms import Steps
from normlab.training import device
from normlab.training.distributed.process_group import SingleProcess
from normlab.training.engines import Engine
from normlab.training.interleaving import Interleaver
from normlab.training.interrupt import StopRequest
from normlab.training.loop import train
from normlab.training.optimizers import build_optimizer
from normlab.training.record import Recorder, open_log
from normlab.training.run import train_run
from normlab.training.state import Position, TrainingState
from normlab.training.step import TrainingStep
from normlab.training.tasks import task_of


def ours(settings: config.RunConfig, data: Data, step: TrainingStep) -> float:
    """Images per second of one epoch, as a run records it."""
    run = runs.Run(settings.as_dict())
    run.freeze()
    position = Position.start(data.train.steps, CPU)
    engine = Engine(settings, data.train, step, position)
    state = TrainingState(
        settings, CPU, SingleProcess(), Interleaver(), data, step, engine, None, position, "contiguous"
    )
    recorder = Rates(run, open_log(run.folder, write=False), loggers.Logger(), lambda status: None)
    train(state, recorder, StopRequest())
    return recorder.rates[0]


class Rates(Recorder):
    """Keeps the speeds that a run measures, and writes no rows."""

    rates: list[float]

    def metrics(self, row: Mapping[str, Any]) -> None:
        self.rates = [row["images_per_second"]]


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
            data = load(settings, CPU, log=print)
            images, labels = in_memory(data)
            # One network for both: where its tensors happen to lie in memory can change the speed by a tenth.
            network = models.build(settings, num_classes=10, image_size=8)
            optimizer = build_optimizer(settings.optimizer, network)
            task, scaler = task_of(data.task, settings.label_smoothing), torch.amp.GradScaler("cpu", enabled=False)
            step = TrainingStep(settings, CPU, task, network, network, Steps(network), optimizer, scaler)
            pairs = []
            for turn in range(turns + 1):
                first = turn % 2  # whoever goes second has the warmer cache
                speeds = {}
                for who in (first, 1 - first):
                    if who == 0:
                        speeds[0] = ours(settings, data, step)
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
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "loop", f"peak-{who}", "--batch", str(batch)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak(who: str, batch: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = configure(folder, f"batch={batch}", "epochs=2")
        if who == "ours":
            train_run(settings)
        else:
            images, labels = in_memory(load(settings, CPU, log=print))
            network = models.build(settings, num_classes=10, image_size=8)
            optimizer = build_optimizer(settings.optimizer, network)
            for _ in range(2):
                bare(images, labels, batch, network, optimizer)
        print(device.peak_memory_bytes(CPU))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="speed", choices=["speed", "memory", "peak-ours", "peak-bare"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128, help="for peak-ours and peak-bare")
    chosen = parser.parse_args()
    if chosen.what == "speed":
        loop(chosen.rounds)
    elif chosen.what == "memory":
        memory(min(chosen.rounds, 3))
    else:
        peak(chosen.what.removeprefix("peak-"), chosen.batch)
