"""Lets every Python process with this folder on its PYTHONPATH see the pretended GPU: workers of sweeps, too."""

import atexit
import importlib.util
import os
import sys
import threading

WORDS = {word.rpartition("/")[2] for word in sys.orig_argv}
# They use no GPU, but for `gpu_checks.limited --here`, which runs the tests.
WITHOUT = {"pip", "gpu_check.py", "report.py", "gpu_checks.engines", "gpu_checks.sweeps", "gpu_checks.limited"}


def pretend() -> None:
    import torch
    from pretended import placed, pretended

    os.environ["NORMLAB_PRETENDED_GPU"] = "1"
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    gpu = pretended()
    gpu.__enter__()
    atexit.register(gpu.__exit__, None, None, None)
    run = threading.Thread.run

    def run_placed(thread: threading.Thread) -> None:
        with placed():
            run(thread)

    threading.Thread.run = run_placed  # type: ignore[method-assign]


if {"train.py", "-m"} <= WORDS:  # the workers of a sweep import torch, and it does not
    from normlab.launchers import preflight

    preflight.gpu_count = lambda: 1
elif "bench.py" in WORDS:  # whose processes measure, and it does not
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *_: "Pretended GPU"
elif ("--here" in WORDS or not WITHOUT & WORDS) and importlib.util.find_spec("torch"):  # else it is another Python
    pretend()
