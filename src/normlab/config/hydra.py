"""Turn what Hydra composes into plain values, and its exceptions into sentences for a user."""

import errno
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import normlab
from normlab.common.errors import InterruptedRunError, UserError, storage_error
from normlab.common.installation import CONF, command_name
from normlab.common.terminal import say
from normlab.config.command_line import CommandLine, read
from normlab.config.explanations import explain

# The names of the commands and the folder of the configuration, in the texts of --help.
OmegaConf.register_new_resolver("called", command_name, replace=True)
OmegaConf.register_new_resolver("conf", lambda: str(CONF), replace=True)


def settings_of(composed: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as plain values.

    Raises:
        MissingMandatoryValue: for a setting that the user has to give and has not.
    """
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def start_in_place() -> None:
    """Go back to the folder where the command began, which Hydra has left with hydra.job.chdir=true.

    Relative paths and a user's own modules then mean the same with every launcher.
    """
    os.chdir(HydraConfig.get().runtime.cwd)


def refuse_folders(settings: Any) -> None:
    """Refuse folders of Hydra's, in which nothing would be written.

    Raises:
        UserError: if hydra.run.dir, hydra.sweep.dir or hydra.sweep.subdir is given.
    """
    given = [str(word).partition("=")[0].lstrip("+") for word in settings.overrides.hydra]
    for name in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
        if name in given:
            raise UserError(
                f"{name} is not used: a run's folder is named by its settings, and no other is made.\n"
                "Choose where with output_dir=..., and the study's name with study=..."
            )


def run_main(
    script: Literal["train", "report"], commands: Sequence[str], main: Callable[[CommandLine], Any]
) -> NoReturn:
    """Run a Hydra main function and end the process.

    A user's mistake is a sentence on stderr and exit status 1. Whatever else is raised is shown with its traceback, and
    with what to send to the authors of normlab.

    Args:
        script: the name of the command.
        commands: the words that can stand beside its settings.
        main: is given the command line, which sys.argv holds in Hydra's order from then on.
    """
    _mend_environment()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal that has not all of our characters
    line = CommandLine(script)
    try:
        _require_folder()
        line = read(sys.argv[1:], script, commands)
        sys.argv[1:] = line.words()
        for sentence in () if "quiet=true" in line.settings else line.replaced():
            say(f"Warning: {sentence}", file=sys.stderr)
        if "--version" in line.flags:
            say(f"normlab {normlab.__version__}, Hydra {hydra.__version__}")
        else:
            main(line)
        sys.stdout.flush()
    except (KeyboardInterrupt, InterruptedRunError):
        exit_interrupted(goes_on=script == "train")
    except Exception as error:
        exit_with_error(error, line)
    sys.exit(0)


def _mend_environment() -> None:
    """Set what libraries read from the environment, and leave out what would stop them."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions to us instead of printing them
    os.environ["MPLBACKEND"] = "agg"  # figures are files; Matplotlib would not be imported with a name it does not know
    # With a terminal of 0 columns Rich prints nothing; with a date that is no number SciPy cannot be imported.
    for name, form in (
        ("COLUMNS", "[1-9][0-9]{0,5}"),
        ("LINES", "[1-9][0-9]{0,5}"),
        ("SOURCE_DATE_EPOCH", "[0-9]{1,10}"),
    ):
        if not re.fullmatch(form, os.environ.get(name, "1")):
            del os.environ[name]
    for number, stream in ((0, "stdin"), (1, "stdout"), (2, "stderr")):  # closed by `>&-`: files would get its number
        if getattr(sys, stream) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            setattr(sys, stream, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8"))


def _require_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError(
            "The folder in which this command was started does not exist any more.\nGo to one that does: cd ..."
        ) from None


def exit_interrupted(*, goes_on: bool = True) -> NoReturn:
    """End the process as one that was interrupted, with exit status 130; `goes_on`: it trained, and can go on."""
    more = " The same command goes on from the last checkpoint." if goes_on else ""
    say(f"Interrupted.{more}", file=sys.stderr, flush=True)
    sys.exit(130)


def exit_with_error(error: Exception, line: CommandLine | None = None) -> NoReturn:
    """Print an error and end the process with exit status 1.

    What the user can mend is a sentence of at most five lines, anything else a traceback with what to send to whom.
    Nothing is printed where nobody reads it any more.

    Args:
        error: of normlab, Hydra, OmegaConf, or any other.
        line: the command line that it came of; if it is not given, settings of train.
    """
    if isinstance(error, BrokenPipeError) and _leave_closed_pipes():
        sys.exit(1)
    sentence = _sentence(error, line or CommandLine("train", settings=sys.argv[1:]))
    if sentence is None:
        from normlab.common import bugs  # whose imports take time, and few errors need them

        say("".join(traceback.format_exception(error)).rstrip(), file=sys.stderr)
        lines = [bugs.report(error, line.command if line else None)]
    else:
        lines = [line for line in str(sentence).splitlines() if line.strip()][:5]
    say("\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(1)


def _leave_closed_pipes() -> bool:
    """Return whether a reader of what is printed, such as head, has seen enough; what it has not read goes nowhere."""
    closed = select.poll()
    for number in (1, 2):
        closed.register(number, 0)
    numbers = [number for number, event in closed.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for number in numbers:  # also what Python writes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(numbers)


def _sentence(error: Exception, line: CommandLine) -> UserError | None:
    """Return an error in a user's words, None for one that the user cannot mend."""
    if isinstance(error, UserError):
        return error
    group_value = isinstance(error, ValueError) and str(error).startswith("Config group override")
    if group_value or isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error, line)
    if isinstance(error, yaml.YAMLError):
        return UserError(f"A YAML file cannot be read: {' '.join(str(error).split())}.\nMend it there.")
    folder = line.flags.get("--config-dir") or line.flags.get("--config-path")
    if folder and (fault := _fault_in(Path(folder), error)):
        return UserError(fault)
    if isinstance(error, OSError) and error.filename:  # Hydra itself makes the folder of a sweep
        return storage_error(Path(error.filename), error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # of print
        return UserError(f"What this command prints cannot be written: {error.strerror}.\nLook where its output goes.")
    return None


def _fault_in(folder: Path, error: Exception) -> str:
    """Return a sentence about the first file of a user's own configuration that is none; nothing if all are."""
    if isinstance(error, RecursionError):
        return f"Files in {folder} include each other in a circle.\nLook at their defaults: lists."
    for file in sorted(folder.rglob("*.yaml")):
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (ValueError, OSError, yaml.YAMLError) as fault:
            return f"{file} cannot be read: {' '.join(str(fault).split())}.\nExpected YAML, in UTF-8."
        if not isinstance(settings, dict | None):
            return f"{file} has no settings.\nExpected lines such as name: value."
    return ""
