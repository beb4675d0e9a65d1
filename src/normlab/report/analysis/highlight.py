"""Highlight cells of a table: the best mean of a batch size, and those that its interval does not exclude."""

import math
from collections.abc import Mapping

import pandas as pd

CLOSE = " Underlined: others within the best one's interval."
_RIVALS = ["setting", "batch", "quantity"]


def highlight_rule(mean: str, tidy: pd.DataFrame) -> str:
    """Return a sentence on what is bold, "" where nothing can be; with the arms that do not compete if there are any.

    Args:
        mean: in words, the mean that is compared.
        tidy: the frame that `highlights` takes.
    """
    competing = complete(tidy)
    if not (tidy[competing].groupby(_RIVALS).size() > 1).any():
        return ""
    among = "" if competing.all() else ", among arms of whose finished runs none diverged or lacks the value"
    return f" Bold: at each batch size the best {mean}{among}."


def highlights(tidy: pd.DataFrame, higher_is_better: Mapping[str, bool]) -> list[str]:
    """Return for each row of a tidy frame "best", "close" or "", compared within its setting, batch size and quantity.

    The best are all whose mean equals the best one; close are means within a best one's t-interval, which one seed
    does not have. Only rows compete whose finished runs are all part of the mean: that of an arm of which some
    diverged, or did not get there, is the mean of survivors. Missing runs are no reason.
    Where fewer than two rows compete, none stands out.

    Args:
        tidy: with setting, batch, quantity, mean, low, high, n, done, diverged.
        higher_is_better: by quantity; others have no best.
    """
    marks = pd.Series("", index=tidy.index)
    for (_, _, quantity), rows in tidy[complete(tidy)].groupby(_RIVALS, sort=False):
        if str(quantity) not in higher_is_better or len(rows) < 2:
            continue
        top = rows["mean"].max() if higher_is_better[str(quantity)] else rows["mean"].min()
        best = rows["mean"].map(lambda mean, top=top: math.isclose(mean, top, rel_tol=1e-9))
        for low, high in zip(rows["low"][best], rows["high"][best], strict=True):
            marks[rows.index[rows["mean"].between(low, high)]] = "close"
        marks[rows.index[best]] = "best"
    return list(marks)


def complete(tidy: pd.DataFrame) -> pd.Series:
    """Return whether all finished runs of a row's cell are part of its mean."""
    return (tidy["n"] > 0) & (tidy["n"] == tidy["done"]) & (tidy["diverged"] == 0) & tidy["mean"].map(math.isfinite)
