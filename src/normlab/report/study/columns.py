"""The rows of files as columns, and those of all runs as one tidy DataFrame."""

import itertools
import json
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
import pandas as pd

TEXTS = ("layer",)  # columns that hold texts

# By name, in the order of the rows' keys: a float64 array, nan where there is no number; or, where a row has a text or
# a list, all values as JSON has them; of `TEXTS`, texts. Empty for a file without rows.
Columns = dict[str, Any]


def as_arrays(columns: Mapping[str, Sequence[Any]]) -> Columns:
    """Return the columns of one file as they are kept."""
    return {name: _column(name, list(values)) for name, values in columns.items()}


def _column(name: str, values: list[Any]) -> Any:
    if name in TEXTS:
        return [value if isinstance(value, str | float | None) else json.dumps(value) for value in values]
    numbers = set(map(type, values)) <= {float, int, bool, NoneType}
    return np.array(values, dtype=float) if numbers else values


def length(columns: Columns) -> int:
    """Return the number of rows."""
    return len(columns["step"]) if columns else 0  # every row has its step


def tidy(measured: Mapping[str, Columns], runs: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """Return the rows of all runs, each behind its run's row, in the order of the key.

    A run that went on from a checkpoint may have measured a step twice: of rows with an equal key the last is kept.
    A column of a probe may hold lists, if it holds nothing else. Whatever else is no number is nan.

    Args:
        measured: by run; those of runs that `runs` lacks are left out.
        runs: one row per run, with the column run.
        key: run, and the columns in which its rows differ.
    """
    files = [columns for columns in measured.values() if columns]
    names = list(dict.fromkeys(itertools.chain.from_iterable(files))) or list(key[1:])
    every = pd.DataFrame({name: _joined(name, files, lists="epoch" not in key) for name in names})
    position = {run: i for i, run in enumerate(runs["run"])}
    of_runs = [position.get(run, -1) for run in measured]
    order = pd.DataFrame({"run": np.repeat(np.array(of_runs, int), [length(rows) for rows in measured.values()])})
    order = order.assign(**{name: every[name] for name in key if name in every})
    if -1 in of_runs or not _ascend(order):
        order = order[order["run"] >= 0].drop_duplicates(keep="last").sort_values([*order])
        every = every.loc[order.index].reset_index(drop=True)
    return pd.concat([runs.iloc[order["run"]].reset_index(drop=True), every], axis=1)


def _ascend(order: pd.DataFrame) -> bool:
    """Return whether the rows are in order as they are, none of them twice: the usual case, and quick to see."""
    if len(order.columns) > 2:
        return False
    run, time = order.to_numpy().T
    return bool(((np.diff(run) > 0) | (np.diff(run) == 0) & (np.diff(time) > 0)).all())


def _joined(name: str, files: Sequence[Columns], *, lists: bool) -> Any:
    """Return one column of all files, nan where one lacks it: texts, lists where they are allowed, or float64."""
    parts = [columns[name] if name in columns else np.full(length(columns), np.nan) for columns in files]
    if not any(isinstance(part, list) for part in parts):
        return np.concatenate([np.empty(0), *parts])
    values = pd.Series(list(itertools.chain.from_iterable(parts)))
    kinds = {type(value) for value in values if value is not None and value == value}  # nan is not itself
    return values if name in TEXTS or (lists and kinds == {list}) else as_numbers(values)


def as_numbers(values: pd.Series) -> pd.Series:
    """Return float64 values, nan for all that are no numbers."""
    if values.dtype == object:
        values = values.where(values.map(lambda value: isinstance(value, str | float | int)))
    return pd.to_numeric(values, errors="coerce").astype(float)
