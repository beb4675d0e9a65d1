"""Turn what Hydra composes into plain values, and its exceptions into sentences for a user."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from normlab.common.errors import InterruptedRunError, UserError, nearest, storage_error
from normlab.common.installation import CONF, command_name
from normlab.common.registry import declarations

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


def refuse_folders(hydra: Any) -> None:
    """Refuse folders of Hydra's, in which nothing would be written.

    Raises:
        UserError: if hydra.run.dir, hydra.sweep.dir or hydra.sweep.subdir is given.
    """
    given = [str(word).partition("=")[0].lstrip("+") for word in hydra.overrides.hydra]
    for name in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
        if name in given:
            raise UserError(
                f"{name} is not used: a run's folder is named by its settings, and no other is made.\n"
                "Choose where with output_dir=..., and the study's name with study=..."
            )


def run_main(main: Callable[[], Any]) -> NoReturn:
    """Run a Hydra main function and end the process; a user's mistake is a sentence on stderr and exit status 1."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions to us instead of printing them
    try:
        main()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        exit_with_error(error)
    except ValueError as error:
        if "Config group override must be" not in str(error):
            raise
        exit_with_error(_no_choice())
    except OSError as error:  # Hydra itself makes the folder of a sweep
        if not error.filename:
            raise
        exit_with_error(storage_error(Path(error.filename), error))
    except (KeyboardInterrupt, InterruptedRunError):
        exit_interrupted()
    sys.exit(0)


def take_command(arguments: list[str], commands: Sequence[str], setting: str = "study") -> str | None:
    """Remove the bare word in front of the settings (`arguments[1]`) and return it; None where there is none.

    Args:
        arguments: the command line, as in sys.argv.
        commands: the words that can be there.
        setting: the setting whose value a word that is no command most probably is.

    Raises:
        UserError: for a word that is none of the commands.
    """
    if len(arguments) < 2 or not re.fullmatch(r"[\w./-]*\w", arguments[1]) or arguments[1].startswith("-"):
        return None
    word = arguments.pop(1)
    if word in commands:
        return word
    close = nearest(word, commands)
    raise UserError(
        f"{word}: there is no such command. Expected one of: {', '.join(commands)}; or settings, key=value.\n"
        f"Did you mean {f'{close}, or ' if close else ''}{setting}={word}?"
    )


def exit_interrupted() -> NoReturn:
    """End the process as one that was interrupted, with exit status 130."""
    print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
    sys.exit(130)


def exit_with_error(error: Exception) -> NoReturn:
    """Print an error as a sentence of at most five lines and end the process with exit status 1."""
    message = str(error if isinstance(error, UserError) else explain(error))
    lines = [line for line in message.splitlines() if line.strip()][:5]
    print("\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(1)


def _no_choice() -> UserError:
    """Return the error for a group that was given null."""
    groups = re.findall(r"(?<!\S)(\w+)=\S*null\b", " ".join(sys.argv[1:]))
    group = next((g for g in groups if (CONF / g).is_dir()), "group")
    none = "\nWithout normalization: norm=none." if group == "norm" else ""
    return UserError(
        f"{group}=null: a group takes the name of one of its files.{none}\n"
        f"`{command_name('train')} --help` shows the choices of every group."
    )


def explain(error: Exception) -> UserError:
    """Return an error of Hydra or OmegaConf in a user's words."""
    text = str(error)
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return _no_such_choice(group, choice, error.options)
    if isinstance(error, MissingMandatoryValue):
        key = getattr(error, "full_key", None) or text.rpartition(" ")[2]
        return UserError(f"{key} has no default and needs a value.\nGive it on the command line: {key}=...")
    if isinstance(error, OverrideParseException):
        return UserError(
            f"Cannot understand {error.override!r}.\n{text.splitlines()[0]}\n"
            "Settings look like key=value, lists in a sweep like key=1,2,3; quote values with special characters."
        )
    key_error = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text)
    return _no_such_setting(key_error[1] or key_error[2]) if key_error else UserError(text)


def _norm_with_alias(word: str) -> str | None:
    """Return the norm that has `word` for an alias, without regard to case and punctuation."""
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    norms = declarations("norms").values()
    return next((each.name for each in norms if plain in (*each.aliases, each.name.replace("_", ""))), None)


def _no_such_choice(group: str, choice: str, options: Sequence[str] | None) -> UserError:
    # For a group whose choice is a list Hydra knows no options.
    known = [str(option) for option in options or (file.stem for file in (CONF / group).glob("*.yaml"))]
    meant = _norm_with_alias(choice) if group == "norm" else None
    return _unknown(f"{group}={choice}", f"option of {group}", meant or choice, known, prefix=f"{group}=")


def _no_such_setting(name: str) -> UserError:
    group = name.rpartition(".")[0]
    options = _known_settings()
    if name in options:  # of the choice that the menu was composed with, and not of another in the sweep
        return UserError(f"{name}: not every choice of {group} has this setting. Give it to those that have it.")
    siblings = [option for option in options if group and option.startswith(f"{group}.")]
    if group in options and not siblings:
        return UserError(f"{name} is new to {group}: add it with a plus, +{name}=...")
    return _unknown(name, "setting or group", name, siblings or options)


def _unknown(given: str, kind: str, word: str, options: list[str], prefix: str = "") -> UserError:
    """Return the error for something that does not exist, with the nearest thing that does."""
    close = nearest(word, options)
    lines = [f"{given}: there is no such {kind}."]
    if close:
        lines.append(f"Did you mean {prefix}{close}{'' if prefix else '=...'}?")
    if len(options) <= 30:
        lines.append(f"Expected one of: {', '.join(sorted(options))}.")
    else:
        lines.append(f"`{command_name('train')} --cfg job` shows all settings, {CONF / 'config.yaml'} explains them.")
    return UserError("\n".join(lines))


def _known_settings() -> list[str]:
    """Return every group and dotted key of the menu as it is without overrides."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            name = "report" if Path(sys.argv[0]).stem.endswith("report") else "config"
            choices = [word for word in sys.argv[1:] if re.fullmatch(r"[a-z]+=\w+", word)]
            groups = [word for word in choices if (CONF / f"{word.replace('=', '/')}.yaml").exists()]
            composed = compose(name, groups)
    except (HydraException, OmegaConfBaseException):
        return []
    return list(_keys(OmegaConf.to_container(composed)))


def _keys(node: object, prefix: str = "") -> Iterator[str]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")
