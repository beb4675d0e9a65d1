"""What every report is made with: the settings that conf/report.yaml explains, checked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from normlab.common.errors import UserError, nearest
from normlab.common.installation import CONF
from normlab.report.analysis.metrics import BEST, EVALUATED, FINAL
from normlab.runs import files

SIZES = ("double", "single", "slide")
_CELLS = {"arms": str, "batches": int, "seeds": int, "settings": str}


@dataclass(frozen=True)
class Options:
    """The settings of a report; `options` makes them from the menu.

    Raises:
        UserError: for a value that is none of those that conf/report.yaml names.
    """

    baseline: str | None
    metric: str | None
    value: str
    arms: Sequence[str] | None
    batches: Sequence[int] | None
    seeds: Sequence[int] | None
    settings: Sequence[str] | None
    thresholds: Sequence[float]
    confidence: float
    alpha: float
    figures: bool
    figure_size: str
    figure_style: str | None
    quiet: bool

    def __post_init__(self) -> None:
        given: object = self.thresholds
        if not isinstance(given, Sequence) or isinstance(given, str) or not all(map(_share, given)):
            raise UserError(
                f"thresholds={given} is not valid: expected a list of accuracies between 0 and 1.\n"
                "Example: thresholds=[0.5,0.8,0.95]"
            )
        if len({f"{threshold:g}" for threshold in self.thresholds}) < len(self.thresholds):
            raise UserError(f"thresholds={list(self.thresholds)} is not valid: two are the same, to six digits.")
        for name in ("figures", "quiet"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)} is not valid: expected true or false.")
        for name, usual in (("confidence", 0.95), ("alpha", 0.05)):
            number = getattr(self, name)
            if not _share(number) or number == 1:
                raise UserError(
                    f"{name}={number} is not valid: expected a number between 0 and 1.\nExample: {name}={usual}"
                )
        for name, choices in {"metric": (None, *EVALUATED), "value": (FINAL, BEST), "figure_size": SIZES}.items():
            _one_of(name, getattr(self, name), choices)
        for name, kind in _CELLS.items():
            entries = getattr(self, name)
            if entries is not None and not _list_of(entries, kind):
                example = "resnet18" if name == "settings" else "bn,none" if kind is str else "0,1"
                told = "names" if kind is str else "whole numbers"
                raise UserError(
                    f"{name}={entries} is not valid: expected null or a list of {told}.\nExample: {name}=[{example}]"
                )
        if self.figure_style is not None:
            _check_style(self.figure_style)

    def selected(self) -> Iterator[str]:
        """The options that leave cells out, as they were given: `arms=[bn,none]`."""
        for name in _CELLS:
            entries = getattr(self, name)
            if entries is not None:
                yield f"{name}=[{','.join(map(str, entries))}]"


def options(**changes: Any) -> Options:
    """The options of conf/report.yaml, with these in place of theirs: `options(baseline="none", figures=False)`.

    Raises:
        UserError: for a value that is none of those that conf/report.yaml names, and for an option that it has not.
    """
    menu = files.read_yaml(CONF / "report.yaml", files.parse_yaml)
    names = [field.name for field in fields(Options)]
    for name in changes:
        if name not in names:
            close = nearest(name, names)
            raise UserError(
                f"{name}: there is no such option of a report."
                + (f"\nDid you mean {close}?" if close else f"\nExpected: {', '.join(names)}.")
            )
    return Options(**{name: menu[name] for name in names} | changes)


def _one_of(name: str, given: object, choices: Sequence[object]) -> None:
    if given in choices:
        return
    names = ["null" if choice is None else choice for choice in choices]
    close = nearest(given, names)
    raise UserError(
        f"{name}={given} is not valid: expected one of {', '.join(map(str, names))}."
        + (f"\nDid you mean {name}={close}?" if close else "")
    )


def _list_of(entries: object, kind: type) -> bool:
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        return False
    return all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in entries)


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _check_style(style: object) -> None:
    from matplotlib.style import available, library  # here: matplotlib is slow to import, and few reports name a style

    if isinstance(style, str) and (style in library or Path(style).is_file()):
        return
    close = nearest(style, available)
    raise UserError(
        f"figure_style={style} is not valid: expected a style of matplotlib or the path of an .mplstyle file.\n"
        f"Styles: {', '.join(available[:6])} and {len(available) - 6} more."
        + (f"\nDid you mean figure_style={close}?" if close else "")
    )
