"""Selection of some cells of a study by `arms`, `batches`, `seeds` and `settings`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from normlab.common.errors import UserError, did_you_mean, listed
from normlab.report.study.arms import in_order, natural
from normlab.report.study.load import Study


def select(
    study: Study,
    arms: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    settings: Sequence[str] | None = None,
) -> Study:
    """Return the study with these cells and seeds only; None: all of them. Unreadable runs stay, having no place.

    Args:
        study: the whole study.
        arms: as the tables name them; a norm's bare name, where no arm is called that, means all of its arms.
        batches: batch sizes.
        seeds: seeds.
        settings: as the tables name them, or some of their parts: `resnet18` means all settings that have it.

    Raises:
        UserError: for an entry that the study does not have, with the nearest.
    """
    placed = study.placed
    titles = sorted(set(placed["setting"]), key=natural)
    sizes, numbers = (sorted({int(value) for value in placed[column]}) for column in ("batch", "seed"))
    # By column: option, entries, the values that the study has, and the parts by which one may be meant.
    options: dict[str, tuple[str, Any, list[Any], Callable[[Any], set[str]]]] = {
        "arm": ("arms", arms, in_order(placed["arm"]), lambda arm: {arm.split(" (")[0]}),
        "setting": ("settings", settings, titles, _parts),
        "batch": ("batches", batches, sizes, lambda _: set()),
        "seed": ("seeds", seeds, numbers, lambda _: set()),
    }
    chosen = {column: _meant(*option) for column, option in options.items() if option[1] is not None}
    if not chosen:
        return study

    def kept(rows: pd.DataFrame) -> pd.DataFrame:
        inside = rows["arm"].isna() | rows[list(chosen)].isin(chosen).all(axis=1)
        return rows[inside].reset_index(drop=True)

    selected = study.reduced(_without_strange_gaps(kept(study.runs)), kept)
    provenance = {run: made for run, made in study.provenance.items() if run in set(selected.runs["run"])}
    return replace(selected, provenance=provenance)


def _without_strange_gaps(runs: pd.DataFrame) -> pd.DataFrame:
    """Leave out the gaps of a grid that only runs which are left out would span."""
    kept = runs["run"] != ""
    for setting, here in runs[kept].groupby("setting"):
        spanned = {"setting": [setting], **{key: list(here[key]) for key in ("arm", "batch", "seed")}}
        kept |= runs[list(spanned)].isin(spanned).all(axis=1)
    return runs[kept].reset_index(drop=True)


def _parts(setting: str) -> set[str]:
    return set(setting.split(", "))


def _meant(option: str, entries: Sequence[Any], known: Sequence[Any], parts: Callable[[Any], set[str]]) -> list[Any]:
    """Return what the entries mean: the same one, else all that have every part of it."""
    meant = []
    for entry in entries:
        names = [entry] if entry in known else [name for name in known if _parts(str(entry)) <= parts(name)]
        if not names:
            choices = [*known, *{part for name in known for part in parts(name)}]
            raise UserError(
                f"{option}: this study has no {entry}.\nIt has: {listed(known, 8, '; ')}."
                + did_you_mean(entry, choices)
            )
        meant += names
    return meant
