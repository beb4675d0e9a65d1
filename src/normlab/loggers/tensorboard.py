"""Write TensorBoard's event files into the run's folder."""

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from normlab import runs
from normlab.config.schema import TensorBoardLogger
from normlab.loggers import Row, finite_values, start_time


class TensorBoard:
    """A run in TensorBoard."""

    def __init__(self, run: runs.Run, settings: TensorBoardLogger) -> None:
        self._started, self._step = start_time(run), 0
        # TensorBoard forgets what files before this one have: a run that goes on logs all of it again.
        self._writer = SummaryWriter(run.folder, purge_step=0)
        self._writer.add_text("config", _block((run.folder / "config.yaml").read_text("utf-8")), 0)

    def log(self, row: Row) -> None:
        """Write an evaluation."""
        self._step = row["step"]
        for name, value in finite_values(row).items():
            self._writer.add_scalar(name, value, self._step, self._started + row["wall_seconds"])
        self._writer.flush()

    def end(self, facts: Mapping[str, Any]) -> None:
        """Write how the run ended, as a text."""
        self._writer.add_text("end", _block("\n".join(f"{name}: {fact}" for name, fact in facts.items())), self._step)
        self._writer.close()


def _block(text: str) -> str:
    """Return Markdown that shows a text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
