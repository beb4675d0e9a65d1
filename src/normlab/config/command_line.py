"""The words of a command line as Hydra takes them: flags first, then settings that its grammar can read.

Hydra's own parser refuses settings on both sides of a flag, answers an unknown flag with its usage, and reads only
letters of ASCII and a few other characters as text. People type `study=x -m norm=bn,none` and `output_dir=~/out`.
"""

import itertools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from normlab.common.errors import UserError, nearest
from normlab.common.installation import CONF, command_name

# Of Hydra 1.3, by their long names; a test compares them with Hydra's.
_SWITCHES = {
    **{"--help": "-h", "--hydra-help": "", "--version": "", "--resolve": ""},
    **{"--run": "-r", "--multirun": "-m", "--shell-completion": "-sc"},
}
_WITH_VALUE = {
    **{"--cfg": "-c", "--info": "-i", "--package": "-p", "--experimental-rerun": ""},
    **{"--config-path": "-cp", "--config-name": "-cn", "--config-dir": "-cd"},
}
FLAGS = _SWITCHES | _WITH_VALUE
_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
_MODES = ("--run", "--multirun", "--cfg", "--info", "--shell-completion")
_SHELLS = ("bash", "fish", "zsh")
_OF_SWEEP = ("cluster", "hydra")  # sections that a launcher reads
_SEVERAL = ("probe",)  # groups of which a run can have several choices

_READABLE = re.compile(r"[\w/\-\\+.$%*@?|: \t]*", re.ASCII)  # text that Hydra reads without quotes
_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|int|float|str|bool)\s*\(")
_NUMBER = re.compile(r"[-+]?[\d.][\w.+-]*|[-+]?(inf|nan)|true|false", re.IGNORECASE)
_TEXTS = ("study", "output_dir", "data_dir", "dataset.path", "page", "source")  # settings whose values are no numbers


@dataclass(frozen=True)
class CommandLine:
    """What stands on a command line.

    Attributes:
        script: train or report.
        command: the word without an equals sign, such as doctor; None where there is none.
        flags: Hydra's, by their long names, with the value of each that has one.
        settings: as they were typed.
    """

    script: str
    command: str | None = None
    flags: dict[str, str | None] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)

    def words(self) -> list[str]:
        """Return the words for Hydra, which knows nothing of the command.

        Where a group is swept, a value in its section, such as norm.groups=8, is a list of one: Hydra would otherwise
        refuse it where the section as it is by default has no such setting, whatever the runs have.
        """
        flags = [flag if value is None else f"{flag}={value}" for flag, value in self.flags.items()]
        return [*flags, *map(self._for_hydra, self.settings)]

    def replaced(self) -> list[str]:
        """Return a sentence for each choice of a group that a later one replaces; scripts do so with other settings."""
        last = {word.partition("=")[0]: word for word in self.settings if "=" in word}
        return [
            f"{word} has no effect: {last[key]} after it replaces it."
            for word in self.settings
            if (key := word.partition("=")[0]) in last and last[key] != word and (CONF / key).is_dir()
        ]

    def original(self, word: str) -> str:
        """Return the word that was typed for one that Hydra was given."""
        return next((each for each in self.settings if word in (each, self._for_hydra(each))), word)

    def _for_hydra(self, setting: str) -> str:
        word = readable(setting)
        return _as_list(word) if word.split(".")[0] in self._swept else word

    @cached_property
    def _of_experiment(self) -> bool:
        """Whether the line names an experiment that is a sweep, as those of the menu are."""
        folders = [Path(folder) for folder in (self.flags.get("--config-dir"), CONF) if folder]
        names = [word.partition("=")[2] for word in self.settings if word.startswith("experiment=")]
        files = [folder / "experiment" / f"{name}.yaml" for name in names for folder in folders]
        found = [file.read_text("utf-8", "replace") for file in files if file.is_file()]
        return any("MULTIRUN" in text for text in found) if found else bool(names)

    @property
    def is_sweep(self) -> bool:
        """Whether the line asks for several runs."""
        asked = "--multirun" in self.flags or "hydra.mode=MULTIRUN" in self.settings
        return asked or (self._of_experiment and "hydra.mode=RUN" not in self.settings)

    @cached_property
    def _swept(self) -> set[str]:
        """Return the groups of which a sweep has several choices, or may have: an experiment's."""
        if self.script != "train" or self.command or not self.is_sweep or {"--cfg", "--info"} & self.flags.keys():
            return set()
        groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {*_OF_SWEEP}
        if self._of_experiment:
            return groups
        given = [word.partition("=") for word in self.settings]
        return {name for name, _, value in given if re.search("[,(]", value)} & groups

    def typed(self, settings: Sequence[str], *flags: str) -> str:
        """Return the line as one types it, with other settings and further flags."""
        own = [FLAGS[flag] or flag for flag, value in self.flags.items() if value is None and flag != "--run"]
        valued = [f"{flag} {shlex.quote(value)}" for flag, value in self.flags.items() if value is not None]
        command = [self.command] if self.command else []
        words = [*command, *flags, *own, *valued, *map(shlex.quote, settings)]
        return " ".join([command_name(self.script), *words])


def read(arguments: Sequence[str], script: str, commands: Sequence[str]) -> CommandLine:
    """Return the parts of a command line, in whatever order they were given.

    Args:
        arguments: its words, without the script's name.
        script: train or report.
        commands: the words that can stand before, between or after the settings.

    Raises:
        UserError: for a word that is no flag, no command and no setting, and for flags that do not go together.
    """
    for word in arguments:
        if not word.isascii() and word != word.encode(errors="replace").decode():
            raise UserError(f"{word!a} is no text in UTF-8, which the records are written in.\nRename what it names.")
    line, words, waiting = CommandLine(script), list[str](), list(arguments)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            words += waiting
            break
        if re.match(r"--?\w", word):
            flag, value = _flag(word, waiting, line, words)
            line.flags[flag] = value
        elif word in commands and line.command is None:
            line = replace(line, command=word)
        else:
            words.append(word)
    line = replace(line, settings=words)
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise _bare_word(line, word, commands)
        _refuse_nonsense(line, word)
    _check_flags(line)
    return line


def readable(setting: str) -> str:
    """Return `key=value` with quotes around what Hydra would not read as text, and ~ as the home folder.

    Lists in brackets, pairs in braces, quoted text, functions such as range(0,3) and interpolations stay as they are.
    """
    key, equals, value = setting.partition("=")
    key, setting = key.strip(), setting.strip()
    if not value or value[0] in "[{'\"" or "${" in value or _FUNCTION.match(value):
        return setting
    if re.search(r"[\[\](){}'\"]", value):
        return setting if "," in value else f"{key}={_as_text(key, value)}"
    elements = [_as_text(key, each) for each in value.split(",")]
    return f"{key}{equals}{','.join(elements)}"


def _as_text(key: str, value: str) -> str:
    text = os.path.expanduser(value) if value.startswith("~") else value  # noqa: PTH111  # of what may be no path
    if _READABLE.fullmatch(text) and not (key in _TEXTS and _NUMBER.fullmatch(text)):
        return text
    quote = '"' if "'" in text else "'"
    escaped = re.sub(rf"(\\*)({quote}|$)", lambda found: found[1] * 2 + (found[2] and "\\" + found[2]), text)
    return f"{quote}{escaped}{quote}"


def _as_list(setting: str) -> str:
    key, _, value = setting.partition("=")
    return f"{key}=choice({value})" if "." in key and value and not _FUNCTION.match(value) else setting


def setting_names(script: str) -> list[str]:
    """Return the names on the first level of the menu, groups included."""
    menu = (CONF / ("config.yaml" if script == "train" else "report.yaml")).read_text(encoding="utf-8")
    groups = [path.name for path in CONF.iterdir() if path.is_dir()] if script == "train" else []
    return sorted({*re.findall(r"^(\w+):", menu, re.MULTILINE), *groups} - {"defaults"})


def choices() -> dict[str, str]:
    """Return `group=choice` for the name of every choice of the menu; of equal names the norm's."""
    files = sorted(CONF.glob("*/*.yaml"), key=lambda path: path.parent.name == "norm")
    return {path.stem: f"{path.parent.name}={path.stem}" for path in files}


def _flag(word: str, waiting: list[str], line: CommandLine, words: Sequence[str]) -> tuple[str, str | None]:
    """Return the flag that `word` is, and its value, which may be the next word and is taken from `waiting`."""
    name, equals, value = word.partition("=")
    known = [flag for flag, short in FLAGS.items() if name in (flag, short)]
    begun = [flag for flag in FLAGS if name.startswith("--") and flag.startswith(name)]
    if not known and len(begun) != 1:
        raise _no_such_flag(word, waiting, line, words)
    [flag] = known or begun
    if flag in _SWITCHES:
        if equals:
            raise UserError(f"{word}: {flag} takes no value.\nGive it alone: {flag}.")
        return flag, None
    options = _CHOICES.get(flag, ())
    if not value:
        if flag == "--info" and not equals and (not waiting or "=" in waiting[0] or waiting[0].startswith("-")):
            return flag, "all"
        if equals or not waiting or waiting[0].startswith("-") or (options and "=" in waiting[0]):
            expected = f"one of {', '.join(options)}. Example: {flag} {options[0]}" if options else f"{flag}=..."
            raise UserError(f"{name} needs a value: {expected}")
        value = waiting.pop(0)
    if options and value not in options:
        close = nearest(value, options) or options[0]
        raise UserError(
            f"{flag} {value} is not valid: expected one of {', '.join(options)}.\nDid you mean {flag} {close}?"
        )
    return flag, value


def _no_such_flag(word: str, waiting: Sequence[str], line: CommandLine, words: Sequence[str]) -> UserError:
    setting = word.lstrip("-")
    if re.split(r"[=.]", setting)[0].replace("-", "_") in setting_names(line.script):
        fixed = _joined([*words, setting.replace("-", "_") if "=" not in setting else setting, *waiting], line.script)
        return UserError(f"{word}: settings have no dashes.\nDid you mean: {line.typed(fixed)}")
    begun = [f"{name}=..." for name in setting_names(line.script) if setting.startswith(name)]
    close = begun[0] if begun else nearest(word.partition("=")[0], FLAGS)
    hint = f"\nDid you mean {close}?" if close else ""
    return UserError(
        f"{word}: there is no such flag.{hint}\n"
        f"Expected one of: -m (a sweep), {', '.join(flag for flag in FLAGS if flag != '--multirun')}.\n"
        "Settings have no dashes: key=value."
    )


def _joined(words: Sequence[str], script: str) -> list[str]:
    """Return words with those joined that make up a setting: norm bn, norm = bn, norm=bn, none, norm:bn."""
    names, joined = setting_names(script), list[str]()
    for word in words:
        last = joined[-1] if joined else ""
        is_name = re.split(r"[./]", last)[0] in names and "=" not in last
        name, colon, value = word.partition(":")
        if last and (last[-1] in "=," or word[:1] in ("=", ",")):
            joined[-1] += word
        elif is_name and "=" not in word and not word.startswith("-"):
            joined[-1] += f"={word}"
        else:
            joined.append(f"{name}={value}" if colon and value and name in names else word)
    return joined


def _bare_word(line: CommandLine, word: str, commands: Sequence[str]) -> UserError:
    """Return the error for a word that is neither a setting nor a command, with what was most probably meant."""
    problem = f"{word or repr(word)}: there is no such command. Expected one of: {', '.join(commands)};"
    problem += " or settings, key=value."
    if line.command and word in commands:
        return UserError(f"{word}: there is a command already, {line.command}.\nGive one of them.")
    if f"--{word}" in FLAGS:
        return UserError(f"{word} is a flag, and flags begin with dashes.\nDid you mean: {line.typed([], f'--{word}')}")
    rest = [each for each in line.settings if each != word]
    if word in (line.script, "run"):
        return UserError(f"{problem}\nLeave {word} out: {line.typed(rest)}")
    if line.script == "train" and (CONF / "hydra" / "launcher" / f"{word}.yaml").is_file():
        return UserError(f"{problem}\nDid you mean: {line.typed([f'hydra/launcher={word}', *rest], '-m')}")
    words = _joined(line.settings, line.script)
    if not any("=" not in each for each in words):
        return UserError(f"{problem}\nDid you mean: {line.typed(words)}")
    if line.script == "train":
        known = choices()
        for before, after in itertools.pairwise(words):
            group = before.partition("=")[0]
            if "=" in before and known.get(after, "=").partition("=")[0] == group:
                several = [f"{before},{after}" if each == before else each for each in words if each != after]
                sweep = () if "--multirun" in line.flags else ("-m",)
                return UserError(f"{problem}\nDid you mean: {line.typed(several, *sweep)}")
        if word in ("report", "status", "claims", "results", "import", "pack", "verify", "next"):
            report = CommandLine("report", None if word == "report" else word)
            return UserError(f"{problem}\nDid you mean: {report.typed(rest)}")
        meant = {name: f"{name}=..." for name in setting_names(line.script)} | known | {each: each for each in commands}
        close = nearest(word, meant)
        return UserError(problem + (f"\nDid you mean {meant[close]}?" if close else ""))
    if word == "doctor":
        return UserError(f"{problem}\nDid you mean: {command_name('train')} doctor")
    close = nearest(word, commands)
    named = f"{word}=..." if word in setting_names(line.script) else f"study={word}"
    return UserError(f"{problem}\nDid you mean {f'{close}, or ' if close else ''}{named}?")


def _refuse_nonsense(line: CommandLine, word: str) -> None:
    """Refuse what Hydra takes and makes nonsense of.

    Raises:
        UserError: for several choices of a group of which a run has one, `norm=[bn,none]`, whose settings Hydra would
            mix; for hydra.launcher=pool.
    """
    group, _, value = word.lstrip("+").partition("=")
    if re.match(r"hydra\.(launcher|sweeper)=", word):
        raise UserError(
            f"{word}: a choice is written with a slash, a setting of it with a dot.\nWrite hydra/{word[6:]}"
        )
    several = re.search(r"^(?!glob)[^,]*\[[^\[\]]*,[^\[\]]*\]", value)
    if several and line.script == "train" and group not in _SEVERAL and (CONF / group).is_dir():
        words = [f"{group}={re.sub(r'[][() ]|str', '', value)}" if each == word else each for each in line.settings]
        sweep = () if "--multirun" in line.flags else ("-m",)
        raise UserError(
            f"{word}: a run has one {group}, and brackets make one value of several.\n"
            f"A sweep over them: {line.typed(words, *sweep)}"
        )


def _check_flags(line: CommandLine) -> None:
    """Check that flags go together, and that what they name is there.

    Raises:
        UserError: if not.
    """
    flags = line.flags
    if not {"--help", "--hydra-help", "--version"}.isdisjoint(flags):
        return
    modes = [flag for flag in _MODES if flag in flags]
    if len(modes) > 1:
        plan = f"\nWhat a sweep would do: {command_name('train')} -m hydra/launcher=plan ..."
        raise UserError(
            f"{' and '.join(modes)} do not go together: give one of them."
            f"{plan if line.script == 'train' and '--multirun' in modes else ''}"
        )
    launcher = [word for word in line.settings if re.match(r"hydra/launcher=|hydra\.launcher\.", word)]
    sweep = line.is_sweep or {"--cfg", "--info"} & flags.keys()
    if launcher and line.script == "train" and not line.command and not sweep:
        raise UserError(
            f"{launcher[0]} is about the runs of a sweep, and a sweep needs -m, also if it has one run:\n"
            f"  {line.typed(line.settings, '-m')}"
        )
    other = {"train": "report", "report": "config"}[line.script]
    if flags.get("--config-name", "") in (other, f"{other}.yaml") and "--config-dir" not in flags:
        script = {"report": "report", "config": "train"}[other]
        raise UserError(f"--config-name {other} is the menu of {command_name(script)}.\nLeave it out here.")
    for flag in ("--resolve", "--package"):
        if flag in flags and "--cfg" not in flags:
            raise UserError(f"{flag} says how --cfg shows settings.\nAdd --cfg job, or leave it out.")
    if "--experimental-rerun" in flags:
        raise UserError(
            "--experimental-rerun reads a pickle, which can run any code, and normlab writes none.\n"
            "The same command again goes on with a run; config.yaml in its folder has its settings."
        )
    for flag in ("--config-dir", "--config-path"):
        if flag in flags:
            folder = Path(flags[flag] or "").expanduser().absolute()
            if not flags[flag] or not folder.is_dir():
                raise UserError(
                    f"{flag}={flags[flag]}: there is no such folder.\n"
                    "Expected a folder of YAML files, with a subfolder for each group, as in own/norm/mine.yaml."
                )
            flags[flag] = str(folder)
    if "--shell-completion" in flags:
        _check_completion(line)


def _check_completion(line: CommandLine) -> None:
    what, _, shell = "".join(line.settings[:1]).partition("=")
    valid = len(line.settings) == 1 and what in ("install", "uninstall", "query") and shell in _SHELLS
    if not valid or (what == "query" and "COMP_LINE" not in os.environ):
        raise UserError(
            "--shell-completion makes the Tab key complete settings: it prints what the shell is to run.\n"
            f'For bash: eval "$({command_name(line.script)} -sc install=bash)"\n'
            "Expected install= or uninstall= with one of bash, fish, zsh; query= is the shell's own."
        )
