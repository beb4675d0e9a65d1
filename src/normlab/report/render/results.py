"""Every study of a folder in Markdown: a page of all verdicts by paper, and a page of tables and figures per study."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pandas as pd

from normlab.common.errors import count
from normlab.common.installation import command_name
from normlab.report.analysis.cells import NOTHING, Table
from normlab.report.claims.claims import Claim, claims
from normlab.report.claims.judge import (
    CONTRADICTED,
    EQUAL,
    INCONCLUSIVE,
    NOT_RUN,
    SUPPORTED,
    VERDICTS,
    ComparisonResult,
    Judgement,
)
from normlab.report.claims.texts import format_effect, format_expectation, judgements_by_claim, result_text
from normlab.report.render.description import departures, experiment_of, facts, question, run_counts
from normlab.report.render.html.svg import PageFigure
from normlab.report.render.markdown import caption, escaped, markdown, markdown_table, notes, paragraphs
from normlab.report.study.load import Study

MARKS = {SUPPORTED: "✓", CONTRADICTED: "✗", EQUAL: "=", INCONCLUSIVE: "?", NOT_RUN: NOTHING}
# The figure by which the page shows the studies of an experiment, in the order of the page: the first that a study has.
MAIN_FIGURES = {
    "peerthum2023_accuracy": ("accuracy_against_batch", "accuracy_by_condition"),
    "gitman2017_imagenet": ("accuracy_by_condition",),
    "ioffe2017_noniid": ("accuracy_by_condition",),
    "davis2021_scale": ("accuracy_against_option",),
    "santurkar2018_landscape": ("landscape",),
    "small_batch": ("accuracy_against_norm_batch",),
}
_LEFT_OUT = ("convergence", "epochs_to_accuracy", "seconds_to_accuracy", "cost", "seeds")
_BUDGETS = ("paper", "laptop")  # those that can answer, the one that answers more first
OTHERS = "Studies of no paper"
_INTRODUCTION = (
    "Every result on this page is computed by `{report} results` from the records of the studies; only the paragraphs"
    " on what came out and what we checked are written by people. {sizes} A verdict holds for the data set, network and"
    " length of its study, which stand with it, and for no more. All margins are ours. docs/statistics.md says how"
    " verdicts are reached. n/a: the paper's number is not known to us.{left_out}"
)


@dataclass(frozen=True)
class StudyPage:
    """A study with what its page shows.

    Attributes:
        tables: all of them, that of the metric first.
        figures: with addresses relative to the page of all studies; the main one first.
        judgements: the verdicts that it allows.
    """

    study: Study
    tables: Sequence[Table]
    figures: Sequence[PageFigure]
    judgements: Sequence[Judgement]

    @property
    def experiment(self) -> str:
        """Return the experiment of its runs; "" where they are of none, or of several."""
        return experiment_of(self.study)

    @property
    def budgets(self) -> set[str]:
        """Return the budgets that its runs name."""
        return {str(config["budget"]) for config in self.study.configs.values() if config.get("budget")}

    @property
    def paper(self) -> str:
        """Return the paper whose experiment it is; "" for one of none."""
        return next((claim.paper for claim in claims() if self.experiment in claim.experiments), "")


class Answer(NamedTuple):
    """A claim with its verdict in the study made for it and in others.

    Of several the main one is the longest, and of these that under the experiment's own name. Where no study was made
    for it, the main one is the first of those that speak to it.
    """

    claim: Claim
    main: Judgement | None
    others: Sequence[Judgement]

    @property
    def verdict(self) -> str:
        """Return the verdict of the main study."""
        return self.main.verdict if self.main else NOT_RUN


def answers_to_claims(pages: Sequence[StudyPage]) -> list[Answer]:
    """Return every claim, in the order of claims.yaml, with its verdicts."""
    experiments = {page.study.name: page.experiment for page in pages}

    def rank(claim: Claim, judgement: Judgement) -> tuple[bool, int, int, bool]:
        experiment, budget = experiments[judgement.study], judgement.budget
        return (
            budget == "smoke",
            claim.experiments.index(experiment) if experiment in claim.experiments else len(claim.experiments),
            _BUDGETS.index(budget) if budget in _BUDGETS else len(_BUDGETS),
            judgement.study != f"{experiment}_{budget}",
        )

    found = judgements_by_claim([judgement for page in pages for judgement in page.judgements])
    ranked = [(claim, sorted(every, key=lambda each: rank(claim, each))) for claim, every in found]
    return [Answer(claim, every[0] if every else None, every[1:]) for claim, every in ranked]


def results_page(pages: Sequence[StudyPage], folder: str, left_out: Sequence[str] = ()) -> str:
    """Return the page of all studies: verdicts, main figures, and a section per paper.

    Args:
        pages: of all studies.
        folder: that of the studies' pages, relative to this one.
        left_out: names of studies of the folder that are not among them.
    """
    answers = answers_to_claims(pages)
    lines = ["# Results", introduction(pages, left_out, escaped), "## At a glance", tally(answers)]
    lines += [markdown(_summary(answers, folder), raw=["study"]).rstrip()]
    lines += [f"{', '.join(f'{mark} {verdict}' for verdict, mark in MARKS.items())}; n: seeds."]
    if found := main_figures(pages):
        lines.append("## Main figures")
    for page, figure in found:
        lines += _figure(figure, f"{page.study.name}: ")
    for paper in dict.fromkeys([answer.claim.paper for answer in answers]):
        of_paper = [page for page in pages if page.paper == paper]
        lines += [f"## {escaped(paper)}", *_claims([each for each in answers if each.claim.paper == paper], folder)]
        for page in of_paper:
            lines += _study(page, folder)
    if others := [page for page in pages if not page.paper]:
        lines += [f"## {OTHERS}", *(line for page in others for line in _study(page, folder))]
    return paragraphs(lines)


def introduction(pages: Sequence[StudyPage], left_out: Sequence[str], shown: Callable[[str], str] = str) -> str:
    """Return what stands above all results.

    Args:
        pages: of all studies.
        left_out: names of studies that are not among them.
        shown: makes a name one of the page's format.
    """
    lacking = f" Not read, and not on this page: {shown(', '.join(left_out))}." if left_out else ""
    text = _INTRODUCTION.format(report=command_name("report"), sizes=_sizes(pages, shown), left_out=lacking)
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def study_page(page: StudyPage, up: str) -> str:
    """Return the page of one study: what was run, verdicts, tables, figures, and what a person wrote.

    Args:
        page: the study.
        up: the folder of the page of all studies, relative to this one.
    """
    study = page.study
    lines = [f"# {escaped(study.name)}", escaped(question(study)), run_counts(study)]
    lines += [f"- {escaped(fact)}" for fact in facts(study)]
    for table in page.tables:
        if table.name not in _LEFT_OUT:
            lines += [f"## {escaped(table.title)}", *markdown_table(table), caption(table)]
    for figure in page.figures:
        lines += _figure(figure, up=up)
    if study.notes:
        lines += ["## What we checked", notes(study.notes)]
    return paragraphs(lines)


def _figure(figure: PageFigure, of_study: str = "", up: str = "") -> list[str]:
    return [f"![{escaped(of_study + _kind(figure))}]({up}{figure.files['png']})", escaped(of_study + figure.caption)]


def _kind(figure: PageFigure) -> str:
    """Return the name of a figure within its study."""
    return Path(figure.files["png"]).stem


def _link(name: str, folder: str) -> str:
    return f"[{escaped(name)}]({quote(f'{folder}/{name}.md', errors='surrogateescape')})"


def _sizes(pages: Sequence[StudyPage], shown: Callable[[str], str]) -> str:
    """Return which studies of the papers' experiments were run at the paper's size."""
    of_papers = [page for page in pages if page.paper]
    full = [page.study.name for page in of_papers if page.budgets == {"paper"}]
    departing = len([page for page in of_papers if departures(page.study)])
    unlike = f" {departing} of {len(of_papers)} have other sizes than their experiment's file now, as their pages say."
    unlike = unlike if departing else ""
    if not full:
        return f"No study here was run at its paper's size.{unlike}"
    others = f"; {count(len(of_papers) - len(full), 'other')} smaller" if len(full) < len(of_papers) else ""
    return f"At the size of its paper: {shown(', '.join(full))}{others}.{unlike}"


def tally(answers: Sequence[Answer]) -> str:
    """Return how many claims have which verdict in their main studies, and how many verdicts there are in all."""
    of_claims = [answer.verdict for answer in answers]
    counted = ", ".join(f"{of_claims.count(verdict)} {verdict}" for verdict in (*VERDICTS, NOT_RUN))
    decided = sum(verdict not in (INCONCLUSIVE, NOT_RUN) for verdict in of_claims)
    judged = [each for _, main, others in answers for each in (main, *others) if each]
    every = [judgement.verdict for judgement in judged]
    in_all = ", ".join(f"{every.count(verdict)} {verdict}" for verdict in VERDICTS)
    return (
        f"{count(len(answers), 'claim')}: {counted}; {decided} decided. Each is judged by the study made for it"
        f" where there is one. In all studies: {in_all}."
    )


def _summary(answers: Sequence[Answer], folder: str) -> pd.DataFrame:
    """Return one row per claim: the verdict, the comparison that it rests on, and its study."""
    rows = []
    for claim, judgement, _ in answers:
        row = {"": MARKS[NOT_RUN], "claim": claim.sentence, "paper": claim.paper, "effect": "", "n": "", "study": ""}
        if judgement:
            result = telling(judgement)
            effect = f"{result.label}: {format_effect(result)}; {expected(judgement)}"
            row |= {"": MARKS[judgement.verdict], "effect": effect, "n": str(result.interval.n or NOTHING)}
            row |= {"study": _link(judgement.study, folder)}
        rows.append(row)
    return pd.DataFrame(rows)


def expected(judgement: Judgement) -> str:
    """Return what the claim expects of the comparison that its verdict rests on, and how many others it makes."""
    others = len(judgement.results) - 1
    also = f"; {count(others, 'more comparison')}" if others else ""
    return f"expected {format_expectation(telling(judgement).comparison)}{also}"


def telling(judgement: Judgement) -> ComparisonResult:
    """Return the comparison that a verdict rests on: the first that has it, or that is equal, or that was not run."""
    found = {result.verdict: result for result in reversed(judgement.results)}
    return next(found[each] for each in (judgement.verdict, EQUAL, NOT_RUN, *VERDICTS) if each in found)


def main_figures(pages: Sequence[StudyPage]) -> list[tuple[StudyPage, PageFigure]]:
    """Return the figures of `MAIN_FIGURES` that there are, with their studies; none of a smoke test."""
    found = []
    for experiment, names in MAIN_FIGURES.items():
        for page in pages:
            if page.experiment == experiment and page.budgets != {"smoke"}:
                of_kind = {name: [figure for figure in page.figures if _kind(figure) == name] for name in names}
                found += [(page, figure) for figure in next(filter(None, of_kind.values()), [])]
    return found


def _claims(answers: Sequence[Answer], folder: str) -> Iterator[str]:
    for claim, judgement, others in answers:
        yield f"### {escaped(claim.sentence)}"
        source = escaped(f"{claim.citation}; the paper's number: {claim.number}. {claim.notes}".strip())
        if judgement is None:
            yield f"Not run: `{claim.command}`. {source}"
            continue
        of_main = f"**{judgement.verdict}** by {_link(judgement.study, folder)} ({escaped(judgement.place)})."
        yield f"{MARKS[judgement.verdict]} {of_main} {source}"
        for result in judgement.results:
            yield f"- {escaped(f'{result_text(result, True)}; expected {format_expectation(result.comparison)}')}"
        if others:
            also = "; ".join(
                f"{MARKS[each.verdict]} {_link(each.study, folder)} ({escaped(each.place)})" for each in others
            )
            yield f"Other studies that speak to it: {also}."


def _study(page: StudyPage, folder: str) -> Iterator[str]:
    """Yield what was asked and done in a study, and what a person wrote about it."""
    study = page.study
    yield f"### {_link(study.name, folder)}"
    yield f"{escaped(question(study))} {run_counts(study)}"
    yield " ".join(f"{escaped(fact).rstrip('.')}." for fact in facts(study))
    if study.notes:
        yield notes(study.notes)
