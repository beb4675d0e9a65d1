"""`scripts/bench where`: where the time of a training step goes, by kind of operation, as PyTorch's profiler sees it.

Steps of a run's own network, optimizer and batch on random images, once as PyTorch does them by default and once as a
run on a CPU does them (taps trimmed, one fused update, freed memory kept, its memory format), in two processes.
"""

import argparse
import json
import subprocess
import sys
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import ROOT, configure, print_machine, table
from normlab.training import device, taps
from normlab.training.calibration import Trial

STEPS = 5
KINDS = {  # by the beginning of an operation's name, without aten::
    "convolution, forward": ("mkldnn_convolution", "cudnn_convolution", "_conv", "slow_conv", "thnn_conv"),
    "convolution, backward": ("convolution_backward", "mkldnn_convolution_backward", "cudnn_convolution_backward"),
    "normaliser": (
        "native_batch_norm",
        "batch_norm",
        "cudnn_batch_norm",
        "_batch_norm",
        "var_mean",
        "native_group_norm",
    ),
    "optimizer": ("_fused_sgd", "_fused_adam", "_foreach"),
    "filling and copying": ("fill_", "copy_", "zero_", "clone", "empty", "constant_pad_nd"),
}


def kind_of(name: str) -> str:
    name = name.removeprefix("aten::")
    # The longest beginning decides: a backward pass begins like its forward pass.
    found = [(len(start), kind) for kind, starts in KINDS.items() for start in starts if name.startswith(start)]
    return max(found)[1] if found else "other operations"


def measure(tuned: bool, side: int, batch: int, memory_format: str, threads: int, where: str) -> dict[str, float]:
    """Milliseconds of a step by kind; "Python" is what no operation accounts for."""
    torch.set_num_threads(threads)
    place = torch.device(where)
    settings = configure("outputs", f"batch={batch}", "norm=bn", f"memory_format={memory_format}")
    if tuned:
        device.prepare(settings, place, threads)
    with mock.patch.object(taps, "trim", taps.trim if tuned else lambda network, images: None):
        trial = Trial(settings, place, side=side, classes=10)
    if not tuned:
        for group in trial.step.optimizer.param_groups:
            group["fused"], group["foreach"] = False, True
    for _ in range(3):
        trial.seconds()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if place.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        seconds = sum(trial.seconds() for _ in range(STEPS))
    spent: dict[str, float] = {}
    for event in recorded.key_averages():
        on_gpu = event.device_type == DeviceType.CUDA
        if (place.type == "cuda") == on_gpu and (on_gpu or event.key.startswith("aten::")):
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[kind_of(event.key)] = spent.get(kind_of(event.key), 0.0) + time / 1000 / STEPS
    total = seconds * 1000 / STEPS
    return {**spent, "Python and the rest": max(0.0, total - sum(spent.values())), "a step": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="with one, times of operations add up (default)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(**json.loads(chosen.one))))
        return
    print_machine(f"ResNet-18, bn, SGD, fp32, {chosen.threads} threads; milliseconds of a step, of {STEPS}")
    rows: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "other operations", "Python and the rest", "a step")}
    head = [""]
    for side, batch, formats in ((8, 8, "contiguous"), (8, 128, "contiguous"), (32, 32, "channels_last")):
        for tuned in (False, True):
            what: dict[str, Any] = {"tuned": tuned, "side": side, "batch": batch, "threads": chosen.threads}
            what |= {"memory_format": formats if tuned else "contiguous", "where": chosen.device}
            command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "where", "--one", json.dumps(what)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            head.append(f"{side}x{side}, batch {batch}, {'as a run' if tuned else 'as it comes'}")
            for kind, cells in rows.items():
                cells.append(f"{found.get(kind, 0.0):.1f}")
    print(table(head, [[kind, *cells] for kind, cells in rows.items()]))
