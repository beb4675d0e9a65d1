"""What variants ask of their options, whoever makes them; the command line checks types before."""

import sys

from normlab.common.errors import UserError

LARGEST = sys.float_info.max


def check_range(option: str, value: object, low: float = 0.0, high: float = LARGEST, expected: str = "") -> None:
    """
    Raises:
        UserError: if `value` is no number from `low` to `high`, both included.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        if not expected:
            expected = f"{low:g} or more" if high == LARGEST else f"{low:g} to {high:g}, a fraction of the run"
        raise _out_of_range(option, value, expected)


def check_count(option: str, value: object) -> None:
    """
    Raises:
        UserError: if `value` is no whole number of 1 or more.
    """
    if type(value) is not int or value < 1:
        raise _out_of_range(option, value, "a whole number of 1 or more")


def last_time(option: str, unit: str) -> float:
    """The largest value that a time in `unit`, of a `Clock`, can be.

    Raises:
        UserError: if there is no such unit.
    """
    if unit not in ("fraction", "steps"):
        raise _out_of_range(option, unit, "fraction (of the run) or steps")
    return 1.0 if unit == "fraction" else LARGEST


def _out_of_range(option: str, value: object, expected: str) -> UserError:
    return UserError(f"norm.{option}={value} is out of range: expected {expected}.")
