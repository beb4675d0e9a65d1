import csv
import io

import numpy as np
import pandas as pd
import pytest

from normlab.report.render.csv import as_csv


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", " =1", "\r=1", "\uff1d1", "\x1b[0m=1"]
)
def test_no_cell_is_a_formula(text):
    written = as_csv(pd.DataFrame({"arm": [text], "mean": [-0.5]}))
    arm, mean = list(csv.reader(io.StringIO(written)))[1]
    assert arm.startswith("'")
    assert mean == "-0.5"


def test_numbers_and_plain_texts_are_read_back_as_they_were():
    frame = pd.DataFrame(
        {
            "arm": ["bn", "gn (groups=4)", "it's"],
            "batch": pd.array([1, 2, None], dtype="Int64"),
            "mean": [-0.1, np.nan, -np.inf],
            "p": [1e-300, -0.0, 3.0000000000000004],
            "mixed": [None, "a", -1.5],
        }
    )
    read = pd.read_csv(io.StringIO(as_csv(frame)))
    assert as_csv(frame) == frame.to_csv(index=False, lineterminator="\n")
    pd.testing.assert_frame_equal(read.drop(columns="mixed"), frame.drop(columns="mixed"), check_dtype=False)
