"""`scripts/bench norms`: the time of a whole training step (forward, backward, update, and what a norm does around
it) with every file of conf/norm, over that with bn; ResNet-18, batch 32, 32x32 random images. Each round builds
every network anew, so that no norm keeps a lucky place in memory, and times bn between the others. What has
statistics of the batch is also timed with norm_batch=4. docs/variants.md has the numbers of
--json docs/benchmarks/norms.json, and python scripts/variants.py puts them there.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import ROOT, configure, described, machine, print_machine, print_ratios
from normlab import models
from normlab.config import schema as config
from normlab.norms import BatchStatistics, Steps
from normlab.training.gradient_transforms import build_transform
from normlab.training.optimizers import build_optimizer

SETTINGS = {"tbbn": ("sampler=class_incremental", "sampler.memory_batch=8")}  # what a norm is refused without


def norms(rounds: int, chosen: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        names = chosen or sorted(path.stem for path in (ROOT / "conf" / "norm").glob("*.yaml"))
        arms: dict[str, config.RunConfig] = {}
        for name in names:
            arms[name] = configure(folder, f"norm={name}", "batch=32", *SETTINGS.get(name, ()))
            if has_statistics(arms[name]) and name != "tbbn":  # which has groups of its own
                arms[f"{name}, norm_batch=4"] = configure(folder, f"norm={name}", "batch=32", "norm_batch=4")
        reference = configure(folder, "norm=bn", "batch=32")
        ratios: dict[str, list[float]] = {arm: [] for arm in arms}
        references = []
        for turn in range(rounds):
            before = step_seconds(reference)
            references.append(before)
            for number, (arm, settings) in enumerate(arms.items()):
                seconds = step_seconds(settings)
                after = step_seconds(reference) if number % 3 == 2 or number + 1 == len(arms) else before
                ratios[arm].append(seconds / ((before + after) / 2))
                before = after
            references.append(before)
            print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    bn_seconds = statistics.median(references)  # the first and the last of each round
    print_machine(f"ResNet-18, batch 32, 32x32, fp32; {rounds} rounds; bn: {bn_seconds:.2f} s a step")
    print_ratios("norm | step time / bn's", ratios)
    return {"bn_seconds": bn_seconds, "ratios": {arm: described(times) for arm, times in ratios.items()}}


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
        layers.start()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()
        if transform:
            transform()
        optimizer.step()
        layers.end(lambda: network(images))
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--norm", nargs="*", default=[], help="these only")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    chosen = parser.parse_args()
    options = {"rounds": chosen.rounds, "norm": chosen.norm}
    found = {"machine": machine("cpu"), "options": options, **norms(chosen.rounds, chosen.norm)}
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
