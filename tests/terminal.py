"""A command in a terminal of its own, and what that terminal then shows."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from typing import Any

CONTROL = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])")
COLOR = re.compile(r"\x1b\[[\d;]*\b(3[0-8]|4[0-8]|9[0-7]|10[0-7])\b[\d;]*m")
ASKED = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES", "TERM")


def in_terminal(
    arguments: Sequence[str], *, columns: int = 100, rows: int = 24, env: Mapping[str, str] = {}, **options: Any
) -> tuple[int, str]:
    """The exit status, and all that was written to the terminal, which is stdout and stderr unless `options` differ."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    usual = {name: value for name, value in os.environ.items() if name not in ASKED}
    streams = {"stdin": slave, "stdout": slave, "stderr": slave} | options
    process = subprocess.Popen(arguments, env={**usual, "TERM": "xterm-256color", **env}, **streams)
    os.close(slave)
    written = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
        while more := os.read(master, 1 << 16):
            written += more
    os.close(master)
    return process.wait(timeout=60), written.decode()


def shown(written: str, columns: int = 100) -> list[str]:
    """The lines of a terminal that is high enough, after all this was written to it."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\x1b\[[\d;?]*[A-Za-z]|\r|\n)", written):
        control = CONTROL.fullmatch(part)
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
        elif control and control[2] == "A":
            row = max(0, row - int(control[1] or 1))
        elif control and control[2] == "K":
            assert control[1] == "2"
            lines[row] = ""
        elif control:
            assert control[2] in "mhl", f"a control sequence that is not known here: {part!r}"
        else:
            for character in part:
                if column == columns:
                    row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
                lines[row] = f"{lines[row][:column]:{column}}{character}{lines[row][column + 1 :]}"
                column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines if line.strip()]
