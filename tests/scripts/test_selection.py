"""What docs/statistics.md says of a choice among values that are equally good."""

import pytest
import selection


def test_without_a_choice_nothing_is_wrong_and_with_one_test_images_flatter_most():
    [(_, error, higher), *_] = selection.errors(5, 1, 4000)
    assert (error, higher) == (pytest.approx(0, abs=0.03), pytest.approx(0.025, abs=0.008))
    on_test, on_validation, fresh = (error for _, error, _ in selection.errors(5, 7, 4000))
    assert on_test > 5 * on_validation > 0.2
    assert fresh == pytest.approx(0, abs=0.03)
