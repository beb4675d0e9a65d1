"""From a study's name to its report on disk: the only part of the report that writes files."""

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normlab import runs
from normlab.errors import UserError, nearest
from normlab.report.arms import in_order
from normlab.report.load import FINISHED, Study, load
from normlab.report.markup import latex, markdown
from normlab.report.tables import Measure, Table, build_tables, measure_of, outcomes
from normlab.report.terminal import show
from normlab.runs import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_CAPTIONS = {
    "against_batch": "Final {measure.label} against batch size: mean over seeds, bars: {percent:g} % t-interval"
    " (where n > 1), dots: single seeds, crosses at the foot: some runs diverged.",
    "learning_curves": "The {measure.label} after each epoch: mean over the done seeds, band: lowest to highest"
    " seed (where n > 1), dotted: diverged runs.",
    "train_against_test": "Test against training values along the training: lines: mean over the done seeds,"
    " markers: where each seed ends, dashed: equal values.",
}
HARDWARE = ("device", "cpu", "versions.torch", "versions.torchvision")  # lines of the page, from provenance


def build(
    study: str,
    output_dir: str | Path = "outputs",
    baseline: str | None = "bn",
    thresholds: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    figures: bool = True,
    confidence: float = 0.95,
) -> Path:
    """Report whatever has finished in `output_dir`/`study`; return the page `report/report.md` there.

    Raises:
        UserError: for a setting out of range, a study that does not exist or has no finished run, and a
            folder that cannot be written.
    """
    _check(thresholds, figures, confidence)
    found = _find(Path(output_dir), str(study))
    measure = measure_of(found.evaluations)
    baseline, remarks = _baseline(found, baseline)
    tables = build_tables(found, measure, baseline, thresholds, confidence)
    folder = found.folder / "report"
    files.make_folder(folder)
    for table in tables:
        for suffix, text in render(table, found.name).items():
            _write(folder / f"{table.name}.{suffix}", text.encode())
    drawn: list[tuple[str, str]] = []
    if figures:
        for name, caption, figure in draw(found, tables[0], measure, confidence):
            for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=suffix, metadata=metadata)
                _write(folder / f"{name}.{suffix}", buffer.getvalue())
            drawn.append((name, caption))
    warnings = found.warnings + remarks
    _write(folder / "report.md", page(found, tables, drawn, warnings).encode())
    show(found, tables[0], folder / "report.md", warnings)
    return folder / "report.md"


def render(table: Table, study_name: str) -> dict[str, str]:
    """A table as the text of its files, by suffix: md, csv (full precision, tidy) and tex."""
    slug = study_name.replace("/", "-")
    sections = [f"**{setting}**\n\n{markdown(texts)}" for setting, texts in table.texts.items()]
    environments = [
        latex(texts, f"{table.title}. {setting}. {table.caption}", f"tab:{slug}-{table.name}{_number(i)}")
        for i, (setting, texts) in enumerate(table.texts.items())
    ]
    return {
        "md": "\n".join([f"# {table.title}\n", *sections, f"{table.caption}\n"]),
        "csv": table.tidy.to_csv(index=False, lineterminator="\n"),
        "tex": "\n".join(["% needs \\usepackage{booktabs}", *environments]),
    }


def draw(
    study: Study, accuracy: Table, measure: Measure, confidence: float
) -> Iterator[tuple[str, str, "Figure"]]:
    """Each setting's figures: the name of its files, its caption, the figure."""
    from normlab.report import figures  # matplotlib is slow to import, and tables can do without

    values, evaluations = outcomes(study, measure), study.evaluations
    looks = figures.styles(study.runs["arm"].dropna())
    for i, (setting, tidy) in enumerate(accuracy.tidy.groupby("setting")):
        curves = evaluations[(evaluations["setting"] == setting) & evaluations["state"].isin(FINISHED)]
        done = curves[curves["state"] == "done"]
        drawn = {}
        if tidy["n"].any():
            of_setting = values[values["setting"] == setting]
            drawn["against_batch"] = figures.accuracy_against_batch(tidy, of_setting, measure, looks)
        if measure.column in curves and len(curves):
            drawn["learning_curves"] = figures.learning_curves(curves, measure, looks)
        if {measure.column, measure.train_column} <= set(done.columns) and len(done):
            drawn["train_against_test"] = figures.train_against_test(done, measure, looks)
        for name, figure in drawn.items():
            caption = FIGURE_CAPTIONS[name].format(measure=measure, percent=100 * confidence)
            prefix = f"{accuracy.name}_" if name == "against_batch" else ""
            yield f"{prefix}{name}{_number(i)}", f"{setting}. {caption}", figure


def page(
    study: Study, tables: Sequence[Table], drawn: Sequence[tuple[str, str]], warnings: Sequence[str]
) -> str:
    """The report as one Markdown page, its figures beside it."""
    states = ", ".join(f"{number} {state}" for state, number in study.states().items())
    noted = study.runs[(study.runs["note"].fillna("") != "") & (study.runs["run"] != "")]
    lines = [f"# Study {study.name}", f"{len(study.runs)} runs: {states}."]
    lines += [f"- {run.run}: {run.state} ({run.note})" for run in noted.itertuples(index=False)]
    lines += [f"- Warning: {warning}" for warning in warnings]
    lines += ["## What was run", *(f"- {fact}" for fact in (*_protocol(study), *_hardware(study)))]
    for table in tables:
        lines.append(f"## {table.title}")
        for setting, texts in table.texts.items():
            lines += [f"**{setting}**", markdown(texts).rstrip()]
        links = ", ".join(f"[{suffix}]({table.name}.{suffix})" for suffix in ("csv", "tex", "md"))
        lines.append(f"{table.caption} ({links})")
    if drawn:
        lines.append("## Figures")
    for name, caption in drawn:
        lines += [f"![{name}]({name}.png)", f"{caption} ([pdf]({name}.pdf))"]
    return _paragraphs(lines)


def _paragraphs(lines: Sequence[str]) -> str:
    """Lines with an empty line between them, except inside a list."""
    text = ""
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        text += line + ("\n" if line.startswith("- ") and following.startswith("- ") else "\n\n")
    return text.rstrip("\n") + "\n"


def _protocol(study: Study) -> Iterator[str]:
    """What all runs have in common, and the seeds, per setting."""
    configs = [study.configs[run] for run in study.runs["run"] if run in study.configs]
    placed = study.runs.dropna(subset=["setting"])
    for setting, group in placed.groupby("setting"):
        seeds = ", ".join(str(seed) for seed in sorted(group["seed"].unique()))
        remark = study.remarks.get(str(setting), "")
        yield f"{setting}: arms {', '.join(in_order(group['arm']))}; seeds {seeds}. {remark}".rstrip()
    facts = {
        "Epochs": [config.get("epochs") for config in configs],
        "Training images": [config["dataset"].get("train_size") or "all" for config in configs],
        "Test images": [config["dataset"].get("test_size") or "all" for config in configs],
        "Optimizer": [_options(config.get("optimizer")) for config in configs],
        "Schedule": [_options(config.get("schedule")) for config in configs],
        "Precision": [config.get("precision") for config in configs],
    }
    for name, values in facts.items():
        yield f"{name}: {_either(values)}"


def _options(group: Mapping[str, Any] | None) -> str:
    if not group:
        return "n/a"
    options = ", ".join(f"{key}={value}" for key, value in group.items() if key != "name")
    return f"{group.get('name')} ({options})" if options else str(group.get("name"))


def _hardware(study: Study) -> Iterator[str]:
    """The provenance that is worth a line: what computed the runs, and with which versions."""
    flat = [_flatten(found) for found in study.provenance.values() if found]
    for name in HARDWARE:
        values = [found[name] for found in flat if found.get(name) is not None]
        if values:
            yield f"{name.rsplit('.')[-1].replace('_', ' ')}: {_either(values)}"


def _flatten(found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in found.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _either(values: Iterable[object]) -> str:
    return " or ".join(dict.fromkeys(str(value) for value in values))


def _number(i: int) -> str:
    return f"_{i + 1}" if i else ""


def _check(thresholds: object, figures: object, confidence: object) -> None:
    if (
        not isinstance(thresholds, Sequence)
        or isinstance(thresholds, str)
        or not all(map(_share, thresholds))
    ):
        raise UserError(
            f"thresholds={thresholds} is not valid: expected a list of accuracies between 0 and 1.\n"
            "Example: thresholds=[0.5,0.8,0.95]"
        )
    if not isinstance(figures, bool):
        raise UserError(f"figures={figures} is not valid: expected true or false.")
    if not _share(confidence) or confidence == 1:
        raise UserError(
            f"confidence={confidence} is not valid: expected a number between 0 and 1.\nExample: confidence=0.95"
        )


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _find(output_dir: Path, study: str) -> Study:
    folder = output_dir / study
    if not folder.is_dir() or not runs.find(folder):
        names = _studies(output_dir)
        close = nearest(study, names)
        raise UserError(
            f"There is no study {study} in {output_dir}."
            + (
                f"\nStudies there: {', '.join(names[:5])}{_more(names)}."
                if names
                else " It holds no study yet."
            )
            + (f"\nDid you mean study={close}?" if close else "")
            + f"\nTo start it: python train.py -m study={study} norm=bn,none"
        )
    found = load(folder, study)
    states = found.states()
    if not any(states[state] for state in FINISHED):
        told = ", ".join(f"{number} {state}" for state, number in states.items() if number)
        failed = found.runs[found.runs["state"] == "failed"]
        raise UserError(
            f"Study {study} has no finished run yet: {told}."
            + "".join(f"\n{run.run}: {run.note}" for run in failed.head(1).itertuples())
            + "\nRepeat the command that started the study; it goes on where it stopped. E.g."
            f"\n  python train.py -m study={study} norm=bn,none"
        )
    return found


def _studies(output_dir: Path) -> list[str]:
    """Every folder that holds runs; a study's name may have several parts."""
    configs = [*output_dir.glob("*/*/config.yaml"), *output_dir.glob("*/*/*/config.yaml")]
    folders = {path.parent.parent for path in configs if not path.parent.name.startswith(".")}
    return sorted(folder.relative_to(output_dir).as_posix() for folder in folders)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""


def _baseline(study: Study, baseline: str | None) -> tuple[str | None, list[str]]:
    """The baseline, or None with a sentence if the study has no such arm."""
    arms = in_order(study.runs["arm"].dropna())
    if baseline is None or baseline in arms:
        return baseline, []
    close = nearest(baseline, arms)
    return None, [
        f"baseline={baseline} is not an arm of this study, so there is no table of differences. Arms:"
        f" {', '.join(arms)}." + (f" Did you mean baseline={_quoted(close)}?" if close else "")
    ]


def _quoted(arm: str) -> str:
    """An arm as it can be typed: options in brackets need quotes for the shell and for Hydra."""
    return arm if "(" not in arm else f"...\n  \"baseline='{arm}'\""


def _write(path: Path, content: bytes) -> None:
    files.write_atomically(path, lambda file: file.write(content), durable=False)
