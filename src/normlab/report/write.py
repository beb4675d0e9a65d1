"""From a study's name to its report on disk: the only part of the report that writes files."""

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from normlab.common.errors import UserError, as_typed, count, did_you_mean, first_line, listed
from normlab.common.installation import command_name, study_words
from normlab.common.terminal import plain, say
from normlab.report import more_seeds
from normlab.report.analysis.cells import Table
from normlab.report.analysis.leaders import leaders
from normlab.report.analysis.metrics import Metric, metric_of
from normlab.report.analysis.tuning import tuning_warnings
from normlab.report.claims import texts as verdict_texts
from normlab.report.claims.judge import Judgement, judge
from normlab.report.options import Options
from normlab.report.options import options as menu_options
from normlab.report.render.answers import answers
from normlab.report.render.csv import as_csv
from normlab.report.render.html import PageFigure, PageTable, cell_numbers, html_page
from normlab.report.render.html.gallery import gallery
from normlab.report.render.html.live import as_live
from normlab.report.render.latex import latex
from normlab.report.render.markdown import caption, commands, escaped, markdown_table, page, sources_sentence
from normlab.report.render.results import StudyPage, results_page, study_page
from normlab.report.render.terminal import show, show_claims, show_path
from normlab.report.study.arms import in_order
from normlab.report.study.find import find_studies
from normlab.report.study.load import Study, load
from normlab.report.study.provenance import Provenance, continued, mixed_cells, mixed_provenance, provenance_of
from normlab.report.tables import chosen_runs, judged_tables, table_options
from normlab.runs import archive, files
from normlab.runs.inside import make_own_folder

if TYPE_CHECKING:
    from normlab.report.figures import NamedFigure

SUFFIXES = ("csv", "md", "tex", "png", "pdf", "sources.json")  # of tables and figures


def build(study: str, output_dir: str | Path, options: Options) -> Path:
    """Report whatever has finished in a study; return the page, `index.html` in the study's `report_folder`.

    The same page as Markdown is beside it, every table as Markdown, CSV and LaTeX, every figure as PNG and PDF, and for
    each of these a list of its runs, their code and hardware, and the command that made it.

    Raises:
        UserError: for a study that does not exist, lacks what the options name or has no finished run, and a folder
            that cannot be written.
    """
    report = write_report(study, output_dir, options)
    if options.quiet:
        show_path(report.page, report.warnings)
    else:
        show(report.study, report.accuracy, report.judgements, report.page, report.warnings)
    return report.page


class Report(NamedTuple):
    """A report on disk: its page, and what the terminal shows of it."""

    study: Study
    accuracy: Table
    judgements: Sequence[Judgement]
    page: Path
    warnings: Sequence[str]


def write_report(study: str, output_dir: str | Path, options: Options, stamp: str = "") -> Report:
    """Write all files of a report as `build` does, and print nothing.

    Args:
        study: its name, or the path of its folder or file.
        output_dir: the folder that holds studies.
        options: what is reported, and how.
        stamp: the time by which an open page tells that it was rebuilt, ISO 8601; "" if it will not be.

    Raises:
        UserError: as `build`.
    """
    whole = load(str(study), _folder("output_dir", output_dir))
    chosen = chosen_runs(whole, options)
    _check_begun(chosen, study_words(str(study), output_dir), options)
    metric = metric_of(chosen.evaluations, options.metric, options.value)
    tables, judgements = judged_tables(chosen, metric, options)
    folder = chosen.report_folder
    _make_report_folder(chosen, folder)
    made = [(table, provenance_of(chosen, table.origin)) for table in tables]
    on_page = []
    for table, provenance in made:
        texts = render(table, chosen.name, provenance)
        on_page.append(PageTable(table, provenance, texts["tex"]))
        for suffix, text in texts.items():
            _write(folder / f"{table.name}.{suffix}", text)
    files.write_json(folder / archive.OPTIONS, table_options(options), durable=False)
    drawings, missing = _drawings(chosen, tables[0], metric, options, folder) if options.figures else ([], "")
    warnings = [*chosen.warnings, *tuning_warnings(chosen), *_remarks(whole, chosen, metric, options)]
    warnings += [missing] if missing else []
    warnings += [*mixed_cells(chosen), *mixed_provenance(chosen), *continued(chosen)]
    shown = [(drawing.name, drawing.caption, drawing.sources) for drawing in drawings if drawing.sources]
    _write(folder / "report.md", page(chosen, made, shown, warnings))
    found = leaders(chosen, metric, tables[0].tidy, options.confidence)
    told = answers(chosen, found, judgements, metric, (options.confidence, options.alpha))
    html = html_page(chosen, on_page, judgements, drawings, metric, warnings, told)
    _write(folder / "index.html", as_live(html, stamp) if stamp else html)
    _remove_earlier(folder, {table.name for table in tables} | {d.name for d in drawings}, options.figures)
    return Report(chosen, tables[0], judgements, folder / "index.html", warnings)


def build_claims(output_dir: str | Path, options: Options) -> Path:
    """Judge every claim against every study below `output_dir`; return the page `claims.md` there.

    Raises:
        UserError: for a folder that does not exist or cannot be written, and options that leave cells out.
    """
    _refuse_selection("claims", options)
    folder = _folder("output_dir", output_dir)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.\nGive the one that holds studies: output_dir=...")
    judgements: list[Judgement] = []
    warnings: list[str] = []
    for study in _studies(folder, warnings, [], options):
        judgements += judge(study, options.confidence, options.alpha)
    files.make_folder(folder)
    text = verdict_texts.claims_page(judgements)
    return _write_claims_page(folder / "claims.md", text, judgements, warnings, options)


def _studies(folder: Path, warnings: list[str], left_out: list[str], options: Options) -> Iterator[Study]:
    """Yield every study of a folder, tuned as the options say; of those that cannot be read add names and sentences."""
    for name in find_studies(folder):
        try:
            study = chosen_runs(load(name, folder), options)
        except UserError as error:
            warnings.append(f"{name} is left out: {first_line(error)}")
            left_out.append(name)
            continue
        warnings += study.warnings
        warnings += [f"{name}: {warning}" for warning in tuning_warnings(study)]
        yield study


def build_results(output_dir: str | Path, page: str | Path, options: Options) -> Path:
    """Write the verdicts of all studies below `output_dir` on one page, and a page of tables and figures for each.

    Beside the page, studies' pages go to a folder of its name (results/ of results.md), figures to figures/, and
    verdicts and figures into one HTML file (results_gallery.html).

    Raises:
        UserError: for a folder without studies and one that cannot be written, and options that leave cells out.
    """
    _refuse_selection("results", options)
    folder, page = _folder("output_dir", output_dir), _folder("page", page)
    if page.suffix != ".md":
        raise UserError(f"page={as_typed(str(page))} is not valid: expected a page in Markdown, {page.stem}.md.")
    pages: list[StudyPage] = []
    warnings: list[str] = []
    left_out: list[str] = []
    for study in _studies(folder, warnings, left_out, options):
        if study.finished.empty:
            warnings.append(f"{study.name} has no finished run yet and is left out.")
            left_out.append(study.name)
            continue
        try:
            metric = metric_of(study.evaluations, options.metric, options.value)
        except UserError as error:
            warnings.append(f"{study.name} is left out: {first_line(error)}")
            left_out.append(study.name)
            continue
        tables, judgements = judged_tables(study, metric, options)
        name = f"study{len(pages)}"
        drawn = list(_figures_of_page(study, name, tables[0], metric, options, page)) if options.figures else []
        pages.append(StudyPage(study, tables, drawn, judgements))
    if not pages:
        measured = f" and {options.metric}" if options.metric else ""
        raise UserError(
            f"There is no study with a finished run{measured} in {folder}.\n"
            f"To start one: {command_name('train')} -m {study_words('default', folder)} norm=bn,none"
        )
    own = page.parent / page.stem
    _refuse_folder_of_study(page, own, pages)
    paths = {own / f"{each.study.name}.md": each for each in pages}
    for path, each in paths.items():
        make_own_folder(path.parent, page.parent)
        _write(path, study_page(each, "../" * (1 + each.study.name.count("/"))))
    if others := sorted(path.relative_to(own).as_posix() for path in own.rglob("*.md") if path not in paths):
        warnings.append(f"{own} has pages of no study of {folder}: {listed(others, 3)}. Remove them, if they are old.")
    _write(page.with_name(f"{page.stem}_gallery.html"), gallery(pages, left_out))
    judgements = [judgement for each in pages for judgement in each.judgements]
    return _write_claims_page(page, results_page(pages, page.stem, left_out), judgements, warnings, options)


def _refuse_folder_of_study(page: Path, own: Path, pages: Sequence[StudyPage]) -> None:
    """Refuse to write the studies' pages into the folder of a study."""
    for each in pages:
        if each.study.folder.resolve().is_relative_to(own.resolve()):
            raise UserError(
                f"page={as_typed(str(page))}: the pages of studies would go to {own}, where the study"
                f" {each.study.name} is.\nName another page: page={page.with_name('all_results.md')}"
            )


def show_next(study: str, output_dir: str | Path, options: Options, looks: object) -> None:
    """Print what would settle what is inconclusive in a study: how many new seeds, their time, and the commands.

    With `quiet` the commands that train alone, on one line each.

    Raises:
        UserError: for a study that does not exist or has no evaluation, and options that are not valid.
    """
    if not isinstance(looks, int) or isinstance(looks, bool) or not 1 <= looks <= 100:
        raise UserError(f"looks={as_typed(looks)} is not valid: expected a whole number from 1 to 100.")
    whole = load(str(study), _folder("output_dir", output_dir))
    chosen = chosen_runs(whole, options)
    _check_begun(chosen, study_words(str(study), output_dir), options)
    metric = metric_of(chosen.evaluations, options.metric, options.value)
    judgements = judge(chosen, options.confidence, options.alpha)
    found = more_seeds.needs(chosen, metric, options, judgements, looks)
    if options.quiet:
        for line in more_seeds.all_commands(whole, found):
            say(line)
        return
    told = (
        more_seeds.lines(whole, found, options, looks)
        if found
        else [more_seeds.nothing_asked(chosen, options, judgements)]
    )
    say("\n".join(told))


def pack_study(
    study: str, output_dir: str | Path, options: Options | None = None, *, replace: bool = False, quiet: bool = False
) -> Path:
    """Write the records of a study to one file, NAME.normlab.zip beside its folder; return its path (see `pack`).

    The tables that the options make are packed beside the records, for others to compare; by default the menu's.

    Raises:
        UserError: for a study that does not exist, a file that cannot be written, and one that has other runs.
    """
    if not isinstance(replace, bool):
        raise UserError(f"replace={as_typed(replace)} is not valid: expected true or false.")
    from normlab.report.pack import pack  # slow to import, and no other command needs it

    folder = _folder("output_dir", output_dir)
    return pack(str(study), folder, options or menu_options(), replace=replace, quiet=quiet)


def verify_study(
    study: str,
    output_dir: str | Path,
    options: Options | None = None,
    *,
    rerun: int = 0,
    rerun_seed: int | None = None,
    trust: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> bool:
    """Print, a line for each, what was checked of a study and how it came out; return whether nothing fails.

    Digests of its file, tables made anew against those beside its records, and `rerun` of its runs carried out again.

    Args:
        study: its name, or the path of its folder or file.
        output_dir: the folder that holds studies.
        options: those of the tables where none are kept beside them; `quiet`: print what does not hold alone.
        rerun: the number of runs that are carried out again.
        rerun_seed: chooses these runs; None: another choice each time.
        trust: carry out runs, too, whose configuration names code or files that are not normlab's.
        changes: settings of this machine, `{"dataset.path": "/my/images"}`.

    Raises:
        UserError: for a study that does not exist or whose file is not read, and for settings that are not valid.
    """
    from normlab.report.reruns import Rerun
    from normlab.report.verify import verify  # slow to import, and no other command needs it

    choice = secrets.randbelow(1_000_000) if rerun_seed is None else rerun_seed
    runs = Rerun(rerun, choice, trust, {} if changes is None else changes)
    return verify(str(study), _folder("output_dir", output_dir), options or menu_options(), runs)


def render(table: Table, study_name: str, provenance: Provenance) -> dict[str, str]:
    """Return the texts of a table's files by suffix: md, csv (full precision, tidy), tex, and its provenance."""
    label = f"tab:{study_name}-{table.name}"
    environments = [latex(table, setting, f"{label}{f'_{i + 1}' if i else ''}") for i, setting in enumerate(table.rows)]
    paragraphs = [f"# {escaped(table.title)}", *markdown_table(table), caption(table), *commands(table)]
    paragraphs.append(sources_sentence(provenance))
    return {
        "md": "\n\n".join(paragraphs) + "\n",
        "csv": as_csv(table.tidy),
        "tex": "\n".join(["% needs \\usepackage{booktabs}", f"% {provenance.sentence()}", *environments]),
        "sources.json": provenance.as_json(),
    }


def _make_report_folder(study: Study, folder: Path) -> None:
    try:
        make_own_folder(folder, study.folder.parent if study.packed else study.folder)
    except UserError as error:
        if study.packed:
            advice = f"Copy {study.folder} to a folder that can be written, and report it there."
            raise UserError(f"{first_line(error)}\n{advice}") from None
        raise


# ---- refusals and remarks


def _folder(setting: str, value: object) -> Path:
    if not isinstance(value, str | Path):
        raise UserError(f"{setting}={as_typed(value)} is not valid: expected a path.")
    return Path(value)


def _refuse_selection(command: str, options: Options) -> None:
    if options.selection:
        raise UserError(
            f"{options.selection}: `{command}` is about whole studies, so nothing can be left out of them.\n"
            f"Leave it out, or report one study: {command_name('report')} study=... {options.selection}"
        )


def _check_begun(study: Study, words: str, options: Options) -> None:
    """Refuse a study of which there is nothing to report yet."""
    if not study.finished.empty or not study.evaluations.empty:
        return
    counts = study.states()
    of_what = f"of {options.selection_in_short} " if options.selection else ""
    failed = study.every[study.every["state"] == "failed"]
    if counts["running"]:
        advice = "\nIts runs are under way, and none has been evaluated yet. Give the same command again later."
    else:
        advice = (
            "\nRepeat the command that started the study; it goes on where it stopped. E.g."
            f"\n  {command_name('train')} -m {words} norm=bn,none"
        )
    raise UserError(
        f"Study {study.name} has no finished run {of_what}yet: {study.counted() or 'none at all'}."
        + "".join(f"\n{study.called(str(run.run))}: {run.note}" for run in failed.head(1).itertuples())
        + f"{advice}\nHow far its runs are: {command_name('report')} status {words}"
    )


def _remarks(whole: Study, study: Study, metric: Metric, options: Options) -> Iterator[str]:
    """Yield sentences on what the options left out, and on what the tables cannot have."""
    if study.finished.empty:
        yield (
            "No run has finished yet, so the tables have no numbers. A cell of the page opens the curves of its runs as"
            " far as they are."
        )
    arms, baseline = in_order(study.runs["arm"].dropna()), options.baseline
    if baseline is not None and baseline in set(whole.runs["arm"]) - set(arms):
        yield f"baseline={baseline} is left out of this report, so there is no table of differences."
    elif baseline is not None and baseline not in arms:
        hint = did_you_mean(baseline, arms, "baseline=").replace("\n", " ")
        yield (
            f"baseline={baseline} is not an arm of this study, so there is no table of differences. Arms:"
            f" {', '.join(arms)}.{hint}"
        )
    if whole.unchecked:
        names = f" ({listed(whole.unchecked, 3)})" if len(whole.unchecked) < len(whole.configs) else ""
        yield (
            f"{len(whole.unchecked)} of {len(whole.configs)} runs{names} carry no checksums, which came with version"
            " 0.4.0: changes of their files cannot be seen."
        )
    if study.tuning and metric.images == "validation":
        yield (
            f"Validation images have chosen the values of {' and '.join(study.tuning.settings)}, so the {metric.label}"
            " is optimistic. Test images say how good the chosen runs are: metric=test_accuracy"
        )
    if options.selection:
        yield f"Only {options.selection_in_short} is reported; p-values are corrected over what is reported."
    done = study.evaluations[study.evaluations["state"] == "done"]
    for setting, rows in done.groupby("setting"):
        if metric.name not in rows or rows[metric.name].isna().all():
            yield (
                f"{setting}: its runs have no {metric.label}, by which this study is compared. Give them a study of"
                " their own: study=..."
            )


# ---- tables, figures and files


def _drawings(
    study: Study, first: Table, metric: Metric, options: Options, folder: Path
) -> tuple[list[PageFigure], str]:
    """Draw all figures; return them, and a sentence on the characters that their font lacks, "" if it has all."""
    from normlab.report.figures import Canvas, as_svg, missing_glyphs

    cells, canvas = cell_numbers(study), Canvas(options.figure_size, options.figure_style)
    drawings = []
    with missing_glyphs() as missing:
        for drawn in _figures(study, first, metric, options, folder, ("pdf", "png")):
            provenance = provenance_of(study, drawn.rows)
            _write(folder / f"{drawn.name}.sources.json", provenance.as_json())
            svg = as_svg(drawn.figure, drawn.name, cells, canvas)
            links = {suffix: f"{drawn.name}.{suffix}" for suffix in ("pdf", "png")}
            drawings.append(PageFigure(drawn.name, drawn.caption, svg, links, provenance))
    if not missing:
        return drawings, ""
    characters = f"{count(len(missing), 'character')} ({listed(sorted(map(plain, missing)), 8)})"
    return drawings, f"The font of the figures lacks {characters}: a box is drawn for each in PNG and PDF files."


def _figures_of_page(
    study: Study, name: str, first: Table, metric: Metric, options: Options, page: Path
) -> Iterator[PageFigure]:
    """Yield each figure of a study, with a name that begins with this one, and its file's address seen from the page.

    Then remove those that are made no more.
    """
    from normlab.report.figures import Canvas, as_svg

    canvas = Canvas(options.figure_size, options.figure_style)
    folder = page.parent / "figures" / study.name
    make_own_folder(folder, page.parent)
    made = set()
    for figure in _figures(study, first, metric, options, folder, ("png",)):
        made.add(f"{figure.name}.png")
        path = quote(f"figures/{study.name}/{figure.name}.png", errors="surrogateescape")
        unique = f"{name}-{figure.name}"
        yield PageFigure(unique, figure.caption, as_svg(figure.figure, unique, {}, canvas), {"png": path})
    for earlier in folder.glob("*.png"):
        if earlier.name not in made:
            earlier.unlink(missing_ok=True)  # another report may be made at the same time


def _figures(
    study: Study, first: Table, metric: Metric, options: Options, folder: Path, suffixes: Sequence[str]
) -> Iterator["NamedFigure"]:
    """Draw into `folder`, in each of these formats; yield each figure."""
    from normlab.report.figures import Canvas, draw, encode  # matplotlib is slow to import; tables can do without

    canvas = Canvas(options.figure_size, options.figure_style)
    for drawn in draw(study, first, metric, options.confidence, canvas):
        for suffix in suffixes:
            _write(folder / f"{drawn.name}.{suffix}", encode(drawn.figure, suffix, canvas))
        yield drawn


def _write_claims_page(
    page: Path, text: str, judgements: Sequence[Judgement], warnings: Sequence[str], options: Options
) -> Path:
    _write(page, text)
    if options.quiet:
        show_path(page, warnings)
    else:
        show_claims(judgements, page, warnings)
    return page


def _remove_earlier(folder: Path, made: Collection[str], figures: bool) -> None:
    """Remove the tables of an earlier report that this one has not made, and its figures if this one drew some."""
    for sources in folder.glob("*.sources.json"):
        name = sources.name.removesuffix(".sources.json")
        if name in made or (not figures and (folder / f"{name}.png").exists()):
            continue
        for suffix in SUFFIXES:
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def _write(path: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    files.write_atomically(path, lambda file: file.write(data), durable=False)
