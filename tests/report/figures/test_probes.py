"""Figures of probes, drawn from planted measurements; what is drawn has to be what was planted."""

import pytest
from matplotlib.collections import PolyCollection

STEPS = (0, 10, 20)


def bands(ax):
    return [artist for artist in ax.collections if isinstance(artist, PolyCollection)]


def drawn_lines(ax, style="-"):
    return [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == style]


def edges(band):
    """Of a filled band: its lowest and highest value at each step."""
    found = {}
    for x, y in band.get_paths()[0].vertices:
        low, high = found.get(x, (y, y))
        found[x] = (min(low, y), max(high, y))
    return found


@pytest.fixture
def plant(add_run, add_probe):
    """`plant("ics", row)`: arms bn and none, seeds 0 and 1. `row(level, step)` gives a step's rows, with a level of 1
    for bn and of 100 for none, half as much again at seed 1."""

    def write(probe, row, arms=("bn", "none"), seeds=(0, 1), **settings):
        for arm in arms:
            for seed in seeds:
                level = (1.0 if arm == "bn" else 100.0) * (1 + 0.5 * seed)
                run = add_run(arm, seed=seed, **settings)
                rows = [{"step": step, **found} for step in STEPS for found in row(level, step)]
                add_probe(run, probe, rows)

    return write


def ics(level, step):
    for position in range(6):
        l2 = 0.0 if position == 0 else level * (1 + step) * position
        yield {"layer": f"conv{position}", "position": position, "l2": l2, "cosine": 0.5, "gradient_norm": 1.0}


def landscape(level, step):
    yield {"loss": 3.0, "loss_low": 2.0, "loss_high": 2.0 + level, "beta": level * (1 + step)} | {
        "predictiveness_low": 0.1,
        "predictiveness_high": 0.1 + level,
    }


def activations(level, step):
    same = {"mean": 0.0, "variance": 1.0, "skewness": 0.0, "large": 0.001 * (1 + step), "large_normalised": 0.003}
    histogram = {"histogram": [1, 3, 4], "edges": [0.0, 1.0, 2.0, 4.0]}
    for position in range(3):
        place = {"layer": f"bn{position}", "position": position, "output_norm": level * 10.0**position}
        place |= {"sample_cosine": 0.1 * position + 0.01 * step, "stable_rank": level * (1 + step)}
        yield same | place | (histogram if position == 1 else dict.fromkeys(histogram))


def affine(level, step):
    drift = 0.01 * step
    yield {
        "layer": "bn1",
        "position": 0,
        **{"scale_mean": 0.1, "scale_std": 0.0, "scale_start": 0.1, "scale_drift": drift},
        **{"shift_mean": 0.0, "shift_std": 0.0, "shift_drift": 3 * drift},
    }


def test_covariate_shift_has_cosine_above_l2_for_layers_that_have_others_below(plant, drawn):
    plant("ics", ics)
    figure = drawn()["covariate_shift"]
    above, below = figure.axes[:4], figure.axes[4:]
    assert [ax.get_title() for ax in above] == ["conv1", "conv2", "conv4", "conv5"]
    assert (above[0].get_ylabel(), below[0].get_ylabel()) == ("cosine", "L2 difference")
    assert drawn_lines(above[3]) == [[0.5, 0.5, 0.5]] * 2
    assert drawn_lines(below[3]) == [pytest.approx([x * 5 * (1 + s) for s in STEPS]) for x in (1.25, 125.0)]
    assert len(bands(below[3])) == 2
    assert below[0].get_yscale() == "log"
    assert figure.get_supxlabel() == "training step; batch 8 (n = 2)"


def test_the_landscape_shows_bands_of_loss_and_gradient_and_a_line_for_beta(plant, drawn):
    plant("landscape", landscape)
    figure = drawn()["landscape"]
    loss, gradient, beta = figure.axes
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "loss",
        "change of the gradient (L2)",
        "effective beta-smoothness",
    ]
    assert edges(bands(loss)[0])[10] == pytest.approx((2.0, 3.25))
    assert edges(bands(gradient)[1])[10] == pytest.approx((0.1, 125.1))
    assert drawn_lines(beta) == [pytest.approx([x * (1 + s) for s in STEPS]) for x in (1.25, 125.0)]
    assert {ax.get_yscale() for ax in figure.axes} == {"log"}
    assert loss.get_title(loc="left") == "batch 8 (n = 2)"


def test_a_diverged_runs_landscape_is_part_of_no_band(plant, add_run, add_probe, drawn):
    plant("landscape", landscape, arms=("bn",))
    lost = add_run("bn", seed=2, accuracies=(0.1,), state="diverged")
    add_probe(lost, "landscape", [{"step": step, **row} for step in STEPS[:2] for row in landscape(1e6, step)])
    loss, _, beta = drawn()["landscape"].axes
    assert edges(bands(loss)[0])[10] == pytest.approx((2.0, 3.25))
    assert [2.0 + 1e6] * 2 in drawn_lines(loss, ":")
    [cross] = [line for line in beta.lines if line.get_marker() == "x"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (10, pytest.approx(1.1e7))


def test_a_loss_that_overflowed_leaves_a_gap(plant, drawn):
    plant("landscape", lambda level, step: [row | {"loss_high": None} for row in landscape(level, step)])
    figure = drawn()["landscape"]
    figure.draw_without_rendering()


@pytest.mark.parametrize("number", [1e150, 1.7e308, 5e-324])
def test_numbers_at_the_ends_of_floats_cost_no_figure(plant, drawn, number):
    plant("sharpness", lambda level, step: [{"eigenvalue": number if step else level, "converged": True}])
    for figure in drawn().values():
        figure.draw_without_rendering()


def test_sharpness_is_a_line_per_arm(plant, drawn):
    plant("sharpness", lambda level, step: [{"eigenvalue": level + step, "converged": True}])
    [ax] = drawn()["sharpness"].axes
    assert ax.get_ylabel() == "largest Hessian eigenvalue"
    assert drawn_lines(ax) == [pytest.approx([level + s for s in STEPS]) for level in (1.25, 125.0)]


def test_activations_are_drawn_along_the_layers_and_as_shares_and_histograms(plant, drawn):
    plant("activations", activations)
    found = drawn()
    norms = found["output_norms"]
    assert [ax.get_title() for ax in norms.axes] == ["bn (n = 2)", "none (n = 2)"]
    assert norms.axes[0].get_yscale() == "log"
    assert drawn_lines(norms.axes[0]) == [pytest.approx([1.25, 12.5, 125])] * len(STEPS)
    assert len(bands(norms.axes[0])) == len(STEPS)
    assert [text.get_text() for text in norms.legends[0].get_texts()] == ["step 0", "step 10", "step 20"]
    outputs, inputs = found["large_values"].axes
    assert drawn_lines(outputs)[0] == pytest.approx([0.1, 1.1, 2.1])  # per cent
    assert drawn_lines(inputs)[0] == pytest.approx([0.3, 0.3, 0.3])
    assert (outputs.get_ylabel(), inputs.get_ylabel()) == ("outputs beyond 3 (%)", "inputs beyond 3 std (%)")
    assert "activation_changes" not in found  # of single steps
    cosines, ranks = found["condensation"].axes
    assert drawn_lines(cosines) == [pytest.approx([0.1, 0.2, 0.3])] * 2
    assert drawn_lines(ranks)[0] == pytest.approx([1.25, 13.75, 26.25])
    assert (cosines.get_ylabel(), ranks.get_ylabel()) == ("cosine of samples", "stable rank")
    assert drawn_lines(found["sample_cosines"].axes[0])[1] == pytest.approx([0.1, 0.2, 0.3])
    histograms = found["activation_histograms"].axes
    assert [ax.get_title() for ax in histograms] == ["bn\nbn1 (seed 0)", "none\nbn1 (seed 0)"]
    assert [label.get_text() for label in histograms[0].get_yticklabels()] == ["20", "10", "0"]  # downwards
    first, *_, last = histograms[0].lines
    assert list(first.get_xdata()) == [0.5, 1.5, 3.0]
    assert list(first.get_ydata()) == pytest.approx([2 + 1.6 / 3, 2 + 1.6, 2 + 3.2 / 3])  # densities 1/8, 3/8, 2/8
    assert list(last.get_ydata()) == pytest.approx([1.6 / 3, 1.6, 3.2 / 3])


def test_where_a_diverged_run_ended_is_dotted_along_the_layers(plant, add_run, add_probe, drawn):
    plant("activations", activations, arms=("bn",))
    lost = add_run("bn", seed=2, accuracies=(), state="diverged")
    add_probe(lost, "activations", [{"step": 7, **row} for row in activations(9.0, 7)])
    figure = drawn()["output_norms"]
    assert drawn_lines(figure.axes[0], ":") == [[9, 90, 900]]
    assert figure.legends[0].get_texts()[-1].get_text() == "before a divergence"


def test_change_from_step_to_step_is_that_of_a_pairs_two_steps(plant, drawn):
    def pairs(level, step):
        for after in (0, 1):
            for position, row in enumerate(activations(level, step)):
                moved = {"mean": -0.2 * level * after, "variance": 1.0 + (position + 1) * level * after}
                yield row | moved | {"step": step + after}

    plant("activations", pairs)
    mean, variance = drawn()["activation_changes"].axes
    assert drawn_lines(mean) == [pytest.approx([0.25] * 3), pytest.approx([25.0] * 3)]
    assert drawn_lines(variance) == [pytest.approx([2.5] * 3), pytest.approx([250.0] * 3)]
    assert list(mean.lines[0].get_xdata()) == list(STEPS)


def test_drift_of_gamma_is_told_in_units_of_its_start(plant, drawn):
    plant("affine", affine)
    gamma, beta = drawn()["affine_drift"].axes
    assert drawn_lines(gamma)[0] == pytest.approx([0, 1, 2])
    assert drawn_lines(beta)[0] == pytest.approx([0, 0.3, 0.6])
    assert (gamma.get_ylabel(), beta.get_ylabel()) == ("drift of gamma / its start", "drift of beta")


def test_a_scale_that_is_not_learned_is_not_drawn(plant, drawn):
    unscaled = {"scale_drift": None, "scale_start": None}
    plant("affine", lambda level, step: [row | unscaled for row in affine(level, step)])
    [beta] = drawn()["affine_drift"].axes
    assert beta.get_ylabel() == "drift of beta"


def test_gradient_norms_are_drawn_along_the_layers(plant, drawn):
    def gradients(level, step):
        return [{"layer": f"c{i}", "position": i, "norm": level * 2.0**i, "weight_norm": 1.0} for i in range(6)]

    plant("gradients", gradients)
    figure = drawn()["gradient_norms"]
    assert drawn_lines(figure.axes[1])[0] == pytest.approx([125 * 2.0**i for i in range(6)])
    assert figure.get_supxlabel() == "layer, in the order of execution"


def test_conditions_stand_below_each_other(plant, drawn):
    for lr in (0.1, 0.5):
        plant("sharpness", lambda level, step: [{"eigenvalue": level + step}], optimizer__lr=lr)
    titles = [ax.get_title(loc="left") for ax in drawn()["sharpness"].axes]
    assert titles == ["optimizer.lr=0.1 (n = 2)", "optimizer.lr=0.5 (n = 2)"]


def test_a_run_that_is_not_finished_is_not_drawn(add_run, add_probe, drawn):
    add_run("none")
    add_probe(add_run("bn", state="running", accuracies=()), "sharpness", [{"step": 0, "eigenvalue": 1.0}])
    assert "sharpness" not in drawn()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probe", "measured", "key"),
    [("ics", ics, "position"), ("landscape", landscape, "loss_high"), ("activations", activations, "output_norm")],
)
@pytest.mark.parametrize("value", [..., [1, 2], {"a": 1}])
def test_what_a_record_lacks_or_has_something_odd_for_is_not_drawn(plant, drawn, probe, measured, key, value):
    def odd(level, step):
        for row in measured(level, step):
            yield {k: v for k, v in {**row, key: value}.items() if v is not ...}

    plant(probe, odd)
    for figure in drawn().values():
        figure.draw_without_rendering()
