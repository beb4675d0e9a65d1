"""Selection of some cells of a study by `arms`, `batches`, `seeds` and `settings`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from normlab.common.errors import UserError, nearest
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
    placed = study.runs.dropna(subset=["arm"])
    titles = sorted(set(placed["setting"]), key=natural)
    chosen: dict[str, list[Any]] = {}
    if arms is not None:
        chosen["arm"] = _named("arms", arms, in_order(placed["arm"]), lambda arm: {arm.split(" (")[0]})
    if settings is not None:
        chosen["setting"] = _named("settings", settings, titles, _parts)
    if batches is not None:
        chosen["batch"] = _numbered("batches", batches, placed["batch"])
    if seeds is not None:
        chosen["seed"] = _numbered("seeds", seeds, placed["seed"])
    if not chosen:
        return study

    def kept(rows: pd.DataFrame) -> pd.DataFrame:
        inside = rows["arm"].isna() | rows[list(chosen)].isin(chosen).all(axis=1)
        return rows[inside].reset_index(drop=True)

    runs = _without_strange_gaps(kept(study.runs))
    names = set(runs["run"])
    probes = {probe: kept(rows) for probe, rows in study.probes.items()}
    return replace(
        study,
        runs=runs,
        evaluations=kept(study.evaluations),
        probes={probe: rows for probe, rows in probes.items() if len(rows)},
        configs={run: config for run, config in study.configs.items() if run in names},
        provenance={run: made for run, made in study.provenance.items() if run in names},
        remarks={setting: remark for setting, remark in study.remarks.items() if setting in set(runs["setting"])},
    )


def _without_strange_gaps(runs: pd.DataFrame) -> pd.DataFrame:
    """Leave out the gaps of a grid that only runs which are left out would span."""
    kept = runs["run"] != ""
    for setting, here in runs[kept].groupby("setting"):
        spanned = {"setting": [setting], **{key: list(here[key]) for key in ("arm", "batch", "seed")}}
        kept |= runs[list(spanned)].isin(spanned).all(axis=1)
    return runs[kept].reset_index(drop=True)


def _parts(setting: str) -> set[str]:
    return set(setting.split(", "))


def _named(option: str, entries: Sequence[str], known: Sequence[str], parts: Callable[[str], set[str]]) -> list[str]:
    """Return the names that are meant: the same one, else all that have every part of it."""
    names = []
    for entry in entries:
        meant = [entry] if entry in known else [name for name in known if _parts(entry) <= parts(name)]
        if not meant:
            raise _unknown(option, entry, known, {part for name in known for part in parts(name)})
        names += meant
    return names


def _numbered(option: str, entries: Sequence[int], column: Iterable[int]) -> list[int]:
    known = sorted({int(value) for value in column})
    for entry in entries:
        if entry not in known:
            raise _unknown(option, entry, known, ())
    return list(entries)


def _unknown(option: str, entry: object, known: Sequence[object], parts: Iterable[object]) -> UserError:
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    close = nearest(entry, [*known, *parts])
    return UserError(
        f"{option}: this study has no {entry}.\nIt has: {'; '.join(map(str, known[:8]))}{more}."
        + (f"\nDid you mean {close}?" if close else "")
    )
