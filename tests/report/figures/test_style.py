import io
import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from normlab.report import figures
from normlab.report.study.arms import FAMILIES, KNOWN_ARMS


def test_an_arm_has_one_look_in_every_study_also_with_options():
    one, other = figures.styles(["bn", "none", "gn"]), figures.styles(["gn (groups=8)", "affine", "bn"])
    assert one["bn"] == other["bn"]
    assert one["gn"] == other["gn (groups=8)"]


def test_no_two_arms_look_alike():
    arms = [*KNOWN_ARMS, *(f"arm{i}" for i in range(20))]
    assert len(set(figures.styles(arms).values())) == len(arms)


@pytest.mark.parametrize("family", FAMILIES.values())
def test_the_first_eight_arms_of_a_family_differ_in_color_whatever_else_the_study_has(family):
    looks = figures.styles(KNOWN_ARMS)
    assert len({looks[arm].color for arm in family[:8]}) == len(family[:8])


def test_a_few_arms_differ_in_color():
    for arms in itertools.combinations(("bn", "none", "renorm", "gn", "wn", "lp1", "nf", "an_arm_of_mine"), 5):
        assert len({look.color for look in figures.styles(arms).values()}) == 5


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_the_same_figure_is_the_same_to_the_byte(add_run, drawn, suffix):
    add_run("bn")
    add_run("none")
    [one, *_], [other, *_] = drawn().values(), drawn().values()
    assert figures.encode(one, suffix) == figures.encode(other, suffix)


def test_a_png_shows_the_colors_it_was_drawn_in():
    figure = Figure(figsize=(1, 1), facecolor="#0072B2")
    image = Image.open(io.BytesIO(figures.encode(figure, "png")))
    assert image.size == (160, 160)
    assert image.convert("RGB").getpixel((80, 80)) == (0x00, 0x72, 0xB2)


@pytest.mark.slow
def test_labels_lie_inside_the_figure(add_run, drawn):
    for norm in ("bn", "affine", "bnminus", "none", "a_rather_long_name_of_an_arm"):
        for batch in (8, 32):
            add_run(norm, batch)
            add_run(norm, batch, sampler__name="a_sampler_with_a_rather_long_name", init__name="default_as_ever")
    for figure in drawn().values():
        figure.draw_without_rendering()
        inside = figure.get_tightbbox()
        assert inside.x0 >= -0.01
        assert inside.y0 >= -0.01
        assert inside.x1 <= figure.get_figwidth() + 0.01
        assert inside.y1 <= figure.get_figheight() + 0.01


def test_a_thin_line_keeps_its_color_among_many_shades():
    figure = Figure(figsize=(4, 3))
    ax = figure.add_subplot()
    arms = figures.styles(KNOWN_ARMS)
    for position, look in enumerate(arms.values()):
        ax.fill_between([0, 1], position, position + 3, color=look.color, alpha=0.13)
        ax.plot([0, 1], [position, position], color=look.color, lw=0.9)
    pixels = np.array(Image.open(io.BytesIO(figures.encode(figure, "png"))).convert("RGB")).reshape(-1, 3).astype(int)
    for look in arms.values():
        wanted = np.array([int(look.color[i : i + 2], 16) for i in (1, 3, 5)])
        assert np.abs(pixels - wanted).max(axis=1).min() <= 24, look
