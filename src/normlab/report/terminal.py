"""What a report says in the terminal."""

from pathlib import Path

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


def show(
    study: Study, accuracy: Table, page: Path, warnings: list[str], console: Console | None = None
) -> None:
    """Print the study's state, what went wrong, the accuracy table, and where the report is."""
    console = console or Console(highlight=False)
    console.print(_state(study))
    troubled = study.runs[(study.runs["note"].fillna("") != "") & (study.runs["run"] != "")]
    for run in troubled.itertuples(index=False):
        _line(console, f"  {run.run}: {run.state} ({run.note})")
    for warning in warnings:
        _line(console, f"Warning: {warning}", "yellow")
    for setting, texts in accuracy.texts.items():
        table = RichTable(
            box=SIMPLE_HEAD, title=Text(f"{accuracy.title}: {setting}", "bold"), title_justify="left"
        )
        for position, column in enumerate(texts.columns):
            table.add_column(Text(column), justify="right" if position else "left")
        for row in texts.itertuples(index=False):
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    _line(console, f"Report: {page}")


def _state(study: Study) -> Text:
    line = Text(f"Study {study.name}, {len(study.runs)} runs: ")
    for position, (state, number) in enumerate(study.states().items()):
        line.append(", " if position else "")
        line.append(f"{number} {state}", _COLORS.get(state, "") if number else "dim")
    return line


def _line(console: Console, text: str, style: str = "") -> None:
    """A line that is not cut, so that a path in it can be copied."""
    console.print(Text(text, style), soft_wrap=True)
