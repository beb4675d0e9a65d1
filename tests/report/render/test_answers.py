"""The sentences above everything else of a report."""

import math

import pytest
from recorded import adder

from normlab.report import build
from normlab.report.analysis.leaders import Leader, Out, Rival, leaders
from normlab.report.analysis.metrics import METRICS, metric_of
from normlab.report.analysis.statistics import Interval
from normlab.report.options import options
from normlab.report.render.answers import answers
from normlab.report.render.description import question
from normlab.report.study.load import Study, load
from normlab.report.tables import judged_tables

OPTIONS = options(baseline=None)


def answered(study: Study):
    metric = metric_of(study.evaluations)
    tables, judgements = judged_tables(study, metric, OPTIONS)
    return answers(study, leaders(study, metric, tables[0].tidy, 0.95), judgements, metric, (0.95, 0.05))


@pytest.fixture
def add(tmp_path):
    return adder(tmp_path)


def test_what_came_out_is_told_with_seeds_and_whether_it_is_more_than_chance(add, tmp_path):
    for batch, arms in {8: {"bn": 0.9, "gn": 0.6}, 32: {"bn": 0.80, "gn": 0.803}}.items():
        for arm, accuracy in arms.items():
            for seed, noise in enumerate((0.0, 0.01, -0.01)):
                add(arm, batch, seed, (0.1, 0.2, accuracy + noise * (1 if arm == "bn" else -0.5)))
    told = answered(load("study", tmp_path))
    assert told.state == "12 runs: 2 arms; batch 8, 32; seeds 0, 1, 2; digits, resnet18."
    assert told.headline[:2] == (
        "bn has the highest final test accuracy at batch 8.",
        "Not decided by these seeds: batch 32 (gn ahead).",
    )
    real, undecided = told.answers
    assert (real.verdict, real.where, real.arm, real.value) == ("real", "batch 8", "bn", "90.0 ± 2.5 %")
    assert real.lead.startswith("30.00 points ahead of gn (95 % interval 26.27 to 33.73, p = 0.00")
    assert real.lead.endswith("; seeds 0, 1, 2)")
    assert (undecided.verdict, undecided.arm) == ("not decided", "gn")


def test_of_too_few_seeds_nothing_is_decided(add, tmp_path):
    for arm, accuracy in (("bn", 0.9), ("none", 0.2)):
        add(arm, accuracies=(0.1, 0.1, accuracy))
    [answer] = answered(load("study", tmp_path)).answers
    assert (answer.verdict, answer.lead) == ("not decided", "70.00 points ahead of none (seed 0)")
    assert answer.reasons == ("Fewer than 3 seeds cannot tell a difference from chance.",)


def test_an_arm_that_is_ahead_on_the_seeds_that_both_have_is_neither_level_nor_behind(add, tmp_path):
    for seed in range(6):
        add("bn", seed=seed, accuracies=(0.1, 0.1, 0.6 if seed < 3 else 0.96))
    for seed in range(3):
        add("gn", seed=seed, accuracies=(0.1, 0.1, 0.7 + 0.01 * seed))
    told = answered(load("study", tmp_path))
    [answer] = told.answers
    assert (answer.verdict, answer.arm, answer.level) == ("not decided", "bn", ())
    words = "11.00 points behind gn on the seeds that both have (95 % interval 8.52 to 13.48, p = 0.003; seeds 0, 1, 2)"
    assert answer.lead == words
    assert told.headline[0].endswith("(bn ahead).")


def test_of_one_arm_it_is_told_what_it_reached(add, tmp_path):
    add("bn", state="running")
    assert answered(load("study", tmp_path)).headline == ("No run has finished yet.",)
    for seed in (1, 2):
        add("bn", 16, seed, (0.1, 0.2, 0.9))
        add("bn", 32, seed, (0.1, 0.2, 0.8), "done" if seed == 1 else "diverged")
    study = load("study", tmp_path)
    said = "Final test accuracy of bn: 90.0 ± 0.0 % at batch 16; 80.0 % at batch 32 (1 of 2 runs diverged)."
    assert answered(study).headline == (said,)
    assert question(study) == "How well does bn do at batch size 8, 16, 32? On digits, resnet18."


def test_an_arm_that_is_left_out_is_named_with_what_it_reached_and_no_lead_is_real_without_it(add, tmp_path):
    for seed, noise in enumerate((0.0, 0.01, -0.01, 0.02)):
        add("none", 16, seed, (0.1, 0.2, 0.7 + noise))
        add("affine", 16, seed, (0.1, 0.2, 0.3 - noise / 2))
        add("bn", 16, seed, (0.1, 0.2, 0.952), "failed" if seed == 3 else "diverged" if seed == 2 else "done")
    told = answered(load("study", tmp_path))
    bn = "bn (1 of 4 runs diverged, 1 failed; the 2 that are done reached 95.2 ± 0.0 %)"
    assert told.headline[:2] == (
        "none has the highest final test accuracy of the arms compared at batch 16.",
        f"Not compared at batch 16: {bn}.",
    )
    [answer] = told.answers
    assert (answer.verdict, answer.others) == ("real among those compared", (f"Not compared: {bn}.",))
    for seed in range(4):
        add("gn", 16, seed, (0.1, 0.2, 0.71))
    told = answered(load("study", tmp_path))
    assert told.headline[0] == "Not decided by these seeds: batch 16 (gn ahead of the arms compared)."


def test_arms_without_a_run_are_named_and_so_are_conditions_of_one_arm(add, tmp_path):
    for seed in range(3):
        for batch, arms in {16: {"gn": 0.9, "bn": 0.8, "in": 0.5}, 32: {"bn": 0.8, "in": 0.5}, 64: {"bn": 0.8}}.items():
            for arm, accuracy in arms.items():
                add(arm, batch, seed, (0.1, 0.2, accuracy + 0.01 * seed * (1 + (arm == "gn"))))
    told = answered(load("study", tmp_path))
    assert told.headline[-2:] == (
        "gn has no run at batch 32.",
        "No two arms can be compared at batch 64: bn reached 81.0 ± 2.5 %; gn and in have no run.",
    )
    assert [answer.others for answer in told.answers] == [(), ("gn has no run.",)]


def test_the_page_offers_what_would_decide_answers_only_where_one_is_open(add, tmp_path):
    for seed, noise in enumerate((0.0, 0.01, -0.01)):
        for arm, accuracy in {"bn": 0.9, "gn": 0.5 + noise, "in": 0.5 - noise}.items():
            add(arm, 16, seed, (0.1, 0.2, accuracy))
    page = build("study", tmp_path, options(baseline="gn", figures=False)).read_text()
    assert "</span> of 9 runs: 3 arms;" in page
    assert 'id="table-seeds"' in page  # as gn and in are not told apart
    assert "what would decide the others" not in page
    for seed, accuracy in enumerate((0.6, 0.4, 0.5)):
        add("bn", 32, seed, (0.1, 0.2, accuracy))
        add("gn", 32, seed, (0.1, 0.2, 0.5))
    page = build("study", tmp_path, options(baseline="gn", figures=False)).read_text()
    assert "what would decide the others" in page
    assert '<div class="effects">in has no run.</div>' in page


def test_an_arm_that_leads_under_another_setting_is_missed_where_it_has_no_run(add, tmp_path):
    for lr, arms in {0.1: ("gn", "bn"), 0.2: ("bn", "in")}.items():
        for arm, accuracy in zip(arms, (0.9, 0.5), strict=True):
            add(arm, accuracies=(0.1, 0.2, accuracy), optimizer__lr=lr)
    assert "gn has no run at optimizer.lr=0.2." in answered(load("study", tmp_path)).headline


def test_where_all_has_ended_and_nothing_is_compared_it_is_told_what_happened(add, tmp_path):
    for seed in range(3):
        add("bn", 16, seed)
        add("none", 16, seed, (), "failed", status={"error": "ValueError"})
        add("gn", 16, seed, (0.1,), "diverged", status={"diverged_step": 3})
    arms = "bn reached 90.0 ± 0.0 %; none (all 3 runs failed); gn (all 3 runs diverged)"
    assert answered(load("study", tmp_path)).headline[0] == f"No two arms can be compared at batch 16: {arms}."
    add("in", 16, 0, (), "running")
    told = answered(load("study", tmp_path)).headline[0]
    assert told.startswith("No two arms can be compared yet at batch 16: bn reached")
    assert told.endswith("; in has no finished run.")


def test_conditions_are_named_by_what_differs_and_many_are_counted(add, tmp_path):
    add("bn")
    study = load("study", tmp_path)
    places = [(f"digits, resnet{depth}", batch) for depth in (18, 34) for batch in (8, 32)]
    rivals = (
        Rival("none", Interval(5.0, 4.0, 6.0, 3), 0.001, (0, 1, 2)),
        Rival("gn", Interval(9.0, 1, 17, 3), 0.2, (0, 1, 2)),
    )
    out = Out("in", Interval(95, math.nan, math.nan, 1), {"done": 1, "diverged": 1})
    found = [Leader(*place, None, "bn", Interval(90, 89, 91, 3), rivals, (out,), ("affine",)) for place in places]
    told = answers(study, found, [], METRICS["test_accuracy"], (0.95, 0.05))
    assert told.answers[1].where == "resnet18, batch 32"
    assert told.answers[0].reasons == (
        "May be as good, as far as these seeds tell: gn.",
        "Behind by more than chance: none.",
    )
    assert told.answers[0].others == (
        "Not compared: in (1 of 2 runs diverged; the one that is done reached 95.0 %).",
        "affine has no run.",
    )
    left_out = "in (1 of 2 runs diverged; the one that is done reached 95.0 %)"
    assert told.headline == (
        "At none of 4 conditions do these seeds decide which arm has the highest final test accuracy"
        " (ahead: bn at 4 of them).",
        f"Not compared {'; '.join(f'at {answer.where}: {left_out}' for answer in told.answers[:3])};"
        " arms at 1 more condition.",
        "affine has no finished run at some of these conditions.",
    )
    alone = Leader("x", 32, 4, "bn (eps=1, norm_batch=4)", Interval(1, math.nan, math.nan, 1), rivals[:1])
    [answer] = answers(study, [alone], [], METRICS["test_loss"], (0.95, 0.05)).answers
    assert (answer.where, answer.arm) == ("statistics over 4 images", "bn (eps=1)")
    assert answer.verdict == "real"
    imported = alone._replace(
        arm="bn (norm_batch=4) (imported)", rivals=(*rivals, Rival("in", rivals[1].lead, 0.2, (0,)))
    )
    [answer] = answers(study, [imported], [], METRICS["test_loss"], (0.95, 0.05)).answers
    assert (answer.arm, answer.reasons[0][:19]) == ("bn (imported)", "Fewer than 3 seeds ")
    many = [Leader("x", i, None, f"arm{i % 6}", alone.mean, rivals[:1]) for i in range(10)]
    *_, last, more = answers(study, many, [], METRICS["test_loss"], (0.95, 0.05)).headline
    assert (last[:4], more) == ("arm3", "2 more arms lead elsewhere.")


def test_equal_means_are_level_and_not_ahead(add, tmp_path):
    for batch in (8, 32):
        for arm in ("bn", "gn", "none"):
            for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
                add(arm, batch, seed, (0.1, 0.1, accuracy - 0.3 * (arm == "none")))
    told = answered(load("study", tmp_path))
    assert told.headline[0] == "Not decided by these seeds: batch 8 (bn and gn level); batch 32 (bn and gn level)."
    assert told.answers[0].lead.startswith("level with gn")


def test_conditions_in_which_every_run_went_wrong_are_named(add, tmp_path):
    for arm in ("bn", "none"):
        for seed in (0, 1):
            add(arm, 8, seed, (0.1, 0.2, 0.5), optimizer__lr=0.1)
            add(arm, 32, seed, (0.1,), "failed", status={"error": "ValueError"}, optimizer__lr=0.1)
            for batch in (8, 32):
                state = "diverged" if arm == "bn" else "failed"
                add(arm, batch, seed, (0.1,), state, status={"diverged_step": 3}, optimizer__lr=1e30)
    told = answered(load("study", tmp_path)).headline
    said = "No run is done at optimizer.lr=0.1, batch 32: all 4 failed; at optimizer.lr=1e+30: 4 diverged, 4 failed."
    assert said in told


def test_a_study_of_diverged_runs_says_so(add, tmp_path):
    for arm in ("bn", "none"):
        add(arm, accuracies=(0.1,), state="diverged", status={"diverged_step": 3})
    assert answered(load("study", tmp_path)).headline == ("No run is done: all 2 diverged.",)


def test_conditions_are_in_the_order_of_their_numbers_and_ties_are_counted(add, tmp_path):
    for images in (32, 1, 2, 8):
        for arm, accuracy in (("bn", 0.6), ("gn", 0.6 if images == 8 else 0.5)):
            add(arm, 32, accuracies=(0.1, 0.1, accuracy), norm_batch=images)
    told = answered(load("study", tmp_path))
    assert [answer.where for answer in told.answers] == [
        f"statistics over {images}" for images in ("1 image", "2 images", "8 images", "32 images")
    ]
    assert told.headline[0].endswith("(ahead: bn at 3 of them; level: the best arms at 1).")
