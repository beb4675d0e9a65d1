"""The settings that every report is made with, which conf/report.yaml explains, checked."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from normlab.common.errors import UserError, as_typed, did_you_mean, listed, switch_meant
from normlab.common.installation import CONF
from normlab.report.analysis.metrics import BEST, EVALUATED, FINAL
from normlab.runs import reading

_SELECTIONS = ("arms", "batches", "seeds", "settings")
TABLE_OPTIONS = ("baseline", "metric", "value", "tuned", *_SELECTIONS, "thresholds", "confidence", "alpha")


MOST_THRESHOLDS = 20  # columns of a table


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_level(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1


def _is_list(value: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(holds, value))


def _are_shares(value: Any) -> bool:
    return _is_list(value, lambda each: _is_number(each) and 0 < each <= 1) and len(value) <= MOST_THRESHOLDS


def _is_name(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_names(value: Any) -> bool:
    return value is None or (_is_list(value, lambda each: isinstance(each, str)) and len(value) > 0)


def _are_whole(value: Any) -> bool:
    return value is None or (_is_list(value, lambda each: type(each) is int) and len(value) > 0)


def _are_settings(value: Any) -> bool:
    return value is None or _is_word(value) or _is_list(value, _is_word)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "thresholds": (
        _are_shares,
        f"a list of at most {MOST_THRESHOLDS} accuracies between 0 and 1.\nExample: thresholds=[0.5,0.8,0.95]",
    ),
    "tuned": (_are_settings, "null, [], or names of settings.\nExample: tuned=optimizer.lr"),
    "baseline": (_is_name, "null or the name of an arm.\nExample: baseline=bn"),
    "figures": (_is_bool, "true or false."),
    "quiet": (_is_bool, "true or false."),
    "confidence": (_is_level, "a number between 0 and 1.\nExample: confidence=0.95"),
    "alpha": (_is_level, "a number between 0 and 1.\nExample: alpha=0.05"),
    "arms": (_are_names, "null or a list of names.\nExample: arms=[bn,none]"),
    "batches": (_are_whole, "null or a list of whole numbers.\nExample: batches=[0,1]"),
    "seeds": (_are_whole, "null or a list of whole numbers.\nExample: seeds=[0,1]"),
    "settings": (_are_names, "null or a list of names.\nExample: settings=[resnet18]"),
}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "metric": (None, *EVALUATED),
    "value": (FINAL, BEST),
    "figure_size": ("double", "single", "slide"),
}


@dataclass(frozen=True)
class Options:
    """The settings of a report; `options` makes them from the menu.

    Raises:
        UserError: for a value that is none of those that conf/report.yaml names.
    """

    baseline: str | None
    metric: str | None
    value: str
    tuned: str | Sequence[str] | None
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
        for name, (is_valid, expected) in _EXPECTED.items():
            if not is_valid(getattr(self, name)):
                self._refuse(name, expected)
        if len(set(self.thresholds)) < len(self.thresholds):
            raise UserError(f"thresholds={as_typed(list(self.thresholds))} is not valid: two are the same.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                names = ["null" if choice is None else choice for choice in choices]
                self._refuse(name, f"one of {', '.join(names)}.", names)
        if self.figure_style is not None:
            self._check_style(self.figure_style)

    def _check_style(self, style: object) -> None:
        from matplotlib.style import available, library  # slow to import, and few reports name a style

        if not isinstance(style, str) or not (style in library or Path(style).is_file()):
            expected = "a style of matplotlib or the path of an .mplstyle file."
            self._refuse("figure_style", f"{expected}\nStyles: {listed(available, 6)}.", available)

    def _refuse(self, name: str, expected: str, choices: Sequence[str] = ()) -> NoReturn:
        given = getattr(self, name)
        hint = did_you_mean(given, choices, f"{name}=") or (switch_meant(name, given) if "true" in expected else "")
        raise UserError(f"{name}={as_typed(given)} is not valid: expected {expected}{hint}")

    @property
    def selection(self) -> str:
        """Return the options that leave cells out as they were given: `arms=[bn,none] seeds=[0]`; "" if none does."""
        return self._selected(sys.maxsize)

    @property
    def selection_in_short(self) -> str:
        """Return the same with few of the entries of each."""
        return self._selected(8)

    def _selected(self, most: int) -> str:
        given = {name: getattr(self, name) for name in _SELECTIONS}
        return " ".join(f"{name}=[{listed(list(v), most, ',')}]" for name, v in given.items() if v is not None)


def options(**changes: Any) -> Options:
    """Return the options of conf/report.yaml, with these in place of theirs: `options(baseline="none", figures=False)`.

    Raises:
        UserError: for a value that is none of those that conf/report.yaml names, and for an option that it has not.
    """
    menu = reading.read_yaml(CONF / "report.yaml")
    names = [field.name for field in fields(Options)]
    for name in changes:
        if name not in names:
            hint = did_you_mean(name, names) or f"\nExpected: {', '.join(names)}."
            raise UserError(f"{name}: there is no such option of a report.{hint}")
    return Options(**{name: menu[name] for name in names} | changes)
