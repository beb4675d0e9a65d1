"""From a checkpoint to the state of a run that goes on: its own, or that of a finished run of fewer epochs."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normlab import runs
from normlab.common.errors import UserError, first_line
from normlab.common.source import changed_modules
from normlab.config import weights
from normlab.config.schema import OptimizerConfig, RunConfig
from normlab.data.recorded import image_files
from normlab.norms import Clock
from normlab.runs.shorter import KEPT, Shorter, find_shorter
from normlab.training import checkpoint
from normlab.training.distributed.process_group import ProcessGroup
from normlab.training.optimizers import build_optimizer, restore_optimizer
from normlab.training.record import Recorder
from normlab.training.setup import Resources, set_up
from normlab.training.state import TrainingState


@dataclass(frozen=True)
class ShorterRecord:
    """What a finished run of fewer epochs left for a longer one.

    Attributes:
        weights: digest of those that it ended with.
        metrics: rows of the evaluations that the longer run has, too.
        probes: rows by probe.
    """

    run: Shorter
    weights: object
    metrics: Sequence[Mapping[str, Any]]
    probes: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that can be read, and whether it fits is to be seen.

    Attributes:
        parameters: number of them, by the run's status; None if unknown.
        made: provenance of the run that it is of.
        of_shorter: more of that run, if it is a finished one of fewer epochs.
    """

    path: Path
    content: dict[str, Any]
    parameters: object
    made: Mapping[str, Any]
    of_shorter: ShorterRecord | None = None

    @property
    def shorter(self) -> Shorter | None:
        """The finished run of fewer epochs that it is of, if it is."""
        return self.of_shorter.run if self.of_shorter else None


class MisfitError(Exception):
    """A checkpoint does not fit the run; the text is why."""


def start(
    config: RunConfig, recorder: Recorder, resources: Resources, group: ProcessGroup
) -> tuple[TrainingState, Saved | None]:
    """Set up a run, and bring it to where the newest checkpoint was written that fits; for all processes together.

    A checkpoint that does not fit is left out, with a warning. Rows of a shorter run become those of this one.

    Raises:
        UserError: if images or network have changed since the run was interrupted.
    """
    found = _saved(config, recorder) if group.is_main else iter(())
    while True:
        saved = group.broadcast(next(found, None))
        state = set_up(config, recorder, resources, group, saved.content if saved else None)
        if saved is None:
            return state, None
        try:
            restore(state, saved, recorder.run)
        except MisfitError as error:
            why = _starts_anew(recorder.run, str(error)) if saved.shorter else checkpoint.left_out(saved.path, error)
            recorder.log.warning("%s", why)
            continue
        if saved.of_shorter and group.is_main:
            _take_over(recorder.run, saved.of_shorter, state.step_number)
        return state, saved


def _starts_anew(run: runs.Run, why: str) -> str:
    return f"{run.title} starts anew: {why}."


def _saved(config: RunConfig, recorder: Recorder) -> Iterator[Saved]:
    """Yield the checkpoints to try, the best first: the run's own, and that of a shorter run."""
    run, log = recorder.run, recorder.log
    evaluated = {row["epoch"] for row in runs.read_metrics(run.folder)[0]}
    changed = first_line(runs.check(run.folder))
    for path, content in checkpoint.load(run.folder, run.run_id, log.warning):
        epoch = content["position"].get("epoch")
        if not (type(epoch) is int and 0 <= epoch <= config.epochs):
            log.warning("%s", checkpoint.left_out(path, "its position is out of range"))
        elif not evaluated.issuperset(range(config.eval_every, epoch + 1, config.eval_every)):
            log.warning("%s", checkpoint.left_out(path, "the record lacks evaluations from before it"))
        elif changed:
            log.warning("%s", checkpoint.left_out(path, changed.rstrip(".")))
        else:
            parameters = (runs.read_status(run.folder) or {}).get("parameters")
            yield Saved(path, content, parameters, runs.read_provenance(run.folder))
    shorter = find_shorter(run)
    if shorter and shorter.hindrance:
        log.info("%s %s", run.title, shorter)  # the launcher has told
    elif shorter:
        try:
            yield _of_shorter(config, shorter)
        except (UserError, ValueError, MisfitError) as error:
            log.warning("%s", _starts_anew(run, f"{shorter.folder.name} cannot be gone on from ({first_line(error)})"))


def _of_shorter(config: RunConfig, shorter: Shorter) -> Saved:
    """Return what a finished run of fewer epochs left, checked as far as this does not take a network.

    Raises:
        UserError, ValueError, MisfitError: if it cannot be gone on from: why.
    """
    content = checkpoint.read(shorter.folder / KEPT, shorter.run_id)
    if (content["position"].get("epoch"), content["position"].get("batch")) != (shorter.epochs, 0):
        raise MisfitError("its checkpoint is not of its end")
    every, status = config.eval_every, runs.read_status(shorter.folder) or {}
    rows, complaints = runs.read_metrics(shorter.folder)
    probes, more = runs.read_probes(shorter.folder)
    if complaints or more or runs.check(shorter.folder):
        raise MisfitError("its record is damaged")
    kept = [row for row in rows if row["epoch"] % every == 0]  # an end that the longer run would not evaluate
    if [row["epoch"] for row in kept] != [*range(every, shorter.epochs + 1, every)]:
        raise MisfitError("it lacks evaluations")
    made = runs.read_provenance(shorter.folder)
    with contextlib.suppress(UserError):  # a file that is gone is not compared
        if change := weights.change(config.weights, made.get("weights")):
            raise MisfitError(f"the file of model.weights={config.weights} has changed since: {change}")
    recorded, now = made.get("own_code"), config.own_code()
    before = recorded if isinstance(recorded, Mapping) else {}
    for setting, code in now.items():
        modules = changed_modules(before[setting], code) if isinstance(before.get(setting), Mapping) else [setting]
        if not code["modules"].keys().isdisjoint(modules) or modules == [setting]:
            raise MisfitError(f"the code of {setting}={code['object']} has changed since")
    left = ShorterRecord(shorter, status.get("weights_sha256"), kept, probes)
    return Saved(shorter.folder / KEPT, content, status.get("parameters"), made, left)


def _take_over(run: runs.Run, shorter: ShorterRecord, step: int) -> None:
    """Give a run the rows of a shorter one, in place of what it may have of its own."""
    run.keep_rows_until(-1, 0)
    for row in shorter.metrics:
        run.append_metrics(row)
    for probe, rows in shorter.probes.items():
        run.append_probe(probe, [row for row in rows if row["step"] < step])


def restore(state: TrainingState, saved: Saved, run: runs.Run) -> None:
    """Bring a state that was set up to where its checkpoint was written.

    Raises:
        MisfitError: if the checkpoint is not of such a state, which is then half changed.
        UserError: if images or network have changed since the run was interrupted.
    """
    _check_images(state, saved, run)
    step, content = state.step, saved.content
    try:
        others = {"run_id": content["run_id"], "probes": {}, "optimizer": {}}
        _require_alike(state.state_dict() | others, content | others)
        for name, _ in step.network.named_parameters():
            if not content["network"][name].isfinite().all():
                raise ValueError(f"network.{name} is not finite")
        _check_position(state, content["position"])
        _check_optimizer(state.config.optimizer, step.optimizer, content["optimizer"])
        if state.steps_until(content["position"]["epoch"]) + content["position"]["batch"]:
            _check_moved(state, content)
        step.network.load_state_dict(content["network"])
        if step.averaged:
            step.averaged.load_state_dict(content["averaged"])
        restore_optimizer(step.optimizer, content["optimizer"])
        if state.probes:
            state.probes.load_state_dict(content["probes"])
        step.scaler.load_state_dict(content["scaler"])
        if state.herding:
            state.herding.ranks.copy_(content["exemplar_ranks"])
            epoch = content["position"]["epoch"]
            if state.herding.epochs <= epoch < state.config.epochs and not len(state.herding.exemplars(1)):
                raise ValueError("exemplar_ranks leave the memory empty")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        why = first_line(error) or type(error).__name__
        if saved.shorter is None and _network_changed(state, saved):
            raise UserError(
                f"The network has changed since the run was interrupted: {why}\n"
                f"Bring the old one back, or delete {run.folder} to start it anew."
            ) from error
        of = f"the kept checkpoint of {saved.shorter.folder.name} cannot be used: " if saved.shorter else ""
        raise MisfitError(f"{of}{why}") from error
    state.position.load_state_dict(content["position"])
    state.peak_memory_before = content["peak_memory_bytes"]
    if saved.of_shorter:
        _check_end(state, saved.of_shorter)


def _check_images(state: TrainingState, saved: Saved, run: runs.Run) -> None:
    images, fingerprint = image_files(state.config), state.data.fingerprint
    change = images.change(saved.made.get("data")) if images else ""
    recorded = saved.made.get("data_fingerprint", saved.content["data_fingerprint"])
    if change or recorded != fingerprint:
        subject = f"images of dataset={state.config.dataset.name} have changed since"
        why = f" ({change})" if change else ""
        if saved.shorter:
            raise MisfitError(f"the {subject} {saved.shorter.folder.name} was trained{why}")
        raise UserError(
            f"The {subject} the run was interrupted{why}.\n"
            f"Bring the old ones back, or delete {run.folder} to start it anew, or give the new ones"
            " another dataset.name."
        )
    if saved.content["data_fingerprint"] != fingerprint:
        raise MisfitError("it is of other images than the record")


def _network_changed(state: TrainingState, saved: Saved) -> bool:
    """Return whether the network is another one than the record tells of, so that no checkpoint can fit."""
    code = saved.made.get("own_code")
    of_model = code.get("model.target") if isinstance(code, Mapping) else None
    now = state.config.own_code().get("model.target")
    changed = isinstance(of_model, Mapping) and now is not None and of_model.get("code") != now["code"]
    return changed or saved.parameters not in (None, state.parameters)


def _check_end(state: TrainingState, shorter: ShorterRecord) -> None:
    """Check that a restored state is what a shorter run ended with, and what this one would have come to itself.

    Raises:
        MisfitError: if it is not.
    """
    name = shorter.run.folder.name
    if checkpoint.weights_sha256(state.step.network) != shorter.weights:
        raise MisfitError(f"the kept checkpoint of {name} has other weights than it ended with")
    if follower := follows_progress(state.step.network):
        raise MisfitError(f"{follower} may change with the share of all epochs that is done (at_step)")
    others = state.probes.others_before(state.step_number) if state.probes else []
    if others:
        raise MisfitError(f"probe={others[0]} measures at other steps than {name} did")


def follows_progress(network: nn.Module) -> str:
    """Return the type of a layer that is told the share of the run that is done; "" if there is none."""
    for module in network.modules():
        if hasattr(module, "at_step") and not (isinstance(module, Clock) and module.unit == "steps"):
            return type(module).__name__
    return ""


def _require_alike(expected: object, found: object, name: str = "it") -> None:
    """Check that a saved value has the form of one of the state: the same keys, types, shapes and dtypes.

    Raises:
        ValueError: naming the first difference.
    """
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.layout != torch.strided or found.dtype != expected.dtype:
            raise ValueError(f"{name} is no tensor of {expected.dtype}")
        if found.shape != expected.shape:
            raise ValueError(f"{name} has the shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    elif type(found) not in (type(expected), dict if isinstance(expected, Mapping) else None):
        raise ValueError(f"{name} is of another kind")
    elif isinstance(expected, Mapping) and isinstance(found, Mapping):
        if missing := expected.keys() - found.keys():
            raise ValueError(f"{name} lacks {min(map(str, missing))}")
        if len(found) > len(expected):
            raise ValueError(f"{name} has {len(found) - len(expected)} unknown keys")
        for key, value in expected.items():
            _require_alike(value, found[key], f"{name}.{key}" if name != "it" else str(key))
    elif isinstance(expected, float) and not math.isfinite(float(str(found))):
        raise ValueError(f"{name} is not finite")


def _check_position(state: TrainingState, position: Mapping[str, Any]) -> None:
    """Check that a position of the right form is one of the run.

    Raises:
        ValueError: if it is not.
    """
    epoch, batch, last = position["epoch"], position["batch"], state.config.epochs
    inside = 0 <= epoch < last and 0 <= batch <= state.data.train.steps
    amounts = (position["wall_seconds"], position["train_seconds"], position["train_images"])
    if not (inside or (epoch, batch) == (last, 0)) or not 0 <= min(amounts) <= max(amounts) < 2**53:
        raise ValueError("position is out of range")


def _check_optimizer(config: OptimizerConfig, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Check that the state of an optimizer is of this one.

    Raises:
        ValueError: if it is not.
    """
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict) or len(saved) != 2:
        raise ValueError("optimizer lacks its groups or its state")
    expected = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if [group.get("params") if isinstance(group, dict) else None for group in groups] != expected:
        raise ValueError("optimizer has other groups of parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keeps = _state_of_one(config)
    for index, kept in states.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError("optimizer has the state of an unknown parameter")
        of_it = {name: parameters[index] if one.dim() else one for name, one in keeps.items()}
        _require_alike(of_it, kept, f"optimizer.state.{index}")


def _check_moved(state: TrainingState, content: Mapping[str, Any]) -> None:
    """Check that an optimizer has a state for each parameter that it has changed; those without gradients have none.

    Raises:
        ValueError: if one has been changed without.
    """
    if state.config.weights is not None or state.config.starts_from_data or not _state_of_one(state.config.optimizer):
        return  # a resumed network begins without trained weights and without a start from data
    names = {parameter: name for name, parameter in state.step.network.named_parameters()}
    parameters = (each for group in state.step.optimizer.param_groups for each in group["params"])
    for index, parameter in enumerate(parameters):
        saved = content["network"][names[parameter]]
        if index not in content["optimizer"]["state"] and not torch.equal(saved, parameter.detach().cpu()):
            raise ValueError(f"optimizer lacks the state of {names[parameter]}")


def _state_of_one(config: OptimizerConfig) -> dict[str, Tensor]:
    """Return what an optimizer keeps of a parameter, here one of one dimension, after a step."""
    layer = nn.PReLU(1)  # whose start draws no random numbers
    layer.weight.grad = torch.zeros(1)
    optimizer = build_optimizer(config, layer)
    optimizer.step()
    state: dict[str, Tensor] = dict(optimizer.state[layer.weight])
    return state
