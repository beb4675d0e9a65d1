"""A report as one Markdown page: what was run, the tables, the figures."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from normlab.common.installation import CONF
from normlab.report.analysis.cells import Table
from normlab.report.render.markdown import markdown_table
from normlab.report.study.arms import in_order, natural
from normlab.report.study.load import Study
from normlab.report.study.provenance import Provenance

_HARDWARE = {  # what the page tells of a run's provenance
    "device": "Device",
    "cores": "Cores",
    "threads": "Threads of a run",
    "versions.torch": "torch",
    "versions.torchvision": "torchvision",
    "git.commit": "Commit",
}


def page(
    study: Study,
    tables: Sequence[tuple[Table, Provenance]],
    drawn: Sequence[tuple[str, str, Provenance]],
    warnings: Sequence[str],
) -> str:
    """The report as one Markdown page, its figures (name, caption, what they were made from) beside it."""
    states = ", ".join(f"{number} {state}" for state, number in study.states().items())
    lines = [f"# Study {study.name}", question(study), f"{len(study.runs)} runs: {states}."]
    lines += [f"- {run.run}: {run.state} ({run.note})" for run in study.noted()]
    lines += [f"- Warning: {warning}" for warning in warnings]
    lines += ["## What was run", *(f"- {fact}" for fact in facts(study))]
    for table, made in tables:
        lines.append(f"## {table.title}")
        lines += markdown_table(table)
        links = ", ".join(f"[{suffix}]({table.name}.{suffix})" for suffix in ("csv", "tex", "md"))
        lines += [f"{table.caption}{table.rule} ({links})", f"{made.sentence()} ([runs]({table.name}.sources.json))"]
    if drawn:
        lines.append("## Figures")
    for name, caption, made in drawn:
        lines += [f"![{name}]({name}.png)", f"{caption} ([pdf]({name}.pdf))"]
        lines.append(f"{made.sentence()} ([runs]({name}.sources.json))")
    return paragraphs(lines)


def question(study: Study) -> str:
    """What the study asks: the words of its experiment, else what its runs vary."""
    names = {config.get("experiment") for config in study.configs.values()}
    experiment = names.pop() if len(names) == 1 else None
    return _of_experiment(str(experiment)) or _of_what_varies(study)


def _of_experiment(name: str) -> str:
    """The first paragraph of comments in an experiment's file; nothing if there is no such file."""
    path = {path.stem: path for path in (CONF / "experiment").glob("*.yaml")}.get(name)
    if path is None:
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]  # the first is Hydra's
    return " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("# "), lines))


def _of_what_varies(study: Study) -> str:
    placed = study.runs.dropna(subset=["arm"])
    arms, batches = in_order(placed["arm"]), sorted(placed["batch"].unique())
    settings = sorted(placed["setting"].unique(), key=natural)
    shown = ", ".join(arms[:8]) + (f" and {len(arms) - 8} more" if len(arms) > 8 else "")
    sizes = f" with batches of {', '.join(map(str, batches))}" if batches else ""
    where = settings[0] if len(settings) == 1 else f"{len(settings)} settings, from {settings[0]} to {settings[-1]}"
    return f"What does each of these arms buy{sizes}: {shown}? On {where}."


def facts(study: Study) -> list[str]:
    """What was run, and on what, a sentence each."""
    return [*_protocol(study), *_hardware(study)]


def paragraphs(lines: Sequence[str]) -> str:
    """Lines with an empty line between them, except inside a list."""
    text = ""
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        text += line + ("\n" if line.startswith("- ") and following.startswith("- ") else "\n\n")
    return text.rstrip("\n") + "\n"


def _protocol(study: Study) -> Iterator[str]:
    """What all runs have in common, and the seeds, per setting."""
    configs = [study.configs[run] for run in study.runs["run"] if run in study.configs]
    by_setting = {str(setting): group for setting, group in study.runs.groupby("setting")}
    for setting in sorted(by_setting, key=natural):
        group = by_setting[setting]
        seeds = ", ".join(str(seed) for seed in sorted(group["seed"].unique()))
        remark = study.remarks.get(setting, "")
        yield f"{setting}: arms {', '.join(in_order(group['arm']))}; seeds {seeds}. {remark}".rstrip()
    facts: dict[str, list[object]] = {
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
    for path, name in _HARDWARE.items():
        values = [_at(path, found) for found in study.provenance.values()]
        known = [value for value in values if value is not None]
        if known:
            yield f"{name}: {_either(known)}"


def _at(path: str, found: Any) -> Any:
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _either(values: Iterable[object]) -> str:
    return " or ".join(dict.fromkeys(str(value) for value in values))
