import pytest
from matplotlib.collections import PolyCollection

from normlab.report import figures, load
from normlab.report.tables import ACCURACY, LOSS, build_tables


@pytest.fixture
def drawn(study):
    def draw(measure=ACCURACY):
        found = load(study)
        [main, *_] = build_tables(found, measure, None, (), 0.95)
        return {name: figure for name, _, figure in figures.draw(found, main, measure, 0.95)}

    return draw


def bands(ax):
    return [artist for artist in ax.collections if isinstance(artist, PolyCollection)]


def test_an_arm_has_one_look_in_every_study():
    one, other = figures.styles(["bn", "none", "gn"]), figures.styles(["gn", "affine", "bn"])
    assert one["bn"] == other["bn"]
    assert one["gn"] == other["gn"]


def test_no_two_arms_look_alike():
    arms = ["bn", "affine", "bnminus", "none", *(f"arm{i}" for i in range(20))]
    assert len(set(figures.styles(arms).values())) == len(arms)


def test_there_are_bands_only_with_several_seeds(add_run, drawn):
    for seed in (0, 1):
        add_run("bn", 8, seed)
    add_run("none", 8, 0)
    add_run("none", 8, 1, accuracies=(0.2,), state="diverged")
    [ax] = drawn()["learning_curves"].axes
    assert len(bands(ax)) == 1
    assert ax.get_title() == "batch 8 (n = 1 to 2)"


def test_a_diverged_run_is_drawn_up_to_its_end(add_run, drawn):
    add_run("bn", seed=0)
    add_run("bn", seed=1, accuracies=(0.3, 0.2), state="diverged")
    [ax] = drawn()["learning_curves"].axes
    [dotted] = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert list(dotted.get_xdata()) == [1, 2]
    assert list(dotted.get_ydata()) == [30, 20]


def test_there_is_one_panel_per_batch_size(add_run, drawn):
    for batch in (128, 2, 32, 8, 512):
        add_run("bn", batch)
    figure = drawn()["learning_curves"]
    assert [ax.get_title().split()[1] for ax in figure.axes] == ["2", "8", "32", "128", "512"]
    assert figure.get_figwidth() == figures.DOUBLE


def test_batch_sizes_are_ticks_of_a_logarithmic_axis(add_run, drawn):
    for batch in (8, 32, 128):
        add_run("bn", batch)
    figure = drawn()["accuracy_against_batch"]
    [ax] = figure.axes
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8", "32", "128"]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([90, 90, 90])
    assert figure.get_figwidth() == figures.SINGLE


def test_error_bars_are_only_where_there_are_several_seeds(add_run, drawn):
    for seed, final in enumerate((0.8, 0.9)):
        add_run("bn", 8, seed, accuracies=(0, 0, final))
    add_run("bn", 32, 0)
    [ax] = drawn()["accuracy_against_batch"].axes
    [container] = ax.containers
    [bars] = container[2]
    assert len(bars.get_segments()) == 1


def test_a_cell_with_diverged_runs_is_marked(add_run, drawn):
    add_run("bn", 8)
    add_run("bn", 32, accuracies=(), state="diverged")
    [ax] = drawn()["accuracy_against_batch"].axes
    assert [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "x"] == [[32.0]]


def test_training_and_test_axes_are_the_same(add_run, drawn):
    add_run("bn", 8, accuracies=(0.2, 0.4, 0.6))
    [ax] = drawn()["train_against_test"].axes
    assert ax.get_xlim() == ax.get_ylim()


def test_each_setting_has_its_own_figures(add_run, drawn):
    add_run(depth=18)
    add_run(depth=34)
    assert {"learning_curves", "learning_curves_2"} <= set(drawn())


def test_a_study_that_only_diverged_has_no_figure_of_final_values(add_run, drawn):
    add_run(accuracies=(0.3,), state="diverged")
    assert set(drawn()) == {"learning_curves"}


def test_labels_lie_inside_the_figure(add_run, drawn):
    for norm in ("bn", "affine", "bnminus", "none", "a_rather_long_name_of_an_arm"):
        for batch in (8, 32):
            add_run(norm, batch)
    for figure in drawn().values():
        figure.draw_without_rendering()
        inside = figure.get_tightbbox()
        assert inside.x0 >= -0.01
        assert inside.y0 >= -0.01
        assert inside.x1 <= figure.get_figwidth() + 0.01
        assert inside.y1 <= figure.get_figheight() + 0.01


def test_a_loss_that_falls_tenfold_has_logarithmic_axes(add_losses, drawn):
    add_losses("bn", (1e5, 2e4, 500.0))
    add_losses("none", (1e5, 5e4, 4e4))
    found = drawn(LOSS)
    for figure in found.values():
        [ax] = figure.axes
        assert ax.get_yscale() == "log"
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
    assert set(drawn()) == {"accuracy_against_batch", "learning_curves", "train_against_test"}
