"""Tables and the report of a study as Markdown."""

import itertools
from collections.abc import Iterator, Sequence

import pandas as pd

from normlab.report.analysis.cells import Table, TableCell
from normlab.report.render.description import facts, question, run_counts
from normlab.report.render.layout import filled, split_number
from normlab.report.study.load import Study
from normlab.report.study.provenance import Provenance


def markdown(frame: pd.DataFrame) -> str:
    """Return a pipe table, padded to be read as plain text; its first column and sentences are left-aligned."""
    lines = [[str(cell).replace("|", r"\|") for cell in row] for row in (frame.columns, *frame.to_numpy())]
    columns = list(zip(*lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    left = [i == 0 or any(len(cell) > 50 for cell in column[1:]) for i, column in enumerate(columns)]
    rule = ["-" * width if is_left else "-" * (width - 1) + ":" for width, is_left in zip(widths, left, strict=True)]
    text = ""
    for line in (lines[0], rule, *lines[1:]):
        padded = [
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        ]
        text += f"| {' | '.join(padded)} |\n"
    return text


def markdown_table(table: Table) -> Iterator[str]:
    """Yield the paragraphs of a table without its caption: each setting and its rows, the best numbers in bold."""
    for setting, rows in table.rows.items():
        yield f"**{setting}**"
        texts = [{heading: _bold(cell) for heading, cell in row.items()} for row in filled(rows)]
        yield markdown(pd.DataFrame(texts)).rstrip()


def page(
    study: Study,
    tables: Sequence[tuple[Table, Provenance]],
    figures: Sequence[tuple[str, str, Provenance]],
    warnings: Sequence[str],
) -> str:
    """Return the report as one page, which links to the files of its tables and figures beside it.

    Args:
        study: the runs that are reported.
        tables: each with its sources.
        figures: name, caption and sources of each.
        warnings: sentences about the study.
    """
    lines = [f"# Study {study.name}", question(study), run_counts(study, zeros=True)]
    lines += [f"- {run.run}: {run.state} ({run.note})" for run in study.noted()]
    lines += [f"- Warning: {warning}" for warning in warnings]
    lines += ["## What was run", *(f"- {fact}" for fact in facts(study))]
    for table, sources in tables:
        links = ", ".join(f"[{suffix}]({table.name}.{suffix})" for suffix in ("csv", "tex", "md"))
        lines += [f"## {table.title}", *markdown_table(table)]
        lines += [f"{table.caption}{table.rule} ({links})", _sources(table.name, sources)]
    if figures:
        lines.append("## Figures")
    for name, caption, sources in figures:
        lines += [f"![{name}]({name}.png)", f"{caption} ([pdf]({name}.pdf))", _sources(name, sources)]
    return paragraphs(lines)


def paragraphs(lines: Sequence[str]) -> str:
    """Join lines with an empty line between them, except inside a list."""
    text = ""
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        text += line + ("\n" if line.startswith("- ") and following.startswith("- ") else "\n\n")
    return text.rstrip("\n") + "\n"


def _sources(name: str, sources: Provenance) -> str:
    return f"{sources.sentence()} ([runs]({name}.sources.json))"


def _bold(cell: TableCell) -> str:
    number, notes = split_number(cell.text)
    return f"**{number}**{notes}" if cell.highlight == "best" else cell.text
