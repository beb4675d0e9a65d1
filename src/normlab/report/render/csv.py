"""Tables as CSV, which spreadsheets open, too."""

import pandas as pd

from normlab.common.terminal import plain

_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # what makes a spreadsheet compute a text


def as_csv(tidy: pd.DataFrame) -> str:
    """Return a frame as CSV with numbers in full; a text that a spreadsheet would compute has a ' in front."""
    return tidy.apply(_harmless).to_csv(index=False, lineterminator="\n")


def _harmless(column: pd.Series) -> pd.Series:
    return column if pd.api.types.is_numeric_dtype(column) else column.map(_as_text)


def _as_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) or text[:1].isspace() else text
