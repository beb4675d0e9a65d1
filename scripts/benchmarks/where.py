"""`scripts/bench where`: where the time of a training step goes, by kind of operation, as PyTorch's profiler sees it.

Steps of a run's own network, optimizer and batch on random images, once as PyTorch does them by default and once as a
run on a CPU does them (taps trimmed, one fused update, freed memory kept, its memory format), in two processes.

--rates: of a run's step instead, what fraction of the rate of its own convolutions by themselves it reaches.
"""

import argparse
import copy
import itertools
import json
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import ROOT, configure, print_machine, table
from normlab.training import device, taps
from normlab.training.calibration import Trial

STEPS = 5
KINDS = {  # by the beginning of an operation's name, without aten::
    "convolution, forward": ("mkldnn_convolution", "cudnn_convolution", "_conv", "slow_conv", "thnn_conv"),
    "convolution, backward": ("convolution_backward", "mkldnn_convolution_backward", "cudnn_convolution_backward"),
    "normalizer": (
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
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[kind_of(event.key)] = spent.get(kind_of(event.key), 0.0) + microseconds / 1000 / STEPS
    total = seconds * 1000 / STEPS
    return {**spent, "Python and the rest": max(0.0, total - sum(spent.values())), "a step": total}


def rates(side: int, batch: int, precision: str, threads: int) -> dict[str, float]:
    """Seconds of a step, of its convolutions by themselves, and the GFLOP/s of both (multiply and add are two)."""
    torch.set_num_threads(threads)
    settings = configure("outputs", f"batch={batch}", "norm=bn", f"precision={precision}")
    device.prepare(settings, torch.device("cpu"), threads)
    trial = Trial(settings, torch.device("cpu"), side=side, classes=10)
    calls: list[tuple[nn.Conv2d, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda conv, inputs: calls.append((conv, inputs[0])))
        for module in trial.step.network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with FlopCounterMode(display=False) as counter:
        trial.seconds()
    for hook in hooks:
        hook.remove()
    step = min(trial.seconds() for _ in range(STEPS))
    kind = device.HALF.get(precision, torch.float32)
    alone = sum(_convolution(conv, images.detach().to(kind), number > 0) for number, (conv, images) in enumerate(calls))
    gflop = counter.get_total_flops() / 1e9
    return {"seconds": step, "alone": alone, "rate": gflop / step, "rate alone": gflop / alone}


def _convolution(conv: nn.Conv2d, images: Tensor, inner: bool) -> float:
    """The least seconds of a convolution, forward and backward; the first of a network needs no gradient of images."""
    own = copy.deepcopy(conv).to(images.dtype)
    images = images.requires_grad_(inner)
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        outputs = own(images)
        outputs.backward(outputs.detach())
        times.append(time.perf_counter() - begun)
    return min(times)


def print_rates(threads: int) -> None:
    print_machine(
        f"ResNet-18, bn, SGD, {threads} threads; the least of {STEPS} steps, each row in a process of its own"
    )
    rows = []
    for precision, side, batch in itertools.product(("fp32", "bf16"), (8, 32), (32, 128)):
        what = {"side": side, "batch": batch, "precision": precision, "threads": threads}
        found = _in_process("--rate", what)
        shares = f"{found['rate']:.0f}", f"{found['rate alone']:.0f}", f"{found['alone'] / found['seconds']:.0%}"
        rows.append([f"{side}x{side}, batch {batch}, {precision}", f"{batch / found['seconds']:.0f}", *shares])
    head = ["", "images/s", "GFLOP/s of the step", "of its convolutions by themselves", "fraction"]
    print(table(head, rows))


def _in_process(option: str, what: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "where", option, json.dumps(what)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="with one, times of operations add up (default)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rates", action="store_true", help="the fraction of the rate of convolutions (CPU)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rate", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one or chosen.rate:
        found = measure(**json.loads(chosen.one)) if chosen.one else rates(**json.loads(chosen.rate))
        print(json.dumps(found))
        return
    if chosen.rates:
        print_rates(chosen.threads)
        return
    print_machine(f"ResNet-18, bn, SGD, fp32, {chosen.threads} threads; milliseconds of a step, of {STEPS}")
    rows: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "other operations", "Python and the rest", "a step")}
    head = [""]
    for side, batch, formats in ((8, 8, "contiguous"), (8, 128, "contiguous"), (32, 32, "channels_last")):
        for tuned in (False, True):
            what: dict[str, Any] = {"tuned": tuned, "side": side, "batch": batch, "threads": chosen.threads}
            what |= {"memory_format": formats if tuned else "contiguous", "where": chosen.device}
            found = _in_process("--one", what)
            head.append(f"{side}x{side}, batch {batch}, {'as a run' if tuned else 'as it comes'}")
            for kind, cells in rows.items():
                cells.append(f"{found.get(kind, 0.0):.1f}")
    print(table(head, [[kind, *cells] for kind, cells in rows.items()]))
