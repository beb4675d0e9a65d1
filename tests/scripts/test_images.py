"""The rates that docs/statistics.md gives of pairing by image."""

import images
import numpy as np
import pytest


@pytest.mark.parametrize("name", images.TESTS)
def test_of_networks_that_are_equally_good_both_tests_call_a_twentieth_different(name) -> None:
    assert images.rates(5, 0.0, 0.0, 300)[name] == pytest.approx(0.05, abs=0.03)


def test_where_networks_differ_counting_images_calls_too_many_different() -> None:
    found = images.rates(3, 0.01, 0.0, 300)
    assert found["paired t"] < 0.09
    assert found["McNemar"] > 0.25


def test_networks_have_the_planted_spread() -> None:
    generator, chances = np.random.default_rng(0), np.full(4000, 0.9)
    accuracies = images.networks(generator, chances, 1000, 0.01).mean(1)
    assert accuracies.var() == pytest.approx(0.01**2 + 0.09 / 4000, rel=0.15)


def test_mcnemars_is_that_of_the_two_counts() -> None:
    arm, other = (np.array([list(map(int, text))], bool) for text in ("1" * 15 + "0" * 5, "0" * 15 + "1" * 5))
    assert images.mcnemar(arm, other) == pytest.approx(0.0442, abs=1e-3)  # chi² = (15 - 5 - 1)² / 20 = 4.05
    assert images.mcnemar(arm, arm) == 1


def test_each_split_of_one_arms_seeds_comes_once() -> None:
    assert len(list(images.same_arm(np.eye(6, dtype=bool), 3))) == 10
