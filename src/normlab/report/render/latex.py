"""Tables as LaTeX for papers: booktabs, and text that pdflatex sets whatever it holds.

A table goes to one column of a two-column paper if it fits there, else over the page's width; if it is wider still its
columns stand below each other in parts. Nothing is scaled: a table's letters are as large as any other's.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from normlab.report.analysis.cells import NOTHING, Cell, Row, Table
from normlab.report.analysis.highlight import CLOSE
from normlab.report.render.markdown import split_number

COLUMN, PAGE = 230.0, 340.0  # points that fit a column of two, and the narrowest page of one column (article's)
HEIGHT = 36  # lines of a table that a page holds beside a long caption
_LETTER, _BETWEEN = 4.0, 7.0  # points that a letter of \footnotesize is wide, about, and the space between columns
_LONG = 24  # letters from which a text may be broken into lines

_ASCII = {
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
    "`": "{}`",  # no ligature with a ? or ! before it
}
_LETTERS = {
    "ß": "ss",
    "æ": "ae",
    "Æ": "AE",
    "œ": "oe",
    "Œ": "OE",
    "ø": "o",
    "Ø": "O",
    "ł": "l",
    "Ł": "L",
    "\u0131": "i",
}
_SIGNS = {
    "±": r"\pm", "‖": r"\Vert", "∞": r"\infty", "\u00d7": r"\times", "·": r"\cdot", "÷": r"\div", "\u2212": "-",
    "≤": r"\leq", "≥": r"\geq", "≠": r"\neq", "≈": r"\approx", "→": r"\rightarrow", "←": r"\leftarrow", "√": r"\surd",
    "∂": r"\partial", "∇": r"\nabla", "∑": r"\sum", "∏": r"\prod", "∈": r"\in", "°": r"^{\circ}", "µ": r"\mu",
    "\u03bf": "o",
}  # fmt: skip
_PUNCTUATION = {
    "\u2013": r"\textendash{}",
    "—": r"\textemdash{}",
    "\u2018": "`",
    "\u2019": "'",
    "“": "``",
    "”": "''",
    "…": r"\ldots{}",
}
_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0323": "d", "\u0327": "c", "\u0331": "b",
}  # fmt: skip
_GREEK = re.compile(r"GREEK (SMALL|CAPITAL) LETTER (\w+)$")
_GREEK_CAPITALS = ("GAMMA", "DELTA", "THETA", "LAMDA", "XI", "PI", "SIGMA", "UPSILON", "PHI", "PSI", "OMEGA")


def latex_escape(text: str) -> str:
    """Text as pdflatex prints it literally, with ± and negative numbers as mathematics.

    Needs no package. What no font of LaTeX's own has, as a Chinese letter, is printed as its number: [U+6F22].
    """
    escaped = "".join(_letter(letter) for letter in unicodedata.normalize("NFC", text))
    escaped = re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)
    escaped = re.sub(r"(?<=\w)-(?=-)|-(?=-)(?!-(\s|$))", "-{}", escaped)  # two hyphens of a name are not a dash
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped  # else an option of the \\ before it


def _letter(letter: str) -> str:
    if letter in _ASCII:
        return _ASCII[letter]
    if " " <= letter <= "~":
        return letter
    if letter.isspace():
        return " "
    if letter in _PUNCTUATION:
        return _PUNCTUATION[letter]
    if letter in _LETTERS:
        return rf"\{_LETTERS[letter]}{{}}"
    if letter in _SIGNS:
        return f"${_SIGNS[letter]}$"
    return _accented(letter) or _raised(letter) or _greek(letter) or f"[U+{ord(letter):04X}]"


def _accented(letter: str) -> str:
    base, *marks = list(unicodedata.normalize("NFD", letter))
    if not marks or not base.isascii() or not base.isalpha() or any(mark not in _ACCENTS for mark in marks):
        return ""
    set_ = rf"\{base}" if base in "ij" and any(mark in "\u0300\u0301\u0302\u0303\u0308" for mark in marks) else base
    for mark in marks:
        set_ = rf"\{_ACCENTS[mark]}{{{set_}}}"
    return set_


def _raised(letter: str) -> str:
    kind, _, code = unicodedata.decomposition(letter).partition(" ")
    sign = {"<super>": "^", "<sub>": "_"}.get(kind, "")
    base = chr(int(code, 16)) if sign and " " not in code else ""
    return f"${sign}{{{base}}}$" if base.isascii() and base.isalnum() else ""


def _greek(letter: str) -> str:
    found = _GREEK.match(unicodedata.name(letter, ""))
    if not found:
        return ""
    size, name = found.groups()
    name = name.replace("LAMDA", "LAMBDA")
    if size == "CAPITAL":
        return rf"$\{name.capitalize()}$" if found[2] in _GREEK_CAPITALS else ""
    known = "ALPHA BETA GAMMA DELTA EPSILON ZETA ETA THETA IOTA KAPPA LAMBDA MU NU XI PI RHO SIGMA TAU UPSILON PHI CHI"
    return rf"$\{name.lower()}$" if name in (*known.split(), "PSI", "OMEGA") else ""


def latex(table: Table, setting: str, label: str) -> str:
    """The table of one setting as a `table` or `table*` environment, for the package booktabs.

    The number of seeds is told in the caption where all cells have the same, else in the cells.
    """
    rows, seeds = _told_once(table.rows[setting])
    headings = [heading for heading in dict.fromkeys(key for row in rows for key in row) if heading not in table.prose]
    prose = [heading for heading in table.prose if any(row.get(heading, Cell("")).text for row in rows)]
    widths = {heading: _width(heading, rows) for heading in headings}
    one_column = not prose and _total(widths) <= COLUMN
    environment = "table" if one_column else "table*"
    rule = table.rule + (CLOSE if table.rule else "")
    caption = latex_escape(f"{table.title}. {setting}. {table.caption}{rule}{seeds}")
    continued = latex_escape(f"{table.title}. {setting}. Continued.")
    parts = [headings] if prose else list(_parts(headings, widths, COLUMN if one_column else PAGE))
    high = HEIGHT // (3 if prose else 1)
    chunks = [rows[i : i + high] for i in range(0, len(rows), high)]
    found = [_tabular(part, widths, chunk, prose) for part in parts for chunk in chunks]
    together = max(1, HEIGHT // (len(chunks[0]) + 4)) if len(chunks) == 1 else 1  # that a page can hold
    floats = []
    for i in range(0, len(found), together):
        told = f"\\label{{{re.sub(r'[^A-Za-z0-9:._-]', '-', label)}}}"
        floats += [
            rf"\begin{{{environment}}}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3.5pt}\setlength{\belowcaptionskip}{4pt}",
            *([rf"\caption{{{caption}}}", told] if i == 0 else [rf"\caption{{{continued}}}"]),
            "\n\n\\medskip\n\n".join("\n".join(lines) for lines in found[i : i + together]),
            rf"\end{{{environment}}}",
            "",
        ]
    return "\n".join(floats)


def _told_once(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The rows without what all cells say of their n, and it as a sentence."""
    told = {n for row in rows for cell in list(row.values())[1:] for n in re.findall(r"\(n=(\d+)[,)]", cell.text)}
    listed = {row["runs"].text for row in rows if "runs" in row}
    found = told or listed
    if len(found) != 1 or not (n := found.pop()).isdigit():
        return list(rows), ""

    def bare(cell: Cell) -> Cell:
        return cell._replace(text=cell.text.replace(f" (n={n})", "").replace(f"(n={n}, ", "("))

    bared = [
        {heading: bare(cell) if i else cell for i, (heading, cell) in enumerate(row.items()) if heading != "runs"}
        for row in rows
    ]
    return bared, f" {n} seed{'' if n == '1' else 's'}."


def _width(heading: str, rows: Sequence[Row]) -> float:
    texts = [heading, *(row.get(heading, Cell(NOTHING)).text for row in rows)]
    return _BETWEEN + _LETTER * max(sum(8 if _letter(x).startswith("[U") else 1 for x in text) for text in texts)


def _total(widths: dict[str, float]) -> float:
    return sum(widths.values())


def _parts(headings: Sequence[str], widths: dict[str, float], room: float) -> Iterator[list[str]]:
    """The columns in parts that fit, each behind the first column, and in lists behind the batch size."""
    heads = [heading for heading in headings[:2] if heading == headings[0] or heading == "batch"]
    part = list(heads)
    for heading in headings[len(heads) :]:
        if part != heads and sum(min(widths[h], room / 3) for h in part) + widths[heading] > room:
            yield part
            part = list(heads)
        part.append(heading)
    yield part


def _tabular(headings: Sequence[str], widths: dict[str, float], rows: Sequence[Row], prose: Sequence[str]) -> list[str]:
    """Columns that are too wide together break the lines of long texts; prose spans the table, its first above."""
    broken = _broken(headings, widths, bool(prose))
    columns = "".join(broken.get(heading) or ("r" if i else "l") for i, heading in enumerate(headings))

    def line(cells: Iterable[str]) -> str:
        return " & ".join(cells) + (r" \tabularnewline" if headings[-1] in broken else r" \\")

    def text(heading: str, cell: Cell) -> str:
        return _breakable(_latex_cell(cell)) if heading in broken else _latex_cell(cell)

    def spanning(row: Row, wanted: Sequence[str], *, named: bool) -> Iterator[str]:
        told = [(heading, row[heading].text) for heading in wanted if heading in row and row[heading].text]
        if told:
            sentence = latex_escape("; ".join(f"{heading}: {text}" if named else text for heading, text in told))
            style = "" if named else r"\itshape "
            whole = rf"\multicolumn{{{len(headings)}}}{{@{{}}p{{\linewidth}}@{{}}}}"
            yield rf"{whole}{{\raggedright {style}{sentence}}} \tabularnewline"

    body = []
    for position, row in enumerate(rows):
        above = list(spanning(row, prose[:1], named=False))
        body += [r"\addlinespace", *above] if above and position else above
        body.append(line(text(heading, row.get(heading, Cell(NOTHING))) for heading in headings))
        body += spanning(row, prose[1:], named=True)
    return [
        rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"\toprule",
        line(text(heading, Cell(heading)) for heading in headings),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _broken(headings: Sequence[str], widths: dict[str, float], whole: bool) -> dict[str, str]:
    """What breaks lines, per heading: where the columns do not fit, or are to be as wide as the page (`whole`), the
    long ones, or the longest, share what the others leave.
    """
    if not whole and sum(widths[heading] for heading in headings) <= PAGE:
        return {}
    long = [heading for heading in headings if widths[heading] > _BETWEEN + _LETTER * _LONG]
    long = long or [max(headings, key=widths.__getitem__)]
    used = sum(widths[heading] for heading in headings if heading not in long) + _BETWEEN * (len(long) - 1)
    together = sum(widths[heading] for heading in long)
    return {
        heading: rf"p{{\dimexpr(\linewidth-{used:.0f}pt)*{100 * widths[heading] / together:.0f}/100\relax}}"
        for heading in long
    }


def _breakable(text: str) -> str:
    """With places where the lines of a name without spaces may end."""
    return r"\raggedright\hspace{0pt}" + re.sub(r"(\\_|(?<!\\)=|[,/\]])(?=\S)", r"\1\\allowbreak{}", text)


def _latex_cell(cell: Cell) -> str:
    number, notes = split_number(cell.text)
    if not cell.highlight:
        return latex_escape(cell.text)
    mark = {"best": r"\textbf", "close": r"\underline"}[cell.highlight]
    return f"{mark}{{{latex_escape(number)}}}{latex_escape(notes)}"
