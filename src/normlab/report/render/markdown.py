"""Tables and the report of a study as Markdown."""

import itertools
import re
from collections.abc import Collection, Iterator, Sequence

import pandas as pd

from normlab.common.terminal import plain
from normlab.report.analysis.cells import Table
from normlab.report.render.description import facts, question, run_counts
from normlab.report.render.layout import filled, split_number
from normlab.report.study.load import Study
from normlab.report.study.provenance import Provenance

_SPECIAL = re.compile(  # what Markdown takes for more than text: anywhere, around words, and where a line begins
    r"[\\`*|{]|(?<![^\W_])_|_(?![^\W_])|^[#>]|^[-+](?=\s)|(?<=^\d)[.)](?=\s|$)|(?<=^\d\d)[.)](?=\s|$)"
)
_ENTITIES = (  # where not every reader of Markdown knows a \ in front
    (re.compile(r"&(?=#?\w+;)"), "&amp;"),
    (re.compile(r"<(?=[A-Za-z/!?])"), "&lt;"),
    (re.compile(r"\](?=\s*[(\[:])"), "&#93;"),
    (re.compile("~"), "&#126;"),
    (re.compile(r"\$"), "&#36;"),
)


def escaped(text: object) -> str:
    """Return Markdown that shows a text as it is, on one line."""
    line = _SPECIAL.sub(r"\\\g<0>", " ".join(plain(str(text)).split()))
    for sign, entity in _ENTITIES:
        line = sign.sub(entity, line)
    return line


def as_code(text: str) -> str:
    """Return Markdown that shows a text as code."""
    return f"`{' '.join(plain(text).split())}`" if "`" not in text else escaped(text)


def notes(text: str) -> str:
    """Return the Markdown of a person without what could act on a page or reach out of it.

    HTML is shown as text, an image is a link to it, a link leads to the web or to a file beside, and a block of code
    that does not end does so at the end.
    """
    text = plain(text)
    for sign, entity in _ENTITIES[:2]:
        text = sign.sub(entity, text)
    text = re.sub(r"!+(?=\[)", "", text)
    text = re.sub(r"\](?=\s*[(:]\s*([^)]{0,300}))", _link, text)
    fence = ""
    for mark in re.findall(r"^ {0,3}(`{3,}|~{3,})", text, re.MULTILINE):
        if not fence:
            fence = mark
        elif mark.startswith(fence):
            fence = ""
    return f"{text}\n{fence}".rstrip()


def _link(found: re.Match[str]) -> str:
    safe = ":" not in found[1] or found[1].startswith(("http://", "https://", "mailto:"))
    return found[0] if safe else "&#93;"


def markdown(frame: pd.DataFrame, bold: Collection[tuple[int, str]] = (), raw: Collection[str] = ()) -> str:
    """Return a pipe table, padded to be read as plain text; its first column and sentences are left-aligned.

    Args:
        frame: texts and numbers, which are escaped.
        bold: number of the row and column of each cell whose number is to be bold.
        raw: columns that are Markdown already.
    """

    def shown(i: int, heading: object, cell: object) -> str:
        if heading in raw:
            return str(cell)
        return _bold(str(cell)) if (i, heading) in bold else escaped(cell)

    texts = [
        [shown(i, heading, cell) for heading, cell in zip(frame, row, strict=True)]
        for i, row in enumerate(frame.to_numpy())
    ]
    lines = [[escaped(heading) for heading in frame], *texts]
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
        yield f"**{escaped(setting)}**"
        cells = [row.items() for row in filled(rows)]
        best = {(i, heading) for i, row in enumerate(cells) for heading, cell in row if cell.highlight == "best"}
        texts = [{heading: cell.text for heading, cell in row} for row in cells]
        yield markdown(pd.DataFrame(texts), best).rstrip()


def caption(table: Table) -> str:
    """Return what stands below a table."""
    return escaped(table.caption + table.rule)


def commands(table: Table) -> list[str]:
    """Return the paragraphs of a table's commands."""
    parts = [text.partition("\n") for text in table.commands]
    return [f"{escaped(title)}:\n\n    {plain(line)}" for title, _, line in parts]


def sources_sentence(sources: Provenance) -> str:
    """Return a table's or a figure's provenance in short."""
    made_by = f"made by {as_code(sources.command)} ({escaped(sources.reporter)})."
    return f"{escaped(sources.counts())}; {made_by}"


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
    lines = [f"# Study {escaped(study.name)}", escaped(question(study)), run_counts(study, zeros=True)]
    lines += [f"- {escaped(f'{study.called(run.run)}: {run.state} ({run.note})')}" for run in study.noted()]
    lines += [f"- Warning: {escaped(warning)}" for warning in warnings]
    lines += ["## What was run", *(f"- {escaped(fact)}" for fact in facts(study))]
    for table, sources in tables:
        links = ", ".join(f"[{suffix}]({table.name}.{suffix})" for suffix in ("csv", "tex", "md"))
        lines += [f"## {table.title}", *markdown_table(table)]
        lines += [f"{caption(table)} ({links})", *commands(table), _sources(table.name, sources)]
    if figures:
        lines.append("## Figures")
    for name, words, sources in figures:
        lines += [f"![{name}]({name}.png)", f"{escaped(words)} ([pdf]({name}.pdf))", _sources(name, sources)]
    return paragraphs(lines)


def paragraphs(lines: Sequence[str]) -> str:
    """Join lines with an empty line between them, except inside a list."""
    text = ""
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        text += line + ("\n" if line.startswith("- ") and following.startswith("- ") else "\n\n")
    return text.rstrip("\n") + "\n"


def _sources(name: str, sources: Provenance) -> str:
    return f"{sources_sentence(sources)} ([runs]({name}.sources.json))"


def _bold(text: str) -> str:
    number, notes = split_number(text)
    return f"**{escaped(number)}**" + (f" {escaped(notes)}" if notes else "")
