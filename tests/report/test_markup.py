import pandas as pd

from normlab.report.markup import latex, latex_escape, markdown


def test_every_special_character_of_latex_is_escaped():
    assert latex_escape(r"a_b%c&d#e$f{g}~^\ ") == (
        r"a\_b\%c\&d\#e\$f\{g\}\textasciitilde{}\textasciicircum{}\textbackslash{} "
    )


def test_signs_are_mathematics_in_latex():
    assert latex_escape("-1.0 ± 2.0") == r"$-$1.0 $\pm$ 2.0"
    assert latex_escape("bn (eps=1e-05)") == "bn (eps=1e-05)"
    assert latex_escape("-- missing") == "-- missing"


def test_latex_is_a_booktabs_table_with_the_first_column_left():
    text = latex(pd.DataFrame({"arm": ["wn_trelu"], "batch 8": ["50.0"]}), "100 %", "tab:x")
    for part in (
        r"\caption{100 \%}",
        r"\label{tab:x}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"wn\_trelu & 50.0 \\",
        r"\bottomrule",
    ):
        assert part in text


def test_markdown_is_aligned_and_pipes_are_escaped():
    text = markdown(pd.DataFrame({"arm": ["a|b", "c"], "batch 8": ["1", "22.0 (n=1)"]}))
    assert text.splitlines() == [
        "| arm  |    batch 8 |",
        "| ---- | ---------: |",
        "| a\\|b |          1 |",
        "| c    | 22.0 (n=1) |",
    ]


def test_a_column_of_sentences_is_wrapped_and_left_aligned():
    long = "A sentence that is rather longer than a number with its interval."
    frame = pd.DataFrame({"arm": ["bn"], "claim": [long], "n": ["3"]})
    assert r"\begin{tabular}{lp{0.25\linewidth}r}" in latex(frame, "", "")
    assert markdown(frame).splitlines()[1] == f"| --- | {'-' * len(long)} | --: |"
