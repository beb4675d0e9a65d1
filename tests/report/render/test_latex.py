"""Tables for papers. The oracle of what compiles is pdflatex itself, where it is installed."""

import re
import subprocess

import pandas as pd
import pytest
from tools import require_latex

from normlab import report
from normlab.report.analysis.cells import Table, TableCell
from normlab.report.render.latex import latex, latex_escape

UGLY = [
    *(r"a\b%c_d#e&f{g}~^$<h>|`'", "±‖²∞ \u03b3₂Δ", "Müller-Łódź-ïçß", "漢字", "[x]", "*y", "--dash--", "?`!`"),
    "a_very_long_name_without_any_space_that_nobody_would_ever_type_but_in_a_test",
]


def table(*rows, caption="Accuracy, in %.", rule="", prose=()):
    return Table("accuracy", "Accuracy", caption, pd.DataFrame(), {"digits": rows}, rule, prose)


def row(arm, *texts, highlight=""):
    return {"arm": TableCell(arm)} | {f"batch {8 * 2**i}": TableCell(t, 1.0, 8, highlight) for i, t in enumerate(texts)}


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        (r"a_b%c&d#e$f{g}~^\ ", r"a\_b\%c\&d\#e\$f\{g\}\textasciitilde{}\textasciicircum{}\textbackslash{} "),
        ("-1.0 ± 2.0", r"$-$1.0 $\pm$ 2.0"),  # signs are mathematics
        ("bn (eps=1e-05)", "bn (eps=1e-05)"),
        ("-- missing", "-- missing"),
        ("é", r"\'{e}"),
        ("Łódź", r"\L{}\'{o}d\'{z}"),
        ("ï", r"\"{\i}"),
        ("‖", r"$\Vert$"),
        ("x²", "x$^{2}$"),
        ("∞", r"$\infty$"),
        ("\u03b3", r"$\gamma$"),
        ("漢", "{}[U+6F22]"),
        ("a--b", "a-{}-b"),
        ("--a", "-{}-a"),
        ("1\u20132", r"1\textendash{}2"),
        ("a\tb\nc", "a b c"),
        ("\x07", "{}[U+0007]"),
    ],
)
def test_a_letter_is_escaped_is_what_any_font_has_or_its_number(text, escaped):
    assert latex_escape(text) == escaped


def test_latex_is_a_booktabs_table_with_the_first_column_left():
    text = latex(table(row("wn_trelu", "50.0")), "digits", "tab:a%b/c_d")
    for part in (
        r"\begin{table}",
        r"\caption{Accuracy. digits. Accuracy, in \%.}",
        r"\label{tab:a+25+b/c_d}",
        r"\begin{tabular}{@{}lr@{}}",
        r"\toprule",
        r"wn\_trelu & 50.0 \\",
        r"\bottomrule",
    ):
        assert part in text


def test_the_best_number_is_bold_and_a_close_one_underlined_without_their_notes():
    best = row("bn", "91.2 ± 0.8 (n=3)", highlight="best")
    close = row("none", "91.0 ± 0.8 (n=2, 1 of 3 missing)", highlight="close")
    text = latex(table(best, close, rule=" Bold: best."), "digits", "tab:x")
    assert r"bn & \textbf{91.2 $\pm$ 0.8} (n=3) \\" in text
    assert r"none & \underline{91.0 $\pm$ 0.8} (n=2, 1 of 3 missing) \\" in text
    assert "Bold: best. Underlined:" in text


def test_the_same_number_of_seeds_is_told_once_in_the_caption():
    text = latex(table(row("bn", "91.2 ± 0.8 (n=3)"), row("none", "-- missing")), "digits", "tab:x")
    assert r"bn & 91.2 $\pm$ 0.8 \\" in text
    assert "in \\%. 3 seeds.}" in text
    assert r"none & -- missing \\" in text


def test_different_numbers_of_seeds_and_what_diverged_stay_in_the_cells():
    text = latex(table(row("bn", "91.2 (n=1, 1 of 2 diverged)"), row("none", "90.0 ± 1.0 (n=2)")), "digits", "tab:x")
    assert "(n=1, 1 of 2 diverged)" in text
    assert "(n=2)" in text
    assert "seeds." not in text
    alone = latex(table(row("bn", "91.2 (n=1, 1 of 2 diverged)")), "digits", "tab:x")
    assert r"bn & 91.2 (1 of 2 diverged) \\" in alone
    assert "1 seed.}" in alone


def test_a_wide_table_is_over_both_columns_and_a_wider_one_in_parts_that_repeat_the_arms():
    wide = latex(table(row("bn", *["91.2 ± 0.8 (n=3)", "91.2 ± 0.8 (n=2)"] * 2)), "digits", "tab:x")
    assert r"\begin{table*}" in wide
    assert wide.count(r"\toprule") == 1
    wider = latex(table(row("bn", *["91.2 ± 0.8 (n=3)", "91.2 ± 0.8 (n=2)"] * 4)), "digits", "tab:x")
    assert wider.count(r"\toprule") == wider.count("bn & ") == 2
    for i in range(8):
        assert len(re.findall(rf"batch {8 * 2**i}\b", wider)) == 1


def test_a_table_that_no_page_can_hold_is_continued_in_further_ones():
    text = latex(table(*(row(f"arm{i}", "1.0") for i in range(120))), "digits", "tab:x")
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 4
    assert text.count("Continued") == 3
    assert text.count(r"\label") == 1
    assert [int(i) for i in re.findall(r"^arm(\d+) ", text, re.MULTILINE)] == list(range(120))


def test_a_long_name_may_break_behind_signs_and_not_within_an_accent():
    name = "m\u0101ori_of_a_long_name,with=many_signs_that_no_column_of_a_paper_holds"
    text = latex(table(row(name, *["91.2 ± 0.8 (n=3)"] * 2)), "digits", "tab:x")
    assert r"m\={a}ori\_\allowbreak{}of" in text
    assert r"name,\allowbreak{}with=\allowbreak{}many" in text


@pytest.mark.slow
def test_every_table_of_a_study_with_ugly_names_compiles_and_fits(add_run, add_probe, tmp_path):
    require_latex()
    for norm in ("bn", "none", *UGLY):
        for batch in (8, 32, 128):
            for seed in range(3):
                lost = (norm, batch, seed) == ("none", 32, 1)
                accuracies, state = (0.2, 0.8, 0.9 + 0.012 * seed), "diverged" if lost else "done"
                run = add_run(norm, batch, seed, accuracies, state=state, budget="%_")
                steps = [{"step": s, "layer": "a", "position": 0, "norm": 1.0 + s, "weight_norm": 2.0} for s in (1, 2)]
                add_probe(run, "gradients", steps)
    folder = report.build("study", tmp_path / "outputs", report.options(figures=False)).parent
    tables = sorted(folder.glob("*.tex"))
    assert {"accuracy", "difference", "verdicts", "probe_gradients"} <= {path.stem for path in tables}
    inputs = "\n".join(rf"\input{{{path}}}\clearpage" for path in tables)
    for layout in ("onecolumn", "twocolumn"):
        (tmp_path / "paper.tex").write_text(
            rf"\documentclass[{layout}]{{article}}\usepackage[utf8]{{inputenc}}\usepackage{{booktabs}}"
            rf"\begin{{document}}{inputs}\end{{document}}"
        )
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper.tex"]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=60)
        log = (tmp_path / "paper.log").read_text(errors="replace")
        assert made.returncode == 0, log[-2000:]
        assert "Missing character" not in log
        assert "Float too large" not in log
        too_wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log)]
        assert max(too_wide, default=0) < 6, re.findall(r"Overfull.*", log)
