"""Charts for Plotly have what the matplotlib figures have that they are copied from."""

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normlab.report.render.html.charts import charts


@pytest.fixture
def figure() -> Figure:
    return Figure(figsize=(3, 2))


def test_a_line_has_its_points_its_look_and_its_name_in_the_legend(figure) -> None:
    ax = figure.subplots()
    ax.plot([1, 2, 3], [0.123456789, 2.0, np.nan], "--", color="#0072B2", marker="s")
    ax.plot([1, 2], [5.0, 6.0], color="#0072B2", marker="o")
    figure.legend(handles=[Line2D([], [], color="#0072B2", marker=m, label=n) for m, n in (("s", "bn"), ("o", "gn"))])
    [panel], legend = charts(figure)
    first, second = panel["traces"]
    assert first["x"] == [1.0, 2.0, 3.0]
    assert first["y"] == [0.12346, 2.0, None]
    assert (first["line"]["color"], first["line"]["dash"]) == ("#0072b2", "dash")
    assert (first["name"], first["legendgroup"], second["name"]) == ("bn", "bn", "gn")
    assert [entry["name"] for entry in legend] == ["bn", "gn"]


def test_axes_have_limits_scale_labels_and_the_texts_of_ticks(figure) -> None:
    ax = figure.subplots()
    ax.plot([8, 32], [1, 2])
    ax.set_xscale("log", base=2)
    ax.set_xticks([8, 32], labels=["8", "32"])
    ax.set(xlim=(4, 64), ylim=(0, 3))
    figure.supxlabel("images per batch")
    [panel], _ = charts(figure)
    assert panel["x"]["type"] == "log"
    assert panel["x"]["range"] == pytest.approx([np.log10(4), np.log10(64)], rel=1e-4)
    assert (panel["x"]["tickvals"], panel["x"]["ticktext"]) == ([8.0, 32.0], ["8", "32"])
    assert panel["x"]["title"] == "images per batch"
    assert panel["y"] == {"title": "", "range": [0.0, 3.0]}
    assert panel["traces"][0]["text"] == ["8", "32"]


@pytest.mark.parametrize("upright", [True, False])
def test_error_bars_belong_to_the_means_that_they_stand_at(figure, upright) -> None:
    ax = figure.subplots()
    x, y = ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    ax.plot(*((x, y) if upright else (y, x)), color="#000000", marker="o")
    bars = {"fmt": "none", "ecolor": "#000000", "capsize": 2}
    if upright:
        ax.errorbar(x[1:], y[1:], yerr=[2.0, 3.0], **bars)
    else:
        ax.errorbar(y[1:], x[1:], xerr=[2.0, 3.0], **bars)
    [panel], _ = charts(figure)
    [trace] = panel["traces"]
    assert trace["error_y" if upright else "error_x"]["array"] == [0.0, 2.0, 3.0]
    assert trace["half"] == [0.0, 2.0, 3.0]


def test_points_in_other_coordinates_become_data(figure) -> None:
    ax = figure.subplots()
    ax.set(xlim=(0, 10), ylim=(20, 40))
    ax.axhline(25)
    ax.axline((1, 21), (2, 22))
    ax.plot([5], [0.1], "x", transform=ax.get_xaxis_transform())
    [panel], _ = charts(figure)
    across, diagonal, cross = panel["traces"]
    assert [*across["x"], *across["y"]] == pytest.approx([0, 10, 25, 25], abs=1e-9)
    assert np.subtract(diagonal["x"], diagonal["y"]) == pytest.approx([-20, -20])
    assert (cross["x"], cross["y"]) == ([5.0], [22.0])
    assert cross["hoverinfo"] == "skip"  # at the foot of a panel, it has no value to tell
    assert "hoverinfo" not in across


def test_a_single_seed_that_equals_the_mean_has_no_error_bar(figure) -> None:
    ax = figure.subplots()
    ax.plot([1.0], [10.0], color="#000000", marker="o")
    ax.plot([1.0, 1.0], [10.0, 12.0], ".", color="#000000")
    ax.errorbar([1.0], [10.0], yerr=[2.0], fmt="none", ecolor="#000000", capsize=2)
    [panel], _ = charts(figure)
    mean, seeds = panel["traces"]
    assert mean["half"] == [2.0]
    assert "half" not in seeds


def test_steps_are_exact_and_measured_values_have_five_digits(figure) -> None:
    figure.subplots().plot([1234566, 1234567], [0.123456, 12345.67], marker="o")
    [panel], _ = charts(figure)
    assert (panel["traces"][0]["x"], panel["traces"][0]["y"]) == ([1234566.0, 1234567.0], [0.12346, 12346.0])


def test_a_band_is_filled_between_its_ends_and_says_nothing(figure) -> None:
    ax = figure.subplots()
    ax.fill_between([0, 1], [0, 1], [2, 3], color="#D55E00", alpha=0.25)
    ax.axhspan(5, 6, color="#009E73", alpha=0.1)
    [panel], _ = charts(figure)
    span, band = panel["traces"]
    assert {(x, y) for x, y in zip(band["x"], band["y"], strict=True)} == {(0, 0), (1, 1), (1, 3), (0, 2)}
    assert band["fillcolor"] == "rgba(213,94,0,0.25)"
    assert band["hoverinfo"] == span["hoverinfo"] == "skip"
    assert (min(span["y"]), max(span["y"])) == (5.0, 6.0)


def test_every_panel_of_a_crowded_figure_takes_names_from_its_own_legend(figure) -> None:
    for ax, name in zip(figure.subplots(1, 2), ("gn", "wn"), strict=True):
        ax.plot([1], [2], color="#E69F00", marker="o")
        ax.legend(handles=[Line2D([], [], color="#E69F00", marker="o", label=name)])
    panels, _ = charts(figure)
    assert [panel["traces"][0]["name"] for panel in panels] == ["gn", "wn"]


def test_plotlys_script_is_read_from_where_its_package_has_it() -> None:
    """Else every report takes the second that importing plotly takes."""
    script = distribution("plotly").locate_file("plotly/package_data/plotly.min.js")
    assert Path(str(script)).is_file(), (
        "Plotly keeps its script elsewhere now: see normlab.report.render.html.contents."
    )
