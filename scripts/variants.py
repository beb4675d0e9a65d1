"""Make the tables of docs/variants.md anew: python scripts/variants.py [--check]

A table stands between `<!-- made by scripts/variants.py: NAME -->` and `<!-- end -->`; all else is written by hand.
NAME is

a family    its norms, as `@register` declares them in src/normlab/norms
cost        docs/benchmarks/norms.json, of `scripts/bench norms --json docs/benchmarks/norms.json`
training    a study of the norms, each at its best learning rate; left as it is while the study has no validation images

--check writes nothing, and fails if the page is not what would be written.
"""

import argparse
import itertools
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from normlab.common.errors import count
from normlab.common.registry import Declaration, declarations
from normlab.report import Study, load, options
from normlab.report.analysis import cells, frames
from normlab.report.analysis.metrics import ACCURACY
from normlab.report.study.provenance import provenance_of
from normlab.report.study.tuned import value_text
from normlab.report.tables import chosen_runs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "variants.md"
BENCHMARK = ROOT / "docs" / "benchmarks" / "norms.json"
STUDY = ROOT / "outputs" / "reference" / "digits_every_norm.normlab.zip"
NORMS = declarations("norms")
BLOCK = re.compile(r"(<!-- made by scripts/variants\.py: ([^\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)

WANTED = {  # step time over bn's, at most
    "BN and its parts": 1.25,
    "statistics of the batch": 1.25,
    "statistics of a sample": 1.5,
    "weights, starts and gradients": 1.3,
}
CONFIDENCE = 0.95
PLACES = ("output_dir=", "data_dir=")  # on a command line
ENOUGH = 90  # per cent; a norm below that has a reason, by its name
REASONS = {
    "noisy_bn": "its moving averages are of noisy inputs, and evaluation is without noise; trains with"
    " `eval_stats=precise`",
    "noisy_none": "nothing bounds what the noise adds, and some seeds do not leave chance",
    "nf": "adaptive clipping bounds each step relative to its weights; that of scalars keeps the branches off; trains"
    " with `optimizer.agc_vectors=false`",
}
ABSENT = {  # why a norm is not in the study
    "bn_frozen": "which is for a network that was trained with `bn`",
    "tbbn": "which is for `sampler=class_incremental` alone",
}


def families() -> dict[str, list[Declaration]]:
    """The norms by family, both in the order of tables."""
    found: dict[str, list[Declaration]] = {}
    for each in NORMS.values():
        found.setdefault(each.family, []).append(each)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def norms(family: Sequence[Declaration]) -> str:
    rows = [
        [
            f"`{each.name}`",
            f"{'a reconstruction: ' * each.reconstruction}{each.formula}",
            each.source,
            each.over,
            each.parameters,
            each.conv or "no",
            each.use,
        ]
        for each in family
    ]
    return table(["`norm=`", "formula", "source", "over", "parameters", "conv", "use"], rows)


def costs() -> str:
    found = json.loads(BENCHMARK.read_text(encoding="utf-8"))
    versions, ratios = found["machine"]["versions"], found["ratios"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "normlab"))
    where = f"{found['machine']['processor']}, {found['machine']['cores']} cores, Python {versions['python']}, {names}"
    rounds = count(found["options"]["rounds"], "round")
    when = "".join(
        f"; {found['machine'][key][:most]}" for key, most in (("commit", 12), ("date", 10)) if found["machine"].get(key)
    )
    measured = f"{where}{when}; medians of {rounds}; `bn` took {found['bn_seconds']:.2f} s a step."

    def numbers(arm: str, missing: str) -> list[str]:
        one = ratios.get(arm)
        return [f"{one['median']:.2f}", f"{one['min']:.2f} to {one['max']:.2f}"] if one else [missing, ""]

    every = list(itertools.chain.from_iterable(families().values()))
    rows = [
        [f"`{each.name}`", *numbers(each.name, "n/a"), *numbers(f"{each.name}, norm_batch=4", ""), each.cost]
        for each in every
    ]
    head = ["`norm=`", "step / `bn`'s", "min to max", "with `norm_batch=4`", "min to max", "what it spends"]
    wanted = ", ".join(f"{most} ({family})" for family, most in WANTED.items())
    above = [
        f"`{arm}` {ratios[arm]['median']:.2f}"
        for each in every
        for arm in (each.name, f"{each.name}, norm_batch=4")
        if arm in ratios and ratios[arm]["median"] > WANTED[each.family]
    ]
    sentence = f"Wanted: at most {wanted}. Above that: {', '.join(above) or 'none'}."
    return "\n\n".join([fill(" ".join([measured, *found.get("notes", [])])), table(head, rows), fill(sentence)])


def training(path: Path) -> str | None:
    """Each norm at its best learning rate by validation images; None where the study has none."""
    study = load(path)
    if "val_accuracy" not in study.evaluations:
        return None
    chosen = chosen_runs(study, options())
    if chosen.tuning is None:  # the runs name no setting that was tuned
        chosen = chosen_runs(study, options(tuned="optimizer.lr"))
    assert chosen.tuning is not None
    settings = chosen.tuning.settings
    choices = {(each.setting, each.arm, each.batch): each for each in chosen.tuning.choices}
    values = frames.outcomes(chosen, ACCURACY)
    means = frames.summarize(chosen.runs, values, ["final"], CONFIDENCE, frames.bounds_of(ACCURACY))
    tables: dict[str, list[list[str]]] = {}
    for row in frames.named_rows(means):
        choice, (name, _, options_of_arm) = choices.get((row.setting, row.arm, row.batch)), row.arm.partition(" ")
        if choice is None:  # a gap of the grid
            continue
        reason = "" if row.mean >= ENOUGH else REASONS.get(name, f"below {ENOUGH} %: why is not known")
        remarks = "; ".join(filter(None, [reason, *choice.none, *choice.edges, *choice.losses]))
        chosen_values = map(value_text, choice.chosen.values) if choice.chosen else ["n/a"] * len(settings)
        tried = "; ".join(each.text for each in choice.tried)
        line = [f"`{name}` {options_of_arm}".strip(), cells.with_counts(row, 1), *chosen_values, tried, remarks]
        tables.setdefault(f"{row.setting}, batch {row.batch}", []).append(line)
    head = ["`norm=`", "test accuracy, %", *(f"`{name}`" for name in settings), "tried", "remarks"]
    parts = [fill(recipe(study, chosen.tuning.sentence)), "\n".join(["```", *commands(study), "```"])]
    for setting, rows in tables.items():
        parts += [f"{setting}:", table(head, rows)]
    trained = {arm.partition(" ")[0] for arm in means["arm"]}
    absent = [f"`{name}`{f', {ABSENT[name]}' if name in ABSENT else ''}" for name in NORMS if name not in trained]
    return "\n\n".join([*parts, *([fill(f"Not in this study: {'; '.join(absent)}.")] if absent else [])])


def recipe(study: Study, tuned: str) -> str:
    epochs, steps = (int(study.results()[name].max()) for name in ("epochs", "step"))
    return (
        f"`outputs/reference/{STUDY.name}`: {provenance_of(study, study.finished).counts()}; {count(epochs, 'epoch')},"
        f" {count(steps, 'step')}; {tuned}. Test accuracy: mean ± half of the 95 % t-interval over n seeds; in brackets"
        " the ends of an interval that is cut at 100 %."
    )


def commands(study: Study) -> Iterator[str]:
    """The commands that made the runs, without where they were written."""
    for words in sorted({tuple(each.get("command", ())) for each in study.provenance.values()} - {()}):
        kept = ["-m" if word == "--multirun" else word for word in words if not word.startswith(PLACES)]
        yield " \\\n    ".join(
            textwrap.wrap(f"python {shlex.join(kept)}", 110, break_long_words=False, break_on_hyphens=False)
        )


def fill(text: str) -> str:
    return textwrap.fill(text, 130, break_long_words=False, break_on_hyphens=False)


def made(page: str) -> str:
    """The page with every table anew."""
    makers: dict[str, Callable[[], str | None]] = {name: partial(norms, each) for name, each in families().items()}
    makers |= {"cost": costs, "training": partial(training, STUDY)}
    if set(makers) != {name for _, name, _ in BLOCK.findall(page)}:
        sys.exit(f"docs/variants.md needs one place for each of: {', '.join(makers)}.")

    def block(found: re.Match[str]) -> str:
        text = makers[found[2]]()
        return found[0] if text is None else f"{found[1]}\n{text}\n\n{found[3]}"

    return BLOCK.sub(block, page)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    check = parser.parse_args(words).check
    page = PAGE.read_text(encoding="utf-8")
    text = made(page)
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif text != page:
        sys.exit("docs/variants.md is out of date. Make it anew: python scripts/variants.py")


if __name__ == "__main__":
    main()
