"""A source as rows: the lines of a CSV file, or the steps of TensorBoard's event files."""

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from normlab.common.errors import UserError, nearest
from normlab.report.importing.settings import COLUMNS, COUNTS, METRICS, Import, is_column, no_column, some

UNNAMED = "(one without a name)"


class Row(NamedTuple):
    """A line of the source, or a step of its events.

    Attributes:
        where: for a user, e.g. "results.csv, line 3".
        cells: by normlab's name of the column; texts as they are written, without those that are empty.
        sha256: of the file or files that it is from.
    """

    where: str
    cells: Mapping[str, str | float]
    sha256: str


def read(source: Path, wanted: Import) -> tuple[list[Row], list[str]]:
    """The rows, and the names of what is left out."""
    if source.is_dir():
        return _read_events(source, wanted)
    if wanted.pattern:
        raise UserError(f"pattern= is about the folders of a source, and {source} is none.\nLeave it out.")
    try:
        content = source.read_bytes()
    except OSError as error:
        siblings = [str(path) for path in source.parent.glob("*")] if source.parent.is_dir() else []
        close = nearest(source, siblings)
        raise UserError(
            f"source={source} cannot be read: {error.strerror}."
            + (f"\nDid you mean source={close}?" if close else "")
            + "\nExpected a CSV file, or a folder with TensorBoard's event files."
        ) from None
    return _read_csv(source.name, content, wanted)


def _read_csv(name: str, content: bytes, wanted: Import) -> tuple[list[Row], list[str]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{name}, line {line} is no text in UTF-8.\nExpected a CSV file: save it as UTF-8.") from None
    sha256 = hashlib.sha256(content).hexdigest()
    first = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(keepends=True), delimiter=max(",;\t", key=first.count), strict=True)
    header: list[str] = []
    names: list[str | None] = []
    rows, before, of_others = [], 0, 0
    try:
        for cells in reader:
            line, before = before + 1, reader.line_num  # where it begins: a quoted cell may have several lines
            if not any(map(str.strip, cells)):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                names = _names(name, header, wanted)
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{name}, line {line} has {len(cells)} cells, its header {len(header)}.\n"
                    "Quote cells that hold the separator."
                )
            found = {column: cell.strip() for column, cell in zip(names, cells, strict=True) if column and cell.strip()}
            others = any(cell.strip() for column, cell in zip(names, cells, strict=True) if not column)
            if others and not set(found) & {*METRICS, "state"}:
                of_others += 1  # a row about what is left out, as Lightning writes one after a test
                continue
            rows.append(Row(f"{name}, line {line}", found, sha256))
    except csv.Error as error:
        raise UserError(f"{name}, line {before + 1} cannot be read: {error}.") from None
    if not rows:
        raise UserError(f"{name} has no rows.\nExpected a header such as arm,seed,test_accuracy, and a row per run.")
    left_out = [column or UNNAMED for column, ours in zip(header, names, strict=True) if not ours]
    return rows, left_out + ([f"{of_others} rows that measure nothing else"] if of_others else [])


def _names(name: str, header: Sequence[str], wanted: Import) -> list[str | None]:
    """Normlab's name of each column, None for those to leave out."""
    theirs = {their: our for our, their in (wanted.columns or {}).items()}
    for their, our in theirs.items():
        if their not in header:
            close = nearest(their, header)
            raise UserError(
                f"columns={{{our}: {their}}}: {name} has no column {their}."
                + (f"\nDid you mean columns={{{our}: {close}}}?" if close else "")
                + f"\nIts columns: {some(header)}."
            )
    found: list[str | None] = []
    for column in header:
        plain = "arm" if column in ("norm", "norm.name") else column
        known = plain if is_column(plain) and plain not in (wanted.columns or {}) else None
        ours = theirs.get(column, known)
        if column not in theirs and (wanted.ignore != "all" or not column) and column in wanted.ignore:
            ours = None
        elif ours is None and wanted.ignore != "all":
            close = nearest(column, COLUMNS)
            ignored = f"ignore=[{column}]" if column else "'ignore=[\"\"]'"
            raise UserError(
                f"{name}: normlab has no column {column or UNNAMED}."
                + (f"\nIf it is {close}, say columns={{{close}: {column}}}." if close and column else "")
                + f"\nIf it does not matter, say {ignored}; ignore=all leaves out every column without meaning."
                + f"\nColumns: {', '.join((*COLUMNS[:5], *METRICS))}, and settings (batch, optimizer.lr, ...)."
            )
        if ours and ours in found:
            raise UserError(f"{name} has two columns for {ours}.\nLeave one out: ignore=[{column}].")
        if ours and ours in (wanted.set or {}):
            raise UserError(f"{ours} is a column of {name} and is in set=, too.\nLeave one out: ignore=[{column}].")
        found.append(ours)
    return found


def _read_events(source: Path, wanted: Import) -> tuple[list[Row], list[str]]:
    """A row per run and step of what TensorBoard calls scalars."""
    folders = sorted({path.parent for path in source.rglob("*tfevents*") if path.is_file()})
    if not folders:
        raise UserError(
            f"There are no event files of TensorBoard in {source} (*tfevents*).\n"
            "Expected a CSV file, or a folder with TensorBoard's event files."
        )
    names = {path: path.relative_to(source).as_posix() if path != source else source.name for path in folders}
    of_names = {path: _by_pattern(names[path], wanted) for path in folders}
    scalars = {path: _scalars(path) for path in folders}
    tags = sorted({tag for found in scalars.values() for tag in found})
    theirs = {their: our for our, their in (wanted.columns or {}).items()}
    used = {
        tag: theirs.get(tag, tag)
        for tag in tags
        if tag in theirs
        or (tag in (*METRICS, "epoch") and tag not in (wanted.columns or {}) and tag not in wanted.ignore)
    }
    for their, our in theirs.items():
        if their not in tags:
            close = nearest(their, tags)
            raise UserError(
                f"columns={{{our}: {their}}}: no run in {source} has the tag {their}."
                + (f"\nDid you mean columns={{{our}: {close}}}?" if close else "")
                + f"\nTags: {some(tags) or 'none'}."
            )
    if not set(used.values()) & set(METRICS):
        raise UserError(
            f"No tag in {source} is a column of normlab ({', '.join(METRICS[:4])}, ...).\n"
            f"Tags: {some(tags) or 'none: its event files have no scalars that can be read'}.\n"
            "Say which one is which: 'columns={test_accuracy: \"val/acc\"}'"
        )
    rows = []
    for path, found in scalars.items():
        by_step: dict[int, dict[str, str | float]] = defaultdict(dict)
        for tag, values in found.items():
            for step, value in values if tag in used else ():
                by_step[step][used[tag]] = value
        if not by_step:
            raise UserError(f"{names[path]} in {source} has none of the tags {some(list(used))}.\nMove it away.")
        digest = hashlib.sha256()
        for file in sorted(path.glob("*tfevents*")):
            digest.update(file.read_bytes())
        rows += [
            Row(f"{source.name}, {names[path]}, step {step}", {**of_names[path], "step": step, **by_step[step]}, sha)
            for sha in [digest.hexdigest()]
            for step in sorted(by_step)
        ]
    return rows, [tag for tag in tags if tag not in used]


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads: per tag, its steps and values."""
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
        found = {tag: [(e.step, float(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        for tag in events.Tags()["tensors"]:  # how TensorFlow 2 writes scalars
            if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
                found[tag] = [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]
    except Exception as error:  # whatever a damaged file makes of its reader
        raise UserError(
            f"The event files in {folder} cannot be read: {type(error).__name__}.\nMove them away."
        ) from error
    return found


def _by_pattern(name: str, wanted: Import) -> dict[str, str | float]:
    """What the name of a run's folder says."""
    if not wanted.pattern:
        return {} if "arm" in (wanted.set or {}) else {"arm": name}
    literal, *rest = re.split(r"\{([^{}]*)\}", wanted.pattern)
    fields, expression = rest[::2], re.escape(literal)
    for i, (given, after) in enumerate(zip(fields, rest[1::2], strict=True)):
        if given and not (is_column(given) and given not in (*METRICS, "epoch", "step")):
            raise UserError(no_column(f"pattern={wanted.pattern}: there is no {{{given}}}", given))
        if given and (given in fields[:i] or given in (wanted.set or {})):
            raise UserError(f"pattern={wanted.pattern}: {given} is given twice.")
        whole = given in ("seed", *COUNTS)
        expression += (rf"(?P<_{i}>\d+)" if whole else rf"(?P<_{i}>[^/]+?)") + re.escape(after)
    found = re.fullmatch(expression, name)
    if not found:
        raise UserError(
            f"The folder {name} is not as the pattern {wanted.pattern} says.\n"
            "Each {field} stands for a part of its name: arm, seed, a setting such as batch; {} for what means nothing."
        )
    return {given: found[f"_{i}"] for i, given in enumerate(fields) if given}
