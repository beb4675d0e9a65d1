"""Studies in memory whose runs have the values that a test plants, for judging claims."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import LinearConstraint, milp

from normlab.report.analysis.metrics import METRICS, Metric
from normlab.report.claims.claims import Claim, Comparison, Side
from normlab.report.study.arms import places
from normlab.report.study.load import Study

BASE = {
    "study": "planted",
    "budget": "smoke",
    "norm.name": "bn",
    "model.name": "resnet",
    "dataset.kind": "digits",
    "dataset.name": "digits",
    "init.name": "default",
    "sampler.name": "iid",
    "optimizer.name": "sgd",
    "optimizer.lr": 0.02,
    "depth": 18,
    "batch": 32,
    "norm_batch": None,
    "eval_stats": "running",
    "input_norm": "dataset",
    "epochs": 3,
}


PLANTABLE = (
    "test_accuracy", "train_accuracy", "train_test_gap", "training_speed", "setbacks", "train_loss", "ics",
    "ics_cosine", "loss_band", "gradient_band", "beta", "scale_drift", "shift_drift", "large_share", "mean_change",
    "sharpness", "incremental_accuracy", "forgetting",
)  # fmt: skip


class Planted(NamedTuple):
    """A run: settings that differ from BASE, and the number that each of its metrics has to come to."""

    settings: Mapping[str, Any]
    seed: int
    values: Mapping[str, float]  # by the metric's name, one of PLANTABLE
    state: str = "done"


def planted(runs: Iterable[Planted]) -> Study:
    """The study of these runs."""
    runs = list(runs)
    configs = {f"run{i}": nested({**BASE, **run.settings, "seed": run.seed}) for i, run in enumerate(runs)}
    where, _ = places(list(configs.values()))
    evaluations, probes = [], {}
    for name, run in zip(configs, runs, strict=True):
        evaluations += [{"run": name, **row} for row in evaluations_of(run)]
        for probe, rows in probes_of(run).items():
            probes.setdefault(probe, []).extend({"run": name, **row} for row in rows)
    table = [
        {"run": name, **place._asdict(), "state": run.state, "note": "", "classes": math.nan}
        for name, place, run in zip(configs, where, runs, strict=True)
    ]
    return Study(
        name="planted",
        folder=Path("planted"),
        runs=pd.DataFrame(table),
        evaluations=pd.DataFrame(evaluations, columns=None if evaluations else ["run", "epoch"]),
        probes={probe: pd.DataFrame(rows) for probe, rows in probes.items()},
        configs=configs,
        provenance={},
        notes="",
        remarks={},
        warnings=[],
    )


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, key = path.split(".")
        node = found
        for group in groups:
            node = node.setdefault(group, {})
        node[key] = value
    return found


def evaluations_of(run: Planted) -> list[dict[str, Any]]:
    values, rows = run.values, [{"epoch": epoch} for epoch in (1, 2, 3)]
    if run.state == "diverged" and run.values:
        return rows[:1]
    test = values.get("test_accuracy", 40.0)
    train: list[float] = []
    if "train_test_gap" in values:
        train = [0.0, 0.0, test + values["train_test_gap"]]
    elif "train_accuracy" in values:
        train = [99.0, 1.0, values["train_accuracy"]]
    elif "training_speed" in values:
        train = [values["training_speed"] + x for x in (-7.0, 2.0, 5.0)]
    elif "setbacks" in values:
        train = [60.0, 60.0 - values["setbacks"], 60.0 - values["setbacks"]]
    if "test_accuracy" in values or "train_test_gap" in values:
        rows = [{**row, "test_accuracy": x / 100} for row, x in zip(rows, (99.0, 1.0, test), strict=True)]
    if train:
        rows = [{**row, "train_accuracy": x / 100} for row, x in zip(rows, train, strict=True)]
    if "incremental_accuracy" in values or "forgetting" in values:  # the first evaluation is of no end of a task
        mean, lost = values.get("incremental_accuracy", 50.0) / 100, values.get("forgetting", 0.0) / 100
        rows = [
            {**row, "task": task, "test_accuracy": mean + more, "task_1_accuracy": first}
            for row, task, more, first in zip(rows, (1, 1, 2), (0.3, 0.1, -0.1), (0.9, 0.5, 0.5 - lost), strict=True)
        ]
    if "train_loss" in values:
        rows = [
            {**row, "train_loss": x} for row, x in zip(rows, (9.0, 9.0, math.exp(values["train_loss"])), strict=True)
        ]
    return rows


def probes_of(run: Planted) -> dict[str, list[dict[str, Any]]]:
    values, found = run.values, {}
    exp = {name: math.exp(value) for name, value in values.items() if METRICS[name].log}
    if "ics" in values or "ics_cosine" in values:
        l2, cosine = exp.get("ics", 1.0), values.get("ics_cosine", 0.5)
        first = {"step": 0, "layer": "first", "l2": 0.0, "cosine": 1.0}  # no layer below it
        both = [
            {"step": step, "layer": "second", "l2": l2 * factor, "cosine": cosine + more}
            for step, factor, more in ((0, 4.0, 0.3), (9, 0.25, -0.3))
        ]
        found["ics"] = [first, *both]
    bands = {"loss_band": "loss", "gradient_band": "predictiveness"}
    if {"loss_band", "gradient_band", "beta"} & set(values):
        found["landscape"] = [
            {"step": step, "beta": exp.get("beta", 1.0) * factor}
            | {f"{band}_low": 0.5 for band in bands.values()}
            | {f"{band}_high": 0.5 + exp.get(name, 1.0) * factor for name, band in bands.items()}
            for step, factor in ((0, 0.001), (5, 1.0), (9, math.nan))  # null: a loss that overflowed
        ]
    if "scale_drift" in values or "shift_drift" in values:
        scale, shift = values.get("scale_drift", 0.0), values.get("shift_drift", 0.0)
        found["affine"] = [
            {"step": 0, "layer": "a", "scale_start": 2.0, "scale_drift": 99.0, "shift_drift": 99.0},
            {"step": 9, "layer": "a", "scale_start": 2.0, "scale_drift": 2 * scale, "shift_drift": shift},
            {"step": 9, "layer": "b", "scale_start": math.nan, "scale_drift": math.nan, "shift_drift": shift},
        ]
    if "large_share" in values:
        share = values["large_share"] / 100
        found["activations"] = [
            {"step": step, "large_normalised": share + more} for step, more in ((0, 0.1), (1, -0.1))
        ]
    if "mean_change" in values:
        first, second = -4.0 * exp["mean_change"], 0.25 * exp["mean_change"]  # of the pairs 0, 1 and 8, 9
        found["activations"] = [
            {"step": step, "layer": layer, "mean": mean, "variance": 1.0}
            for layer in ("a", "b")
            for step, mean in ((0, 3.0), (1, 3.0 + first), (8, 5.0), (9, 5.0 + second))
        ]
    if "sharpness" in values:
        found["sharpness"] = [
            {"step": 0, "eigenvalue": 77.0, "converged": True},
            {"step": 9, "eigenvalue": exp["sharpness"], "converged": True},
        ]
    return found


def study_for(claim: Claim, speaks: str, seeds: Iterable[int] = range(5), noise: float = 0.02) -> Study:
    """A study in which each of a claim's contrasts is what the claim expects ("for") or the opposite ("against").

    Args:
        noise: standard deviation of each run's value, in units of the planted effect.
    """
    arms = list(
        {tuple(sorted(settings_of(side).items(), key=str)): None for c in claim.comparisons for side in c.sides}
    )
    values: dict[Any, dict[str, float]] = {arm: {} for arm in arms}
    generator = np.random.default_rng(0)
    for measure in dict.fromkeys(c.measure for c in claim.comparisons):
        compared = [c for c in claim.comparisons if c.measure == measure]
        matrix = np.zeros((len(compared), len(arms)))
        for row, comparison in zip(matrix, compared, strict=True):
            for side in comparison.sides:
                row[arms.index(tuple(sorted(settings_of(side).items(), key=str)))] += side.weight
        base = 50.0 if measure.unit == "%" else 0.0
        found = nearest(base, matrix, [target(comparison, speaks) for comparison in compared], compared, speaks)
        for arm, value in zip(arms, found, strict=True):
            if matrix[:, arms.index(arm)].any():
                values[arm][measure.name] = value
    return planted(
        Planted(dict(arm), seed, {n: v + noise * generator.normal() * unit(METRICS[n]) for n, v in planted_.items()})
        for arm, planted_ in values.items()
        for seed in seeds
    )


def nearest(base: float, matrix: Any, targets: Iterable[float], compared: Iterable[Comparison], speaks: str) -> Any:
    """Values as near to `base` as can be whose contrasts are what each comparison's target is, or beyond it."""
    beyond = [
        0 if comparison.expect == "equal" else 1 if (comparison.expect == "greater") == (speaks == "for") else -1
        for comparison in compared
    ]
    bounds = np.array(list(targets)) - base * matrix.sum(1)
    low, high = (np.where(np.array(beyond) * sign >= 0, bounds, sign * -np.inf) for sign in (1, -1))
    both = np.hstack([matrix, -matrix])  # of what is added to and taken from the base
    found = milp(np.ones(both.shape[1]), constraints=LinearConstraint(both, low, high))
    assert found.success, "the comparisons of the claim contradict each other"
    up, down = np.split(found.x, 2)
    return base + up - down


def settings_of(side: Side) -> dict[str, Any]:
    """Settings of a run that the side selects."""
    ends = {"lowest": 2, "highest": 16}
    first = {key: value[0] if isinstance(value, list) else value for key, value in side.where.items()}
    return {key: ends.get(value, value) if isinstance(value, str) else value for key, value in first.items()}


def target(comparison: Comparison, speaks: str) -> float:
    size = unit(comparison.measure) * {"for": 1, "against": -1}[speaks]
    if comparison.expect == "equal":
        return comparison.reference + (comparison.margin - size if speaks == "against" else 0.0)
    return comparison.reference + (size if comparison.expect == "greater" else -size)


def unit(measure: Metric) -> float:
    return 5.0 if measure.unit == "%" else 1.0 if measure.log else 0.1


def simulate(
    arms: Mapping[str, Callable[[np.random.Generator], float]], seeds: int, repeats: int, **settings: Any
) -> Any:
    """Studies of test accuracies, each value drawn anew: the arm's own number for each seed and study."""
    generator = np.random.default_rng(2026)
    one = planted(
        Planted({"norm.name": arm, **settings}, seed, {"test_accuracy": 50.0}) for arm in arms for seed in range(seeds)
    )
    runs = [arm for arm in arms for _ in range(seeds)]
    last = (one.evaluations["epoch"] == 3).to_numpy()
    for _ in range(repeats):
        one.evaluations.loc[last, "test_accuracy"] = [arms[arm](generator) / 100 for arm in runs]
        yield one
