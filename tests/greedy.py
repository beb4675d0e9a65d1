"""Networks that want something of their machine for themselves."""

import fcntl
import os
import time
from pathlib import Path

from small import SmallNet


class Alone(SmallNet):
    """Runs out of memory while another process has one of these."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.file = Path("greedy").open("w")  # noqa: SIM115  # held until the process forgets the network
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            Path("refused").touch()
            raise MemoryError from None
        while not Path("refused").exists():  # until another one has come in the meantime
            time.sleep(0.05)

    def __deepcopy__(self, memo: object) -> SmallNet:
        return SmallNet(self.head.out_features)


class Killed(SmallNet):
    """Is killed the first time it is built in the current folder, as the kernel does when memory is short."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        if not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), 9)
