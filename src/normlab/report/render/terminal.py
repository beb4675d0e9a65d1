"""What a report says in the terminal."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from normlab.report.analysis.cells import Table
from normlab.report.claims.judge import CONTRADICTED, INCONCLUSIVE, SUPPORTED, Judgement
from normlab.report.claims.texts import judgements_by_claim, verdict_lines
from normlab.report.study.load import Study

_COLORS = {
    "done": "green",
    "running": "cyan",
    "diverged": "magenta",
    "failed": "red",
    "interrupted": "yellow",
}
_VERDICTS = {SUPPORTED: "green", CONTRADICTED: "red", INCONCLUSIVE: "yellow"}


def show(
    study: Study,
    accuracy: Table,
    judgements: Sequence[Judgement],
    page: Path,
    warnings: list[str],
    console: Console | None = None,
) -> None:
    """Print the study's state, what went wrong, the accuracy table, the verdicts, and where the report is."""
    console = console or Console(highlight=False)
    console.print(_state(study))
    for run in study.noted():
        _line(console, f"  {run.run}: {run.state} ({run.note})")
    for warning in warnings:
        _line(console, f"Warning: {warning}", "yellow")
    for setting, texts in accuracy.texts.items():
        _line(console, f"{accuracy.title}: {setting}", "bold")
        for part in _parts(texts, console.width):
            console.print(_table(part))
            console.print()
    for place, found in itertools.groupby(judgements, key=lambda judgement: judgement.place):
        _line(console, f"Verdicts: {place}", "bold")
        _verdicts(console, list(found))
        console.print()
    _line(console, f"Report: {page}")


def show_claims(
    judgements: Sequence[Judgement], page: Path, warnings: Sequence[str], console: Console | None = None
) -> None:
    """Print every claim's verdicts over all studies, then those that are not run with their commands."""
    console = console or Console(highlight=False)
    for warning in warnings:
        _line(console, f"Warning: {warning}", "yellow")
    ordered = sorted(judgements, key=lambda judgement: (judgement.study, judgement.place))
    for (study, place), found in itertools.groupby(ordered, key=lambda judgement: (judgement.study, judgement.place)):
        _line(console, f"{study}: {place}", "bold")
        _verdicts(console, list(found))
        console.print()
    missing = [claim for claim, judged in judgements_by_claim(judgements) if not judged]
    if missing:
        _line(console, "Not run", "bold")
    for command, claims in itertools.groupby(missing, key=lambda claim: claim.command):
        for claim in claims:
            _line(console, f"  {claim.sentence}")
        _line(console, f"    {command}", "cyan")
    _line(console, f"Page: {page}")


def show_path(page: Path, warnings: Sequence[str]) -> None:
    """What is left if quiet: the page's path on stdout, warnings on stderr."""
    for warning in warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    print(page)


def _verdicts(console: Console, judgements: Sequence[Judgement]) -> None:
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    for verdict, sentence in verdict_lines(judgements):
        grid.add_row(Text(f"  {verdict}", _VERDICTS[verdict]), Text(sentence))
    console.print(grid)


def _state(study: Study) -> Text:
    line = Text(f"Study {study.name}, {len(study.runs)} runs:\n  ")
    for position, (state, number) in enumerate(study.states().items()):
        line.append(", " if position else "")
        line.append(f"{number} {state}", _COLORS.get(state, "") if number else "dim")
    return line


def _parts(texts: pd.DataFrame, width: int) -> Iterator[pd.DataFrame]:
    """A table cut between columns into parts that fit beside the column of arms."""
    arms, *others = texts.columns
    wide = {column: max(len(str(column)), *texts[column].str.len()) + 2 for column in texts}
    while others:
        room = width - wide[arms]
        fitting = sum(total <= room for total in itertools.accumulate(wide[column] for column in others)) or 1
        yield texts[[arms, *others[:fitting]]]
        others = others[fitting:]


def _table(texts: pd.DataFrame) -> RichTable:
    table = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for position, column in enumerate(texts.columns):
        table.add_column(Text(column), justify="right" if position else "left")
    for row in texts.to_numpy():
        table.add_row(*(Text(cell) for cell in row))
    return table


def _line(console: Console, text: str, style: str = "") -> None:
    """A line that is not cut, so that a path in it can be copied."""
    console.print(Text(text, style), soft_wrap=True)
