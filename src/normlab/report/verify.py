"""Check a study as its reviewer does: its digests, its tables, and, where wanted, some runs carried out again."""

import csv
import io
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from normlab import runs
from normlab.common.errors import UserError, as_typed, count, first_line, listed
from normlab.common.progress import one_line, span
from normlab.common.terminal import say
from normlab.report import reruns
from normlab.report.checks import Check, Outcome
from normlab.report.options import TABLE_OPTIONS, Options
from normlab.report.options import options as menu_options
from normlab.report.reruns import Rerun
from normlab.report.study.find import find_study
from normlab.report.study.load import Study, load
from normlab.report.tables import csv_tables, read_table_options
from normlab.runs import State, archive, reading
from normlab.runs.reading import RecordPath
from normlab.runs.record import CONFIG, STATUS, read_record

RELATIVE, ABSOLUTE = 1e-9, 1e-12  # by which numbers of two machines may differ: another BLAS sums in another order
MOST_BYTES_OF_OPTIONS = 10_000
FALSE_ALARM = 0.05  # the probability that reruns on another machine fail although all holds


def verify(study: str, output_dir: Path, options: Options, rerun: Rerun) -> bool:
    """Print what was checked of a study, a line for each; return whether nothing fails.

    Args:
        study: its name, or the path of its folder or file.
        output_dir: the folder that holds studies.
        options: those of the tables where none are kept beside them; `quiet`: print what does not hold alone.
        rerun: which runs are carried out again.

    Raises:
        UserError: if there is no such study; if its file is not read, because a digest is wrong for one.
    """
    name, path = find_study(study, output_dir)
    read = load(path, name=name)
    found: list[Check] = []
    with archive.opened(path) if read.packed else nullcontext(path) as folder:
        for check in _checks(read, folder, options, rerun):
            found.append(check)
            _show(check, quiet=options.quiet)
    counts = Counter(check.outcome for check in found)
    if not options.quiet:
        words = {Outcome.HOLDS: "hold", Outcome.OPEN: "are open", Outcome.FAILS: "fail"}
        say(f"{name}: of {len(found)} checks {', '.join(f'{counts[each]} {word}' for each, word in words.items())}.")
    return not counts[Outcome.FAILS]


def _show(check: Check, *, quiet: bool) -> None:
    line = f"{check.outcome:<6} {' '.join(f'{check.subject} {check.text}'.split())}"  # a name may have several lines
    if not quiet:
        say(line, flush=True)
    elif check.outcome != Outcome.HOLDS:
        say(line, file=sys.stderr, flush=True)


def _checks(study: Study, folder: RecordPath, options: Options, rerun: Rerun) -> Iterator[Check]:
    yield from _digests(study, folder)
    yield _records(study, folder)
    yield from _tables(study, folder, options)
    if rerun.number:
        yield from _reruns(study, folder, rerun, quiet=options.quiet)


# ---- digests and records


def _digests(study: Study, folder: RecordPath) -> Iterator[Check]:
    if study.packed:
        manifest = reading.read_json(folder / archive.MANIFEST)
        text = f"of all {len(manifest['entries'])} entries are those of its {archive.MANIFEST}."
        yield Check(Outcome.HOLDS, "Digests (SHA-256)", text)  # or it would not have been opened
    elif study.unchecked:
        text = (
            f"of {len(study.unchecked)} of {_number(study)} runs were not recorded: whether files were changed is not"
            " seen."
        )
        yield Check(Outcome.OPEN, "Checksums", text)


def _number(study: Study) -> int:
    return int((study.runs["run"] != "").sum())


def _records(study: Study, folder: RecordPath) -> Check:
    """Check that the files of each run are what it wrote, and of the run that its folder names."""
    wrong = []
    left_out = {run.run: run.note for run in study.noted() if run.state == State.UNREADABLE}
    for run, damage in runs.scan(folder):
        why = damage or runs.check(run) or _unlike(run) or left_out.get(run.name, "")
        if why:
            wrong.append(f"{reading.shown(run.name)}: {why.removeprefix(f'{run}/').rstrip('.')}")
    number = _number(study)
    if wrong:
        return Check(
            Outcome.FAILS, "Records", f"of {len(wrong)} of {number} runs do not go together: {listed(wrong, 2, '; ')}."
        )
    return Check(
        Outcome.HOLDS, "Records", f"of {count(number, 'run')}: names, settings, status and last evaluation go together."
    )


def _unlike(run: RecordPath) -> str:
    """Return how a run's settings differ from its name, or its last evaluation from its status; "" if they do not.

    That tells of edited records without checksums, too.
    """
    try:
        record = read_record(run)
        config, status = record.config, record.status or {}
        named, identity, (rows, lines) = runs.run_name(config), runs.run_id(config), runs.read_metrics(run)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        return first_line(error)
    if record.damage or lines:
        return first_line(record.damage or lines[0])
    if named != run.name:
        return f"its {CONFIG} is that of {named}"
    if status.get("run_id", identity) != identity:
        return f"its {STATUS} is that of run {one_line(status['run_id'])}"
    last = rows[-1] if rows and status.get("state") == State.DONE else {}
    for key in ("step", "train_loss", "test_loss", "test_accuracy"):
        if key in last and key in status and last[key] != status[key]:
            return f"{key} is {one_line(last[key])} in its last evaluation and {one_line(status[key])} in its {STATUS}"
    return ""


# ---- tables


def _tables(study: Study, folder: RecordPath, options: Options) -> Iterator[Check]:
    try:
        held, kept = _held_tables(folder, packed=study.packed)
        if not held:
            where = "The file holds" if study.packed else "The study's folder holds"
            yield Check(Outcome.OPEN, where, "no tables to compare.")
            return
        anew = csv_tables(study, options if kept is None else kept)
        texts = {name: _text(path, _most_bytes(anew[name])) for name, path in held.items() if name in anew}
    except UserError as error:
        yield Check(Outcome.FAILS, "Tables", f"cannot be made anew as they were made: {one_line(error)}")
        return
    same = [name for name, text in texts.items() if anew[name] == text]
    for name in sorted(texts.keys() - set(same)):
        yield _compared(name, texts[name], anew[name])
    others = sorted(held.keys() - anew.keys())
    if others:
        several = len(others) > 1
        text = f"{listed(others, 5)} {'are none' if several else 'is not one'} that these records give."
        yield Check(Outcome.FAILS, f"Table{'s' * several}", text)
    if same:
        text = f"made anew{_unusual(kept)} are the same to the byte: {', '.join(sorted(same))}."
        yield Check(Outcome.HOLDS, "Tables", text)
    missing = sorted(anew.keys() - held.keys())
    if missing:
        yield Check(Outcome.OPEN, "Tables", f"that the records give and that are not there: {', '.join(missing)}.")


def _unusual(kept: Options | None) -> str:
    """Return in words the options of tables that are not the menu's."""
    menu = menu_options()
    words = [f"{name}={as_typed(getattr(kept, name))}" for name in TABLE_OPTIONS] if kept else []
    usual = {f"{name}={as_typed(getattr(menu, name))}" for name in TABLE_OPTIONS}
    unlike = [word for word in words if word not in usual]
    return f" with {listed(unlike, len(unlike))}" if unlike else ""


def _most_bytes(anew: str) -> int:
    """Return the size up to which a table is read that is to be like one made anew."""
    return 4 * len(anew.encode()) + 10_000


def _held_tables(folder: RecordPath, *, packed: bool) -> tuple[dict[str, RecordPath], Options | None]:
    """Return the files of the tables beside the records of a study by name, and the options they were made with.

    Raises:
        UserError: for a file that cannot be read, or that holds no options.
    """
    for name in (archive.TABLES,) if packed else ("report", archive.TABLES):
        try:
            files = {path.name: path for path in reading.listed(folder / name)}
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}.") from None
        tables = {path.stem: path for name, path in files.items() if name.endswith(".csv")}
        if tables:
            kept = files.get(archive.OPTIONS)
            return tables, read_table_options(_json(kept)) if kept else None
    return {}, None


def _text(path: RecordPath, most: int) -> str:
    try:
        content = reading.read(path, most)
        if len(content) > most:  # of an entry of a file
            raise ValueError(f"it has {len(content)} bytes, and at most {most} are read")
        return content.decode()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read: {why}.") from None


def _json(path: RecordPath) -> object:
    return reading.json_object(path, _text(path, MOST_BYTES_OF_OPTIONS).encode())


def _compared(name: str, held: str, anew: str) -> Check:
    """Compare two texts of a table, which are not equal, cell by cell."""
    try:
        rows, new = (list(csv.reader(io.StringIO(text, newline=""))) for text in (held, anew))
    except csv.Error as error:
        return Check(Outcome.FAILS, f"Table {name}", f"is no CSV: {error}.")
    if rows[:1] != new[:1]:
        return Check(Outcome.FAILS, f"Table {name}", "has other columns, or in another order, than the one made anew.")
    if len(rows) != len(new):
        return Check(Outcome.FAILS, f"Table {name}", f"has {len(rows) - 1} rows, and {len(new) - 1} anew.")
    if any(map(_unequal_lengths, rows, new)):
        return Check(Outcome.FAILS, f"Table {name}", "has rows with more or fewer cells than its header.")
    header = new[0]
    unequal = [
        (row, column, before, after)
        for row, (old_cells, cells) in enumerate(zip(rows, new, strict=True))
        for column, before, after in zip(header, old_cells, cells, strict=True)
        if before != after and not _close(before, after)
    ]
    if not unequal:
        text = f"made anew is the same up to rounding ({RELATIVE:g} of each number, or {ABSOLUTE:g})."
        return Check(Outcome.HOLDS, f"Table {name}", text)
    if all(_is_cut(*cell[1:]) for cell in unequal):
        text = (
            f"has {count(len(unequal), 'end')} of intervals beyond what is possible, such as"
            f" {one_line(unequal[0][2])} for {unequal[0][3]}: versions before 0.5.0 did not cut them."
        )
        return Check(Outcome.OPEN, f"Table {name}", text)
    row, column, before, after = unequal[0]
    more = f" {len(unequal) - 1} more cells differ." if len(unequal) > 1 else ""
    keys = dict(zip(header, new[row], strict=True))
    place = ", ".join(keys[key] for key in ("setting", "place", "arm", "batch", "claim", "quantity") if keys.get(key))
    text = (
        f"row {row} ({one_line(place)}), column {column}: {one_line(before)!r} there, {one_line(after)!r} anew.{more}"
    )
    return Check(Outcome.FAILS, f"Table {name}", text)


def _unequal_lengths(one: list[str], other: list[str]) -> bool:
    return len(one) != len(other)


def _is_cut(column: str, before: str, after: str) -> bool:
    """Return whether the end of an interval differs by no more than that it is cut now, at a whole number."""
    try:
        there, anew = float(before), float(after)
    except ValueError:
        return False
    return anew.is_integer() and (there > anew if column == "high" else column == "low" and there < anew)


def _close(before: str, after: str) -> bool:
    try:
        return math.isclose(float(before), float(after), rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    except ValueError:
        return False


# ---- runs


def _reruns(study: Study, folder: RecordPath, rerun: Rerun, *, quiet: bool) -> Iterator[Check]:
    able, others = reruns.candidates(study, rerun)
    for why, names in others.items():
        yield Check(
            Outcome.OPEN, f"{len(names)} of {len(study.finished)} finished runs", f"are not carried out again, {why}."
        )
    names = reruns.chosen(able, rerun.number, rerun.choice)
    if not names:
        yield Check(Outcome.OPEN, "No run", "can be carried out again.")
    elif not quiet:
        seconds = [reruns.recorded_seconds(runs.read_status(folder / name) or {}) for name in names]
        took = span(sum(seconds)) if all(map(math.isfinite, seconds)) else "an unknown time"
        words = f"Carrying out {len(names)} of {len(able)} runs again, which took {took}: rerun_seed={rerun.choice}"
        say(words, flush=True)
    for name in names:
        yield reruns.carry_out(study, name, folder / name, able[name], FALSE_ALARM / len(names))
