"""What a report says in the terminal."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from normlab.report.load import Study
from normlab.report.tables import Table

_COLORS = {
    "done": "green",
    "running": "cyan",
    "diverged": "magenta",
    "failed": "red",
    "interrupted": "yellow",
}


def show(study: Study, accuracy: Table, page: Path, warnings: list[str], console: Console | None = None) -> None:
    """Print the study's state, what went wrong, the accuracy table, and where the report is."""
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
    _line(console, f"Report: {page}")


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
