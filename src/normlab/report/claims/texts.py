"""Verdicts for a reader: the table of a study, its lines in the terminal, and the page of all claims."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pandas as pd

from normlab.report.analysis.cells import NOTHING, Cell, Row, Table, p_text
from normlab.report.claims.claims import Claim, Comparison, claims
from normlab.report.claims.judge import CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, Finding, Judgement
from normlab.report.render.markdown import markdown

_CAPTION = (
    "The papers' claims that these runs can speak to. Contrasts are paired by seed and averaged over the cells that"
    " have all their sides; effect: mean over seeds, ± half of the {percent:g} % t-interval (factors: ends of the"
    " interval); n counts seeds; p: t-test against what is expected (equality: two one-sided tests), with Holm's"
    " correction over all comparisons of this table; d_z: distance from what is expected in standard deviations of the"
    " contrast. supported: p at most {alpha:g} for all of a claim's comparisons (where one is enough: for one);"
    " contradicted: the same the other way; inconclusive: neither, or fewer than 3 seeds. Margins are ours;"
    " docs/statistics.md explains them."
)


def table(judgements: Sequence[Judgement], confidence: float) -> Table:
    """The verdicts of one study: tidy, one row per comparison; rows, by data set, network and budget."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for judgement in judgements:
        rows[judgement.place] += [{name: Cell(text) for name, text in row.items()} for row in _rows(judgement)]
    return Table(
        name="verdicts",
        title="Verdicts on the papers' claims",
        caption=_CAPTION.format(percent=100 * confidence, alpha=judgements[0].findings[0].alpha),
        tidy=pd.DataFrame([_tidy(judgement, finding) for judgement in judgements for finding in judgement.findings]),
        rows=rows,
        prose=("claim", "paper says", "remarks"),
        runs=sorted({run for judgement in judgements for finding in judgement.findings for run in finding.runs}),
    )


def lines(judgements: Sequence[Judgement]) -> Iterator[tuple[str, str]]:
    """Per claim its verdict, and what it is about and from: for a terminal."""
    for judgement in judgements:
        several = len({finding.comparison.measure for finding in judgement.findings}) > 1
        found = "; ".join(_told(finding, several) for finding in judgement.findings)
        yield judgement.verdict, f"{judgement.claim.sentence} [{found}; {_source(judgement.claim)}]"


def overview(judgements: Sequence[Judgement]) -> str:
    """Every claim with its verdicts in every study, or with the command that runs it, as Markdown."""
    tally = dict.fromkeys((SUPPORTED, CONTRADICTED, INCONCLUSIVE), 0)
    sections, missing = [], []
    for claim in claims():
        found = [judgement for judgement in judgements if judgement.claim == claim]
        if not found:
            missing.append(claim)
            continue
        for judgement in found:
            tally[judgement.verdict] += 1
        rows = [
            {"study": f"{judgement.study}: {judgement.place}" if first else "", **row}
            for judgement in found
            for first, row in zip((True, *[False] * len(judgement.findings)), _rows(judgement), strict=False)
        ]
        frame = pd.DataFrame(rows).drop(columns=["claim", "paper says"])
        sections += [f"## {claim.sentence}", f"{_source(claim)}. {claim.notes}".strip(), markdown(frame).rstrip()]
    counted = ", ".join(f"{number} {verdict}" for verdict, number in tally.items())
    levels = sorted({finding.alpha for judgement in judgements for finding in judgement.findings})
    level = f" at p <= {' or '.join(f'{alpha:g}' for alpha in levels)}" if levels else ""
    head = [
        "# The papers' claims",
        f"{len(claims())} claims; verdicts{level}: {counted}; {len(missing)} claims not run.",
    ]
    if len({judgement.study for judgement in judgements}) > 1:
        head.append(
            "Runs of equal settings and seed are the same in all studies that have them: such studies' verdicts are not"
            " independent evidence."
        )
    if missing:
        sections.append("## Not run")
        sections.append("\n".join(f"- {claim.sentence} ({claim.paper})\n  `{claim.command}`" for claim in missing))
    return "\n\n".join([*head, *sections]) + "\n"


def not_run(judgements: Sequence[Judgement]) -> list[Claim]:
    """The claims without a verdict."""
    judged = {judgement.claim.id for judgement in judgements}
    return [claim for claim in claims() if claim.id not in judged]


def _tidy(judgement: Judgement, finding: Finding) -> dict[str, object]:
    comparison = finding.comparison
    return {
        "claim": judgement.claim.id,
        "paper": judgement.claim.paper,
        "dataset": judgement.dataset,
        "model": judgement.model,
        "budget": judgement.budget,
        "verdict": judgement.verdict,
        "measure": comparison.measure.full_label,
        "unit": "natural logarithm" if comparison.measure.log else "points" if comparison.measure.unit == "%" else "",
        "comparison": finding.label,
        "expected": comparison.expect,
        "reference": comparison.reference,
        "margin": comparison.margin,
        "verdict_of_comparison": finding.verdict,
        **finding.interval._asdict(),
        "p": finding.p,
        "p_holm": finding.p_holm,
        "d_z": finding.d_z,
        "paper_number": judgement.claim.number,
        "remarks": "; ".join(finding.remarks),
    }


def _rows(judgement: Judgement) -> list[dict[str, str]]:
    rows = []
    for position, finding in enumerate(judgement.findings):
        rows.append(
            {
                "claim": "" if position else judgement.claim.sentence,
                "verdict": "" if position else judgement.verdict,
                "comparison": f"{finding.label}, {finding.comparison.measure.full_label}",
                "expected": expected(finding.comparison),
                "effect": effect(finding),
                "n": str(finding.interval.n),
                "p (Holm)": p_text(finding.p_holm),
                "d_z": NOTHING if math.isnan(finding.d_z) else f"{finding.d_z:.1f}",
                "paper says": "" if position else judgement.claim.number,
                "remarks": "; ".join(finding.remarks) or ("not run" if finding.verdict == NOT_RUN else ""),
            }
        )
    return rows


def _told(finding: Finding, with_measure: bool) -> str:
    label = f"{finding.label}, {finding.comparison.measure.full_label}" if with_measure else finding.label
    if finding.verdict == NOT_RUN:
        return f"{label}: not run"
    tested = f", p {p_text(finding.p_holm, '= ')}" if not math.isnan(finding.p_holm) else ""
    remarks = f" ({'; '.join(finding.remarks)})" if finding.remarks else ""
    return f"{label}: {effect(finding)}, n = {finding.interval.n}{tested}{remarks}"


def _source(claim: Claim) -> str:
    place = "" if claim.place == "n/a" else f", {claim.place}"
    return f"{claim.paper}{place}; paper: {claim.number}"


def expected(comparison: Comparison) -> str:
    """What a claim expects of a contrast, e.g. "above 0", "within 2 of 6", "below a factor of 0.9"."""
    if comparison.measure.log:
        reference, margin = math.exp(comparison.reference), math.exp(comparison.margin)
        if comparison.expect == "equal":
            return f"within a factor of {margin:g} of {reference:g}"
        return f"{'above' if comparison.expect == 'greater' else 'below'} a factor of {reference:g}"
    if comparison.expect == "equal":
        return f"within {comparison.margin:g} of {comparison.reference:g}"
    return f"{'above' if comparison.expect == 'greater' else 'below'} {comparison.reference:g}{_percent(comparison)}"


def effect(finding: Finding) -> str:
    """A contrast's mean and interval in the measure's unit, e.g. "+3.25 ± 0.80", "factor 1.8 (1.5 to 2.2)"."""
    mean, low, high, n = finding.interval
    if not n:
        return NOTHING
    if not math.isfinite(mean):
        return "infinite"
    interval = not math.isnan(low)
    if finding.comparison.measure.log:
        return f"factor {_exp(mean)}" + (f" ({_exp(low)} to {_exp(high)})" if interval else "")
    shown = ".2f" if finding.comparison.measure.unit == "%" else ".3g"
    sign = "+" if len(finding.comparison.sides) > 1 else ""
    return f"{mean:{sign}{shown}}" + (f" ± {high - mean:{shown}}" if interval else "") + _percent(finding.comparison)


def _percent(comparison: Comparison) -> str:
    """Differences are in points, a side's own share or accuracy in per cent."""
    return " %" if comparison.measure.unit == "%" and len(comparison.sides) == 1 else ""


def _exp(value: float) -> str:
    """Of a logarithm, which a wide interval can push beyond what a float holds."""
    return f"{math.exp(value):.3g}" if value < 700 else "inf"
