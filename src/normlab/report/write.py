"""From a study's name to its report on disk: the only part of the report that writes files."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normlab.common.errors import UserError, nearest
from normlab.common.installation import called
from normlab.report.analysis.cells import Table
from normlab.report.analysis.metric import Measure, measure_of
from normlab.report.analysis.probe_tables import probe_tables
from normlab.report.analysis.tables import build_tables
from normlab.report.claims import texts as verdict_texts
from normlab.report.claims.judge import judge
from normlab.report.options import Options
from normlab.report.render.html import Drawing, html_page
from normlab.report.render.latex import latex
from normlab.report.render.markdown import markdown_table
from normlab.report.render.page import facts, page, question
from normlab.report.render.results import results_page
from normlab.report.render.terminal import show, show_claims, show_path
from normlab.report.study.arms import in_order
from normlab.report.study.find import find_studies, study_folder
from normlab.report.study.load import Study, first_line, load
from normlab.report.study.provenance import Sources, mixtures, sources
from normlab.report.study.select import select
from normlab.report.study.status import show_status
from normlab.runs import files
from normlab.runs.states import FINISHED

if TYPE_CHECKING:
    from normlab.report.figures import Named

SUFFIXES = ("csv", "md", "tex", "png", "pdf", "sources.json")  # of tables and figures


def build(study: str, output_dir: str | Path, options: Options) -> Path:
    """Report whatever has finished in `output_dir`/`study`; return the page `report/index.html` there.

    The same page as Markdown is beside it, every table as Markdown, CSV and LaTeX, every figure as PNG and PDF, and for
    each of these a list of its runs, their code and hardware, and the command that made it.

    Raises:
        UserError: for a study that does not exist, lacks what the options name or has no finished run, and a folder
            that cannot be written.
    """
    found, every_arm = _find(_folder("output_dir", output_dir), str(study), options)
    measure = measure_of(found.evaluations, options.metric, options.value)
    baseline, remarks = _baseline(found, options.baseline, every_arm)
    tables = _tables(found, measure, baseline, options)
    judgements = judge(found, options.confidence, options.alpha)
    if judgements:
        tables.append(verdict_texts.table(judgements, options.confidence))
    folder = found.folder / "report"
    files.make_folder(folder)
    made = [(table, sources(found, table.origin)) for table in tables]
    for table, origin in made:
        for suffix, text in render(table, found.name, origin).items():
            _write(folder / f"{table.name}.{suffix}", text.encode())
    drawings = []
    for drawn in _figures(found, tables[0], measure, options, folder, ("pdf", "png")) if options.figures else ():
        origin = sources(found, drawn.rows)
        _write(folder / f"{drawn.name}.sources.json", origin.as_json().encode())
        drawings.append(_drawing(drawn, origin, folder))
    warnings = [*found.warnings, *remarks, *_left_out(options), *_unmeasured(found, measure), *mixtures(found)]
    shown = [(drawing.name, drawing.caption, drawing.sources) for drawing in drawings]
    _write(folder / "report.md", page(found, made, shown, warnings).encode())
    html = html_page(found, question(found), made, judgements, drawings, measure, facts(found), warnings)
    _write(folder / "index.html", html.encode())
    _remove_what_is_left_of_earlier(folder, {table.name for table in tables} | {d.name for d in drawings}, options)
    if options.quiet:
        show_path(folder / "index.html", warnings)
    else:
        show(found, tables[0], judgements, folder / "index.html", warnings)
    return folder / "index.html"


def _remove_what_is_left_of_earlier(folder: Path, made: Collection[str], options: Options) -> None:
    """Remove tables and figures of an earlier report that this one has not made: they show something else. Without
    figures=true the figures stay.
    """
    for listed in folder.glob("*.sources.json"):
        name = listed.name.removesuffix(".sources.json")
        if name in made or (not options.figures and (folder / f"{name}.png").exists()):
            continue
        for suffix in SUFFIXES:
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def _drawing(drawn: "Named", origin: Sources, folder: Path) -> Drawing:
    from normlab.report.render.html.charts import charts

    panels, legend = charts(drawn.figure)
    return Drawing(drawn.name, drawn.caption, panels, legend, (folder / f"{drawn.name}.png").read_bytes(), origin)


def build_claims(output_dir: str | Path, options: Options) -> Path:
    """Judge every claim against every study below `output_dir`; return the page `claims.md` there.

    Raises:
        UserError: for a folder that does not exist or cannot be written, and options that leave cells out.
    """
    _refuse_selection("claims", options)
    folder = _folder("output_dir", output_dir)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.\nGive the one that holds studies: output_dir=...")
    studies = [load(folder / name, name=name) for name in find_studies(folder)]
    judgements = [judgement for study in studies for judgement in judge(study, options.confidence, options.alpha)]
    files.make_folder(folder)
    _write(folder / "claims.md", verdict_texts.overview(judgements).encode())
    warnings = [warning for study in studies for warning in study.warnings]
    if options.quiet:
        show_path(folder / "claims.md", warnings)
    else:
        show_claims(judgements, folder / "claims.md", warnings)
    return folder / "claims.md"


def build_results(output_dir: str | Path, page: str | Path, options: Options) -> Path:
    """Tables, figures and verdicts of every study below `output_dir` on one page; its figures go to figures/ beside it.

    Raises:
        UserError: for a folder without studies and one that cannot be written, and options that leave cells out.
    """
    _refuse_selection("results", options)
    folder, page = _folder("output_dir", output_dir), _folder("page", page)
    studies, judgements, warnings = [], [], []
    for name in find_studies(folder):
        found = load(folder / name, name=name)
        warnings += found.warnings
        if not found.runs["state"].isin(FINISHED).any():
            warnings.append(f"{name} has no finished run yet and is left out.")
            continue
        try:
            measure = measure_of(found.evaluations, options.metric, options.value)
        except UserError as error:
            warnings.append(f"{name} is left out: {first_line(error)}")
            continue
        tables = _tables(found, measure, _baseline(found, options.baseline)[0], options)
        drawn = []
        if options.figures:
            files.make_folder(page.parent / "figures" / name)
            for earlier in (page.parent / "figures" / name).glob("*.png"):
                earlier.unlink()
            made = _figures(found, tables[0], measure, options, page.parent / "figures" / name, ("png",))
            drawn = [(f"figures/{name}/{figure.name}.png", figure.caption) for figure in made]
        studies.append((found, tables, drawn))
        judgements += judge(found, options.confidence, options.alpha)
    if not studies:
        measured = f" and {options.metric}" if options.metric else ""
        raise UserError(
            f"There is no study with a finished run{measured} in {folder}.\n"
            f"To start one: {called('train')} -m norm=bn,none"
        )
    files.make_folder(page.parent)
    _write(page, results_page(studies, judgements).encode())
    if options.quiet:
        show_path(page, warnings)
    else:
        show_claims(judgements, page, warnings)
    return page


def study_status(study: str, output_dir: str | Path, *, watch: bool, quiet: bool = False) -> None:
    """Print how far the runs of `output_dir`/`study` are; `watch`: until they are done; `quiet`: on one line.

    Raises:
        UserError: for a study that does not exist and a folder that cannot be read.
    """
    if not isinstance(watch, bool):
        raise UserError(f"watch={watch} is not valid: expected true or false.")
    show_status(str(study), study_folder(str(study), _folder("output_dir", output_dir)), watch=watch, quiet=quiet)


def _tables(study: Study, measure: Measure, baseline: str | None, options: Options) -> list[Table]:
    tables = build_tables(study, measure, baseline, options.thresholds, options.confidence)
    return [*tables, *probe_tables(study, options.confidence)]


def _figures(
    study: Study, accuracy: Table, measure: Measure, options: Options, folder: Path, suffixes: Sequence[str]
) -> Iterator["Named"]:
    """Draw into `folder`."""
    from normlab.report.figures import Canvas, draw, encode  # matplotlib is slow to import; tables can do without

    canvas = Canvas(options.figure_size, options.figure_style)
    for drawn in draw(study, accuracy, measure, options.confidence, canvas):
        for suffix in suffixes:
            _write(folder / f"{drawn.name}.{suffix}", encode(drawn.figure, suffix, canvas))
        yield drawn


def render(table: Table, study_name: str, origin: Sources) -> dict[str, str]:
    """A table as the text of its files, by suffix: md, csv (full precision, tidy), tex, and what it was made from."""
    slug = study_name.replace("/", "-")
    environments = [
        latex(table, setting, f"tab:{slug}-{table.name}{f'_{i + 1}' if i else ''}")
        for i, setting in enumerate(table.rows)
    ]
    return {
        "md": "\n\n".join([f"# {table.title}", *markdown_table(table), table.caption + table.rule, origin.sentence()])
        + "\n",
        "csv": table.tidy.to_csv(index=False, lineterminator="\n"),
        "tex": "\n".join(["% needs \\usepackage{booktabs}", f"% {origin.sentence()}", *environments]),
        "sources.json": origin.as_json(),
    }


def _folder(setting: str, value: object) -> Path:
    if not isinstance(value, str | Path):
        raise UserError(f"{setting}={'null' if value is None else value} is not valid: expected a path.")
    return Path(value)


def _refuse_selection(command: str, options: Options) -> None:
    selected = " ".join(options.selected())
    if selected:
        raise UserError(
            f"{selected}: `{command}` is about whole studies, so nothing can be left out of them.\n"
            f"Leave it out, or report one study: {called('report')} study=... {selected}"
        )


def _left_out(options: Options) -> Iterator[str]:
    selected = " ".join(options.selected())
    if selected:
        yield f"Only {selected} is reported; p-values are corrected over what is reported."


def _find(output_dir: Path, study: str, options: Options) -> tuple[Study, list[str]]:
    """What the options leave of the study, and all arms that it has."""
    whole = load(study_folder(study, output_dir), name=study)
    found = select(whole, options.arms, options.batches, options.seeds, options.settings)
    states = found.states()
    if not any(states[state] for state in FINISHED):
        told = ", ".join(f"{number} {state}" for state, number in states.items() if number)
        failed = found.runs[found.runs["state"] == "failed"]
        selected = " ".join(options.selected())
        raise UserError(
            f"Study {study} has no finished run {f'of {selected} ' if selected else ''}yet: {told or 'none at all'}."
            + "".join(f"\n{run.run}: {run.note}" for run in failed.head(1).itertuples())
            + "\nRepeat the command that started the study; it goes on where it stopped. E.g."
            f"\n  {called('train')} -m study={study} norm=bn,none"
            f"\nHow far its runs are: {called('report')} status study={study}"
        )
    return found, in_order(whole.runs["arm"].dropna())


def _baseline(study: Study, baseline: str | None, every_arm: Sequence[str] = ()) -> tuple[str | None, list[str]]:
    """The baseline, or None with a sentence if what is reported has no such arm."""
    arms = in_order(study.runs["arm"].dropna())
    if baseline is None or baseline in arms:
        return baseline, []
    if baseline in every_arm:
        return None, [f"baseline={baseline} is left out of this report, so there is no table of differences."]
    close = nearest(baseline, arms)
    return None, [
        f"baseline={baseline} is not an arm of this study, so there is no table of differences. Arms:"
        f" {', '.join(arms)}." + (f" Did you mean baseline={close}?" if close else "")
    ]


def _unmeasured(study: Study, measure: Measure) -> Iterator[str]:
    """A sentence per setting that the tables can say nothing about."""
    done = study.evaluations["state"] == "done"
    measured = study.evaluations[measure.column].notna() if measure.column in study.evaluations else ~done
    for setting, any_measured in measured[done].groupby(study.evaluations["setting"]).any().items():
        if not any_measured:
            yield (
                f"{setting}: its runs have no {measure.label}, by which this study is compared. Give them a study of"
                " their own: study=..."
            )


def _write(path: Path, content: bytes) -> None:
    files.write_atomically(path, lambda file: file.write(content), durable=False)
