"""Work in a process of its own, which is ended when it takes too long, and which gets no more than so much memory."""

import contextlib
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from normlab.cli import commands
from normlab.common.errors import UserError

SECONDS, BYTES = 20.0, 3 << 29  # of CPU; 1.5 GB
WAIT = 2.5 * SECONDS  # for a process that does not work, or that others leave no time
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b")
FILE_BYTES = 1 << 28  # that such a process may write to one file


class Ended(NamedTuple):
    """What work came to: its value, or `fault` (a traceback, or in words), or a UserError's text as `refusal`."""

    value: Any
    refusal: str
    fault: str
    output: str
    seconds: float

    @property
    def cause(self) -> str:
        """The fault on one line: the error, and the line of normlab's code that it came out of."""
        lines = self.fault.strip().splitlines() or [""]
        errors = [line for line in lines if _ERROR.match(line)] or lines
        places = [line.strip() for line in lines if line.startswith('  File "') and "/normlab/" in line]
        where = places[-1].split("/src/")[-1].replace('", line ', ":").split(",")[0] if places else ""
        return f"{errors[-1][:160]} ({where})" if where else errors[-1][:160]


def watched(work: Callable[[], Any]) -> Ended:
    """Carry out `work`, whose value is plain, in a fork of this process."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as answer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python 3.12, about the threads that are not in the fork
            child = os.fork()
        if not child:
            _carry_out(work, output.fileno(), answer.fileno())
        begun = time.monotonic()
        process = os.pidfd_open(child)
        ready, _, _ = select.select([process], [], [], WAIT)
        os.close(process)
        with contextlib.suppress(ProcessLookupError):  # with all that it started
            os.killpg(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
        took = time.monotonic() - begun
        output.seek(0)
        answer.seek(0)
        said, text = output.read().decode(errors="replace"), answer.read()
    if not ready:
        return Ended(None, "", f"it was still at work after {WAIT:.0f} s", said, took)
    if not text:
        return Ended(None, "", f"its process ended with status {os.waitstatus_to_exitcode(status)}", said, took)
    value, refusal, fault = json.loads(text)
    if not fault and used.ru_maxrss * 1024 > BYTES:
        fault = f"it took {used.ru_maxrss / 1e6:.1f} GB"
    if not fault and used.ru_utime + used.ru_stime > SECONDS:
        fault = f"it took {used.ru_utime + used.ru_stime:.0f} s"
    return Ended(value, refusal, fault, said, took)


def _carry_out(work: Callable[[], Any], output: int, answer: int) -> None:
    os.setpgid(0, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(stream, "w", errors="replace", closefd=False) for stream in (1, 2))  # noqa: SIM115
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, taken + BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    value, refusal, fault = None, "", ""
    try:
        value = work()
    except UserError as error:
        refusal = str(error)
    except BaseException:
        fault = traceback.format_exc()[-20_000:]
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(answer, json.dumps([value, refusal, fault]).encode())
    os._exit(0)


def command(folder: Path, script: str, *arguments: str, **environment: str) -> Ended:
    """Carry out `python SCRIPT ARGUMENTS` in this folder; its value is the exit status."""

    def work() -> int:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ.update({"COLUMNS": "200", **environment})
        sys.argv = [script, *arguments]
        try:
            {"train.py": commands.train, "report.py": commands.report}[script]()
        except SystemExit as ended:
            return int(ended.code or 0)

    ended = watched(work)
    shown = "Traceback (most recent call last)" in ended.output
    return ended._replace(fault=ended.output[-20_000:]) if shown and not ended.fault else ended
