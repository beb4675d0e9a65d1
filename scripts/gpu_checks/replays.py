"""Which kernels a replayed step consists of: python -m gpu_checks.replays FOUND.json FOLDER SETTINGS"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

from benchmarks.common import configure, table
from normlab.training import engines
from normlab.training.run import train_run

FIRST, REPLAYS, SHOWN, NAME = 3, 20, 15, 80


class Window:
    """Profiles some steps of an epoch, once its steps are replays."""

    def __init__(self) -> None:
        self.done, self.seconds = False, 0.0
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._step = engines.Graphed.step

    def step(self, engine: engines.Graphed) -> None:
        """In place of the engine's."""
        if engine.capture_seconds and not self.done:
            if engine.position.batch == FIRST:
                torch.cuda.synchronize()
                self._profile.start()
                self.seconds = -time.perf_counter()
            elif engine.position.batch == FIRST + REPLAYS and self.seconds:
                torch.cuda.synchronize()
                self.seconds += time.perf_counter()
                self._profile.stop()
                self.done = True
        self._step(engine)

    def kernels(self) -> list[dict[str, Any]]:
        """Name, launches and microseconds of each kernel, per replay."""
        return [
            {
                "name": one.key,
                "launches": one.count / REPLAYS,
                "microseconds": one.self_device_time_total / REPLAYS,
            }
            for one in self._profile.key_averages()
            if one.device_type == DeviceType.CUDA
        ]


def shown(kernels: list[dict[str, Any]], step_microseconds: float) -> str:
    busy = sum(one["microseconds"] for one in kernels)
    kernels = sorted(kernels, key=lambda one: -one["microseconds"])
    rows = [
        [
            f"`{one['name'][:NAME].replace('|', '/')}`",
            *(f"{one['launches']:.1f}", f"{one['microseconds']:.1f}", f"{one['microseconds'] / busy:.1%}"),
        ]
        for one in kernels[:SHOWN]
    ]
    return (
        f"A replayed step takes {step_microseconds:.0f} µs while it is profiled, and its"
        f" {sum(one['launches'] for one in kernels):.0f} kernels, of {len(kernels)} kinds, {busy:.0f} µs."
        f"\n\n{table(['kernel', 'a step', 'µs a step', 'share'], rows)}"
    )


def main() -> None:
    found, folder, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if ProfilerActivity.CUDA not in supported_activities():
        sys.exit("The profiler of PyTorch cannot see kernels here: it finds no CUPTI, or no driver.")
    window = Window()
    engines.Graphed.step = lambda engine: window.step(engine)  # type: ignore[method-assign]
    settings = ["device=cuda", "engine=graph", "quiet=true", *words, f"study=at_{time.time_ns()}"]
    train_run(configure(folder, *settings))
    if not window.done:
        sys.exit(f"No epoch had {FIRST + REPLAYS + 1} steps that were replayed.")
    kernels, step_microseconds = window.kernels(), window.seconds / REPLAYS * 1e6
    if not kernels:
        sys.exit("The profiler of PyTorch saw no kernel on the GPU.")
    table = shown(kernels, step_microseconds)
    found.write_text(json.dumps({"step_microseconds": step_microseconds, "kernels": kernels[:50], "table": table}))
    print(table)


if __name__ == "__main__":
    main()
