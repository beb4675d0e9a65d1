"""A figure in the page: the oracles are what was drawn, and matplotlib's own places of its markers."""

import math
import re
import warnings
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normlab.report import figures
from normlab.report.figures.marks import Mark, mark
from normlab.report.figures.style import PAPER, Canvas, legend

EVIL = "</text></svg><script>alert(1)</script> --> & \"' \x00\x1b[31m\uffff\u202e $x_$"
BN = ("digits", "bn", 8)


def figure_of(name: str = "bn", canvas: Canvas = PAPER) -> Figure:
    with canvas.context():
        figure = Figure(figsize=(3, 2), layout="constrained")
        ax = figure.subplots()
        [line] = ax.plot([0, 1, 2], [1.0, 3.0, 2.0], color="#0072B2", marker="s")
        mark(line, name, [Mark(f"{name}\n{i}", BN) for i in range(3)])
        mark(ax.errorbar([1], [3.0], yerr=[0.5], fmt="none", ecolor="#0072B2"), name)
        [other] = ax.plot([0, 2], [1.5, 1.5], color="#000000")
        mark(other, "none", [Mark("none, start"), None])
        entry = Line2D([], [], color="#0072B2", marker="s", label=name)
        legend(figure, [entry], canvas)
    return figure


def parsed(svg: str) -> Element:
    return ElementTree.fromstring(svg)


def of_class(root: Element, name: str) -> list[Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def test_marks_lie_on_matplotlibs_markers_with_their_text_and_cell() -> None:
    root = parsed(figures.as_svg(figure_of(), "one", {BN: 7}))
    *of_line, start = of_class(root, "mark")
    drawn = next(group for group in of_class(root, "s0") if group.tag == "g" and group.findall(".//use"))
    for key in ("x", "y"):
        places = [float(use.get(key)) for use in drawn.iter("use")]
        assert [float(each.get(f"c{key}")) for each in of_line] == pytest.approx(places, abs=0.02)
    assert [m.get("aria-label") for m in of_line] == ["bn\n0", "bn\n1", "bn\n2"]
    assert {(m.get("data-cell"), m.get("role")) for m in of_line} == {("7", "button")}
    assert (start.get("aria-label"), start.get("role"), start.get("data-cell")) == ("none, start", "img", None)
    assert [m.get("tabindex") for m in (*of_line, start)] == ["0", "-1", "-1", "-1"]


def test_a_key_of_the_legend_stands_for_all_that_its_series_drew() -> None:
    root = parsed(figures.as_svg(figure_of(name := "a rather long name that fills " * 3), "one", {}))
    [key] = of_class(root, "key")
    assert (key.get("aria-label"), key.get("aria-pressed")) == (name, "true")
    number = key.get("data-series")
    strokes = {path.get("stroke") for group in of_class(root, f"s{number}") for path in group.iter("path")}
    assert strokes == {"#0072b2"}
    assert len([group for group in of_class(root, f"s{number}") if group.tag == "g"]) == 2  # line and error bar


def test_texts_from_disk_are_texts() -> None:
    figure = figure_of(EVIL)
    figure.axes[0].set_title(EVIL)
    PAPER.shape(figure)
    root = parsed(figures.as_svg(figure, "one", {}))
    assert {element.tag for element in root.iter()} <= {
        *("svg", "g", "path", "use", "defs", "clipPath", "rect", "circle", "text", "tspan")
    }
    shown = "</text></svg><script>alert(1)</script> --> & \"' \ufffd $x_$"
    assert shown in [text.text for text in root.iter("text")]
    assert of_class(root, "key")[0].get("aria-label") == shown


def test_characters_that_the_font_lacks_are_gathered_and_other_warnings_are_told() -> None:
    with figures.missing_glyphs() as missing:
        svg = figures.as_svg(figure_of("日 and 本"), "one", {})
        figures.encode(figure_of("日"), "png")
    assert missing == {"日", "本"}
    assert of_class(parsed(svg), "key")[0].get("aria-label") == "日 and 本"
    with pytest.warns(UserWarning, match="another"), figures.missing_glyphs():
        warnings.warn("another", stacklevel=1)


def test_the_same_figure_is_the_same_text_and_ids_are_of_one_figure() -> None:
    one, again, other = (figures.as_svg(figure_of(), name, {}) for name in ("one", "one", "other"))
    assert one == again
    ids = re.findall(r'\bid="([^"]+)"', one) + re.findall(r'\bid="([^"]+)"', other)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', one + other)) <= set(ids)


def test_a_long_line_is_thinned_to_within_a_fraction_of_a_point() -> None:
    figure = Figure(figsize=(3, 2))
    ax = figure.subplots()
    x = np.linspace(0, 10, 3000)
    ax.fill_between(x, np.sin(x), np.sin(x) + 1 + 0.001 * np.sin(900 * x), color="#0072B2")
    root = parsed(figures.as_svg(figure, "one", {}))
    band = max(root.iter("path"), key=lambda path: len(path.get("d")))
    [use] = [use for use in root.iter("use") if use.get("href") == f"#{band.get('id')}"]
    points = np.array(re.findall(r"-?[\d.]+", band.get("d")), dtype=float).reshape(-1, 2)
    points += float(use.get("x")), float(use.get("y"))
    assert len(points) < 600
    figure.set_dpi(72)
    edges = [np.column_stack([x, y]) for y in (np.sin(x), np.sin(x) + 1)]
    true = np.concatenate([ax.transData.transform(edge) for edge in edges])
    true[:, 1] = 144 - true[:, 1]
    assert max(math.sqrt(((true - point) ** 2).sum(axis=1).min()) for point in points) < 0.5


def test_black_and_white_are_the_pages_unless_a_style_has_grounds_of_its_own() -> None:
    assert 'class="themed"' in (plain := figures.as_svg(figure_of(), "one", {}))
    assert "#000000" not in plain  # of markers, too, which a page's style does not reach
    assert 'stroke="currentColor"' in plain
    assert "#ffffff" not in plain
    dark = Canvas(style="dark_background")
    assert "themed" not in figures.as_svg(figure_of(canvas=dark), "one", {}, dark)


def test_lines_of_a_title_are_centered_whatever_font_the_page_has() -> None:
    figure = figure_of()
    figure.axes[0].set_title("a short line\nand a line that is longer by far")
    texts = [text for text in parsed(figures.as_svg(figure, "one", {})).iter("text") if "line" in (text.text or "")]
    box = figure.axes[0].get_position()
    for text in texts:
        assert text.get("text-anchor") == "middle"
        assert float(text.get("x")) == pytest.approx(216 * (box.x0 + box.x1) / 2, abs=0.1)
    assert float(texts[0].get("y")) < float(texts[1].get("y"))
