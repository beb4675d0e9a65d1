"""What is left of a study when cells are chosen: runs, measurements, gaps and all that is made of them."""

import pytest

from normlab.common.errors import UserError
from normlab.report.study import load
from normlab.report.study.select import select


@pytest.fixture
def found(add_run, add_probe, study):
    for norm in ("bn", "none"):
        for batch in (8, 32):
            for seed in (0, 1):
                add_probe(add_run(norm, batch, seed), "ics", [{"step": 1, "layer": "a", "l2": 1.0}])
    add_run("bn", 8, 0, depth=34)
    return load(study)


@pytest.mark.parametrize(
    ("chosen", "column", "left"),
    [
        ({"arms": ["none"]}, "arm", {"none"}),
        ({"batches": [32]}, "batch", {32}),
        ({"seeds": [1]}, "seed", {1}),
        ({"settings": ["digits, resnet34"]}, "setting", {"digits, resnet34"}),
        ({"settings": ["resnet34"]}, "setting", {"digits, resnet34"}),
        ({"settings": ["digits"]}, "setting", {"digits, resnet18", "digits, resnet34"}),
    ],
)
def test_every_part_of_the_study_has_the_chosen_cells_only(found, chosen, column, left):
    some = select(found, **chosen)
    assert set(some.runs[column]) == set(some.evaluations[column]) == left
    assert set(some.configs) == set(some.provenance) == set(some.runs["run"]) - {""}
    assert all(set(rows[column]) <= left for rows in some.probes.values())
    assert len(some.evaluations) == 3 * len(some.runs)


def test_choices_are_combined_and_without_one_the_study_is_as_it_was(found):
    [run] = select(found, arms=["bn"], batches=[8], seeds=[0], settings=["resnet18"]).runs.to_dict("records")
    assert (run["arm"], run["batch"], run["seed"]) == ("bn", 8, 0)
    assert select(found) is found


def test_the_name_of_a_norm_means_all_its_arms_unless_an_arm_is_called_that(add_run, study):
    add_run("gn", norm__groups=2)
    add_run("gn", norm__groups=8)
    add_run("bn")
    assert set(select(load(study), arms=["gn"]).runs["arm"]) == {"gn (groups=2)", "gn (groups=8)"}
    assert set(select(load(study), arms=["gn (groups=8)"]).runs["arm"]) == {"gn (groups=8)"}


def test_a_gap_that_only_other_arms_span_is_none(add_run, study):
    add_run("bn", 8)
    add_run("none", 32)
    everything = load(study)
    assert len(everything.runs) == 4
    [run] = select(everything, arms=["bn"]).runs.to_dict("records")
    assert run["batch"] == 8


def test_what_cannot_be_read_stays(add_run, study):
    (add_run("bn") / "config.yaml").write_text("norm: {")
    add_run("none")
    assert list(select(load(study), arms=["none"]).runs["state"].sort_values()) == ["done", "unreadable"]


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"arms": ["nonne"]}, "arms: this study has no nonne.\nIt has: bn; none.\nDid you mean none?"),
        ({"batches": [16]}, "batches: this study has no 16.\nIt has: 8; 32.\nDid you mean 8?"),
        ({"seeds": [7]}, "seeds: this study has no 7.\nIt has: 0; 1.\nDid you mean 1?"),
        ({"settings": ["resnet35"]}, "Did you mean resnet34?"),
    ],
)
def test_what_the_study_does_not_have_is_answered_with_the_nearest(found, chosen, told):
    with pytest.raises(UserError) as error:
        select(found, **chosen)
    assert told in str(error.value)
