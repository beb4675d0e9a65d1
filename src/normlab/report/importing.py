"""Bring results made elsewhere into a study: `python report.py import`, which docs/import.md explains to its users.

A source, a CSV file or a folder of TensorBoard's event files, is read as a table of texts: a row per evaluation or per
run, with its place in the source as index. Every value is checked, and `set=` adds the settings that the source does
not have: none is assumed. The rows of a run become a folder like that of any other run, whose `norm.imported` keeps
its identity apart from every run that normlab trains, whatever the arm's name.
"""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
)

from normlab import runs
from normlab.common.errors import UserError, as_typed, did_you_mean, exact, listed, storage_error
from normlab.common.installation import command_name, study_words
from normlab.common.sentences import sentence
from normlab.common.terminal import say
from normlab.config.schema import DEPTHS, RunConfig, StudyName
from normlab.runs import archive, files, reading
from normlab.runs.folder import write_record
from normlab.runs.identity import CARRIED_OUT
from normlab.runs.reading import LARGEST_NUMBER
from normlab.runs.schema import LARGEST, MOST_EPOCHS, MOST_SECONDS

MOST_BYTES, MOST_COLUMNS = 64 << 20, 10_000  # of a source; a hundred thousand evaluations of 20 columns have 20 MB
LONGEST = 60  # characters of a name: three of them, and what else names a folder, fit into a file system's 255
LABELS = ("arm", "dataset.name", "model.name")
COUNTS = ("batch", "norm_batch", "depth", "epochs")
ACCURACIES, LOSSES = ("test_accuracy", "train_accuracy"), ("test_loss", "train_loss")
MEASURED = (*ACCURACIES, *LOSSES, "wall_seconds", "images_per_second")
OF_EVALUATIONS = ("epoch", "step", "state", *MEASURED)  # every other column is a setting of its run
_Assumed = dict[str, list[str]]  # by kind: the runs it is about, none where it is about all of them
UNNAMED = "(one without a name)"
EXAMPLES = {"arm": "mine", "dataset.name": "cifar10", "model.name": "resnet", "depth": 18, "batch": 128, "epochs": 20}
_GROUPS = ("norm", "model", "dataset", "sampler", "init", "optimizer", "schedule")
_DOTTED = re.compile(rf"({'|'.join(_GROUPS)})(\.[a-zA-Z][a-zA-Z0-9_]*)+")
_RESERVED = ("norm.name", "norm.imported", "dataset.path", "dataset.workers")
_OTHERS = RunConfig.model_fields.keys() - {"probe", "seed", *COUNTS, *_GROUPS, *CARRIED_OUT}
COLUMNS = ("arm", "seed", *OF_EVALUATIONS, *COUNTS, *sorted(_OTHERS), "dataset.name", "model.name")
_BLANKS = ("", "na", "n/a", "none", "null", "-", "--")  # of a column of numbers: not measured


def _label(value: object) -> str:
    text = str(value) if isinstance(value, str | int | float) else ""
    if not (re.fullmatch(rf"[^<>$\\`]{{1,{LONGEST}}}", text) and text.isprintable()):
        raise ValueError("tables, figures and pages cannot all show it")
    return text


def _setting(value: Any) -> Any:
    """Return a setting's value as YAML would have it; equal numbers are one."""
    words = {"true": True, "false": False, "null": None}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, Mapping) or (
        isinstance(value, list) and any(isinstance(each, list | Mapping) for each in value)
    ):
        raise ValueError("a setting has no settings of its own")
    if isinstance(value, list):
        return list(map(_setting, value))
    if not isinstance(value, str | float):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,4000}", value):
        return int(value)  # not by way of a float, to which 2**53 and the next are the same
    try:
        number = float(value)
    except ValueError:
        return _label(value)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return int(number) if number.is_integer() else number


def _loss(text: str) -> float:
    loss = float(text)
    return loss if abs(loss) <= LARGEST_NUMBER else math.inf  # nan stands for what was not measured


class _Kind(NamedTuple):
    """The type of a column's values, and its description: the end of "... is not valid: expected"."""

    type: Any
    expected: str


_TEXT = f"1 to {LONGEST} characters, none of < > $ \\ ` and no control characters"
_SETTING = _Kind(Annotated[Any, BeforeValidator(_setting)], f"a finite number, or a text of {_TEXT}")


def _whole(low: int, high: int) -> _Kind:
    return _Kind(Annotated[int, Field(ge=low, le=high)], f"a whole number from {low} to {high}")


def _number(high: float, range_in_words: str) -> _Kind:
    return _Kind(Annotated[FiniteFloat, Field(ge=0, le=high)], f"a number, {range_in_words}, or an empty cell")


_KINDS = {
    **dict.fromkeys(LABELS, _Kind(Annotated[str, BeforeValidator(_label)], _TEXT)),
    **dict.fromkeys(("seed", "step"), _whole(0, LARGEST)),
    "epoch": _whole(0, MOST_EPOCHS),
    **dict.fromkeys(COUNTS, _whole(1, LARGEST)),
    "epochs": _whole(1, MOST_EPOCHS),
    **dict.fromkeys(MEASURED, _number(LARGEST_NUMBER, "0 or more")),
    "wall_seconds": _number(MOST_SECONDS, f"0 to {MOST_SECONDS:g}"),
    **dict.fromkeys(LOSSES, _Kind(Annotated[float, BeforeValidator(_loss)], "a number, or an empty cell")),
    "state": _Kind(Literal["done", "diverged"], "done or diverged"),
}


def _is_column(name: str) -> bool:
    return name in COLUMNS or (bool(_DOTTED.fullmatch(name)) and name not in _RESERVED)


def _column(name: str) -> str:
    if not _is_column(name):
        raise UserError(
            f"normlab has no column {name}.{did_you_mean(name, COLUMNS)}\nExpected one of {', '.join(COLUMNS)}."
        )
    return name


def _setting_name(name: str) -> str:
    if name in OF_EVALUATIONS:
        raise UserError(f"{name} is no setting of a run.\nIt is measured at each evaluation: give it a column.")
    return _column(name)


def _in_order(columns: Any) -> Any:
    for our, their in columns.items() if isinstance(columns, dict) else ():
        if not _is_column(str(our)) and _is_column(str(their)):
            raise UserError(f"normlab's name comes first: columns={{{their}: {our}}}.")
    return columns


_Column = Annotated[str, AfterValidator(_column)]
_SettingName = Annotated[str, AfterValidator(_setting_name)]


class Import(BaseModel):
    """The settings of the command. A description is the end of "... is not valid: expected"."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    study: StudyName
    source: str = Field(description="a CSV file, or a folder with TensorBoard's event files: source=results.csv")
    columns: Annotated[dict[_Column, str] | None, BeforeValidator(_in_order)] = Field(
        None, description="pairs: 'columns={test_accuracy: val_acc}'"
    )
    ignore: list[str] | Literal["all"] = Field([], description="a list of columns, or all")
    set: dict[_SettingName, Any] | None = Field(None, description="pairs: 'set={dataset.name: cifar10}'")
    percent: bool = Field(False, description="true or false")
    pattern: str | None = Field(None, description="""a text, quoted twice: 'pattern="{arm}/b{batch}_s{seed}"'""")
    first_epoch: Literal[0, 1] | None = Field(None, description="0 or 1")
    steps_per_epoch: int | None = Field(None, ge=1, le=LARGEST, description="a whole number, 1 or more")
    replace: bool = Field(False, description="true or false")


class _Source(NamedTuple):
    """A source's table of texts with normlab's names, the names of what is left out, and the SHA-256 of its files."""

    table: pd.DataFrame
    left_out: list[str]
    sha256: str


class _Made(NamedTuple):
    """The contents of a run's folder."""

    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    metrics: bytes


def import_runs(study: str, output_dir: str | Path, settings: Mapping[str, Any], *, quiet: bool = False) -> None:
    """Write the runs of a source into `output_dir`/`study`, all or none, and print how many and what was assumed.

    Args:
        study: the name of the study, new or not.
        output_dir: the folder that holds studies.
        settings: those of `Import`.
        quiet: print the study's folder alone.

    Raises:
        UserError: for a source that cannot be read or lacks something, and for runs that are there with other values.
    """
    try:
        options = Import.model_validate({**settings, "study": study})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name == "study":
            raise UserError(sentence(first, {})) from None
        expected = Import.model_fields[name].description
        raise UserError(f"{name}={as_typed(settings[name])} is not valid: expected {expected}.") from None
    folder = Path(output_dir) / options.study
    archive.refuse_new_runs(folder)
    path = Path(options.source)
    path = path if path.name else path.absolute()  # "." has no name to print
    source = _read_events(path, options) if path.is_dir() else _read_csv(path, options)
    made, assumed = _runs(source, path.name, options)
    new = [run for run in made if not (folder / run.name).exists()]
    changed = [run for run in made if run not in new and _differs(run, folder / run.name, path.name)]
    if changed and not options.replace:
        raise UserError(
            f"{len(changed)} of {len(made)} runs of {path.name} are in {folder} with other values, e.g."
            f"\n  {changed[0].name}\nNothing was written. To replace them: replace=true"
        )
    imported = {"source": path.name, "sha256": source.sha256, "time": runs.now(), "assumed": assumed}
    _write([*new, *changed], [run.name for run in changed], folder, {"imported": imported})
    if quiet:
        say(folder)
        return
    counts = f"{len(new)} new, {len(changed)} replaced, {len(made) - len(new) - len(changed)} there already"
    say(f"{path.name}: {len(made)} run{'s' * (len(made) != 1)} for study {options.study}: {counts}.")
    for assumption in assumed:
        say(f"Assumed: {assumption}")
    if source.left_out:
        say(f"Left out: {listed(source.left_out, 12)}.")
    if not new and not changed:
        say("Nothing was changed.")
    say(f"Tables and figures: {command_name('report')} {study_words(options.study, output_dir)}")


# ---- reading


def _read_csv(path: Path, options: Import) -> _Source:
    name, expected = path.name, Import.model_fields["source"].description
    if options.pattern:
        raise UserError(f"pattern= is about the folders of a source, and {path} is none.\nLeave it out.")
    content = _content(path, expected)
    # Not by pandas, to which a row with too few cells is one with empty cells, and which does not number lines.
    table: list[tuple[str, list[str]]] = []
    place = name
    try:
        lines = content.decode("utf-8-sig").splitlines(keepends=True)
        place = f"{name}, line 1"
        reader = csv.reader(lines, delimiter=max(",;\t", key="".join(lines[:1]).count), strict=True)
        for cells in reader:
            if any(map(str.strip, cells)):
                table.append((place, [cell.strip() for cell in cells]))
            place = f"{name}, line {reader.line_num + 1}"  # where the next row begins: a quoted cell may hold lines
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{place} cannot be read: {error}.\nExpected a CSV file in UTF-8.") from None
    if len(table) < 2:
        raise UserError(f"{name} has no rows.\nExpected a header such as arm,seed,test_accuracy, and a row per run.")
    header = table[0][1]
    if len(header) > MOST_COLUMNS:
        raise UserError(
            f"{name} has {len(header)} columns; at most {MOST_COLUMNS} are read.\nLeave out those that do not matter."
        )
    for place, cells in table[1:]:
        if len(cells) != len(header):
            raise UserError(
                f"{place} has {len(cells)} cells, its header {len(header)}.\nQuote cells that hold the separator."
            )
    names = _names(header, name, options)
    texts = pd.DataFrame([cells for _, cells in table[1:]], [place for place, _ in table[1:]])
    known = [i for i, ours in enumerate(names) if ours]
    # Rows about what is left out, as Lightning writes one after a test.
    measured = [i for i in known if names[i] in (*MEASURED, "state")]
    others = (texts.drop(columns=known) != "").any(axis=1) & (texts[measured] == "").all(axis=1)
    left_out = [column or UNNAMED for column, ours in zip(header, names, strict=True) if not ours]
    left_out += [f"{others.sum()} rows that measure nothing else"] if others.any() else []
    texts = texts.loc[~others, known].set_axis([names[i] for i in known], axis=1)
    return _Source(texts, left_out, hashlib.sha256(content).hexdigest())


def _content(path: Path, expected: object) -> bytes:
    try:
        with reading.opened(Path(os.path.realpath(path))) as file:  # it may be a link, being no part of a study
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        close = did_you_mean(path, path.parent.glob("*"), "source=") if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"source={path} cannot be read: {error.strerror}.{close}\nExpected {expected}.") from None
    if len(content) > MOST_BYTES:
        raise UserError(
            f"source={path} is larger than {MOST_BYTES >> 20} MiB, which is more than is read.\n"
            "Leave out the columns that do not matter, or divide it into several files."
        )
    return content


def _names(header: Sequence[str], name: str, options: Import, *, tags: bool = False) -> list[str]:
    """Return normlab's names of a source's columns, "" for those to leave out: every unknown tag, and `ignore`."""
    kind = "tag" if tags else "column"
    theirs = {their: our for our, their in (options.columns or {}).items()}
    for their, our in theirs.items():
        if their not in header:
            close = did_you_mean(their, header, f"columns={{{our}: ", "}")
            raise UserError(
                f"columns={{{our}: {their}}}: {name} has no {kind} {their}.{close}\nIts {kind}s: {listed(header, 12)}."
            )
    names: list[str] = []
    for column in header:
        plain = "arm" if column in ("norm", "norm.name") else column
        known = plain in (*MEASURED, "epoch") if tags else _is_column(plain)
        ours = theirs.get(column, plain if known and plain not in theirs.values() else "")
        if column not in theirs and options.ignore != "all" and column in options.ignore:
            ours = ""
        elif not ours and not tags and options.ignore != "all":
            raise UserError(
                f"{name}: normlab has no column {column or UNNAMED}."
                f"{did_you_mean(column, COLUMNS, 'columns={', f': {column}}}') if column else ''}"
                f"\nIf it does not matter, give 'ignore=[\"{column}\"]'; ignore=all leaves out all of them."
                f"\nColumns: {', '.join(COLUMNS)}; optimizer.lr, ..."
            )
        if ours and (ours in names or ours in (options.set or {})):
            other = "another column" if ours in names else "set="
            raise UserError(
                f"{name}: the column {column} is {ours}, and {other} has it, too.\nLeave one out: ignore=[{column}]."
            )
        names.append(ours)
    if not set(names) & set(MEASURED):
        raise UserError(
            f"{name} has no measured {kind}.\nIts {kind}s: {listed(header, 12) or 'none that can be read'}.\n"
            "Name at least one: 'columns={test_accuracy: \"val/acc\"}'"
        )
    return names


def _read_events(folder: Path, options: Import) -> _Source:
    """Return a row per run and step of TensorBoard's scalars."""
    files_of: dict[Path, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*tfevents*") if not path.is_dir()):
        if not path.is_file():
            raise UserError(f"{path} is not a file.\nMove it away.")  # TensorBoard would wait for it
        files_of.setdefault(path.parent, []).append(path)
    if not files_of:
        expected = Import.model_fields["source"].description
        raise UserError(f"There are no event files of TensorBoard in {folder} (*tfevents*).\nExpected {expected}.")
    scalars = {path: _scalars(path) for path in files_of}
    tags = sorted({tag for series in scalars.values() for tag in series})
    ours = dict(zip(tags, _names(tags, folder.name, options, tags=True), strict=True))
    rows: dict[str, dict[str, object]] = {}
    for path, series in scalars.items():
        name = path.relative_to(folder).as_posix() if path != folder else folder.name
        used = [tag for tag in series if ours[tag]]
        if not used:
            raise UserError(f"{name} in {folder} has none of the tags in use.\nMove it away.")
        place, of_name = f"{folder.name}, {name}, step", _of_name(name, options)
        for tag in used:
            for step, value in series[tag]:
                rows.setdefault(f"{place} {step}", {**of_name, "step": step})[ours[tag]] = str(value)
    table = pd.DataFrame.from_dict(rows, orient="index", dtype=object).fillna("")
    content = b"".join(path.read_bytes() for paths in files_of.values() for path in paths)
    return _Source(table, [tag for tag in tags if not ours[tag]], hashlib.sha256(content).hexdigest())


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of each tag, as TensorBoard itself reads them."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util import tensor_util
    except ImportError:
        raise UserError(
            f"{folder}: to read event files takes tensorboard, which is not installed.\n"
            "Install it: pip install 'normlab[tensorboard]'"
        ) from None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    try:
        events.Reload()
        series = {tag: [(e.step, float(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        for tag in events.Tags()["tensors"]:  # how TensorFlow 2 writes scalars
            if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
                series[tag] = [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]
    except Exception as error:  # whatever a damaged file makes of its reader
        raise UserError(
            f"The event files in {folder} cannot be read: {type(error).__name__}.\nMove them away."
        ) from error
    return series


def _of_name(name: str, options: Import) -> dict[str, object]:
    """Return the settings that `pattern` reads from the name of a run's folder; without it the name is the arm."""
    pattern, given = options.pattern, options.set or {}
    if not pattern:
        return {} if "arm" in given else {"arm": name}
    parts = re.split(r"\{([^{}]*)\}", pattern)
    expression, fields = "", [field for field in parts[1::2] if field]
    for field in fields:
        if fields.count(_setting_name(field)) > 1 or field in given:
            raise UserError(f"pattern={pattern}: {field} is given twice.")
    for i, part in enumerate(parts):
        number = part in ("seed", *COUNTS)
        expression += (r"(\d+)" if number else r"([^/]+?)") if i % 2 else re.escape(part)
    match = re.fullmatch(expression, name)
    if not match:
        raise UserError(
            f"The folder {name} does not match the pattern {pattern}.\n"
            "Each {field} stands for a part of its name: arm, seed, a setting such as batch; {} for what means nothing."
        )
    return {field: text for field, text in zip(parts[1::2], match.groups(), strict=True) if field}


# ---- runs


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """Return the values of a table of texts, as objects; nan where a cell is empty or was not measured."""
    columns = {}
    for name, cells in table.items():
        blanks: tuple[str, ...] = ("",)
        if name in _KINDS and name not in LABELS:
            blanks = _BLANKS if name in LOSSES else (*_BLANKS, "nan")  # a loss that is nan is a sign of divergence
        filled = cells[[str(cell).lower() not in blanks for cell in cells]]
        kind = _KINDS.get(str(name), _SETTING)
        try:
            values = TypeAdapter(list[kind.type]).validate_python(filled.tolist())  # type: ignore[name-defined]
        except ValidationError as error:
            place, value = list(filled.items())[int(error.errors()[0]["loc"][0])]
            shown = str(value)[:LONGEST].encode("unicode_escape").decode()
            raise UserError(f"{place}: {name}={shown} is not valid: expected {kind.expected}.") from None
        columns[name] = pd.Series(values, filled.index, dtype=object)
    return pd.DataFrame(columns, table.index)


def _present(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table, without what is nan."""
    rows = table.to_dict("records")
    return [{str(name): value for name, value in row.items() if value == value} for row in rows]  # nan is not itself


def _runs(source: _Source, name: str, options: Import) -> tuple[list[_Made], list[str]]:
    """Return the runs of a source, and sentences about what was assumed."""
    table = _checked(source.table)
    given = _present(_checked(pd.DataFrame([options.set or {}], ["set="], dtype=object)))[0]
    if "seed" in table and table["seed"].isna().any():
        raise UserError(f"{table.index[table['seed'].isna()][0]} has no seed, and others have one.\nGive it one.")
    assumed: _Assumed = {} if "seed" in {*table, *given} else {f"seed 0, as {name} has none": []}
    rows = table.reindex(columns=OF_EVALUATIONS).astype(dict.fromkeys(("epoch", "step", *MEASURED), float))
    of_rows = _present(table.drop(columns=[*OF_EVALUATIONS], errors="ignore"))
    settings = [{"seed": 0, **given, **row} for row in of_rows]
    for place, row in zip(table.index, settings, strict=True):
        _need_settings(row, str(place))
    rows["run"] = [json.dumps(row, sort_keys=True) for row in settings]
    rows["alike"] = [json.dumps({**row, "arm": "", "seed": 0}, sort_keys=True) for row in settings]
    rows["epochs"] = [row["epochs"] for row in settings]
    _scale(rows, percent=options.percent)
    _time(rows, options)
    made: dict[str, _Made] = {}
    for key, of_run in rows.groupby("run", sort=False):
        row = json.loads(str(key))
        title = ", ".join(f"{key} {value}" for key, value in {"arm": row["arm"], "seed": row["seed"], **row}.items())
        evaluations = _evaluations(of_run, options.steps_per_epoch, assumed)
        state, why, example = _state(of_run, evaluations, f"{of_run.index[-1]}: {title}")
        if why:
            assumed.setdefault(why, []).append(f"{row['arm']}, seed {row['seed']}{example}")
        run = _make(row, evaluations, state, options.study)
        if run.name in made:
            raise UserError(f"{of_run.index[-1]}: {title} is the same run as another one of {name}.\nRemove one.")
        made[run.name] = run
    return list(made.values()), [_assumption(kind, examples, len(made)) for kind, examples in assumed.items()]


def _assumption(kind: str, examples: Sequence[str], runs_made: int) -> str:
    """Return the sentence of one kind of assumption, with the number of its runs and the first three."""
    of_runs = f": {len(examples)} of {runs_made} runs, e.g. {'; '.join(examples[:3])}" if examples else ""
    return f"{kind}{of_runs}."


def _need_settings(settings: Mapping[str, Any], place: str) -> None:
    missing = [key for key in EXAMPLES if key not in settings]
    if settings.get("model.name") not in DEPTHS:
        missing = [key for key in missing if key != "depth"]
    if missing:
        example = ", ".join(f"{key}: {EXAMPLES[key]}" for key in missing)
        raise UserError(
            f"{place} lacks {', '.join(missing)}.\n"
            f"Give what holds for all rows: 'set={{{example}}}'; what differs: a column of that name."
        )


def _scale(rows: pd.DataFrame, *, percent: bool) -> None:
    """Make accuracies shares of 1; refuse those that fit the other `percent`."""
    for column in ACCURACIES:
        values = rows[column].dropna()
        wrong = values[(values > 100) | ((values > 0) & (values < 1) if percent else values > 1)]
        if percent and not values.empty and 0 < values.max() <= 1:
            wrong = values
        if not wrong.empty:
            raise UserError(
                f"{wrong.index[0]}: {column}={exact(wrong.iloc[0])} is not valid with percent={str(percent).lower()}.\n"
                "Expected percent=true for accuracies in per cent, from 1 to 100; percent=false for shares of 1."
            )
        rows[column] /= 100 if percent else 1


def _time(rows: pd.DataFrame, options: Import) -> None:
    """Give every row its epoch, and the last step of the runs like it where the source has steps alone."""
    per_epoch = options.steps_per_epoch
    if rows["epoch"].eq(0).any() and options.first_epoch is None:
        raise UserError(
            f"{rows.index[rows['epoch'].eq(0)][0]} is of epoch 0.\n"
            "If the first epoch is called 0, give first_epoch=0: every epoch then counts one more.\n"
            "If epoch 0 is before training and the first is called 1, give first_epoch=1."
        )
    rows["epoch"] += options.first_epoch == 0
    in_steps = rows["epoch"].isna() & rows["step"].notna()
    if in_steps.any() and not per_epoch:
        raise UserError(
            f"{rows.index[in_steps][0]} has a step, and no epoch.\n"
            "Give the number of steps of an epoch, steps_per_epoch=..., or a column epoch."
        )
    alone = in_steps.groupby(rows["run"]).transform("all")
    rows["last_step"] = rows["step"].where(alone).groupby(rows["alike"]).transform("max")
    rows["epoch"] = rows["epoch"].fillna(np.ceil(rows["step"] / (per_epoch or 1)))
    untimed = rows["epoch"].isna()
    if untimed.any() and not untimed.all():
        raise UserError(f"{rows.index[untimed][0]} has neither epoch nor step, and others have one.\nGive all one.")
    rows["epoch"] = rows["epoch"].fillna(rows["epochs"])
    values = rows.melt(["run", "epoch", "step"], MEASURED, "column", ignore_index=False).dropna(subset="value")
    twice = values[values.duplicated(["run", "epoch", "step", "column"])]
    if not twice.empty:
        raise UserError(
            f"{twice.index[0]}: another row has {twice['column'].iloc[0]} of the same run and epoch.\n"
            "Rows that are not the same need a column that tells them apart: seed, epoch, a setting."
        )


def _evaluations(rows: pd.DataFrame, per_epoch: int | None, assumed: _Assumed) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, one per epoch: the last measured values of each column."""
    last = rows.sort_values("step", kind="stable", na_position="first").groupby("epoch").last()
    if last["step"].isna().any() and not per_epoch:
        assumed["one step per epoch, as their number is not given; it matters to axes of figures only"] = []
    last["step"] = last["step"].fillna(pd.Series(last.index * (per_epoch or 1), last.index))
    whole = zip(last.index.astype(int), last["step"].astype(int), _present(last[[*MEASURED]]), strict=True)
    return [{"epoch": int(epoch), "step": int(step), **values} for epoch, step, values in whole]


def _state(rows: pd.DataFrame, evaluations: Sequence[Mapping[str, Any]], title: str) -> tuple[str, str, str]:
    """Return done, diverged or interrupted: by the source's column `state`, else by the last evaluation.

    Then what was assumed for that, "" if nothing was, and what an example of it adds.
    """
    end, epochs, last_step = evaluations[-1], rows["epochs"].iloc[0], rows["last_step"].max()
    cut = ""
    if end["epoch"] < epochs:
        cut = f"epoch {epochs}"
    elif end["step"] < last_step:
        cut = f"step {last_step:.0f}"
    lost = any(not math.isfinite(end.get(loss, 0)) for loss in LOSSES)
    states = rows.sort_values(["epoch", "step"])["state"].dropna()
    stated = states.iloc[-1] if len(states) else None
    missing = [name for name in ("test_accuracy", "test_loss") if name not in end and rows[name].notna().any()]
    wrong = ""
    if end["epoch"] > epochs:
        wrong = f"has an epoch {end['epoch']}, and epochs={epochs}"
    elif stated == "done" and (lost or cut):
        wrong = f"is done by its state, but {'its last loss is not finite' if lost else f'ends before {cut}'}"
    elif stated != "diverged" and not lost and not cut and (missing or end.keys().isdisjoint(MEASURED)):
        wrong = f"has no {missing[0] if missing else 'measured value'} at its last epoch, {end['epoch']}"
    if wrong:
        raise UserError(
            f"{title} {wrong}.\nRuns are compared by their last evaluation, at epoch epochs. If a run diverged, give"
            " it the state diverged; if it was cut short, leave its state empty."
        )
    if stated == "diverged":
        return "diverged", "", ""
    if lost:
        return "diverged", "runs whose last loss is not finite have diverged", ""
    if cut:
        return "interrupted", "runs that end early were interrupted, and are part of no mean", f" (before {cut})"
    return "done", "", ""


def _make(settings: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], state: str, study: str) -> _Made:
    config: dict[str, Any] = {"study": study, "depth": None, "norm_batch": None, "norm": {}}
    for path, value in settings.items():
        *groups, key = path.split(".")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise UserError(f"{path} is given, and {path.removesuffix(f'.{key}')}, too.\nGive one of them.")
        node[key] = value
    config["norm"] |= {"name": config.pop("arm"), "imported": True}
    name = runs.run_name(config)
    status = {"state": state, "run_id": runs.run_id(config), "name": name, "error": None, **evaluations[-1]}
    metrics = "".join(files.to_json(row) + "\n" for row in evaluations).encode()
    return _Made(name, config, {**status, "epochs": config["epochs"]}, metrics)


# ---- writing


def _differs(run: _Made, there: Path, source: str) -> bool:
    """Return whether the folder of an imported run holds other values.

    Raises:
        UserError: if the folder is not that of an imported run.
    """
    try:
        imported = runs.read_config(there)["norm"].get("imported")
    except (UserError, KeyError, AttributeError, TypeError):
        imported = False
    if not imported:
        raise UserError(f"{there} is no imported run, and is left alone.\nMove it away to import {source}.")
    try:
        state = (runs.read_status(there) or {}).get("state")
        return state != run.status["state"] or reading.read(there / runs.METRICS_FILE) != run.metrics
    except (UserError, OSError):
        return True  # damaged


def _write(made: Sequence[_Made], gone: Sequence[str], folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write all runs or none: each folder appears as a whole, after those that are `gone` were moved away."""
    if not made:
        return
    files.make_folder(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".import.") as temporary:
            new, old = Path(temporary) / "new", Path(temporary) / "old"
            old.mkdir()
            for run in made:
                _write_run(run, new / run.name, provenance)
            try:
                for name in gone:
                    (folder / name).rename(old / name)
                for run in made:
                    (new / run.name).rename(folder / run.name)
            except BaseException:  # also Ctrl-C
                for run in made:
                    if not (new / run.name).exists():
                        shutil.rmtree(folder / run.name, ignore_errors=True)
                for path in old.iterdir():
                    path.rename(folder / path.name)
                raise
    except OSError as error:
        raise storage_error(folder, error) from error


def _write_run(run: _Made, folder: Path, provenance: Mapping[str, Any]) -> None:
    write_record(folder, run.config, run.status, provenance, run.metrics)
