"""Every study of a folder on one page: verdicts first, then what each study measured."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from normlab.common.installation import called
from normlab.report.analysis.cells import Table
from normlab.report.claims import texts as verdict_texts
from normlab.report.claims.claims import claims
from normlab.report.claims.judge import CONTRADICTED, INCONCLUSIVE, SUPPORTED, Judgement
from normlab.report.render.markdown import markdown, markdown_table
from normlab.report.render.page import facts, paragraphs
from normlab.report.study.load import Study

NOTES = "notes.md"  # what a person has to say about a study, in its folder
_LEFT_OUT = ("convergence", "epochs_to_accuracy", "seconds_to_accuracy", "cost", "verdicts")
_INTRODUCTION = """\
This page is made by `{report} results` from the records of the studies below; nothing on it is typed but the
sections called "What we checked". A verdict holds for the data set, network and budget that stand beside it, and for no
more: most of these studies are far smaller than the papers'. docs/statistics.md says how verdicts are reached, and
what "inconclusive" means. All margins are ours. "n/a": the paper's number is not known to us."""


def results_page(
    studies: Sequence[tuple[Study, Sequence[Table], Sequence[tuple[str, str]]]], judgements: Sequence[Judgement]
) -> str:
    """The page as Markdown.

    Args:
        studies: each with its tables, and with path (as seen from the page) and caption of its figures.
        judgements: of all studies.
    """
    details = re.sub(r"^(#+) ", r"#\1 ", verdict_texts.claims_page(judgements), flags=re.MULTILINE)
    introduction = _INTRODUCTION.format(report=called("report"))
    lines = ["# Results", introduction, "## At a glance", markdown(_summary(judgements)).rstrip()]
    lines += [details.rstrip(), "## The studies"]
    for study, tables, drawn in studies:
        lines += _section(study, tables, drawn)
    return paragraphs(lines)


def _section(study: Study, tables: Sequence[Table], drawn: Sequence[tuple[str, str]]) -> Iterator[str]:
    states = ", ".join(f"{number} {state}" for state, number in study.states().items() if number)
    yield f"### {study.name}"
    yield f"{len(study.runs)} runs: {states}."
    yield from (f"- {fact}" for fact in facts(study))
    for table in tables:
        if table.name in _LEFT_OUT:
            continue
        yield f"#### {table.title}"
        yield from markdown_table(table)
        yield table.caption + table.rule
    for path, caption in drawn:
        yield from (f"![{Path(path).stem}]({path})", caption)
    notes = study.folder / NOTES
    if notes.exists():
        yield from ("#### What we checked", notes.read_text(encoding="utf-8", errors="replace").strip())


def _summary(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """One row per claim: the studies by verdict."""
    rows = []
    for claim in claims():
        found = [judgement for judgement in judgements if judgement.claim == claim]
        row = {"claim": claim.sentence, "paper": claim.paper}
        for verdict in (SUPPORTED, CONTRADICTED, INCONCLUSIVE):
            row[verdict] = "; ".join(dict.fromkeys(_where(j) for j in found if j.verdict == verdict))
        rows.append(row | ({} if found else {INCONCLUSIVE: "not run"}))
    return pd.DataFrame(rows)


def _where(judgement: Judgement) -> str:
    numbers = {finding.interval.n for finding in judgement.results if finding.interval.n}
    seeds = f", n = {'/'.join(map(str, sorted(numbers)))}" if numbers else ""
    return f"{judgement.study} ({judgement.dataset}, {judgement.model}{seeds})"
