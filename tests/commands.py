"""The commands as forks of the tests' process, which has imported what takes them seconds to import."""

import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

import torch  # noqa: F401  # once for all commands

from normlab.cli import commands

ROOT = Path(__file__).parents[1]


def run_command(folder: Path, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """What `python SCRIPT ARGUMENTS` in this folder ends with: exit status, stdout, stderr."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as error:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python 3.12, about the threads that are not in the fork
            child = os.fork()
        if not child:
            signal.alarm(300)  # a command that hangs is ended, and its test fails
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            os.environ.update({"COLUMNS": "200", "NORMLAB_DATA": str(folder / "data"), **environment})
            _carry_out(script, arguments)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        error.seek(0)
        return os.waitstatus_to_exitcode(status), out.read(), error.read()


def _carry_out(script: str, arguments: tuple[str, ...]) -> NoReturn:
    status = 1
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
