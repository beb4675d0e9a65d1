"""`scripts/bench probes`: the time of one measurement of every file of conf/probe, over that of a training step; the
same network and images as in `norms`, at two steps of training. A probe that measures pairs of steps is timed at one.
"""

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import ROOT, configure, print_machine, print_ratios
from normlab import models
from normlab.norms import find_sites
from normlab.probes import ProbedNetwork, Probes, StepSnapshot
from normlab.training.optimizers import build_optimizer


def probes(rounds: int) -> None:
    """Each round times a training step before and after each probe, on one network that trains on."""
    with tempfile.TemporaryDirectory() as folder:
        names = sorted(path.stem for path in (ROOT / "conf" / "probe").glob("*.yaml"))
        settings = configure(folder, f"probe=[{','.join(names)}]", "batch=32")
        network = models.build(settings, num_classes=10, image_size=32)
        optimizer = build_optimizer(settings.optimizer, network)
        probed = ProbedNetwork(network, tuple(site.norm for site in find_sites(network)))
        every = {name: Probes({name: one}, probed, 1, lambda *rows: None) for name, one in settings.probe.items()}
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
                    StepSnapshot(
                        0,
                        settings.optimizer.lr,
                        images,
                        labels,
                        network=network,
                        optimizer=optimizer,
                        scaler=torch.amp.GradScaler("cpu", enabled=False),
                        transform=None,
                        criterion=F.cross_entropy,
                        forward_context=nullcontext,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    probes(parser.parse_args().rounds)
