"""Tables by test image, of runs that recorded which ones they got right (runs/correct.py).

How much of the variance between seeds the sampling of the test set makes, accuracy per class, and the images that only
one of two arms gets right.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from normlab.common.errors import count, per_cent
from normlab.report.analysis import cells, frames
from normlab.report.analysis.cells import NOTHING, Table, lists, note_on_cut
from normlab.report.analysis.frames import CELL, COUNTS, named_rows
from normlab.report.analysis.metrics import SHARE
from normlab.report.study.load import Study
from normlab.runs import reading

SEEDS = 5  # with fewer, the variance between seeds is known to no better than a factor of about ten
MOST_CLASSES, SHOWN = 100, 10  # those that are hardest: in the CSV, and in the other forms
_CAPTIONS: dict[str, dict[str, str]] = reading.read_yaml(Path(__file__).with_name("captions.yaml"))
_SIDES = {"both": "both right", "only_arm": "only the arm", "only_baseline": "only {baseline}", "neither": "neither"}

Numbers = NDArray[np.floating | np.integer]


class Variance(NamedTuple):
    """The variance of accuracy between seeds and its parts, of fractions of 1.

    Attributes:
        between_seeds: unbiased, of the accuracies on this test set.
        test_set: the part that comes of the test set's size.
        networks: of the accuracies on unlimited test data; below 0 where chance has it so.
        scale: low and high end of the interval of `between_seeds`, in units of it.
    """

    between_seeds: float
    test_set: float
    networks: float
    scale: tuple[float, float]

    def of_networks(self, between_seeds: float, images: int) -> float:
        """Return the networks' part of such a variance between seeds."""
        return (between_seeds - self.test_set) * images / (images - 1)


def variance_parts(accuracies: Numbers, right: Numbers, confidence: float = 0.95) -> Variance:
    """Split the variance between seeds of the accuracy on a test set, as Jordan (2023, arXiv 2304.01910) does.

    An accuracy is the mean of bits X_i over N images that were drawn from a distribution, so its variance over networks
    is the sum of Var(X_i) over images and of Cov(X_i, X_j) over pairs, divided by N². The first sum is there for
    networks that are equally good, too: they differ by chance on each image, and N is finite (binomial, with each
    image's own probability). The pairs estimate the variance of accuracy on the distribution without bias:
    N / (N - 1) * (Var(accuracy) - sum of Var(X_i) / N²).

    The interval takes accuracies to be normal (chi² with n - 1 degrees of freedom), and the first sum, a mean over many
    images, to be exact.

    Args:
        accuracies: of the n networks, 2 or more.
        right: how many of them classify each of the N images correctly, 2 or more.
        confidence: of the interval.
    """
    from scipy.special import chdtri  # slow to import, and most reports have no bits

    n, images = len(accuracies), len(right)
    between = float(accuracies.var(ddof=1))
    test_set = float((right / n * (1 - right / n)).sum()) * n / (n - 1) / images**2
    low, high = ((n - 1) / float(chdtri(n - 1, p)) for p in ((1 - confidence) / 2, (1 + confidence) / 2))
    parts = Variance(between, test_set, 0.0, (low, high))
    return parts._replace(networks=parts.of_networks(between, images))


def disagreement(right: Numbers, n: int) -> float:
    """Return the share of images that one of two networks gets right, averaged over all pairs of n networks.

    Args:
        right: how many of them classify each image correctly, (N,).
        n: number of networks.
    """
    return float((right * (n - right)).mean()) * 2 / (n * (n - 1)) if n > 1 else math.nan


def image_tables(study: Study, baseline: str | None, confidence: float) -> list[Table]:
    """Return the tables that runs with bits allow; none where no run of a table has any."""
    runs, left_out = _runs_with_bits(study)
    if runs.empty:
        return []
    here = study.runs[study.runs["setting"].isin(runs["setting"])]
    others = f" Left out, as they were evaluated on other images than most of their table: {count(left_out, 'run')}."
    words = {
        "percent": f"{per_cent(confidence)} %",
        "notes": others if left_out else "",
        "baseline": baseline,
        "seeds": SEEDS,
    }
    tables = [_variance_table(study, here, runs, confidence, words), _class_table(study, here, runs, confidence, words)]
    return [*tables, *(_agreement_table(study, here, runs, confidence, words) if baseline is not None else ())]


def _table(name: str, tidy: pd.DataFrame, rows: Any, runs: pd.DataFrame, words: Mapping[str, object]) -> Table:
    texts = {part: text.format(**words) for part, text in _CAPTIONS[name].items()}
    return Table(name, **texts, tidy=tidy, rows=rows, runs=list(runs["run"]))


def _runs_with_bits(study: Study) -> tuple[pd.DataFrame, int]:
    """Return the done runs that have bits, of each setting those of the images that most have; and how many others."""
    runs = study.runs[(study.runs["state"] == "done") & study.runs["run"].isin(study.correct)]
    runs = runs[["run", *CELL, "seed"]].astype({"batch": int, "seed": int}).reset_index(drop=True)
    if runs.empty:
        return runs, 0
    found = map(study.correct.__getitem__, runs["run"])
    runs["images"] = [f"{each.order} {each.classes} {each.counts}" for each in found]
    alike = runs["images"] == runs.groupby("setting")["images"].transform(lambda images: images.mode().iloc[0])
    return runs[alike].reset_index(drop=True), int((~alike).sum())


def _right(study: Study, runs: Sequence[str]) -> Numbers:
    """Return how many of the runs classify each image correctly: in the memory of one run, as there may be many."""
    right = np.zeros(study.correct[runs[0]].images, np.int32)
    for run in runs:
        right += study.correct[run].bits()
    return right


# ---- variance


def _variance_table(
    study: Study, here: pd.DataFrame, runs: pd.DataFrame, confidence: float, words: Mapping[str, object]
) -> Table:
    by_cell = {cell: list(rows["run"]) for cell, rows in runs.groupby(CELL)}
    found = []
    for cell in frames.counts(here).to_dict("records"):
        names = by_cell.get(tuple(cell[key] for key in CELL), [])
        place, states = ({key: cell[key] for key in keys} for keys in (CELL, COUNTS))
        for quantity, (mean, low, high) in _deviations(study, names, confidence).items():
            numbers = {"mean": mean, "low": low, "high": high, "n": len(names)}
            found.append({**place, "quantity": quantity, **numbers, **states})
    tidy = pd.DataFrame(found)
    headings = {
        "between_seeds": "std between seeds",
        "test_set": "by the test set's size",
        "networks": "between networks",
        "test_set_share": "test set's share (%)",
    }
    return _table("variance", tidy, lists(tidy, headings, _variance_text), runs, words)


def _deviations(study: Study, names: Sequence[str], confidence: float) -> dict[str, tuple[float, float, float]]:
    """Return value, low and high of each quantity: standard deviations in points, and a share in per cent."""
    nothing = (math.nan,) * 3
    images = study.correct[names[0]].images if names else 0
    if len(names) < SEEDS or images < 2:
        return dict.fromkeys(("between_seeds", "test_set", "networks", "test_set_share"), nothing)
    accuracies = np.array([study.correct[name].number / images for name in names])
    parts = variance_parts(accuracies, _right(study, names), confidence)
    low, high = (end * parts.between_seeds for end in parts.scale)
    variances = {
        "between_seeds": (parts.between_seeds, low, high),
        "test_set": (parts.test_set, math.nan, math.nan),
        "networks": (parts.networks, *(parts.of_networks(end, images) for end in (low, high))),
    }
    found = {name: _points(*values) for name, values in variances.items()}
    share = 100 * parts.test_set / parts.between_seeds if parts.between_seeds else math.nan
    return found | {"test_set_share": (share, math.nan, math.nan)}


def _points(value: float, low: float, high: float) -> tuple[float, float, float]:
    value, low, high = (
        100 * math.sqrt(max(each, 0.0)) if not math.isnan(each) else each for each in (value, low, high)
    )
    return value, low, high


def _variance_text(row: Any) -> str:
    if math.isnan(row.mean):
        return "n/a" if row.n else NOTHING
    if row.quantity == "test_set_share":
        return f"{row.mean:.0f}" if row.mean <= 100 else "all"
    return f"{row.mean:.2f}" + ("" if math.isnan(row.low) else f" ({row.low:.2f} to {row.high:.2f})")


# ---- classes


def _class_table(
    study: Study, here: pd.DataFrame, runs: pd.DataFrame, confidence: float, words: Mapping[str, object]
) -> Table:
    parts, shown, dropped = [], {}, False
    for setting, rows in runs.groupby("setting", sort=False):
        rows = rows.drop(columns="images").reset_index(drop=True)  # joined by position
        values = rows.join(_class_accuracies(study, list(rows["run"])))
        names = list(values.columns[len(CELL) + 2 :])
        hardest = sorted(names, key=lambda name: values[name].mean())  # stable
        kept, first = set(hardest[:MOST_CLASSES]), set(hardest[:SHOWN])
        dropped |= len(names) > SHOWN
        names = [name for name in names if name in kept]
        of_setting = here[here["setting"] == setting]
        parts.append(frames.summarize(of_setting, values, names, confidence, dict.fromkeys(names, SHARE)))
        shown[setting] = first
    tidy = pd.concat(parts, ignore_index=True)
    in_table = [row.quantity in shown[row.setting] for row in named_rows(tidy)]
    hard = (
        f" Shown are the {SHOWN} classes with the lowest accuracy; the CSV has at most {MOST_CLASSES}."
        if dropped
        else ""
    )
    headings = {name: f"{name.removeprefix('class ')} (%)" for name in tidy["quantity"].unique()}
    shown_rows = lists(tidy[in_table], headings, lambda row: cells.with_interval(row, 1))
    notes = f"{words['notes']}{note_on_cut(tidy[in_table], '0 and 100 %')}"
    return _table("classes", tidy, shown_rows, runs, {**words, "hardest": hard, "notes": notes})


def _class_accuracies(study: Study, names: Sequence[str]) -> pd.DataFrame:
    """Return a row per run with the accuracy of each class that has images, in per cent."""
    first = study.correct[names[0]]
    places = np.split(np.arange(first.images), np.cumsum(first.counts)[:-1])
    rows = []
    for run in names:
        bits = study.correct[run].bits()
        rows.append([100 * bits[place].mean() for place in places if len(place)])
    present = [f"class {name}" for name, count in zip(first.classes, first.counts, strict=True) if count]
    return pd.DataFrame(rows, columns=present)


# ---- agreement


def _agreement_table(
    study: Study, here: pd.DataFrame, runs: pd.DataFrame, confidence: float, words: Mapping[str, object]
) -> Iterator[Table]:
    baseline = str(words["baseline"])
    own, theirs = runs[runs["arm"] != baseline], runs[runs["arm"] == baseline]
    pairs = own.merge(theirs, on=["setting", "batch", "seed"], suffixes=("", "_baseline"))
    if pairs.empty:
        return
    values = pairs[["run", *CELL, "seed"]].join(pd.DataFrame(_shares(study, pairs)))
    compared = here[(here["arm"] != baseline) & here["setting"].isin(pairs["setting"])]
    shares = [*_SIDES, "disagree"]
    tidy = frames.summarize(compared, values, shares, confidence, dict.fromkeys(shares, SHARE))
    tidy = pd.concat([tidy, _within_arms(study, tidy, runs, baseline)], ignore_index=True)
    tidy.insert(len(CELL), "baseline", baseline)
    headings = {name: f"{text.format(baseline=baseline)} (%)" for name, text in _SIDES.items()}
    headings |= {"disagree": "one of them (%)", "seeds_disagree": "one of two seeds (%)"}
    used = pd.DataFrame({"run": [*pairs["run"], *pairs["run_baseline"].unique()]})
    notes = f"{words['notes']}{note_on_cut(tidy, '0 and 100 %')}"
    yield _table("agreement", tidy, lists(tidy, headings, _share_text), used, {**words, "notes": notes})


def _shares(study: Study, pairs: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
    """Return the shares of the images of each pair, in per cent."""
    found = []
    for pair in named_rows(pairs):
        arm, other = study.correct[pair.run].bits(), study.correct[pair.run_baseline].bits()
        found.append(
            [np.mean(sides) for sides in (arm & other, arm & ~other, ~arm & other, ~(arm | other), arm ^ other)]
        )
    return dict(zip([*_SIDES, "disagree"], 100 * np.array(found).T, strict=True))


def _within_arms(study: Study, tidy: pd.DataFrame, runs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return, per cell, on how many images two seeds of one arm disagree: the mean of arm and baseline."""
    by_cell = {cell: list(rows["run"]) for cell, rows in runs.groupby(CELL)}
    rows = tidy[tidy["quantity"] == "disagree"].copy()
    means = []
    for row in named_rows(rows):
        names = [by_cell.get((row.setting, arm, row.batch), []) for arm in (row.arm, baseline)]
        means.append(
            100 * np.mean([disagreement(_right(study, each), len(each)) if each else math.nan for each in names])
        )
    return rows.assign(quantity="seeds_disagree", mean=means, low=math.nan, high=math.nan)


def _share_text(row: Any) -> str:
    if math.isnan(row.low):
        return NOTHING if math.isnan(row.mean) else f"{row.mean:.1f}"
    return cells.with_interval(row, 1)
