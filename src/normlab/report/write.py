"""From a study's name to its report on disk: the only part of the report that writes files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from normlab.errors import UserError, nearest
from normlab.report import verdict_texts
from normlab.report.arms import in_order
from normlab.report.load import FINISHED, Study, load
from normlab.report.markup import latex, markdown
from normlab.report.page import page
from normlab.report.probes import probe_tables
from normlab.report.results import results_page
from normlab.report.status import show_status
from normlab.report.studies import find_studies, study_folder
from normlab.report.tables import Measure, Table, build_tables, measure_of
from normlab.report.terminal import show, show_claims, show_path
from normlab.report.verdicts import judge
from normlab.runs import files


@dataclass(frozen=True)
class Options:
    """What every report is made with: the settings that conf/report.yaml explains.

    Raises:
        UserError: for a value out of range.
    """

    baseline: str | None
    thresholds: Sequence[float]
    figures: bool
    confidence: float
    quiet: bool = False

    def __post_init__(self) -> None:
        given: object = self.thresholds
        if not isinstance(given, Sequence) or isinstance(given, str) or not all(map(_share, given)):
            raise UserError(
                f"thresholds={given} is not valid: expected a list of accuracies between 0 and 1.\n"
                "Example: thresholds=[0.5,0.8,0.95]"
            )
        for setting, value in (("figures", self.figures), ("quiet", self.quiet)):
            if not isinstance(value, bool):
                raise UserError(f"{setting}={value} is not valid: expected true or false.")
        if not _share(self.confidence) or self.confidence == 1:
            raise UserError(
                f"confidence={self.confidence} is not valid: expected a number between 0 and 1.\n"
                "Example: confidence=0.95"
            )


def build(study: str, output_dir: str | Path, options: Options) -> Path:
    """Report whatever has finished in `output_dir`/`study`; return the page `report/report.md` there.

    Raises:
        UserError: for a study that does not exist or has no finished run, and a folder that cannot be written.
    """
    found = _find(_folder("output_dir", output_dir), str(study))
    measure = measure_of(found.evaluations)
    baseline, remarks = _baseline(found, options.baseline)
    tables = _tables(found, measure, baseline, options)
    judgements = judge(found, options.confidence)
    if judgements:
        tables.append(verdict_texts.table(judgements, options.confidence))
    folder = found.folder / "report"
    files.make_folder(folder)
    for table in tables:
        for suffix, text in render(table, found.name).items():
            _write(folder / f"{table.name}.{suffix}", text.encode())
    drawn = list(_figures(found, tables[0], measure, options, folder, ("png", "pdf"))) if options.figures else []
    warnings = found.warnings + remarks + list(_unmeasured(found, measure))
    _write(folder / "report.md", page(found, tables, drawn, warnings).encode())
    if options.quiet:
        show_path(folder / "report.md", warnings)
    else:
        show(found, tables[0], judgements, folder / "report.md", warnings)
    return folder / "report.md"


def build_claims(output_dir: str | Path, options: Options) -> Path:
    """Judge every claim against every study below `output_dir`; return the page `claims.md` there.

    Raises:
        UserError: for a folder that does not exist or cannot be written.
    """
    folder = _folder("output_dir", output_dir)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.\nGive the one that holds studies: output_dir=...")
    studies = [load(folder / name, name=name) for name in find_studies(folder)]
    judgements = [judgement for study in studies for judgement in judge(study, options.confidence)]
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
        UserError: for a folder without studies and one that cannot be written.
    """
    folder, page = _folder("output_dir", output_dir), _folder("page", page)
    studies, judgements, warnings = [], [], []
    for name in find_studies(folder):
        found = load(folder / name, name=name)
        warnings += found.warnings
        if not found.runs["state"].isin(FINISHED).any():
            warnings.append(f"{name} has no finished run yet and is left out.")
            continue
        measure = measure_of(found.evaluations)
        tables = _tables(found, measure, _baseline(found, options.baseline)[0], options)
        drawn = []
        if options.figures:
            files.make_folder(page.parent / "figures" / name)
            for earlier in (page.parent / "figures" / name).glob("*.png"):
                earlier.unlink()
            made = _figures(found, tables[0], measure, options, page.parent / "figures" / name, ("png",))
            drawn = [(f"figures/{name}/{figure}.png", caption) for figure, caption in made]
        studies.append((found, tables, drawn))
        judgements += judge(found, options.confidence)
    if not studies:
        raise UserError(
            f"There is no study with a finished run in {folder}.\nTo start one: python train.py -m norm=bn,none"
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
) -> Iterator[tuple[str, str]]:
    """Draw into `folder`; name and caption of each."""
    from normlab.report.figures import draw, encode  # matplotlib is slow to import; tables can do without

    for name, caption, figure in draw(study, accuracy, measure, options.confidence):
        for suffix in suffixes:
            _write(folder / f"{name}.{suffix}", encode(figure, suffix))
        yield name, caption


def render(table: Table, study_name: str) -> dict[str, str]:
    """A table as the text of its files, by suffix: md, csv (full precision, tidy) and tex."""
    slug = study_name.replace("/", "-")
    sections = [f"**{setting}**\n\n{markdown(texts)}" for setting, texts in table.texts.items()]
    environments = [
        latex(texts, f"{table.title}. {setting}. {table.caption}", f"tab:{slug}-{table.name}{f'_{i + 1}' if i else ''}")
        for i, (setting, texts) in enumerate(table.texts.items())
    ]
    return {
        "md": "\n".join([f"# {table.title}\n", *sections, f"{table.caption}\n"]),
        "csv": table.tidy.to_csv(index=False, lineterminator="\n"),
        "tex": "\n".join(["% needs \\usepackage{booktabs}", *environments]),
    }


def _folder(setting: str, value: object) -> Path:
    if not isinstance(value, str | Path):
        raise UserError(f"{setting}={'null' if value is None else value} is not valid: expected a path.")
    return Path(value)


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _find(output_dir: Path, study: str) -> Study:
    found = load(study_folder(study, output_dir), name=study)
    states = found.states()
    if not any(states[state] for state in FINISHED):
        told = ", ".join(f"{number} {state}" for state, number in states.items() if number)
        failed = found.runs[found.runs["state"] == "failed"]
        raise UserError(
            f"Study {study} has no finished run yet: {told}."
            + "".join(f"\n{run.run}: {run.note}" for run in failed.head(1).itertuples())
            + "\nRepeat the command that started the study; it goes on where it stopped. E.g."
            f"\n  python train.py -m study={study} norm=bn,none"
            f"\nHow far its runs are: python report.py status study={study}"
        )
    return found


def _baseline(study: Study, baseline: str | None) -> tuple[str | None, list[str]]:
    """The baseline, or None with a sentence if the study has no such arm."""
    arms = in_order(study.runs["arm"].dropna())
    if baseline is None or baseline in arms:
        return baseline, []
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
