"""A network whose steps take as long as a test wants them to, so that there is time to disturb a run."""

import os
import time

from small import SmallNet
from torch import Tensor


class SlowNet(SmallNet):
    """Sleeps for SLOW_SECONDS of the environment in each forward pass, which changes nothing else."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("SLOW_SECONDS", 0)))
        return super().forward(images)
