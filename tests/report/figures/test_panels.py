import math

import pandas as pd
import pytest
from matplotlib.figure import Figure

from normlab.report.figures import panels
from normlab.report.figures.style import Style
from normlab.report.study.arms import KNOWN_ARMS
from normlab.report.study.load import load

LOOK = Style("#0072B2", "o")


def arranged(study):
    found = load(study)
    return panels.arrange(found, found.runs)


def test_only_what_the_study_varies_is_told_of_a_setting(add_run, study):
    add_run(depth=18)
    add_run(depth=34)
    assert set(arranged(study)["condition"]) == {"resnet18", "resnet34"}


def test_a_study_that_varies_nothing_is_told_by_its_batch_size(add_run, study):
    add_run("bn")
    add_run("none")
    assert set(arranged(study)["condition"]) == {"batch 8"}


def test_a_norm_batch_is_a_condition_and_no_arm(add_run, study):
    add_run("bn")
    add_run("bn", norm_batch=4)
    add_run("gn", norm_batch=4, norm__groups=8)
    add_run("gn", norm_batch=4, norm__groups=2)
    rows = arranged(study).dropna(subset=["run"])
    found = {tuple(row) for row in rows.loc[rows["run"] != "", ["variant", "where"]].to_numpy()}
    assert found == {
        ("bn", "whole batch"),
        ("bn", "norm_batch=4"),
        ("gn (groups=8)", "norm_batch=4"),
        ("gn (groups=2)", "norm_batch=4"),
    }


def test_more_arms_than_a_panel_can_show_stand_by_family():
    rows = pd.DataFrame({"variant": KNOWN_ARMS, "condition": "batch 8", "n": 3})
    found = panels.split(rows)
    assert [arm for panel in found for arm in panel.rows["variant"]] == list(KNOWN_ARMS)
    assert max(len(panel.rows) for panel in found) <= panels.CROWD
    assert found[0].title == "BN and its parts\nbatch 8 (n = 3)"
    assert all(panel.crowded for panel in found)


def test_a_condition_with_few_arms_is_one_panel_beside_crowded_ones():
    rows = pd.DataFrame({"variant": KNOWN_ARMS, "condition": "batch 8", "n": 3})
    few = pd.DataFrame({"variant": ["bn", "gn"], "condition": "batch 16", "n": 1})
    last = panels.split(pd.concat([rows, few]))[-1]
    assert (last.title, last.crowded) == ("batch 16 (n = 1)", False)


@pytest.mark.parametrize("number", [1, 12, 13, 25, 100])
def test_pages_hold_every_panel_once(number):
    every = [panels.Panel(str(i), pd.DataFrame({"panel": [i]})) for i in range(number)]
    drawn = list(panels.paged(every, 12, lambda page: [panel.title for panel in page]))
    found = [list(rows["panel"]) for _, rows in drawn]
    assert [i for page in found for i in page] == list(range(number))
    assert [titles for titles, _ in drawn] == [[str(i) for i in page] for page in found]
    assert max(map(len, found)) <= 12
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_title_is_broken_after_a_comma_or_before_a_bracket():
    title = "sampler=paired, eval_stats=batch (n = 3)"
    assert panels.wrapped(title, 1.2) == "sampler=paired,\neval_stats=batch\n(n = 3)"
    assert panels.wrapped(title, 3.0) == title


CELL = {"variant": "bn", "setting": "digits", "arm": "bn", "batch": 8}


def rows(seed, state, values):
    """Of two layers, `value - 1` and `value + 1`."""
    return [
        {"seed": seed, "state": state, "step": step, "layer": layer, "value": value + shift, **CELL}
        for step, value in enumerate(values)
        for layer, shift in (("a", -1.0), ("b", 1.0))
    ]


def trend(*found, **options):
    ax = Figure().add_subplot()
    panels.trend(ax, pd.DataFrame([row for run in found for row in run]), "step", "value", LOOK, **options)
    return ax


def test_a_trend_is_the_mean_over_seeds_of_the_means_over_layers_in_a_band():
    ax = trend(rows(0, "done", [1.0, 2.0]), rows(1, "done", [3.0, 6.0]), scale=10.0)
    [line] = ax.lines
    assert list(line.get_ydata()) == pytest.approx([20, 40])
    [band] = ax.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(0, 10), (0, 30), (1, 20), (1, 60)}


def test_one_seed_has_no_band():
    assert not trend(rows(0, "done", [1.0, 2.0])).collections


def test_a_mean_is_only_where_every_seed_has_a_value_and_single_seeds_are_thin_lines_then():
    ax = trend(
        rows(0, "done", [1.0, 2.0, math.nan, 4.0]), rows(1, "done", [3.0, 6.0, 9.0]), rows(2, "done", [math.nan])
    )
    first, second, mean = ax.lines
    assert (list(first.get_ydata()), list(second.get_ydata())) == ([1, 2, 4], [3, 6, 9])
    assert {first.get_gid(), second.get_gid()} == {panels.SINGLE_SEED}
    assert (list(mean.get_xdata()), mean.get_gid()) == ([0, 1, 2], None)
    assert list(mean.get_ydata()) == pytest.approx([2, 4, math.nan], nan_ok=True)  # and none of seed 0 alone at 3


def test_a_diverged_run_is_dotted_up_to_its_last_value_and_no_part_of_the_mean():
    ax = trend(rows(0, "done", [1.0, 2.0]), rows(1, "diverged", [5.0, 9.0, math.nan]))
    mean, dotted, end = ax.lines
    assert list(mean.get_ydata()) == [1, 2]
    assert dotted.get_linestyle() == ":"
    assert (list(end.get_xdata()), list(end.get_ydata()), end.get_marker()) == ([1], [9], "x")
    assert not ax.collections
