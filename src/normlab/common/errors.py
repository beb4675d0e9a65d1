"""Errors that are a sentence for the user, and the parts that many of them share."""

import difflib
import errno
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

_NO_TEXT = re.compile(
    r"[-+]?(\d[\d_]*\.?\d*|\.\d+|inf|nan)(e[-+]?\d+)?|true|false|null", re.IGNORECASE
)  # without quotes


class UserError(Exception):
    """A mistake or circumstance that the user can mend; shown without a traceback.

    The text is at most five lines: what is wrong, what was expected, the nearest valid choice, the fix.
    """


class RunBusyError(UserError):
    """Another process is training this run right now."""


class FolderGoneError(UserError):
    """The folder of a run was deleted or moved while it was trained: nothing of it is recorded any more."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder} was deleted or moved while its run was trained.\n"
            "It stops here, and nothing of it is recorded any more. The same command trains it again."
        )


class OutOfMemoryError(UserError):
    """The run does not fit into what memory is left on its device."""


class InterruptedRunError(Exception):
    """The run was stopped on request, wrote a checkpoint, and can go on later."""


def storage_error(path: Path, error: OSError) -> UserError:
    """Return an operating system's refusal to write `path` as a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "The disk is full. Free some space, or choose another folder with output_dir=..., then run again."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "It is not writable. Change its permissions, or choose another folder with output_dir=..."
    else:
        fix = f"{error.strerror or error}. Choose another folder with output_dir=... if this one cannot be mended."
    return UserError(f"Cannot write {path}.\n{fix}")


def first_line(text: object) -> str:
    """Return the first line of any text or error, empty for an empty one."""
    return (str(text).strip().splitlines() or [""])[0]


def described(error: BaseException) -> str:
    """Return an error's message, after the name of its type unless it is a sentence for the user."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def nearest(word: object, choices: Iterable[object]) -> str | None:
    """Return the choice nearest to `word`, by value for numbers, by spelling otherwise; None if none is near."""
    options = list(choices)
    numbers = [c for c in options if isinstance(c, int | float)]
    if isinstance(word, int | float) and numbers:
        return str(min(numbers, key=lambda c: abs(c - word)))
    by_name = {str(option).lower(): str(option) for option in options}
    ending = next((name for low, name in by_name.items() if low.endswith(f"_{word}".lower())), None)
    if (
        ending and str(word).lower() not in by_name
    ):  # accuracy: test_accuracy rather than val_accuracy, which is shorter
        return ending
    found = difflib.get_close_matches(str(word).lower(), by_name, n=1, cutoff=0.5)
    return by_name[found[0]] if found else None


def did_you_mean(word: object, choices: Iterable[object], before: str = "", after: str = "") -> str:
    """Return a line that proposes the nearest choice, between `before` and `after`; "" if none is near."""
    close = nearest(word, choices)
    return f"\nDid you mean {before}{close}{after}?" if close else ""


def count(number: int, noun: str) -> str:
    """Return a number with its noun: `1 run`, `2 runs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def listed(words: Sequence[object], most: int, separator: str = ", ") -> str:
    """Return the first words, and the number of the others: `a, b and 3 more`."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return separator.join(map(str, words[:most])) + more


def cut(text: str, most: int) -> str:
    """Return a text of at most `most` characters: of a longer one the beginning and the end."""
    end = most // 3
    return text if len(text) <= most else f"{text[: most - end - 3]}...{text[-end:]}" if end else text[: max(0, most)]


def as_typed(value: object) -> object:
    """Return a value as one writes it on the command line: text that would be read as a number has quotes."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"'{value}'" if _NO_TEXT.fullmatch(value) else value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_typed(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(str(as_typed(each)) for each in value)}]"
    return str(value).lower() if isinstance(value, bool) else value


def exact(number: float) -> str:
    """Return a number as short as `%g` has it where that is the same number, else in all its digits."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def per_cent(share: float) -> str:
    """Return a share of 1 as an exact number of per cent: 95 for 0.95, though 100 * 0.07 is not 7."""
    return f"{(100 * Decimal(repr(share))).normalize():f}"


def switch_meant(path: str, value: object) -> str:
    """Return a line that proposes true or false for yes, off, 1 and the like; "" for anything else."""
    meant = {**dict.fromkeys(("yes", "on", "1"), "true"), **dict.fromkeys(("no", "off", "0", "none", "null"), "false")}
    word = meant.get(str(as_typed(value)).lower().strip("'"))
    return f"\nDid you mean {path}={word}?" if word else ""


def not_one_of(path: str, value: object, choices: Iterable[str]) -> str:
    """Return the sentence for a setting whose value is none of its `choices`."""
    options = list(choices)
    expected = f"{path}={as_typed(value)} is not valid: expected{' one of' * (len(options) > 1)} {', '.join(options)}."
    return expected + did_you_mean(value, options, f"{path}=")
