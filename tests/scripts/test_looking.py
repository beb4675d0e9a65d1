"""The rates that docs/statistics.md gives of looking again."""

import looking
import pytest


def test_testing_all_seeds_again_calls_alike_arms_different_too_often_and_new_seeds_alone_do_not():
    assert looking.rates("5 more, all 10 tested", 0.0, 2000)[0] == pytest.approx(0.086, abs=0.02)
    every, later = looking.rates("as many as `next` says, these alone at 2.5 %", 0.0, 2000)
    assert later < 0.025
    assert every < 0.075
    assert looking.rates("the same, the first look at 2.5 %, too", 0.0, 2000)[0] < 0.05


def test_new_seeds_alone_settle_most_of_what_a_first_look_left_open():
    once, _ = looking.rates("5 seeds, one look", 1.0, 500)
    every, _ = looking.rates("as many as `next` says, these alone at 2.5 %", 1.0, 500)
    assert once < 0.5
    assert every > 0.8
