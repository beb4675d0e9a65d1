"""A frame of texts as a Markdown or a LaTeX (booktabs) table."""

import re
from collections.abc import Iterable

import pandas as pd

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "_": r"\_",
        "%": r"\%",
        "&": r"\&",
        "#": r"\#",
        "$": r"\$",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
    }
)


def latex_escape(text: str) -> str:
    """Text as LaTeX prints it literally, with ± and negative numbers as mathematics."""
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", text.translate(_LATEX))


def latex(frame: pd.DataFrame, caption: str, label: str) -> str:
    """A `table` environment for the booktabs package; the first column is left-aligned, sentences are wrapped."""
    columns = [r"p{0.25\linewidth}" if _sentences(frame, i) else "r" if i else "l" for i in range(frame.shape[1])]

    def line(cells: Iterable[object]) -> str:
        return " & ".join(latex_escape(str(cell)) for cell in cells) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_escape(caption)}}}",
            rf"\label{{{label}}}",
            rf"\begin{{tabular}}{{{''.join(columns)}}}",
            r"\toprule",
            line(frame.columns),
            r"\midrule",
            *(line(row) for row in frame.to_numpy()),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


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


def _sentences(frame: pd.DataFrame, column: int) -> bool:
    """Whether a column is to be read rather than compared."""
    return any(len(str(cell)) > 50 for cell in frame.iloc[:, column])
