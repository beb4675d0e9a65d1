"""What the command `import` is told, and the names of columns."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normlab.common.errors import UserError, nearest
from normlab.common.installation import command_name
from normlab.config.schema import RunConfig
from normlab.runs.identity import CARRIED_OUT

ACCURACIES, LOSSES = ("test_accuracy", "train_accuracy"), ("test_loss", "train_loss")
METRICS = (*ACCURACIES, *LOSSES, "wall_seconds", "images_per_second")
GROUPS = ("norm", "model", "dataset", "sampler", "init", "optimizer", "schedule")
SETTINGS = tuple(name for name in RunConfig.model_fields if name not in {*GROUPS, *CARRIED_OUT, "probe", "seed"})
COLUMNS = ("arm", "seed", "epoch", "step", "state", *METRICS, *SETTINGS, "dataset.name", "model.name")
LARGEST = 2**53  # up to which whole numbers are exact wherever the report puts them
COUNTS = ("batch", "norm_batch", "epochs", "depth")  # settings that are whole numbers, 1 or more
_DOTTED = re.compile(rf"({'|'.join(GROUPS)})\.[a-zA-Z][a-zA-Z0-9_]*(\.[a-zA-Z][a-zA-Z0-9_]*)*")


@dataclass(frozen=True)
class Import:
    """What is imported, and how it is to be read: settings that conf/report.yaml explains.

    Raises:
        UserError: for a setting that is not valid.
    """

    source: str | None
    columns: Mapping[str, str] | None = None
    ignore: Sequence[str] | str = ()
    set: Mapping[str, Any] | None = None
    percent: bool = False
    pattern: str | None = None
    first_epoch: int | None = None
    steps_per_epoch: int | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        if not self.source or not isinstance(self.source, str):
            raise UserError(
                "source= is missing: a CSV file, or a folder with TensorBoard's event files.\n"
                f"Example: {command_name('report')} import source=results.csv study=my_study"
            )
        for name in ("percent", "replace"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)} is not valid: expected true or false.")
        for name, example in (("columns", "{test_accuracy: val_acc}"), ("set", "{dataset.name: cifar10}")):
            if not isinstance(getattr(self, name), Mapping | None):
                raise UserError(f"{name}={getattr(self, name)} is not valid: expected pairs, '{name}={example}'.")
        if self.ignore != "all" and (isinstance(self.ignore, str) or not isinstance(self.ignore, Sequence)):
            raise UserError(f"ignore={self.ignore} is not valid: expected a list of columns, or all.")
        if self.first_epoch not in (None, 0, 1):
            raise UserError(f"first_epoch={self.first_epoch} is not valid: expected 0 or 1.")
        if self.steps_per_epoch is not None and not is_count(self.steps_per_epoch):
            raise UserError(f"steps_per_epoch={self.steps_per_epoch} is not valid: expected 1 or more.")
        if not isinstance(self.pattern, str | None):
            raise UserError(
                f"pattern={self.pattern} is not valid: expected a text, quoted twice:"
                """ 'pattern="{arm}/b{batch}_s{seed}"'."""
            )
        for key, theirs in (self.columns or {}).items():
            if not is_column(key):
                if is_column(theirs):
                    raise UserError(f"normlab's name comes first: columns={{{theirs}: {key}}}.")
                raise UserError(no_column(f"columns={{{key}: {theirs}}}: normlab has no column {key}", key))
        for key in self.set or {}:
            if not is_column(key) or key in (*METRICS, "epoch", "step", "state"):
                raise UserError(no_column(f"set={{{key}: ...}}: there is no such setting", key))


def is_column(name: object) -> bool:
    reserved = ("norm.name", "norm.imported", "dataset.path", "dataset.workers")
    return name in COLUMNS or (bool(_DOTTED.fullmatch(str(name))) and name not in reserved)


def no_column(wrong: str, name: str) -> str:
    close = nearest(name, COLUMNS)
    return wrong + "." + (f" Did you mean {close}?" if close else "") + f"\nExpected one of {', '.join(COLUMNS)}."


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def some(words: Sequence[str], most: int = 12) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
