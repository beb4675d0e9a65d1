"""How this machine trains a network fastest: found out by a short trial, and remembered below `data_dir`.

A choice changes the order of sums and nothing else, and a resumed run keeps the one it began with.
"""

import contextlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normlab.common.errors import UserError
from normlab.config.schema import RunConfig
from normlab.data.cache import locked
from normlab.data.datasets import Data
from normlab.norms.layer_statistics import is_random
from normlab.runs import files
from normlab.training.device import name_of
from normlab.training.trial import Trial

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ALL_THREADS = torch.get_num_threads()  # before an earlier run of this process chose fewer
STEPS, LIMIT_SECONDS = 3, 2.0  # of each trial
WORTH = 0.95  # of the time that the plain choice takes: another one has to be clearly better


@dataclass(frozen=True)
class Choice:
    """`memory_format`: a key of `FORMATS`; `threads`: of this process."""

    memory_format: str
    threads: int

    def apply(self, network: nn.Module) -> nn.Module:
        torch.set_num_threads(self.threads)
        return network.to(memory_format=FORMATS[self.memory_format])


def choose(
    config: RunConfig,
    network: nn.Module,
    data: Data,
    device: torch.device,
    threads: int | None,
    saved: dict[str, Any] | None,
    log: Callable[[str], None],
) -> Choice:
    """The fastest choice for a run, as far as the run leaves one.

    Args:
        threads: of this process; None: all that PyTorch would use, or fewer.
        saved: the run's checkpoint, if it goes on from one.
    """
    plain = Choice("contiguous", threads or ALL_THREADS)
    if saved:
        return replace(plain, memory_format=saved.get("memory_format", "contiguous"))
    formats: list[str] = [config.memory_format] if config.memory_format != "auto" else list(FORMATS)
    if data.image_size == 1 or not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        formats = ["contiguous"]
    if len(formats) > 1 and any(map(is_random, network.modules())):
        formats = ["contiguous"]  # numbers are drawn in the order of memory: another format is another run
    plain = replace(plain, memory_format=formats[0])
    if len(formats) == 1 and (threads or plain.threads == 1 or device.type != "cpu"):
        return plain
    asked = {
        "device": name_of(device),
        "versions": [str(torch.__version__), platform.python_version()],
        "network": [config.model.model_dump(mode="json"), config.depth],
        "image": [data.channels, data.image_size],
        "batch": config.batch,
        "precision": config.precision,
        "optimizer": config.optimizer.name,
        "formats": formats,
        "threads": [plain.threads, threads is None],
    }
    with _memory(Path(config.data_dir).expanduser() / "cache" / "choices.json", log) as known:
        key = json.dumps(asked, sort_keys=True)
        if key not in known:
            known[key] = asdict(_try(config, data, device, plain, formats, fewer=threads is None, log=log))
    with contextlib.suppress(TypeError):
        found = Choice(**known[key])
        if found.memory_format in formats and 1 <= found.threads <= plain.threads:
            return found
    return plain


def _try(
    config: RunConfig,
    data: Data,
    device: torch.device,
    plain: Choice,
    formats: list[str],
    *,
    fewer: bool,
    log: Callable[[str], None],
) -> Choice:
    def seconds(choice: Choice) -> float:
        torch.set_num_threads(choice.threads)
        try:
            trial = Trial(
                config,
                device,
                side=data.image_size,
                channels=data.channels,
                classes=len(data.classes),
                memory_format=FORMATS[choice.memory_format],
            )
            return trial.fastest(STEPS, LIMIT_SECONDS)
        except RuntimeError:  # a network that views its images as contiguous ones, or one too many for the memory
            return float("inf")

    best, least = plain, seconds(plain)
    told = [f"{plain.memory_format}, {plain.threads} threads: {least:.3g} s a step"]

    def consider(choice: Choice) -> bool:
        nonlocal best, least
        needed = seconds(choice)
        told.append(f"{choice.memory_format}, {choice.threads}: {needed:.3g} s")
        better = needed < WORTH * least
        if better:
            best, least = choice, needed
        return better

    for other in formats[1:]:
        consider(replace(plain, memory_format=other))
    while fewer and device.type == "cpu" and best.threads > 1 and consider(replace(best, threads=best.threads // 2)):
        pass
    log(f"tried once: {'; '.join(told)}; chosen and remembered: {best.memory_format}, {best.threads}")
    return best


@contextlib.contextmanager
def _memory(path: Path, log: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """What earlier runs on this machine found out, and what is added inside; one process at a time.

    It only saves time: what cannot be read is found out anew, what cannot be written is not remembered.
    """
    known: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(UserError, OSError):
            stack.enter_context(locked(path.with_suffix(".lock"), log))
        with contextlib.suppress(UserError):
            known = files.read_json(path)
        before = dict(known)
        yield known
        if known != before:
            with contextlib.suppress(UserError):
                files.write_json(path, known)
