import pandas as pd

from normlab.report.analysis.cells import Table, TableCell
from normlab.report.render.markdown import markdown, markdown_table


def test_markdown_is_aligned_and_pipes_are_escaped():
    text = markdown(pd.DataFrame({"arm": ["a|b", "c"], "batch 8": ["1", "22.0 (n=1)"]}))
    assert text.splitlines() == [
        "| arm  |    batch 8 |",
        "| ---- | ---------: |",
        "| a\\|b |          1 |",
        "| c    | 22.0 (n=1) |",
    ]


def test_a_column_of_sentences_is_left_aligned():
    long = "A sentence that is rather longer than a number with its interval."
    frame = pd.DataFrame({"arm": ["bn"], "claim": [long], "n": ["3"]})
    assert markdown(frame).splitlines()[1] == f"| --- | {'-' * len(long)} | --: |"


def test_in_markdown_the_best_number_is_bold_without_its_notes_and_a_close_one_is_plain():
    rows = [
        {"arm": TableCell("bn"), "batch 8": TableCell("91.2 ± 0.8 (n=3)", highlight="best")},
        {"arm": TableCell("none"), "batch 8": TableCell("91.0 ± 0.8 (n=3)", highlight="close")},
    ]
    setting, pipes = markdown_table(Table("accuracy", "Accuracy", "", pd.DataFrame(), {"digits": rows}))
    assert setting == "**digits**"
    assert pipes.splitlines()[2:] == [
        "| bn   | **91.2 ± 0.8** (n=3) |",
        "| none |     91.0 ± 0.8 (n=3) |",
    ]
