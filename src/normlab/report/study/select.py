"""Some cells of a study: what `arms`, `batches`, `seeds` and `settings` leave of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

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
    """The study with these cells and seeds only; None: all of them. What could not be read stays, having no place.

    Args:
        arms: as the tables name them; a norm's bare name, where no arm is called that, means all of its arms.
        settings: as the tables name them, or some of their parts: `resnet18` means all settings that have it.

    Raises:
        UserError: for an entry that the study does not have, with the nearest.
    """
    placed = study.runs.dropna(subset=["arm"])
    wanted: dict[str, Sequence[object] | None] = {
        "arm": _named("arms", arms, in_order(placed["arm"]), lambda arm: {arm.split(" (")[0]}),
        "setting": _named("settings", settings, sorted(set(placed["setting"]), key=natural), _parts),
        "batch": _numbered("batches", batches, placed["batch"]),
        "seed": _numbered("seeds", seeds, placed["seed"]),
    }
    chosen = {column: values for column, values in wanted.items() if values is not None}
    if not chosen:
        return study

    def kept(rows: pd.DataFrame) -> pd.DataFrame:
        inside = rows["arm"].isna() | rows[list(chosen)].isin(chosen).all(axis=1)
        return rows[inside].reset_index(drop=True)

    runs = _without_strange_gaps(kept(study.runs))
    names, titles = set(runs["run"]), set(runs["setting"])
    probes = {probe: kept(rows) for probe, rows in study.probes.items()}
    return replace(
        study,
        runs=runs,
        evaluations=kept(study.evaluations),
        probes={probe: rows for probe, rows in probes.items() if len(rows)},
        configs={run: config for run, config in study.configs.items() if run in names},
        provenance={run: found for run, found in study.provenance.items() if run in names},
        remarks={setting: remark for setting, remark in study.remarks.items() if setting in titles},
    )


def _without_strange_gaps(runs: pd.DataFrame) -> pd.DataFrame:
    """Without the gaps of a grid that only runs which are left out would span."""
    started = runs[runs["run"] != ""]
    kept = runs["run"] != ""
    for setting, here in started.groupby("setting"):
        spanned = {"setting": [setting], **{key: list(here[key]) for key in ("arm", "batch", "seed")}}
        kept |= runs[list(spanned)].isin(spanned).all(axis=1)
    return runs[kept].reset_index(drop=True)


def _parts(setting: str) -> set[str]:
    return set(setting.split(", "))


def _named(
    option: str, wanted: Sequence[str] | None, known: Sequence[str], parts: Callable[[str], set[str]]
) -> list[str] | None:
    """The names that are meant: the same one, else all that have every part of it."""
    if wanted is None:
        return None
    found = []
    for entry in wanted:
        meant = [entry] if entry in known else [name for name in known if _parts(entry) <= parts(name)]
        if not meant:
            raise _unknown(option, entry, known, {part for name in known for part in parts(name)})
        found += meant
    return found


def _numbered(option: str, wanted: Sequence[int] | None, column: Iterable[int]) -> list[int] | None:
    known = sorted({int(value) for value in column})
    for entry in wanted or ():
        if entry not in known:
            raise _unknown(option, entry, known, ())
    return None if wanted is None else list(wanted)


def _unknown(option: str, entry: object, known: Sequence[object], parts: Iterable[object]) -> UserError:
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    close = nearest(entry, [*known, *parts])
    return UserError(
        f"{option}: this study has no {entry}.\nIt has: {'; '.join(map(str, known[:8]))}{more}."
        + (f"\nDid you mean {close}?" if close else "")
    )
