"""Networks that want something of their machine for themselves, once they see images."""

import fcntl
import os
import threading
import time
from pathlib import Path
from typing import NoReturn

from small import SmallNet
from torch import Tensor, nn

from normlab.training.packing import MemoryBudget


class Alone(SmallNet):
    """Runs out of memory while another process has one of these."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_forward_pre_hook(_want_all)


def _want_all(network: nn.Module, inputs: tuple[Tensor]) -> None:
    if inputs[0].is_meta or hasattr(network, "file"):  # shapes are checked before the sweep
        return
    network.file = Path("greedy").open("w")  # noqa: SIM115  # held until the process forgets the network
    try:
        fcntl.flock(network.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        Path("refused").touch()
        raise MemoryError from None
    while not Path("refused").exists():  # until another one has come in the meantime
        time.sleep(0.05)


class Killed(SmallNet):
    """Is killed the first time it is used in the current folder, as the kernel does when memory is short."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_forward_pre_hook(_be_killed)


def _be_killed(network: nn.Module, inputs: tuple[Tensor]) -> None:
    if not inputs[0].is_meta and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), 9)


class Insatiable(SmallNet):
    """Runs out of memory."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_forward_pre_hook(_want_more)


def _want_more(network: nn.Module, inputs: tuple[Tensor]) -> None:
    if not inputs[0].is_meta:
        raise MemoryError


class Spoils(SmallNet):
    """Raises what a kernel's error does: beside others it comes once, and then everything of the process raises it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_forward_pre_hook(_spoil)


def _spoil(network: nn.Module, inputs: tuple[Tensor]) -> None:
    if not inputs[0].is_meta and threading.current_thread() is not threading.main_thread():
        MemoryBudget.admits = MemoryBudget.free = _raise
        _raise()


def _raise(*_: object) -> NoReturn:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


class SpoilsAlone(SmallNet):
    """The same, and alone as well with an error of its own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_forward_pre_hook(_spoil_alone)


def _spoil_alone(network: nn.Module, inputs: tuple[Tensor]) -> None:
    _spoil(network, inputs)
    if not inputs[0].is_meta:
        raise RuntimeError("CUDA error: device-side assert triggered")
