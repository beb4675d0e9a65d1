"""All tables of a report with its options: to show, to pack, and to compare with those that somebody packed."""

from collections.abc import Mapping
from dataclasses import replace

from normlab.common.errors import UserError, as_typed, listed
from normlab.report import more_seeds
from normlab.report.analysis.cells import Table
from normlab.report.analysis.images import image_tables
from normlab.report.analysis.metrics import Metric, metric_of
from normlab.report.analysis.tables import build_tables, probe_tables, task_tables
from normlab.report.analysis.tuned_tables import tuned_tables, with_cost_of_trials
from normlab.report.analysis.tuning import tune
from normlab.report.claims import texts
from normlab.report.claims.judge import Judgement, judge
from normlab.report.options import TABLE_OPTIONS, Options, options
from normlab.report.render.csv import as_csv
from normlab.report.study.load import Study
from normlab.report.study.select import select


def chosen_runs(study: Study, options: Options) -> Study:
    """Return the study of what the options select, at the best values of the settings that they tune.

    Raises:
        UserError: if the study lacks what the options name, or the images to choose on.
    """
    chosen = select(study, options.arms, options.batches, options.seeds, options.settings)
    return tune(chosen, study, options.tuned, options.value, options.confidence)


def make_tables(study: Study, metric: Metric, options: Options) -> list[Table]:
    """Return the tables of the metric, the first, of what else was recorded, and of the probes."""
    baseline = options.baseline if options.baseline in set(study.runs["arm"]) else None
    tables = build_tables(study, metric, baseline, options.thresholds, options.confidence)
    tables += [*tuned_tables(study, options.confidence), *image_tables(study, baseline, options.confidence)]
    tables += [*task_tables(study, options.confidence), *probe_tables(study, options.confidence)]
    return [_with_caveats(with_cost_of_trials(table, study), study) for table in tables]


def _with_caveats(table: Table, study: Study) -> Table:
    """Return the table with the study's caveats in its caption; how it was tuned also in its CSV."""
    tidy = table.tidy.assign(tuned=study.tuning.sentence) if study.tuning else table.tidy
    return replace(table, caption=" ".join([table.caption, *study.caveats]), tidy=tidy)


def judged_tables(study: Study, metric: Metric, options: Options) -> tuple[list[Table], list[Judgement]]:
    """Return the same tables, those of the verdicts and of what is inconclusive, where there are any; the verdicts."""
    tables, judgements = make_tables(study, metric, options), judge(study, options.confidence, options.alpha)
    if judgements:
        tables.append(_with_caveats(texts.verdict_table(judgements, options.confidence), study))
    found = more_seeds.needs(study, metric, options, judgements)
    wanted = more_seeds.seeds_table(study, found, options)
    return [*tables, *([_with_caveats(wanted, study)] if wanted else [])], judgements


def csv_tables(study: Study, options: Options) -> dict[str, str]:
    """Return all tables of a study as CSV, by name; none of a study without an evaluation.

    Raises:
        UserError: if the study lacks what the options name.
    """
    chosen = chosen_runs(study, options)
    if chosen.evaluations.empty:
        return {}
    tables, _ = judged_tables(chosen, metric_of(chosen.evaluations, options.metric, options.value), options)
    return {table.name: as_csv(table.tidy) for table in tables}


def table_options(options: Options) -> dict[str, object]:
    """Return those of the options that change a table, as they are kept beside tables."""
    return {name: getattr(options, name) for name in TABLE_OPTIONS}


def read_table_options(kept: object) -> Options:
    """Return the options that tables were made with, from what is kept beside them.

    Raises:
        UserError: if it is no such thing.
    """
    if isinstance(kept, Mapping):
        kept = {"tuned": [], **kept}  # versions before 0.5.0 had no such option
    if not isinstance(kept, Mapping) or set(kept) != set(TABLE_OPTIONS):
        names = listed(sorted(map(str, kept)), 3) if isinstance(kept, Mapping) else str(as_typed(kept))[:80]
        raise UserError(f"They have {names}; expected {', '.join(TABLE_OPTIONS)}.")
    return options(**kept)
