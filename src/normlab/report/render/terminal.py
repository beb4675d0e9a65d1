"""The summary of a report in the terminal."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from normlab.common.console import Console
from normlab.common.errors import count
from normlab.common.progress import COLORS
from normlab.common.terminal import say
from normlab.report.analysis.cells import Row, Table
from normlab.report.claims.judge import CONTRADICTED, EQUAL, INCONCLUSIVE, SUPPORTED, Judgement
from normlab.report.claims.texts import judgements_by_claim, verdict_lines
from normlab.report.render.layout import column_parts, filled
from normlab.report.study.load import Study

_VERDICTS = {SUPPORTED: "green", CONTRADICTED: "red", EQUAL: "cyan", INCONCLUSIVE: "yellow"}


def show(
    study: Study,
    accuracy: Table,
    judgements: Sequence[Judgement],
    page: Path,
    warnings: Sequence[str],
    console: Console | None = None,
) -> None:
    """Print the state of the study, notes and warnings, the accuracy table, the verdicts and the path of the report."""
    console = console or Console()
    console.print(_state(study))
    for run in study.noted():
        _line(console, f"  {study.called(run.run)}: {run.state} ({run.note})")
    _warnings(console, warnings)
    for setting, rows in accuracy.rows.items():
        _line(console, f"{accuracy.title}: {setting}", "bold")
        for part in _tables(filled(rows), console.width):
            console.print(part)
            console.print()
    for place, found in itertools.groupby(judgements, key=lambda judgement: judgement.place):
        _verdicts(console, f"Verdicts: {place}", found)
    _line(console, f"Report: {page}")


def show_claims(
    judgements: Sequence[Judgement], page: Path, warnings: Sequence[str], console: Console | None = None
) -> None:
    """Print every claim's verdicts over all studies, then those that are not run with their commands."""
    console = console or Console()
    _warnings(console, warnings)
    ordered = sorted(judgements, key=lambda judgement: (judgement.study, judgement.place))
    for title, found in itertools.groupby(ordered, key=lambda judgement: f"{judgement.study}: {judgement.place}"):
        _verdicts(console, title, found)
    missing = [claim for claim, found in judgements_by_claim(judgements) if not found]
    if missing:
        _line(console, "Not run", "bold")
    for command, claims in itertools.groupby(missing, key=lambda claim: claim.command):
        for claim in claims:
            _line(console, f"  {claim.sentence}")
        _line(console, f"    {command}", "cyan")
    _line(console, f"Page: {page}")


def show_path(page: Path, warnings: Sequence[str]) -> None:
    """Print no more than a quiet command does: the path of the page on stdout, warnings on stderr."""
    for warning in warnings:
        say(f"Warning: {warning}", file=sys.stderr)
    say(page)


def _warnings(console: Console, warnings: Sequence[str]) -> None:
    for warning in warnings:
        _line(console, f"Warning: {warning}", "yellow")


def _verdicts(console: Console, title: str, judgements: Iterator[Judgement]) -> None:
    _line(console, title, "bold")
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    for verdict, sentence in verdict_lines(list(judgements)):
        grid.add_row(Text(f"  {verdict}", _VERDICTS[verdict]), Text(sentence))
    console.print(grid)
    console.print()


def _state(study: Study) -> Text:
    line = Text(f"Study {study.name}, {count(len(study.every), 'run')}:\n  ")
    for position, (state, number) in enumerate(study.states().items()):
        line.append(", " if position else "")
        line.append(f"{number} {state}", COLORS.get(state, "") if number else "dim")
    return line


def _tables(rows: Sequence[Row], width: int) -> Iterator[RichTable]:
    """Yield the columns in tables that fit the terminal, each with the column of arms."""
    widths = {heading: max(len(heading), *(len(row[heading].text) for row in rows)) + 2 for heading in rows[0]}
    for headings in column_parts(widths, list(widths)[:1], width):
        table = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for position, heading in enumerate(headings):
            table.add_column(Text(heading), justify="right" if position else "left")
        for row in rows:
            table.add_row(*(Text(row[heading].text) for heading in headings))
        yield table


def _line(console: Console, text: str, style: str = "") -> None:
    """Print a line without cutting it, so that a path in it can be copied."""
    console.print(Text(text, style), soft_wrap=True)
