"""Event files of TensorBoard in the run's folder."""

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from normlab import runs
from normlab.config.schema import TensorBoardLogger
from normlab.loggers import Row, numbers, started


class Tool:
    def __init__(self, run: runs.Run, settings: TensorBoardLogger) -> None:
        self._started, self._step = started(run), 0
        # TensorBoard forgets what files before this one have: a run that goes on tells all of it again.
        self._writer = SummaryWriter(run.folder, purge_step=0)
        self._writer.add_text("config", _block((run.folder / "config.yaml").read_text("utf-8")), 0)

    def log(self, row: Row) -> None:
        self._step = row["step"]
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, self._step, self._started + row["wall_seconds"])
        self._writer.flush()

    def end(self, facts: Mapping[str, Any]) -> None:
        self._writer.add_text("end", _block("\n".join(f"{name}: {fact}" for name, fact in facts.items())), self._step)
        self._writer.close()


def _block(text: str) -> str:
    """As it is, in Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())
