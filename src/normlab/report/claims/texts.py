"""Verdicts as texts: the table of a study, lines for the terminal, and the Markdown page of all claims."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import pandas as pd

from normlab.common.errors import exact, per_cent
from normlab.report.analysis.cells import NOTHING, Row, Table, TableCell, p_text
from normlab.report.claims.claims import Claim, Comparison, claims
from normlab.report.claims.judge import NOT_RUN, VERDICTS, ComparisonResult, Judgement
from normlab.report.render.markdown import markdown

_CAPTION = (
    "The papers' claims that these runs can speak to. Contrasts are paired by seed and averaged over the cells that"
    " have all their sides; effect: mean over seeds, ± half of the {percent} % t-interval (its ends: for factors, and"
    " where it is cut at what is possible); n counts seeds; p: t-test against what is expected (equality: two one-sided"
    " tests), with Holm's correction over all comparisons of this table; d_z: distance from what is expected in"
    " standard deviations of the"
    " contrast. supported: p at most {alpha} for all of a claim's comparisons (where one is enough: for one);"
    " contradicted: one of them the other way, or equal (where one is enough: all); equal: all within the smallest"
    " difference of interest (1 point, a factor of 1.5), by two one-sided tests with a correction of their own;"
    " inconclusive: none of these, or fewer than 3 seeds. Margins are ours;"
    " docs/statistics.md explains them."
)


def verdict_table(judgements: Sequence[Judgement], confidence: float) -> Table:
    """Return the verdicts of one study: tidy, one row per comparison; for a reader, by data set, network and budget."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for judgement in judgements:
        rows[judgement.place] += [{name: TableCell(text) for name, text in row.items()} for row in _rows(judgement)]
    results = [(judgement, result) for judgement in judgements for result in judgement.results]
    return Table(
        name="verdicts",
        title="Verdicts on the papers' claims",
        caption=_CAPTION.format(percent=per_cent(confidence), alpha=exact(results[0][1].alpha)),
        tidy=pd.DataFrame([_tidy_row(judgement, result) for judgement, result in results]),
        rows=rows,
        prose=("claim", "paper says", "remarks"),
        runs=sorted({run for _, result in results for run in result.runs}),
    )


def verdict_lines(judgements: Sequence[Judgement]) -> Iterator[tuple[str, str]]:
    """Yield each verdict with its claim, results and source on one line, for a terminal."""
    for judgement in judgements:
        several = len({result.comparison.measure for result in judgement.results}) > 1
        results = "; ".join(result_text(result, several) for result in judgement.results)
        yield judgement.verdict, f"{judgement.claim.sentence} [{results}; {_source(judgement.claim)}]"


def claims_page(judgements: Sequence[Judgement]) -> str:
    """Return every claim with its verdicts in every study, or with the command that runs it, as Markdown."""
    by_claim = judgements_by_claim(judgements)
    missing = [claim for claim, found in by_claim if not found]
    tally = Counter(judgement.verdict for judgement in judgements)
    counted = ", ".join(f"{tally[verdict]} {verdict}" for verdict in VERDICTS)
    levels = sorted({result.alpha for judgement in judgements for result in judgement.results})
    level = f" at p <= {' or '.join(map(exact, levels))}" if levels else ""
    sections = [
        "# The papers' claims",
        f"{len(by_claim)} claims; verdicts{level}: {counted}; {len(missing)} claims not run.",
    ]
    if len({judgement.study for judgement in judgements}) > 1:
        sections.append(
            "Runs of equal settings and seed are the same in all studies that have them: such studies' verdicts are not"
            " independent evidence."
        )
    for claim, found in by_claim:
        if found:
            sections += [f"## {claim.sentence}", f"{_source(claim)}. {claim.notes}".strip(), _markdown_rows(found)]
    if missing:
        sections.append("## Not run")
        sections.append("\n".join(f"- {claim.sentence} ({claim.paper})\n  `{claim.command}`" for claim in missing))
    return "\n\n".join(sections) + "\n"


def judgements_by_claim(judgements: Sequence[Judgement]) -> list[tuple[Claim, list[Judgement]]]:
    """Return every claim, in the order of claims.yaml, with its judgements: none if it was not run."""
    return [(claim, [each for each in judgements if each.claim.id == claim.id]) for claim in claims()]


def _markdown_rows(judgements: Sequence[Judgement]) -> str:
    rows = [
        {"study": "" if position else f"{judgement.study}: {judgement.place}", **row}
        for judgement in judgements
        for position, row in enumerate(_rows(judgement))
    ]
    return markdown(pd.DataFrame(rows).drop(columns=["claim", "paper says"])).rstrip()


def _tidy_row(judgement: Judgement, result: ComparisonResult) -> dict[str, object]:
    comparison = result.comparison
    return {
        "claim": judgement.claim.id,
        "paper": judgement.claim.paper,
        "dataset": judgement.dataset,
        "model": judgement.model,
        "budget": judgement.budget,
        "verdict": judgement.verdict,
        "measure": comparison.measure.full_label,
        "unit": "natural logarithm" if comparison.in_factors else "points" if comparison.measure.unit == "%" else "",
        "comparison": result.label,
        "expected": comparison.expect,
        "reference": comparison.reference,
        "margin": comparison.margin,
        "verdict_of_comparison": result.verdict,
        **result.interval._asdict(),
        "p": result.p,
        "p_holm": result.p_holm,
        "d_z": result.d_z,
        "paper_number": judgement.claim.number,
        "remarks": "; ".join(result.remarks),
    }


def _rows(judgement: Judgement) -> list[dict[str, str]]:
    rows = []
    for position, result in enumerate(judgement.results):
        rows.append(
            {
                "claim": "" if position else judgement.claim.sentence,
                "verdict": "" if position else judgement.verdict,
                "comparison": f"{result.label}, {result.comparison.measure.full_label}",
                "expected": format_expectation(result.comparison),
                "effect": format_effect(result),
                "n": str(result.interval.n),
                "p (Holm)": p_text(result.p_holm),
                "d_z": NOTHING if math.isnan(result.d_z) else f"{result.d_z:.1f}",
                "paper says": "" if position else judgement.claim.number,
                "remarks": "; ".join(result.remarks) or ("not run" if result.verdict == NOT_RUN else ""),
            }
        )
    return rows


def result_text(result: ComparisonResult, with_measure: bool) -> str:
    """Return what came out of a comparison, how sure it is, and remarks, in one line."""
    label = f"{result.label}, {result.comparison.measure.full_label}" if with_measure else result.label
    if result.verdict == NOT_RUN:
        return f"{label}: not run"
    tested = f", p {p_text(result.p_holm, '= ')}" if not math.isnan(result.p_holm) else ""
    remarks = f" ({'; '.join(result.remarks)})" if result.remarks else ""
    return f"{label}: {format_effect(result)}, n = {result.interval.n}{tested}{remarks}"


def _source(claim: Claim) -> str:
    return f"{claim.citation}; paper: {claim.number}"


def format_expectation(comparison: Comparison) -> str:
    """Return the expected value of a contrast, e.g. "above 0", "within 2 of 6", "below a factor of 0.9"."""
    reference, margin, unit = comparison.reference, comparison.margin, ""
    if comparison.in_factors:
        reference, margin, unit = math.exp(reference), math.exp(margin), "a factor of "
    if comparison.expect == "equal":
        return f"within {unit}{margin:g} of {reference:g}"
    return f"{'above' if comparison.expect == 'greater' else 'below'} {unit}{reference:g}{_percent(comparison)}"


def format_effect(result: ComparisonResult) -> str:
    """Return the mean and interval of a contrast, e.g. "+3.25 ± 0.80", "factor 1.8 (1.5 to 2.2)"."""
    interval = result.interval
    mean, low, high, n = interval
    if not n:
        return NOTHING
    if not math.isfinite(mean):
        return "infinite"
    known = not math.isnan(low)
    if result.comparison.in_factors:
        return f"factor {_exp(mean)}" + (f" ({_exp(low)} to {_exp(high)})" if known else "")
    shown = ".2f" if result.comparison.in_points else ".3g"
    sign = "+" if len(result.comparison.sides) > 1 else ""
    ends = f" [{low:{sign}{shown}}, {high:{sign}{shown}}]" if interval.is_cut else f" ± {high - mean:{shown}}"
    return f"{mean:{sign}{shown}}" + (ends if known else "") + _percent(result.comparison)


def _percent(comparison: Comparison) -> str:
    """Return the unit of a side's own share or accuracy; differences are in points."""
    return " %" if comparison.in_points and len(comparison.sides) == 1 else ""


def _exp(value: float) -> str:
    """Return e to a power, which a wide interval can push beyond the largest float."""
    return f"{math.exp(value):.3g}" if value < 700 else "inf"
