"""Which cells of a table stand out: the best mean of a batch size, and those that its interval does not exclude."""

import math
from collections.abc import Mapping

import pandas as pd

CLOSE = " Underlined: others within the best one's interval."


def rule(what: str, tidy: pd.DataFrame) -> str:
    """What is bold, as a sentence: "" where nothing can be. Arms that do not compete are told of if there are any."""
    rivals = tidy[_complete(tidy)].groupby(["setting", "batch", "quantity"]).size()
    if not (rivals > 1).any():
        return ""
    among = "" if _complete(tidy).all() else ", among arms of whose finished runs none diverged or lacks the value"
    return f" Bold: at each batch size the best {what}{among}."


def standings(tidy: pd.DataFrame, higher_is_better: Mapping[str, bool]) -> list[str]:
    """Of each row of a tidy frame: "best", "close" or "". It is compared with the rows of its setting, batch size and
    quantity.

    The best are all whose mean equals the best one; close are means within a best one's t-interval, which one seed
    does not have. Only rows compete whose finished runs are all part of the mean: that of an arm of which some
    diverged, or did not get there, is the mean of survivors. Missing runs are no reason: they say nothing of the arm.
    Where fewer than two rows compete, none stands out.

    Args:
        tidy: with setting, batch, quantity, mean, low, high, n, done, diverged.
        higher_is_better: by quantity; others have no best.
    """
    found = pd.Series("", index=tidy.index)
    for (_, _, quantity), rows in tidy[_complete(tidy)].groupby(["setting", "batch", "quantity"], sort=False):
        if str(quantity) not in higher_is_better or len(rows) < 2:
            continue
        top = rows["mean"].max() if higher_is_better[str(quantity)] else rows["mean"].min()
        best = rows["mean"].map(lambda mean, top=top: math.isclose(mean, top, rel_tol=1e-9))
        for low, high in zip(rows["low"][best], rows["high"][best], strict=True):
            found[rows.index[rows["mean"].between(low, high)]] = "close"
        found[rows.index[best]] = "best"
    return list(found)


def _complete(tidy: pd.DataFrame) -> pd.Series:
    """Whether all finished runs of a row's cell are part of its mean."""
    return (tidy["n"] > 0) & (tidy["n"] == tidy["done"]) & (tidy["diverged"] == 0) & tidy["mean"].map(math.isfinite)
