"""Tables as LaTeX for papers: booktabs, and text that pdflatex sets whatever it holds.

A table goes to one column of a two-column paper if it fits there, else over the page's width; if it is wider still its
columns stand below each other in parts. Nothing is scaled: the letters of all tables are equally large.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence

from normlab.report.analysis.cells import Row, Table, TableCell
from normlab.report.analysis.highlight import CLOSE
from normlab.report.render.layout import column_parts, filled, split_number

COLUMN, PAGE = 230.0, 340.0  # points that fit a column of two, and the narrowest page of one column (article's)
HEIGHT = 36  # lines of a table that a page holds beside a long caption
_LETTER, _BETWEEN = 4.0, 7.0  # points that a letter of \footnotesize is wide, about, and the space between columns
_LONG = 24  # letters from which a text may be broken into lines

# Commands that the standard classes have in any encoding of fonts: pdflatex stops at others, e.g. those for Cyrillic.
_TEXT = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": "{}`",  # no ligature with a ? or ! before it
    "\u2013": r"\textendash{}", "—": r"\textemdash{}", "…": r"\ldots{}",
    "\u2018": "`", "\u2019": "'", "“": "``", "”": "''",
    "ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "œ": r"\oe{}", "Œ": r"\OE{}", "ø": r"\o{}", "Ø": r"\O{}",
    "ł": r"\l{}", "Ł": r"\L{}", "\u0131": r"\i{}",
}  # fmt: skip
_SIGNS = {
    "±": r"\pm", "‖": r"\Vert", "∞": r"\infty", "\u00d7": r"\times", "·": r"\cdot", "÷": r"\div", "\u2212": "-",
    "≤": r"\leq", "≥": r"\geq", "≠": r"\neq", "≈": r"\approx", "→": r"\rightarrow", "←": r"\leftarrow", "√": r"\surd",
    "∂": r"\partial", "∇": r"\nabla", "∑": r"\sum", "∏": r"\prod", "∈": r"\in", "°": r"^{\circ}", "µ": r"\mu",
    "\u03bf": "o",
}  # fmt: skip
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi"
    " omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
)
_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0323": "d", "\u0327": "c", "\u0331": "b",
}  # fmt: skip
_ABOVE = "\u0300\u0301\u0302\u0303\u0308"  # accents that take the place of the dot of an i


def _greek_letter(name: str) -> str:
    case = "SMALL" if name.islower() else "CAPITAL"
    return unicodedata.lookup(f"GREEK {case} LETTER {name.upper().replace('LAMBDA', 'LAMDA')}")


_COMMANDS = (
    _TEXT
    | {sign: f"${command}$" for sign, command in _SIGNS.items()}
    | {_greek_letter(name): rf"$\{name}$" for name in _GREEK.split()}
)


def latex_escape(text: str) -> str:
    """Return text that pdflatex prints literally, with ± and negative numbers as mathematics.

    Needs no package. A letter that no font of LaTeX's own has, such as a Chinese one, is printed as its number:
    [U+6F22].
    """
    escaped = "".join(_letter(letter) for letter in unicodedata.normalize("NFC", text))
    escaped = re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)
    escaped = re.sub(r"(?<=\w)-(?=-)|-(?=-)(?!-(\s|$))", "-{}", escaped)  # two hyphens of a name are not a dash
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped  # else an option of the \\ before it


def _letter(letter: str) -> str:
    if letter in _COMMANDS:
        return _COMMANDS[letter]
    if " " <= letter <= "~":
        return letter
    if letter.isspace():
        return " "
    return _accented(letter) or _raised(letter) or f"[U+{ord(letter):04X}]"


def _accented(letter: str) -> str:
    base, *marks = list(unicodedata.normalize("NFD", letter))
    if not marks or not base.isascii() or not base.isalpha() or any(mark not in _ACCENTS for mark in marks):
        return ""
    accented = rf"\{base}" if base in "ij" and any(mark in _ABOVE for mark in marks) else base
    for mark in marks:
        accented = rf"\{_ACCENTS[mark]}{{{accented}}}"
    return accented


def _raised(letter: str) -> str:
    kind, _, code = unicodedata.decomposition(letter).partition(" ")
    sign = {"<super>": "^", "<sub>": "_"}.get(kind, "")
    base = chr(int(code, 16)) if sign and " " not in code else ""
    return f"${sign}{{{base}}}$" if base.isascii() and base.isalnum() else ""


def latex(table: Table, setting: str, label: str) -> str:
    """Return the table of one setting as `table` or `table*` environments, for the package booktabs.

    The caption has the number of seeds where it is the same in all cells; else the cells have it.
    """
    rows, seeds = _without_common_n(filled(table.rows[setting]))
    prose = [heading for heading in table.prose if any(row[heading].text for row in rows)]
    headings = [heading for heading in rows[0] if heading not in table.prose]
    widths = {heading: _width([heading, *(row[heading].text for row in rows)]) for heading in headings}
    one_column = not prose and sum(widths.values()) <= COLUMN
    room = COLUMN if one_column else PAGE
    repeated = headings[:2] if headings[1:2] == ["batch"] else headings[:1]
    parts = [headings] if prose else list(column_parts(widths, repeated, room, widest=room / 3))
    height = HEIGHT // 3 if prose else HEIGHT
    chunks = [rows[i : i + height] for i in range(0, len(rows), height)]
    tabulars = [_tabular(part, widths, chunk, prose) for part in parts for chunk in chunks]
    per_float = max(1, HEIGHT // (len(rows) + 4)) if len(chunks) == 1 else 1  # that a page can hold
    environment = "table" if one_column else "table*"
    title = f"{table.title}. {setting}."
    caption = latex_escape(f"{title} {table.caption}{table.rule}{CLOSE if table.rule else ''}{seeds}")
    key = re.sub(r"[^A-Za-z0-9:._/-]", lambda letter: f"+{ord(letter[0]):x}+", label)  # of two labels never the same
    heads = [rf"\caption{{{caption}}}", rf"\label{{{key}}}"]
    lines = []
    for i in range(0, len(tabulars), per_float):
        lines += [
            rf"\begin{{{environment}}}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3.5pt}\setlength{\belowcaptionskip}{4pt}",
            *heads,
            "\n\n\\medskip\n\n".join(tabulars[i : i + per_float]),
            rf"\end{{{environment}}}",
            "",
        ]
        heads = [rf"\caption{{{latex_escape(f'{title} Continued.')}}}"]
    return "\n".join(lines)


def _without_common_n(rows: Sequence[Row]) -> tuple[Sequence[Row], str]:
    """Return the rows without the n that all cells have, and that n as a sentence."""
    in_cells = {n for row in rows for cell in list(row.values())[1:] for n in re.findall(r"\(n=(\d+)[,)]", cell.text)}
    found = in_cells or {row["runs"].text for row in rows if "runs" in row}
    n = found.pop() if len(found) == 1 else ""
    if not n.isdigit():
        return rows, ""

    def without_n(cell: TableCell) -> TableCell:
        return cell._replace(text=cell.text.replace(f" (n={n})", "").replace(f"(n={n}, ", "("))

    bare = [
        {heading: without_n(cell) if i else cell for i, (heading, cell) in enumerate(row.items()) if heading != "runs"}
        for row in rows
    ]
    return bare, f" {n} seed{'' if n == '1' else 's'}."


def _width(texts: Sequence[str]) -> float:
    """Return the width in points of a column with these texts, about."""
    return _BETWEEN + _LETTER * max(sum(8 if _letter(x).startswith("[U") else 1 for x in text) for text in texts)


def _tabular(headings: Sequence[str], widths: Mapping[str, float], rows: Sequence[Row], prose: Sequence[str]) -> str:
    """Return a tabular in which prose spans all columns: its first heading above the row, the others below."""
    broken = _broken_columns({heading: widths[heading] for heading in headings}, whole_page=bool(prose))
    columns = "".join(broken.get(heading) or ("r" if i else "l") for i, heading in enumerate(headings))
    end = r" \tabularnewline" if headings[-1] in broken else r" \\"

    def line(row: Row) -> str:
        cells = {heading: _latex_cell(row[heading]) for heading in headings}
        return " & ".join(_breakable(cell) if heading in broken else cell for heading, cell in cells.items()) + end

    def spanning(text: str, style: str = "") -> list[str]:
        columns = rf"\multicolumn{{{len(headings)}}}{{@{{}}p{{\linewidth}}@{{}}}}"
        return [rf"{columns}{{\raggedright {style}{latex_escape(text)}}} \tabularnewline"] if text else []

    body: list[str] = []
    for row in rows:
        above = spanning(row[prose[0]].text, r"\itshape ") if prose else []
        below = "; ".join(f"{heading}: {row[heading].text}" for heading in prose[1:] if row[heading].text)
        body += [*([r"\addlinespace"] if above and body else []), *above, line(row), *spanning(below)]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            line({heading: TableCell(heading) for heading in headings}),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _broken_columns(widths: Mapping[str, float], whole_page: bool) -> dict[str, str]:
    """Return the type of each column that breaks lines.

    Where the columns do not fit, or are to be as wide as the page, the long ones, or the longest, share the width that
    the others leave.
    """
    together = sum(widths.values())
    if not whole_page and together <= PAGE:
        return {}
    long = {heading: width for heading, width in widths.items() if width > _BETWEEN + _LETTER * _LONG}
    if not long:
        longest = max(widths, key=widths.__getitem__)
        long = {longest: widths[longest]}
    of_long = sum(long.values())
    used = together - of_long + _BETWEEN * (len(long) - 1)
    return {
        heading: rf"p{{\dimexpr(\linewidth-{used:.0f}pt)*{100 * width / of_long:.0f}/100\relax}}"
        for heading, width in long.items()
    }


def _breakable(text: str) -> str:
    """Return the text with places where the lines of a name without spaces may end."""
    return r"\raggedright\hspace{0pt}" + re.sub(r"(\\_|(?<!\\)=|[,/\]])(?=\S)", r"\1\\allowbreak{}", text)


def _latex_cell(cell: TableCell) -> str:
    if not cell.highlight:
        return latex_escape(cell.text)
    number, notes = split_number(cell.text)
    mark = {"best": r"\textbf", "close": r"\underline"}[cell.highlight]
    return f"{mark}{{{latex_escape(number)}}}{latex_escape(notes)}"
