"""The commands as forks of the tests' process, which has imported what takes them seconds to import.

The workers of their sweeps are forks, too; tests/launchers has commands and workers that begin as a user's do. What a
fork trains needs threads=1: OpenMP's threads, which this process may have, are not in it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

import torch  # noqa: F401  # once for all commands

from normlab.cli import commands

ROOT = Path(__file__).parents[1]


class Forked:
    """`python SCRIPT ARGUMENTS` in a folder, under way."""

    def __init__(self, folder: Path, script: str, *arguments: str, **environment: str) -> None:
        self._out, self._error = TemporaryFile("w+"), TemporaryFile("w+")  # noqa: SIM115  # of the whole object
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python 3.12, about the threads that are not in the fork
            self.pid = os.fork()
        if not self.pid:
            signal.alarm(900)  # ends a command that hangs; one that waits for SLURM takes minutes
            os.dup2(self._out.fileno(), 1)
            os.dup2(self._error.fileno(), 2)
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            os.environ.update({"COLUMNS": "200", "NORMLAB_DATA": str(folder / "data"), **environment})
            _carry_out(script, arguments)

    def wait(self) -> tuple[int, str, str]:
        """What it ends with: exit status, stdout, stderr."""
        _, status = os.waitpid(self.pid, 0)
        with self._out, self._error:
            self._out.seek(0)
            self._error.seek(0)
            return os.waitstatus_to_exitcode(status), self._out.read(), self._error.read()


def run_command(folder: Path, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """What `python SCRIPT ARGUMENTS` in this folder ends with: exit status, stdout, stderr."""
    return Forked(folder, script, *arguments, **environment).wait()


def _carry_out(script: str, arguments: tuple[str, ...]) -> NoReturn:
    status, fork = 1, multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    sys.settrace(None)  # of coverage, whose numbers of this process nobody would read
    threading.settrace(None)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = [str(ROOT / script), *arguments]
    try:
        {"train.py": commands.train, "report.py": commands.report}[script]()
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
