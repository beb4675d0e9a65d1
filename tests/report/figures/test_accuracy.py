"""What is drawn of a planted study, by its values: the oracle is what `add_run` was told."""

import math

import pytest
from matplotlib.collections import PolyCollection

from normlab.report import figures
from normlab.report.analysis.metrics import LOSS
from normlab.report.analysis.tables import build_tables
from normlab.report.figures import style
from normlab.report.study.load import load


def bands(ax):
    return [artist for artist in ax.collections if isinstance(artist, PolyCollection)]


def solid(ax):
    return [line for line in ax.lines if line.get_linestyle() == "-"]


def test_there_are_bands_only_with_several_seeds_and_a_diverged_run_is_drawn_up_to_its_end(add_run, drawn):
    for seed in (0, 1):
        add_run("bn", 8, seed)
    add_run("none", 8, 0)
    add_run("none", 8, 1, accuracies=(0.3, 0.2), state="diverged")
    [ax] = drawn()["learning_curves"].axes
    assert len(bands(ax)) == 1
    assert ax.get_title() == "batch 8 (n = 1 to 2)"
    [dotted] = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert (list(dotted.get_xdata()), list(dotted.get_ydata())) == ([10, 20], [30, 20])


def test_later_epochs_that_some_seeds_lack_are_no_mean_and_the_caption_says_so(add_run, add_losses, study):
    add_losses("bn", (3.0, 2.0, 1.0, 0.5), seed=0)
    folder = add_losses("bn", (5.0, 4.0, 3.0, 0.5), seed=1)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace("3.0", "null")
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    found = load(study)
    [main, *_] = build_tables(found, LOSS, None, (), 0.95)
    by_name = {figure.name: figure for figure in figures.draw(found, main, LOSS, 0.95)}
    curves = by_name["learning_curves"]
    [ax] = curves.figure.axes
    [mean] = [line for line in solid(ax) if line.get_gid() is None]
    assert list(mean.get_ydata()) == pytest.approx([4.0, 3.0, math.nan, 0.5], nan_ok=True)
    assert curves.caption.endswith("Thin: single seeds of arms whose seeds do not all have a value everywhere.")
    [ax] = by_name["train_against_test"].figure.axes
    assert len(ax.lines[1].get_xdata()) == 3
    assert "Thin" not in by_name["train_against_test"].caption


def test_learning_curves_show_test_values_solid_and_training_values_dashed(add_run, drawn):
    add_run("bn", accuracies=(0.2, 0.4, 0.6))
    found = drawn()
    [ax] = found["learning_curves"].axes
    dashed, line = ax.lines
    assert (dashed.get_linestyle(), list(dashed.get_ydata())) == ("--", pytest.approx([25, 45, 65]))
    assert (line.get_linestyle(), list(line.get_ydata())) == ("-", pytest.approx([20, 40, 60]))
    [ax] = found["train_against_test"].axes
    assert ax.get_xlim() == ax.get_ylim()


def test_one_batch_size_is_shown_in_steps_and_several_in_epochs(add_run, drawn):
    add_run("bn", 8)
    figure = drawn()["learning_curves"]
    assert figure.get_supxlabel() == "training step (10 per epoch)"
    assert list(solid(figure.axes[0])[0].get_xdata()) == [10, 20, 30]
    add_run("bn", 32)
    figure = drawn()["learning_curves"]
    assert figure.get_supxlabel() == "epoch"
    assert list(solid(figure.axes[0])[0].get_xdata()) == [1, 2, 3]


def test_every_condition_has_a_panel(add_run, drawn):
    for lr in (0.1, 0.5):
        for norm in ("bn", "none"):
            add_run(norm, optimizer__lr=lr)
    for name in ("learning_curves", "train_against_test"):
        titles = [ax.get_title() for ax in drawn()[name].axes]
        assert titles == ["optimizer.lr=0.1 (n = 1)", "optimizer.lr=0.5 (n = 1)"]


def test_batch_sizes_are_panels_and_ticks_of_a_logarithmic_axis(add_run, drawn):
    for batch in (128, 2, 32, 8, 512):
        add_run("bn", batch)
    add_run("none", 32, accuracies=(), state="diverged")
    found = drawn()
    figure = found["accuracy_against_batch"]
    [ax] = figure.axes
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "8", "32", "128", "512"]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([90] * 5)
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("images per batch", "test accuracy (%)")
    assert figure.get_figwidth() == style.SINGLE
    assert len([line for line in ax.lines if line.get_marker() == "x"]) == 1
    figure = found["learning_curves"]
    assert [ax.get_title().split()[1] for ax in figure.axes] == ["2", "8", "32", "128", "512"]
    assert figure.get_figwidth() == style.DOUBLE


def test_error_bars_are_only_where_there_are_several_seeds(add_run, drawn):
    for seed, final in enumerate((0.8, 0.9)):
        add_run("bn", 8, seed, accuracies=(0, 0, final))
    add_run("bn", 32, 0)
    [ax] = drawn()["accuracy_against_batch"].axes
    [container] = ax.containers
    [bars] = container[2]
    [segment] = bars.get_segments()
    assert segment[:, 1] == pytest.approx([85 - 12.7062 * 5, 100], abs=1e-3)  # of 80 and 90, cut at 100


def test_depths_stand_beside_each_other_joined_by_lines_with_a_panel_per_batch_size(add_run, drawn):
    for depth, final in ((101, 0.7), (18, 0.9), (34, 0.8)):
        for batch in (8, 32):
            for norm in ("bn", "none"):
                for seed in (0, 1):
                    add_run(norm, batch, seed, accuracies=(0.1, 0.2, final + 0.02 * seed), depth=depth)
    figure = drawn()["accuracy_by_condition"]
    assert [ax.get_title() for ax in figure.axes] == ["batch 8 (n = 2)", "batch 32 (n = 2)"]
    for ax in figure.axes:
        assert [label.get_text() for label in ax.get_xticklabels()] == ["resnet18", "resnet34", "resnet101"]
        means = [line for line in solid(ax) if line.get_marker() in "oD"]
        assert [list(line.get_ydata()) for line in means] == [pytest.approx([91, 81, 71])] * 2
        assert len(ax.containers) == 2
        xs = [list(line.get_xdata()) for line in means]
        assert xs[0][0] < 0 < xs[1][0]  # side by side


def test_conditions_that_differ_by_more_than_a_number_are_not_joined(add_run, drawn):
    for name in ("default", "fixup"):
        add_run("none", init__name=name)
    [ax] = drawn()["accuracy_by_condition"].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["init=default", "init=fixup"]
    assert [line.get_linestyle() for line in ax.lines] == ["None"]


def test_conditions_that_differ_by_two_settings_are_not_joined_and_are_read_without_turning_the_page(add_run, drawn):
    for lr, decay in ((0.1, 1e-4), (0.1, 5e-4), (0.5, 1e-4)):
        add_run("none", optimizer__lr=lr, optimizer__weight_decay=decay)
    figure = drawn()["accuracy_by_condition"]
    [ax] = figure.axes
    assert [line.get_linestyle() for line in ax.lines] == ["None"]
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {0}
    assert figure.get_figwidth() == style.DOUBLE


def test_a_condition_with_diverged_runs_is_marked(add_run, drawn):
    for norm in ("bn", "none"):
        add_run(norm, depth=18)
    add_run("bn", depth=34)
    add_run("none", depth=34, accuracies=(0.1,), state="diverged")
    [ax] = drawn()["accuracy_by_condition"].axes
    [cross] = [line for line in ax.lines if line.get_marker() == "x"]
    assert cross.get_xdata()[0] == pytest.approx(1.06)


def test_a_study_of_arms_alone_has_a_row_for_each(add_run, drawn):
    arms = ["bn", "none", "renorm", "lp1", "gn", "ln", "in", "wn", "nf", "mabn"]
    for i, norm in enumerate(arms):
        for seed in (0, 1):
            add_run(norm, seed=seed, accuracies=(0.1, 0.2, 0.5 + 0.03 * i + 0.02 * seed))
    add_run("fixup", accuracies=(), state="diverged")
    found = drawn()
    assert not {"accuracy_against_batch", "accuracy_by_condition", "train_against_test"} & set(found)
    [ax] = found["accuracy_by_arm"].axes
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert set(rows) == {*arms, "fixup"}
    for line in [line for line in ax.lines if line.get_marker() == "o"]:
        [x], [y] = line.get_xdata(), line.get_ydata()
        if rows[int(y)] != "fixup":
            assert x == pytest.approx(51 + 3 * arms.index(rows[int(y)]))
    [cross] = [line for line in ax.lines if line.get_marker() == "x"]
    assert rows[int(cross.get_ydata()[0])] == "fixup"
    assert len(ax.containers) == len(arms)
    assert ax.get_xlabel() == "test accuracy (%)"


@pytest.fixture
def small_batches(add_run):
    for size in (1, 2, 4, None):
        for seed in (0, 1):
            add_run("bn", 8, seed, accuracies=(0.1, 0.2, 0.5 + 0.05 * (size or 8)), norm_batch=size)
    for seed in (0, 1):
        add_run("ln", 8, seed, accuracies=(0.1, 0.2, 0.7 + 0.02 * seed))
    return add_run


def test_arms_that_do_not_see_the_batch_are_horizontal_beside_those_that_do(small_batches, drawn):
    [ax] = drawn()["accuracy_against_norm_batch"].axes
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4", "8"]
    [sloped] = [line for line in solid(ax) if len(line.get_xdata()) == 4]
    assert list(sloped.get_ydata()) == pytest.approx([55, 60, 70, 90])
    [level] = [line for line in ax.lines if line.get_linestyle() == "-."]
    assert list(level.get_ydata()) == pytest.approx([71, 71])
    [band] = ax.patches
    assert band.get_y() == pytest.approx(71 - 12.7062 * 1.0, abs=1e-3)  # the t-interval of 70 and 72
    assert band.get_height() == pytest.approx(2 * 12.7062, abs=1e-3)


def test_a_norm_batch_at_which_runs_diverged_is_marked_there(small_batches, drawn):
    small_batches("renorm", 8, norm_batch=4)
    small_batches("renorm", 8, norm_batch=1, accuracies=(), state="diverged")
    small_batches("nf", 8, accuracies=(), state="diverged")
    [ax] = drawn()["accuracy_against_norm_batch"].axes
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert crosses[0].get_xdata()[0] == pytest.approx(1, rel=0.1)
    assert crosses[1].get_transform() == ax.transAxes


def test_families_of_many_arms_have_panels_that_show_bn_for_comparison(small_batches, drawn):
    for norm in ("affine", "bnminus", "none", "gn", "in", "frn", "wn", "nf"):
        small_batches(norm, 8)
    figure = drawn()["accuracy_against_norm_batch"]
    assert [ax.get_title().split("\n")[0] for ax in figure.axes] == [
        "BN and its parts",
        "statistics of a sample",
        "weights, starts and gradients",
    ]
    for ax in figure.axes[1:]:
        assert [list(line.get_ydata()) for line in solid(ax)] == [pytest.approx([55, 60, 70, 90])]
    assert [text.get_text() for text in figure.axes[2].get_legend().get_texts()] == ["wn", "nf"]


def test_an_options_values_are_the_axis_and_a_second_ones_the_lines(add_run, drawn):
    for scale, high in ((1.0, 0.0), (0.1, 0.2), (0.01, 0.1)):
        for divisor in (1.0, 100.0):
            for seed in (0, 1):
                final = 0.6 + high + 0.05 * (divisor > 1) + 0.02 * seed
                add_run("bn", 8, seed, (0.1, 0.2, final), norm__scale_init=scale, norm__scale_lr_divisor=divisor)
    found = drawn()
    figure = found["accuracy_against_option"]
    [ax] = figure.axes
    assert (ax.get_xlabel(), ax.get_xscale()) == ("scale_init", "log")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.01", "0.1", "1"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "scale_lr_divisor=1",
        "scale_lr_divisor=100",
    ]
    means = [list(line.get_ydata()) for line in solid(ax) if len(line.get_xdata()) == 3]
    assert means == [pytest.approx([71, 81, 61]), pytest.approx([76, 86, 66])]
    assert "accuracy_by_arm" not in found  # the same values


def test_two_values_of_an_option_are_arms_and_no_axis(add_run, drawn):
    for scale in (1.0, 0.1):
        add_run("bn", norm__scale_init=scale)
    assert "accuracy_against_option" not in drawn()


@pytest.mark.parametrize(
    ("figure", "conditions"),
    [
        ("accuracy_by_arm", [{"norm": "bn"}, {"norm": "none"}]),
        ("accuracy_against_batch", [{"batch": 8}, {"batch": 32}]),
        ("accuracy_against_norm_batch", [{"norm_batch": size} for size in (1, 4, None)]),
        ("accuracy_by_condition", [{"depth": 18}, {"depth": 34}]),
        ("accuracy_against_option", [{"norm__scale_init": scale} for scale in (1.0, 0.1, 0.01)]),
    ],
)
def test_every_seed_is_in_view(add_run, drawn, figure, conditions) -> None:
    finals = [0.5] * 16 + [0.1, 0.9]  # the interval of their mean is a twentieth as long
    for settings in conditions:
        for seed, final in enumerate(finals):
            add_run(seed=seed, accuracies=(0.1, 0.2, final), **{"batch": 8} | settings)
    for ax in drawn()[figure].axes:
        shown = "x" if figure == "accuracy_by_arm" else "y"
        dots = [list(line.properties()[f"{shown}data"]) for line in ax.lines if line.get_marker() == "."]
        assert dots
        low, high = ax.properties()[f"{shown}lim"]
        assert all(low < dot < high for line in dots for dot in line)


def test_a_study_that_only_diverged_has_no_figure_of_final_values(add_run, drawn):
    add_run(accuracies=(0.3,), state="diverged")
    assert set(drawn()) == {"learning_curves"}


def test_a_loss_that_falls_tenfold_has_logarithmic_axes(add_losses, drawn):
    add_losses("bn", (1e5, 2e4, 500.0))
    add_losses("none", (1e5, 5e4, 4e4))
    found = drawn(LOSS)
    for name, figure in found.items():
        [ax] = figure.axes
        assert (ax.get_xscale() if name == "loss_by_arm" else ax.get_yscale()) == "log"
        figure.draw_without_rendering()
    [ax] = found["learning_curves"].axes
    assert ax.get_xscale() == "linear"
    low, high = ax.get_ylim()
    assert 100 < low < 500
    assert 1e5 < high < 5e5
    [ax] = found["train_against_test"].axes
    assert ax.get_xscale() == "log"
    assert ax.get_xlim() == ax.get_ylim()


@pytest.mark.parametrize(("last", "scale"), [(500.0, "log"), (4e4, "linear")])
def test_the_diagonal_of_equal_losses_is_one_on_either_scale(add_losses, drawn, last, scale):
    """A point of it is on the line that is drawn, in the figure's own coordinates."""
    add_losses("bn", (1e5, 5e4, last))
    figure = drawn(LOSS)["train_against_test"]
    [ax] = figure.axes
    assert ax.get_xscale() == scale
    figure.draw_without_rendering()
    [diagonal] = [line for line in ax.lines if line.get_linestyle() == "--"]
    (x0, y0), (x1, y1) = diagonal.get_transform().transform([(0, 0), (1, 1)])
    x, y = ax.transData.transform((3e4, 3e4))
    assert (y - y0) * (x1 - x0) == pytest.approx((y1 - y0) * (x - x0))


def test_a_loss_that_hardly_falls_and_one_that_reaches_0_have_linear_axes(add_losses, drawn):
    add_losses("bn", (5.0, 4.0, 3.0))
    assert drawn(LOSS)["learning_curves"].axes[0].get_yscale() == "linear"
    add_losses("none", (5.0, 0.0, 0.0))
    assert drawn(LOSS)["learning_curves"].axes[0].get_yscale() == "linear"


def test_a_setting_without_the_measure_has_no_figures(add_run, add_losses, drawn):
    add_run("bn")
    add_losses("bn", (1e5, 500.0))
    assert set(drawn()) == {"learning_curves", "train_against_test"}
