"""The training steps of this process, counted, and disturbed where a test wants it; and forged checkpoints."""

import hashlib
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from normlab.common.errors import InterruptedRunError
from normlab.config.schema import RunConfig
from normlab.training.run import train_run
from normlab.training.supervision import Supervisor


class Steps:
    """Counts training steps, and acts after those that a test chooses, before anything is saved or noticed."""

    def __init__(self) -> None:
        self.taken = 0
        self._planned: dict[int, Callable[[], object]] = {}

    @contextmanager
    def counted(self) -> Iterator["Steps"]:
        """Count inside of this context."""
        after_batch = Supervisor.after_batch

        def hooked(supervisor: Supervisor, *, training: bool) -> None:
            if training:
                self.taken += 1
                self._planned.pop(self.taken, lambda: None)()
            after_batch(supervisor, training=training)

        with mock.patch.object(Supervisor, "after_batch", hooked):
            yield self

    def after(self, number: int, act: Callable[[], object]) -> None:
        """Call `act` after so many steps from now."""
        self._planned[self.taken + number] = act

    def stop_after(self, number: int, how: signal.Signals = signal.SIGTERM) -> None:
        """Send this process a signal after so many steps from now."""
        self.after(number, lambda: os.kill(os.getpid(), how))

    def interrupt(self, config: RunConfig, after: int) -> None:
        """Train a run until it is interrupted after so many steps."""
        self.stop_after(after)
        with pytest.raises(InterruptedRunError):
            train_run(config)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a checkpoint holds, and give it the right digest."""
    saved, file = torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True), io.BytesIO()
    change(saved)
    torch.save(saved, file)
    path.write_bytes(file.getvalue() + hashlib.sha256(file.getvalue()).digest())
