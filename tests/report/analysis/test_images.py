"""Tables by test image, of runs whose bits a test plants."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planted import Planted, planted

from normlab.report.analysis.cells import Table
from normlab.report.analysis.images import Variance, disagreement, image_tables, variance_parts
from normlab.report.study.load import Study
from normlab.runs.correct import Correct

CLASSES = ("cat", "dog", "eel")


def bits_of(text: str, counts: tuple[int, ...], order: str = "0", classes: tuple[str, ...] = CLASSES) -> Correct:
    packed = np.packbits(np.array([each == "1" for each in text])).tobytes()
    return Correct(order, classes, counts, packed)


def study_of(arms: Mapping[str, list[Correct]]) -> Study:
    """Runs by arm, whose seeds are 0, 1, ..."""
    runs = [Planted({"norm.name": arm}, seed, {}) for arm, found in arms.items() for seed in range(len(found))]
    found = [each for bits in arms.values() for each in bits]
    return replace(planted(runs), correct={f"run{i}": each for i, each in enumerate(found)})


def tables_of(study: Study, baseline: str | None = "bn") -> dict[str, Table]:
    return {table.name: table for table in image_tables(study, baseline, 0.95)}


def quantity(table: Table, arm: str, name: str) -> Any:
    found = table.tidy[(table.tidy["arm"] == arm) & (table.tidy["quantity"] == name)]
    return found.iloc[0]


def networks(generator: np.random.Generator, n: int, images: int, skill: float) -> Any:
    """Bits of n networks on images that are drawn anew: each has a chance of its own and a skill that all images share.

    Accuracy on unlimited images is 0.65 + the network's skill, of that standard deviation.
    """
    chances = generator.choice([0.5, 0.8], images) + generator.uniform(-skill, skill, (n, 1)) * math.sqrt(3)
    return generator.random((n, images)) < chances


def parts_of(bits: Any) -> Variance:
    return variance_parts(bits.mean(1), bits.sum(0))


@pytest.mark.parametrize("skill", [0.0, 0.05, 0.1])
def test_the_parts_of_the_variance_are_on_average_those_that_were_planted(skill) -> None:
    generator = np.random.default_rng(1)
    parts = [parts_of(networks(generator, 6, 200, skill)) for _ in range(500)]
    assert np.mean([p.networks for p in parts]) == pytest.approx(skill**2, rel=0.1, abs=1e-4)
    assert np.mean([p.test_set for p in parts]) == pytest.approx((0.5 * 0.5 + 0.8 * 0.2) / 2 / 200, rel=0.01)


@pytest.mark.parametrize(("n", "skill"), [(5, 0.0), (5, 0.05), (10, 0.03)])
def test_the_interval_of_the_networks_has_the_truth_as_often_as_it_says(n, skill) -> None:
    generator = np.random.default_rng(2)
    inside = 0
    for _ in range(600):
        parts = parts_of(networks(generator, n, 200, skill))
        low, high = (parts.of_networks(end * parts.between_seeds, 200) for end in parts.scale)
        inside += low <= skill**2 <= high
    assert 0.93 <= inside / 600 <= 0.99  # a uniform skill has shorter tails than a normal one


def test_networks_that_are_equally_good_differ_by_the_test_set_alone_and_few_are_not_judged() -> None:
    generator = np.random.default_rng(4)
    equal = networks(generator, 8, 800, 0.0)
    study = study_of(
        {
            arm: [bits_of("".join("01"[int(each)] for each in row), (800,), classes=("cat",)) for row in rows]
            for arm, rows in {"bn": equal, "none": equal[:4]}.items()
        }
    )
    table = tables_of(study)["variance"]
    between, test_set, of_networks = (quantity(table, "bn", name) for name in ("between_seeds", "test_set", "networks"))
    assert between["mean"] == pytest.approx(100 * equal.mean(1).std(ddof=1))
    assert test_set["mean"] == pytest.approx(100 * math.sqrt((0.25 + 0.16) / 2 / 800), rel=0.1)
    assert of_networks["low"] == 0
    assert math.isnan(quantity(table, "none", "networks")["mean"])
    [row] = [row for row in table.rows["digits, resnet18"] if row["arm"].text == "none"]
    assert row["between networks"].text == "n/a"


def test_agreement_is_that_counted_by_hand() -> None:
    counts = (2, 1, 2)
    arms = {
        "bn": [bits_of("11010", counts), bits_of("11110", counts)],
        "none": [bits_of("10011", counts), bits_of("11110", counts), bits_of("00000", counts)],  # the last: no pair
    }
    table = tables_of(study_of(arms))["agreement"]
    assert table.caption.endswith("the ends of an interval that is cut at 0 and 100 %.")
    # Seed 0: both 1, 4; only the arm 5; only bn 2; neither 3. Seed 1: four both, one neither.
    for name, of_two in {"both": (40, 80), "only_arm": (20, 0), "only_baseline": (20, 0), "neither": (20, 20)}.items():
        found = quantity(table, "none", name)
        assert (found["mean"], found["n"], found["done"]) == (pytest.approx(np.mean(of_two)), 2, 3)
        assert 0 <= found["low"] <= found["high"] <= 100
    assert quantity(table, "none", "disagree")["mean"] == pytest.approx(20)
    # bn's seeds differ in the third; none's in 3 (2, 3, 5), in 3 (1, 4, 5) and in 4 (1, 2, 3, 4) of five.
    assert quantity(table, "none", "seeds_disagree")["mean"] == pytest.approx(100 * np.mean([1 / 5, 10 / 15]))
    assert set(table.tidy["arm"]) == {"none"}


def test_disagreement_is_that_of_all_pairs() -> None:
    bits = np.random.default_rng(0).random((5, 40)) < 0.7
    pairs = [np.mean(bits[i] != bits[j]) for i in range(5) for j in range(i)]
    assert disagreement(bits.sum(0), 5) == pytest.approx(np.mean(pairs))
    assert math.isnan(disagreement(bits[0].astype(int), 1))


def test_accuracy_per_class_is_that_counted_by_hand_and_a_class_without_images_has_none() -> None:
    study = study_of({"bn": [bits_of("110", (2, 0, 1)), bits_of("011", (2, 0, 1))]})
    table = tables_of(study)["classes"]
    assert list(table.tidy["quantity"]) == ["class cat", "class eel"]
    assert list(table.tidy["mean"]) == pytest.approx([75, 50])
    [row] = table.rows["digits, resnet18"]
    assert (row["cat (%)"].text, row["eel (%)"].text) == ("75.0 [0.0, 100.0]", "50.0 ± 50.0")
    assert table.caption.endswith("the ends of an interval that is cut at 0 and 100 %.")


def test_accuracy_per_class_is_of_a_setting_s_own_runs_where_settings_take_turns() -> None:
    bits = ("110", "000", "010", "001")
    study = planted(Planted({"depth": (18, 34)[i % 2]}, i // 2, {}) for i in range(len(bits)))
    study = replace(study, correct={f"run{i}": bits_of(each, (1, 1, 1)) for i, each in enumerate(bits)})
    tidy = tables_of(study)["classes"].tidy
    found = {setting: (list(rows["mean"]), set(rows["n"])) for setting, rows in tidy.groupby("setting")}
    assert found == {"digits, resnet18": ([50, 100, 0], {2}), "digits, resnet34": ([0, 0, 50], {2})}


def test_of_many_classes_the_hardest_are_shown() -> None:
    names = tuple(f"c{i}" for i in range(30))
    study = study_of({"bn": [bits_of("".join("10"[i % 2] for i in range(30)), (1,) * 30, classes=names)]})
    table = tables_of(study, None)["classes"]
    assert len(table.tidy) == 30
    [row] = table.rows["digits, resnet18"]
    assert [heading for heading in row if heading[0] == "c" and heading != "cells"] == [
        f"c{i} (%)" for i in range(1, 20, 2)
    ]


def test_runs_on_other_images_are_left_out_and_counted_and_there_is_no_table_without_bits() -> None:
    counts = (1, 1, 1)
    mine = [bits_of("110", counts), bits_of("011", counts), bits_of("111", counts, order="1")]
    study = study_of({"bn": mine, "none": mine[2:]})
    study = replace(study, correct=study.correct | {"run3": bits_of("111", counts)})
    tables = tables_of(study)
    assert tables["classes"].runs == ["run0", "run1", "run3"]
    assert "on other images than most of their table: 1 run." in tables["classes"].caption
    assert not tables_of(replace(study, correct={}))
    assert "agreement" not in tables_of(study, None)
