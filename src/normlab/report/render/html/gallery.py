"""All studies on one HTML page, by the parts and the style of a study's page: verdicts, then every figure."""

from collections.abc import Sequence

from normlab.report.render.description import facts, question, run_counts
from normlab.report.render.html.contents import environment
from normlab.report.render.results import (
    MARKS,
    OTHERS,
    StudyPage,
    answers_to_claims,
    expected,
    introduction,
    main_figures,
    tally,
    telling,
)


def gallery(pages: Sequence[StudyPage], left_out: Sequence[str] = ()) -> str:
    """Return the page. Texts from disk are escaped.

    Args:
        pages: of all studies.
        left_out: names of studies of the folder that are not among them.
    """
    answers = answers_to_claims(pages)
    papers = dict.fromkeys([*(answer.claim.paper for answer in answers), ""])
    main = main_figures(pages)
    numbers = {page.study.name: number for number, page in enumerate(pages)}
    return (
        environment()
        .get_template("gallery.html.j2")
        .render(
            introduction=introduction(pages, left_out),
            tally=tally(answers),
            rows=[(answer, telling(answer.main) if answer.main else None) for answer in answers],
            marks=MARKS,
            expected=expected,
            main=main,
            numbers=numbers,
            sections={
                paper or OTHERS: found
                for paper in papers
                if (found := [_section(page, main) for page in pages if page.paper == paper])
            },
            data={"measure": {"label": "", "unit": "", "images": ""}, "cells": [], "runs": []},
        )
    )


def _section(page: StudyPage, above: Sequence[tuple[StudyPage, object]]) -> dict[str, object]:
    """Return what is shown of a study, without the figures above."""
    shown = [figure for _, figure in above]
    return {
        "study": page.study,
        "question": question(page.study),
        "counts": run_counts(page.study),
        "facts": facts(page.study),
        "judgements": page.judgements,
        "figures": [figure for figure in page.figures if figure not in shown],
    }
