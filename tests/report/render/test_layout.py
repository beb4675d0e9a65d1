import math

from normlab.report.analysis.cells import TableCell
from normlab.report.render.layout import column_parts, filled

WIDTHS = {"arm": 10.0, "a": 20.0, "b": 20.0, "c": 50.0}


def test_columns_are_cut_where_the_room_ends_and_the_arms_are_repeated():
    assert list(column_parts(WIDTHS, ["arm"], 50)) == [["arm", "a", "b"], ["arm", "c"]]
    assert list(column_parts(WIDTHS, ["arm"], math.inf)) == [list(WIDTHS)]


def test_a_column_that_is_wider_than_the_room_stands_alone():
    assert list(column_parts(WIDTHS, ["arm"], 5)) == [["arm", "a"], ["arm", "b"], ["arm", "c"]]


def test_a_row_that_lacks_a_column_has_dashes_there():
    assert filled([{"arm": TableCell("bn"), "a": TableCell("1")}, {"arm": TableCell("none")}])[1] == {
        "arm": TableCell("none"),
        "a": TableCell("--"),
    }
