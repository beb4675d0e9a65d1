"""Carry out recorded runs again, and judge whether they come out the same.

To the bit where CPU, versions, threads and code are those of the record. Elsewhere rounding differs, and training
makes it grow until the run is another draw from what seeds give: then the difference to the recorded final value is
judged by the spread of the cell's other seeds (`_judged`).
"""

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normlab import runs
from normlab.common.errors import UserError, as_typed, did_you_mean, listed
from normlab.common.progress import one_line, span
from normlab.common.registry import declarations
from normlab.config import schema, weights
from normlab.report.checks import Check, Outcome
from normlab.report.study.load import Study
from normlab.runs import State, provenance
from normlab.runs.reading import RecordPath

CHANGES = (
    "dataset.path",
    "dataset.workers",
    "model.weights",
    "data_dir",
    "device",
)  # settings that a reviewer may give: `set`
MOST_TIMES, MOST_SECONDS = 20, 600  # a run is given up after this many times what it took, and no sooner than that
MOST_RECORDED_SECONDS = 30 * 86_400  # that are believed; nobody waits longer for a rerun
MOST_THREADS = 1024  # that are believed
ENOUGH = 3  # other seeds, to say that a value lies within what seeds differ by
_UNREPEATED = ("images_per_second", "wall_seconds")  # columns of rows
_NEEDED = ("code", "torch", "NumPy", "device", "threads")  # to demand that a run comes out to the bit
_FACTS = ("state", "diverged_step", "step", "parameters", "weights_sha256")  # of status.json


@dataclass(frozen=True)
class Rerun:
    """The settings of `verify rerun=N`.

    Attributes:
        number: of runs to carry out again.
        choice: chooses them; the same number chooses the same runs.
        trust: carry out runs, too, whose configuration names code or files that are not normlab's.
        changes: settings of this machine by dotted path, of `CHANGES`.

    Raises:
        UserError: for values that are none of these.
    """

    number: int
    choice: int
    trust: bool
    changes: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, value in (("rerun", self.number), ("rerun_seed", self.choice)):
            if type(value) is not int or value < 0:
                raise UserError(f"{name}={as_typed(value)} is not valid: expected a whole number, 0 or more.")
        if not isinstance(self.trust, bool):
            raise UserError(f"trust={as_typed(self.trust)} is not valid: expected true or false.")
        if not isinstance(self.changes, Mapping):
            raise UserError("set= is not valid: expected settings, e.g. set='{dataset.path: /my/images}'.")
        for name in self.changes:
            if name not in CHANGES:
                raise UserError(
                    f"set={{{name}: ...}} is not possible: a run is carried out as it was recorded.\n"
                    f"Settings of this machine: {', '.join(CHANGES)}.{did_you_mean(name, CHANGES)}"
                )


def chosen(names: Iterable[str], number: int, choice: int) -> list[str]:
    """Return that many of the names, at random by `choice`: the same ones with every version of Python."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{choice} {name}".encode()).hexdigest())[:number]


def candidates(study: Study, rerun: Rerun) -> tuple[dict[str, schema.RunConfig], dict[str, list[str]]]:
    """Return the finished runs that can be carried out, and why others cannot: the reason, and their names."""
    able: dict[str, schema.RunConfig] = {}
    others: dict[str, list[str]] = {}
    for run in study.finished["run"]:
        config, why = as_here(study.configs[run], rerun)
        if config is None:
            others.setdefault(why, []).append(run)
        else:
            able[run] = config
    return able, others


def as_here(recorded: Mapping[str, Any], rerun: Rerun) -> tuple[schema.RunConfig | None, str]:
    """Return the configuration of a run as it is carried out here, or why it is not."""
    if recorded["norm"].get("imported"):
        return None, "imported: they were made elsewhere"
    here = {**recorded, "study": "rerun", "logger": {"name": "none"}, "checkpoint_seconds": None}
    here |= {"save_weights": False, "quiet": True, "data_dir": os.environ.get("NORMLAB_DATA", "data")}
    if "path" in recorded["dataset"] and "dataset.path" not in rerun.changes:
        return None, "their images lie in a folder of the machine that trained: set='{dataset.path: /my/images}'"
    for name, value in rerun.changes.items():
        group, _, key = name.rpartition(".")
        if group and here[group].get(key) is not None:
            here[group] = {**here[group], key: value}
        elif not group:
            here[key] = value
    try:
        config = schema.parse(here)
        if runs.run_id(config.as_dict()) != runs.run_id(recorded):
            return (
                None,
                f"set={as_typed(rerun.changes)} makes other runs of them: weights have the name of the record's",
            )
    except (UserError, AttributeError, TypeError, ValueError) as error:
        return None, f"their settings are not valid: {one_line(error)}"
    named = [] if rerun.trust else foreign(config, given=rerun.changes)
    if named:
        return None, (
            f"what {listed(named, 2)} names is not in the study and not normlab's. If you have it and trust it, go to"
            " its folder and add trust=true"
        )
    return (None, why) if (why := _download(config, rerun)) else (config, "")


def _download(config: schema.RunConfig, rerun: Rerun) -> str:
    """Return why a run is not carried out before the reviewer agrees to what it would download; "" if nothing."""
    downloaded = isinstance(config.dataset, schema.BuiltinDataset) and config.dataset.kind != "digits"
    if downloaded and "data_dir" not in rerun.changes and "NORMLAB_DATA" not in os.environ:
        return "their images may have to be downloaded: set='{data_dir: FOLDER}' names a folder for them"
    if config.weights and not weights.is_file(config.weights) and not rerun.trust:
        return "their trained weights may have to be downloaded: trust=true allows it"
    return ""


def foreign(config: schema.RunConfig, given: Iterable[str] = ()) -> list[str]:
    """Return the settings of a run that name code or files which are neither normlab's nor torchvision's nor timm's.

    Args:
        config: that of the run.
        given: settings that are the reviewer's own.
    """
    own = {f"normlab.norms.{norm.class_name}" for norm in declarations("norms").values()}
    found = [] if config.norm.target in own else [f"norm._target_={config.norm.target}"]
    if isinstance(config.model, schema.CustomModelConfig):
        found.append(f"model.target={config.model.target}")
    if weights.is_file(config.weights) and "model.weights" not in given:
        found.append(f"model.weights={config.weights}")
    kwargs = getattr(config.model, "kwargs", {})
    return found + [f"model.kwargs.{key}={one_line(as_typed(each))}" for key, each in kwargs.items() if _names(each)]


def _names(value: object) -> bool:
    """Return whether a value may name code or a file: it is no number, no switch and no list of these."""
    if isinstance(value, list):
        return any(map(_names, value))
    return not isinstance(value, bool | int | float | None)


def recorded_seconds(status: Mapping[str, Any]) -> float:
    """Return the seconds that a run took by its status; nan if it does not say."""
    seconds = status.get("wall_seconds")
    return float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < MOST_RECORDED_SECONDS else math.nan


def carry_out(study: Study, run: str, recorded: RecordPath, config: schema.RunConfig, alpha: float) -> Check:
    """Train a run again, in a temporary folder, and compare it with its record.

    Args:
        study: what it is of.
        run: the name of its folder.
        recorded: that folder.
        config: its configuration as it is carried out here.
        alpha: the probability that a run which holds is said not to, where it need not come out to the bit.
    """
    made = study.provenance.get(run, {})
    settings = config.as_dict() | _left_to_the_machine(made)
    with tempfile.TemporaryDirectory(prefix="normlab-rerun-") as folder:
        settings["output_dir"] = folder
        order = Path(folder, "order.json")
        order.write_text(json.dumps({"settings": settings, "made": made}))
        seconds = recorded_seconds(runs.read_status(recorded) or {})
        limit = max(MOST_SECONDS, MOST_TIMES * (0 if math.isnan(seconds) else seconds))
        took = "nothing of it" if math.isnan(seconds) else span(seconds)
        # -P: nothing is imported from the present folder, except by trust=true.
        command = [sys.executable, "-P", "-m", "normlab.launchers.rerun", str(order)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit)
        except subprocess.TimeoutExpired:
            return Check(Outcome.OPEN, run, f"was given up after {limit:.0f} s; its record says {took}.")
        if ended.returncode == 130:
            raise KeyboardInterrupt
        if ended.returncode:
            why = one_line(ended.stderr.strip()) or f"exit status {ended.returncode}"
            return Check(Outcome.OPEN, run, f"cannot be carried out here: {why}")
        return _compared(study, run, recorded, Path(folder, "rerun", runs.run_name(settings)), alpha)


def _left_to_the_machine(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what settings such as auto and null came to where a run was made."""
    threads, memory_format = made.get("threads"), made.get("memory_format")
    found = {"threads": threads} if type(threads) is int and 0 < threads <= MOST_THREADS else {}
    return found | ({"memory_format": memory_format} if memory_format in ("contiguous", "channels_last") else {})


def _compared(study: Study, run: str, recorded: RecordPath, again: Path, alpha: float) -> Check:
    made, now = study.provenance.get(run, {}), runs.read_provenance(again)
    images = made.get("data_fingerprint")
    if images and images != now.get("data_fingerprint"):
        return Check(Outcome.OPEN, run, "cannot be compared: the images here are not those that it was trained on.")
    circumstances = _circumstances(made, now, study.configs[run])
    difference = _first_difference(recorded, again, whole=not circumstances)
    elsewhere = f", although {listed(circumstances, 3, '; ')}" if circumstances else ""
    if not difference:
        status = runs.read_status(recorded) or {}
        ends = " and its weights" if status.get("weights_sha256") else ""
        rows = len(runs.read_metrics(recorded)[0])
        what = f"{rows} evaluation{'s' * (rows != 1)}{ends}, times left out"
        text = f"comes out the same to the bit: {what}{elsewhere}."
        return Check(Outcome.HOLDS, run, text)
    if not circumstances:
        text = f"does not come out the same, though CPU, versions, threads and code are: {difference}."
        return Check(Outcome.FAILS, run, text)
    outcome, text = _judged(study, run, again, alpha)
    return Check(outcome, run, f"{text} Not to the bit, as {listed(circumstances, 3, '; ')}.")


def _first_difference(recorded: RecordPath, again: RecordPath, *, whole: bool) -> str:
    """Return the first difference of evaluations, measurements of probes and end, times left out; "" if none.

    Args:
        recorded, again: the folders of the run.
        whole: whether the record has to have all that is recorded now, which other versions did not.
    """
    tables = [("metrics", runs.read_metrics(recorded)[0], runs.read_metrics(again)[0])]
    (probes, _), (probes_again, _) = runs.read_probes(recorded), runs.read_probes(again)
    measured = dict.fromkeys([*probes, *probes_again] if whole else probes)
    tables += [(probe, probes.get(probe, []), probes_again.get(probe, [])) for probe in measured]
    for name, rows, anew in tables:
        if len(rows) != len(anew):
            return f"{len(rows)} rows of {name} recorded, {len(anew)} now"
        for row, new in zip(rows, anew, strict=True):
            for key in dict.fromkeys([*row, *new] if whole else row):
                if key not in _UNREPEATED and row.get(key) != new.get(key):
                    old, value = one_line(as_typed(row.get(key))), one_line(as_typed(new.get(key)))
                    return f"{name}, step {row['step']}, {key}: {old} recorded, {value} now"
    status, ended = runs.read_status(recorded) or {}, runs.read_status(again) or {}
    for key in _FACTS:
        if (whole or status.get(key) is not None) and status.get(key) != ended.get(key):
            return f"{key}: {one_line(status.get(key))} recorded, {one_line(ended.get(key))} now"
    return ""


def _circumstances(made: Mapping[str, Any], now: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return why a run need not come out the same to the bit: circumstances that differ, or are not recorded."""
    found: dict[str, None] = {}
    for segment in provenance.segments(made):
        before, known = provenance.circumstances(segment), provenance.circumstances(now)
        before = dict.fromkeys(_NEEDED, provenance.UNKNOWN) | before
        found |= {
            f"{name} {old}, now {known[name]}": None
            for name, old in before.items()
            if name in known and (old != known[name] or provenance.UNKNOWN in old)
        }
    if "instructions" not in now and not config.get("deterministic"):
        found["a GPU repeats itself with deterministic=true only"] = None
    return list(found)


def _judged(study: Study, run: str, again: Path, alpha: float) -> tuple[Outcome, str]:
    """Judge the final value of a run that need not come out to the bit by the other seeds of its cell.

    The recorded value is not among these, so one that is made up does not widen what is allowed.
    """
    cells = study.finished.set_index("run")
    place = ["setting", "arm", "batch"]
    others = cells[(cells[place] == cells.loc[run, place]).all(axis=1) & (cells.index != run)]
    state, ended = str(cells.loc[run, "state"]), str((runs.read_status(again) or {}).get("state"))
    if state != ended or ended != State.DONE:
        alike = int((others["state"] == ended).sum())
        text = f"is {state} in its record and {ended} now; of {len(others)} other seeds {alike} are {ended}."
        return (Outcome.HOLDS if state == ended or alike else Outcome.OPEN), text
    new = runs.read_metrics(again)[0][-1]
    column = "test_accuracy" if "test_accuracy" in new else "test_loss"
    last = study.evaluations.drop_duplicates("run", keep="last").set_index("run").reindex(columns=[column])[column]
    recorded, now = float(last[run]), math.nan if new[column] is None else float(new[column])
    seeds = last.reindex(others.index[others["state"] == State.DONE]).dropna()
    text = f"ends at {_shown(now, column)}, its record at {_shown(recorded, column)}"
    bound = allowed_difference(seeds.to_list(), alpha)
    if not bound > 0 or math.isnan(now - recorded):
        return Outcome.OPEN, f"{text}; {len(seeds)} other seeds do not tell by how much seeds differ."
    inside = abs(now - recorded) <= bound
    text += f"; {len(seeds)} other seeds allow a difference of {_shown(bound, column).replace('%', 'points')}"
    if inside and len(seeds) < ENOUGH:
        return Outcome.OPEN, f"{text}, but {len(seeds)} are too few to say that it holds."
    return (Outcome.HOLDS if inside else Outcome.FAILS), f"{text}{'' if inside else ' and no more'}."


def allowed_difference(seeds: Sequence[float], alpha: float) -> float:
    """Return the difference that two further runs exceed with probability `alpha`; nan if the seeds do not tell.

    It is t(n - 1) * s * sqrt(2), with the standard deviation s of n seeds and the quantile t at 1 - alpha / 2: exact
    for independent draws of one normal distribution, and too large for runs that are alike for sharing a seed.
    """
    if len(seeds) < 2:
        return math.nan
    from scipy.special import stdtrit

    return float(stdtrit(len(seeds) - 1, 1 - alpha / 2)) * statistics.stdev(seeds) * math.sqrt(2)


def _shown(value: float, column: str) -> str:
    return f"{100 * value:.2f} %" if column == "test_accuracy" else f"{value:.4g}"
