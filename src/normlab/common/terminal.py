"""All that is printed goes through here, or `console`, so that no text from a file can command the terminal."""

import logging
import re
from typing import TextIO

_SEQUENCES = re.compile(
    r"(?:\x1b[PX\]^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f\n]*(?:\x07|\x1b\\|\x9c)"  # strings: titles, links
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colors, moves of the cursor
    r"|\x1b[ -/]*[0-~]?"  # resets, sets of characters
)
_INVISIBLE = re.compile(  # controls but for tab and newline, what reverses or hides text, halves of characters
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e0fff]"
)
_BREAKS = re.compile(r"\r\n|[\u2028\u2029]")
_HALVES = re.compile(r"[\ud800-\udfff]")  # of a file's name that is not UTF-8


def plain(text: str) -> str:
    """Return a text without what a terminal, or a page, would obey instead of showing it.

    That is escape sequences, control characters other than tab and newline, and characters that reverse the
    direction of others or are invisible.
    """
    if text.isprintable():
        return text
    return _HALVES.sub("\ufffd", _INVISIBLE.sub("", _SEQUENCES.sub("", _BREAKS.sub("\n", text))))


def say(text: object = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a text as `plain` has it."""
    print(plain(str(text)), file=file, flush=flush)


class PlainFormatter(logging.Formatter):
    """A formatter of logs whose lines are as `plain` has them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return plain(super().format(record))
