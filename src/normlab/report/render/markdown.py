"""Tables as Markdown."""

from collections.abc import Iterator

import pandas as pd

from normlab.report.analysis.cells import Cell, Table


def markdown(frame: pd.DataFrame) -> str:
    """A pipe table, padded so that it can be read as plain text; the first column and sentences are left-aligned."""
    lines = [[str(cell).replace("|", r"\|") for cell in row] for row in (frame.columns, *frame.to_numpy())]
    left = {i for i in range(frame.shape[1]) if i == 0 or _sentences(frame, i)}
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(frame.shape[1])]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(lines[0]), line(rule), *(line(cells) for cells in lines[1:])]) + "\n"


def markdown_table(table: Table) -> Iterator[str]:
    """The paragraphs of a table without its caption: each setting and its pipe table, the best numbers in bold."""
    for setting, frame in table.frames(_bold).items():
        yield f"**{setting}**"
        yield markdown(frame).rstrip()


def split_number(text: str) -> tuple[str, str]:
    """A cell's text as its number with interval, and what stands behind it in brackets: only the first is marked."""
    number, bracket, notes = text.partition(" (")
    return number, bracket + notes


def _bold(cell: Cell) -> str:
    number, notes = split_number(cell.text)
    return f"**{number}**{notes}" if cell.highlight == "best" else cell.text


def _sentences(frame: pd.DataFrame, column: int) -> bool:
    """Whether a column is to be read rather than compared."""
    return any(len(str(cell)) > 50 for cell in frame.iloc[:, column])
