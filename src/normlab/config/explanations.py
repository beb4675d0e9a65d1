"""Errors of Hydra and OmegaConf as sentences for a user, who knows settings, groups and lists, and no more."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from normlab.common.errors import UserError, nearest
from normlab.common.installation import CONF, command_name
from normlab.common.registry import declarations
from normlab.config.command_line import CommandLine

_INTERNAL = re.compile(r"\s*(full_key:|object_type=|reference_type=|See https?:).*|,? set env var HYDRA_FULL_ERROR.*")
_LISTS = ("arms", "batches", "seeds", "settings", "thresholds", "ignore")  # of a report
_NO_NAME = re.compile(r"null|true|false|[-+.\d].*|\{.*", re.IGNORECASE)
_ADDED = ("tuning",)  # groups of which a run has a choice only where one is added, with a plus
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


def explain(error: Exception, line: CommandLine) -> UserError:
    """Return an error of Hydra or OmegaConf in a user's words.

    Args:
        error: a HydraException, an OmegaConfBaseException, or the ValueError of a group's value.
        line: the command line that it came of.
    """
    if isinstance(error, MissingConfigException):
        return _missing_file(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, str(error), line)
    if isinstance(error, OmegaConfBaseException):
        return _of_value(error, line)
    if isinstance(error, ValueError):
        return _no_name_of_choice(line)
    text = str(error)
    for pattern, sentence in _SENTENCES:
        if match := re.search(pattern, text, re.DOTALL):
            return sentence(match, error, line)
    return _cleaned(error)


def _missing_file(error: MissingConfigException) -> UserError:
    missing = str(error.missing_cfg_file or "")
    group, _, choice = missing.rpartition("/")
    if group:
        return _no_such_choice(group, choice, error.options)
    return UserError(
        f"There is no configuration {missing}.yaml, in conf/ or in a folder of --config-dir.\n"
        "--config-name names one on the first level: config for training, report for reports. Or leave it out."
    )


def _unreadable(word: str, text: str, line: CommandLine) -> UserError:
    """Return the error for a word that Hydra's grammar refuses, by what is wrong in it as far as that can be seen."""
    word = line.original(word)
    return UserError(f"Cannot understand {word!r}.\n{_flaw(word, text)}")


def _flaw(word: str, text: str) -> str:
    key, equals, value = word.partition("=")
    if not re.fullmatch(r"[+~]*[\w$@:/.-]+", key.strip()) or not equals:
        element = re.fullmatch(r"([\w.]+)\[.*\]", key)
        if element:
            return f"{element[1]} is set as a whole: '{element[1]}=[...]'."
        return "Settings look like key=value, without spaces before or after the name."
    unquoted = re.sub(r"\"(\\.|[^\"\\])*\"|'(\\.|[^'\\])*'", "q", value)
    if "'" in unquoted or '"' in unquoted:
        return f"A quote is not closed. Settings look like key=value; a text with a quote in it: '{key}=\"...\"'"
    for opening, closing in _BRACKETS.items():
        if unquoted.count(opening) != unquoted.count(closing):
            return f"A bracket is not closed: {opening} without {closing}. Settings look like key=value or key=[1,2]."
    if re.search(r"^,|,\s*(,|$|[\])}])|[\[({]\s*,", unquoted):
        return "A value is missing before or after a comma. Settings look like key=value, in a sweep key=1,2."
    function = re.search(r"Unknown function '(\w+)'\s*Available: ?([\w,]+)", text)
    if function:
        known = [name for name in function[2].split(",") if name != "tag"]
        close = nearest(function[1], known)
        hint = f"Did you mean {close}(...)? " if close else ""
        return (
            f"{function[1]}(...) is no function. {hint}Expected one of: {', '.join(known)}.\n"
            f"Text with brackets in a list needs quotes: \"{key}=['...']\"."
        )
    called = re.search(r"while evaluating '.*?': (.*)", text)
    if called:
        return f"{_stripped(called[1])}. Examples: seed=range(0,3), norm=glob(b*), norm=choice(bn,none)."
    if unquoted.startswith("{"):
        return f"Pairs in braces have a colon: '{key}={{name: value, other: value}}'."
    return (
        "Settings look like key=value, lists in a sweep like key=1,2,3; text with brackets or other special"
        f" characters needs quotes of its own: '{key}=\"...\"'."
    )


def _of_value(error: OmegaConfBaseException, line: CommandLine) -> UserError:
    """Return the error for a value that is missing, or refers to what is not there."""
    text = str(error)
    name = error.full_key or text.splitlines()[0].rpartition(" ")[2]
    if isinstance(error, MissingMandatoryValue):
        return UserError(f"{name} has no default and needs a value.\nGive it on the command line: {name}=...")
    if found := re.search(r"Interpolation key '([^']*)' not found", text):
        return UserError(
            f"{name} refers to ${{{found[1]}}}, and there is no such setting.\n"
            f"An environment variable is written ${{oc.env:{found[1]}}}."
        )
    if found := re.search(r"Environment variable '([^']*)' not found", text):
        return UserError(
            f"{name} refers to the environment variable {found[1]}, which is not set.\n"
            f"Set it, or give a default: ${{oc.env:{found[1]},default}}."
        )
    if "Recursive interpolation" in text or "RecursionError" in text:
        return UserError(f"{name} refers to itself.\nGive it a value that does not depend on it.")
    if found := re.search(r"Unsupported interpolation type '?([\w.]*)", text):
        return UserError(
            f"{name} refers to ${{{found[1]}:...}}, which there is not.\n"
            "Expected another setting, ${study}, or an environment variable, ${oc.env:HOME}."
        )
    if "nterpolation" in text or type(error).__name__ == "GrammarParseError":
        return UserError(
            f"{name} has a reference that cannot be read: {_stripped(text)}\n"
            "A reference is ${study} to a setting, ${oc.env:HOME} to an environment variable."
        )
    if "Unexpected type annotation" in text:
        return _mixed(line)
    if missing := re.search(r"Key '([^']+)' is not in struct", text):
        return _no_such_setting(error.full_key or missing[1], line)
    return _cleaned(error)


def _no_name_of_choice(line: CommandLine) -> UserError:
    """Return the error for a group that was given null, a number, or another value that is no name."""
    for word in line.settings:
        group, _, values = word.lstrip("+~").partition("=")
        wrong = [each for each in values.split(",") if _NO_NAME.fullmatch(each)]
        if not wrong or not (CONF / group).is_dir():
            continue
        if wrong[0].lower() != "null":
            return _no_such_choice(group, wrong[0], None)
        none = "\nWithout normalization: norm=none." if group == "norm" else ""
        return UserError(
            f"{group}=null: a group takes the name of one of its files.{none}\n"
            f"`{command_name('train')} --help` shows the choices of every group."
        )
    return UserError(f"A group takes the name of one of its files.\n`{command_name('train')} --help` shows them.")


def _list_without_sweep(found: re.Match[str], _: Exception, line: CommandLine) -> UserError:
    """Return the error for several values of a setting where one is expected."""
    word = line.original(found[1])
    key, value = word.split("=", 1)
    first = f"{key}={re.split('[,()]', value)[0]}" if "(" not in value else f"{key}=..."
    if line.script == "report":
        if key not in _LISTS:
            return UserError(f"{word} has several values.\nGive one of them: {first}\n{_comma(key, value)}")
        listed = line.typed([f"{key}=[{value}]" if each == word else each for each in line.settings])
        return UserError(f"{word} has several values.\nA list is in brackets: {listed}")
    if _is_list(key, line):
        as_list = line.typed([f"{key}=[{value}]" if each == word else each for each in line.settings])
        return UserError(f"{word}: a list of values for one run is in brackets.\nWrite: {as_list}")
    showing = next((flag for flag in ("--cfg", "--info", "--help") if flag in line.flags), "")
    if line.command or showing:
        what = f"{line.command} looks at" if line.command else f"{showing} shows"
        return UserError(f"{word} has several values, and {what} one set of settings.\nGive one of them: {first}")
    as_list = f"\nAll of them in one run: {key}=[{value}]" if key == "probe" else ""
    return UserError(
        f"{word} has several values, which is a sweep, and a sweep needs -m:\n"
        f"  {line.typed(line.settings, '-m')}{as_list}\n{_comma(key, value)}"
    )


def _is_list(key: str, line: CommandLine) -> bool:
    composed = _composed(line)
    return composed is not None and OmegaConf.is_list(OmegaConf.select(composed, key))


def _comma(key: str, value: str) -> str:
    folder = key in ("output_dir", "data_dir", "dataset.path") or key.startswith("study")
    return f"If the comma is part of the value: '{key}=\"{value}\"'" if folder and "(" not in value else ""


def _not_overridden(found: re.Match[str], error: Exception, line: CommandLine) -> UserError:
    cause = error.__cause__
    name = found[1]
    if not name:
        return UserError("A setting has no name before its equals sign.\nSettings look like key=value.")
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and cause.full_key.startswith(f"{name}."):
        name = cause.full_key
    if "@" in name or ("/" in name and not name.startswith("hydra/")):
        group = re.split("[/@]", name)
        meant = next((each for each in group if (CONF / each).is_dir()), "group")
        value = next((word.partition("=")[2] for word in line.settings if word.startswith(f"{name}=")), "...")
        return UserError(f"{name}={value}: a group has one place here, and no package.\nWrite {meant}={value}")
    return _no_such_setting(name, line)


def _mixed(line: CommandLine) -> UserError:
    word = next((word for word in line.settings if re.search(r"\),|,\w+\(", word)), "A list")
    return UserError(
        f"{word}: a list holds values, and no function beside them.\nGive one of both: key=0,1,2,5 or key=range(0,3)."
    )


def _exists_already(found: re.Match[str], _: Exception, line: CommandLine) -> UserError:
    name = found[1].split("@")[0]
    word = next((word.lstrip("+") for word in line.settings if word.lstrip("+").startswith(f"{name}=")), f"{name}=...")
    return UserError(
        f"+{word}: a plus adds what is not there, and {name} is there already.\nWrite it without a plus: {word}"
    )


def _not_deleted(found: re.Match[str], _: Exception, line: CommandLine) -> UserError:
    if found[2].startswith(". The value"):
        return UserError(f"~{found[1]}: {_stripped(found[2][2:])}\nTo leave it out whatever it is: ~{found[1]}")
    known = _known_settings(line)
    if found[1] in known:
        return UserError(
            f"~{found[1]}: there is nothing to leave out, as no {found[1]} is chosen.\nLeave out the word."
        )
    return _unknown(f"~{found[1]}", "setting or group", found[1], known, prefix="~")


def _reference_of_group(found: re.Match[str], _: Exception, line: CommandLine) -> UserError:
    word = next((word for word in line.settings if found[1] in word), found[1])
    return UserError(
        f"{word}: a group takes the name of one of its files, and no reference to a setting.\n"
        f"Give the name itself: {word.partition('=')[0]}=..."
    )


def _wrong_for_hydra(found: re.Match[str], error: Exception, _: CommandLine) -> UserError:
    """Return the error for a value of Hydra's own settings that they cannot have."""
    why = str(error.__cause__ or "")
    choices = re.search(r"expected one of \[([^\]]*)\]", why)
    if choices:
        return UserError(f"{found[1]} is not valid: expected one of {choices[1]}.")
    if "deletion" in why:
        return UserError(f"{found[1]}: this cannot be left out.\nGive it a value instead: key=value.")
    if "valid bool" in why:
        return UserError(f"{found[1]} is not valid: expected true or false.")
    return UserError(f"{found[1]} is not valid.\n{_stripped(why)}")


def _of_sweep(found: re.Match[str], _: Exception, __: CommandLine) -> UserError:
    return UserError(f"{found[1]}: what carries out a sweep has one value for all of its runs.\nGive one value.")


def _interval(found: re.Match[str], _: Exception, line: CommandLine) -> UserError:
    word = next((word for word in line.settings if "interval" in word), "interval(...)")
    return UserError(
        f"{word}: an interval has no end of values, and a sweep here is a grid.\n"
        "Name the values: key=0.01,0.1 or, for whole numbers, key=range(0,10,2)."
    )


_SENTENCES: tuple[tuple[str, Callable[["re.Match[str]", Exception, CommandLine], UserError]], ...] = (
    (r"Ambiguous value for argument '(.*?)'\n", _list_without_sweep),
    (r"Sweep parameters '(.*)' requires --multirun", _list_without_sweep),
    (r"Sweeping over Hydra's configuration is not supported : '(.*)'", _of_sweep),
    (r"Error resolving interpolation '(.*?)'", _reference_of_group),
    (r"Can only enumerate CHOICE and RANGE", _interval),
    (r"Could not append to config. An item is already at '([^']*)'", _exists_already),
    (r"(\S+) appears more than once in the final defaults list", _exists_already),
    (r"force-add of config groups is not supported: '\+\+([^'=]+)=", _exists_already),
    (r"Could not delete from config(?=. The value of '([^']*)')(. .*)", _not_deleted),
    (r"Could not delete from config. '([^']*)'(.*)", _not_deleted),
    (r"Could not delete '([^']*)'(.*)", _not_deleted),
    (r"Error merging override (\S+)", _wrong_for_hydra),
    (r"Could not override '([^']*)'", _not_overridden),
    (r"Override (\S+?)=\S* looks like a config group", _not_overridden),
)


def _cleaned(error: Exception) -> UserError:
    """Return any other text without what only Hydra's own developers can use."""
    text = "\n".join(filter(None, (str(error), str(error.__cause__ or ""))))
    lines = [_INTERNAL.sub("", each).rstrip() for each in text.splitlines()]
    return UserError("\n".join(dict.fromkeys(filter(None, lines))) or type(error).__name__)


def _stripped(text: str) -> str:
    """Return the first line, without what names an error's type."""
    return re.sub(r"^\w+(Error|Exception)\b( raised while \w+ interpolation)?: ", "", text.strip().splitlines()[0])


def _norm_with_alias(word: str) -> str | None:
    """Return the norm that has `word` for an alias, without regard to case and punctuation."""
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    norms = declarations("norms").values()
    return next((each.name for each in norms if plain in (*each.aliases, each.name.replace("_", ""))), None)


def _no_such_choice(group: str, choice: str, options: Sequence[str] | None) -> UserError:
    # For a group whose choice is a list Hydra knows no options.
    known = [str(option) for option in options or (file.stem for file in (CONF / group).glob("*.yaml"))]
    meant = _norm_with_alias(choice) if group == "norm" else None
    plus = "+" if group in _ADDED else ""
    prefix = f"{plus}{group}="
    error = _unknown(f"{prefix}{choice}", f"option of {group}", meant or choice, known, prefix=prefix)
    if group == "norm" and "sync" in choice.lower():
        return UserError(f"{error}\nStatistics over all processes of a run: sync_stats=true.")
    return error


def _no_such_setting(name: str, line: CommandLine) -> UserError:
    group, _, key = name.rpartition(".")
    top = name.partition(".")[0]
    if f"~{top}" in line.settings:
        return UserError(f"~{top} leaves out {top}, which every run has.\nGive another choice of it: {top}=...")
    if name.startswith("hydra."):
        files = [file for file in (CONF / "hydra" / "launcher").glob("*.yaml") if group == "hydra.launcher"]
        keys = {found for file in files for found in re.findall(r"(?m)^([a-z]\w*):", file.read_text("utf-8"))}
        close = nearest(key, keys)
        hint = f"\nDid you mean hydra.launcher.{close}=...?" if close else ""
        return UserError(
            f"{name}: Hydra has no such setting, or not with this launcher.{hint}\n"
            f"`{command_name('train')} --cfg hydra` shows all of its settings."
        )
    if name in _ADDED:
        word = next((word for word in line.settings if word.startswith(f"{name}=")), f"{name}=lr")
        return UserError(f"{word}: {name} is no part of the menu, and is added with a plus.\nWrite +{word}")
    options = _known_settings(line)
    if name in options:  # of the choice that the menu was composed with, and not of another in the sweep
        return UserError(f"{name}: not every choice of {group} has this setting. Give it to those that have it.")
    siblings = [option for option in options if group and option.startswith(f"{group}.")]
    if group in options and not siblings:
        return UserError(f"{name} is new to {group}: add it with a plus, +{name}=...")
    unknown = _unknown(name, "setting or group", name, siblings or options)
    having = _choices_with(group, key)
    if having:
        first = str(unknown).splitlines()[0]
        section = group.partition(".")[0]
        given = next((word for word in reversed(line.settings) if word.startswith(f"{section}=")), "")
        which = f"with {given}" if given else f"with the choice of {section}"
        return UserError(f"{first.rstrip('.')} {which}.\nIt belongs to {', '.join(having)}.")
    return unknown


def _choices_with(group: str, key: str) -> list[str]:
    """Return `group=choice` for the choices of a group whose own file has a setting."""
    if not group:
        return []
    group, _, choice = group.partition(".")
    if choice:  # of probes, whose settings are by their names
        return [f"{group}={choice}"] if (CONF / group / f"{choice}.yaml").is_file() else []
    files = sorted((CONF / group).glob("*.yaml"))
    return [f"{group}={file.stem}" for file in files if re.search(rf"(?m)^{re.escape(key)}:", file.read_text("utf-8"))]


def _unknown(given: str, kind: str, word: str, options: list[str], prefix: str = "") -> UserError:
    """Return the error for something that does not exist, with the nearest thing that does."""
    inner = [option for option in options if option.endswith(f".{word}")]
    close = f"hydra/{word}" if word in ("launcher", "sweeper") else inner[0] if inner else nearest(word, options)
    lines = [f"{given}: there is no such {kind}."]
    if close:
        lines.append(f"Did you mean {prefix}{close}{'' if prefix else '=...'}?")
    if 0 < len(options) <= 40:
        lines.append(f"Expected one of: {', '.join(sorted(options))}.")
    else:
        lines.append(f"`{command_name('train')} --cfg job` shows all settings, {CONF / 'config.yaml'} explains them.")
    return UserError("\n".join(lines))


def _known_settings(line: CommandLine) -> list[str]:
    """Return every group and dotted key of the menu as it is with the choices of groups that were given."""
    composed = _composed(line)
    return [] if composed is None else list(_keys(OmegaConf.to_container(composed)))


def _composed(line: CommandLine) -> DictConfig | None:
    """Return the menu with the choices of groups that were given, as far as they are ones."""
    choices = [word for word in line.settings if re.fullmatch(r"[a-z]+=\w+", word)]
    groups = [word for word in choices if (CONF / f"{word.replace('=', '/')}.yaml").exists()]
    for given in (groups, []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                return compose("config" if line.script == "train" else "report", given)
        except (HydraException, OmegaConfBaseException):
            continue
    return None


def _keys(node: object, prefix: str = "") -> Iterator[str]:
    for key, value in node.items() if isinstance(node, Mapping) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")
