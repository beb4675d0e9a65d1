"""Every study of a folder on one Markdown page: verdicts first, then the tables and figures of each study."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from normlab.common.installation import command_name
from normlab.report.analysis.cells import Table
from normlab.report.claims.judge import CONTRADICTED, INCONCLUSIVE, SUPPORTED, Judgement
from normlab.report.claims.texts import claims_page, judgements_by_claim
from normlab.report.render.description import facts, run_counts
from normlab.report.render.markdown import caption, escaped, markdown, markdown_table, notes, paragraphs
from normlab.report.study.load import Study

_LEFT_OUT = ("convergence", "epochs_to_accuracy", "seconds_to_accuracy", "cost", "verdicts")
_INTRODUCTION = """\
This page is made by `{report} results` from the records of the studies below; nothing on it is typed but the
sections called "What we checked". A verdict holds for the data set, network and budget that stand beside it, and for no
more: most of these studies are far smaller than the papers'. docs/statistics.md says how verdicts are reached, and
what "inconclusive" means. All margins are ours. "n/a": the paper's number is not known to us."""


def results_page(
    studies: Sequence[tuple[Study, Sequence[Table], Sequence[tuple[str, str]]]], judgements: Sequence[Judgement]
) -> str:
    """Return the page.

    Args:
        studies: each with its tables, and with path (relative to the page) and caption of its figures.
        judgements: of all studies.
    """
    details = re.sub(r"^(#+) ", r"#\1 ", claims_page(judgements), flags=re.MULTILINE)
    introduction = _INTRODUCTION.format(report=command_name("report"))
    lines = ["# Results", introduction, "## At a glance", markdown(_summary(judgements)).rstrip()]
    lines += [details.rstrip(), "## The studies"]
    for study, tables, figures in studies:
        lines += _section(study, tables, figures)
    return paragraphs(lines)


def _section(study: Study, tables: Sequence[Table], figures: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield from (f"### {escaped(study.name)}", run_counts(study))
    yield from (f"- {escaped(fact)}" for fact in facts(study))
    for table in tables:
        if table.name not in _LEFT_OUT:
            yield from (f"#### {escaped(table.title)}", *markdown_table(table), caption(table))
    for path, words in figures:
        yield from (f"![{escaped(Path(path).stem)}]({quote(path, errors='surrogateescape')})", escaped(words))
    if study.notes:
        yield from ("#### What we checked", notes(study.notes))


def _summary(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """Return one row per claim: the studies by verdict."""
    rows = []
    for claim, found in judgements_by_claim(judgements):
        row = {"claim": claim.sentence, "paper": claim.paper}
        for verdict in (SUPPORTED, CONTRADICTED, INCONCLUSIVE):
            row[verdict] = "; ".join(dict.fromkeys(_place(each) for each in found if each.verdict == verdict))
        rows.append(row if found else row | {INCONCLUSIVE: "not run"})
    return pd.DataFrame(rows)


def _place(judgement: Judgement) -> str:
    numbers = {result.interval.n for result in judgement.results if result.interval.n}
    seeds = f", n = {'/'.join(map(str, sorted(numbers)))}" if numbers else ""
    tuned = f"; {judgement.tuned}" if judgement.tuned else ""
    return f"{judgement.study} ({judgement.dataset}, {judgement.model}{seeds}{tuned})"
