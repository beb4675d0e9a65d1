"""The training loop: epochs of steps, each with an evaluation; measurements of probes in between."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from normlab.common.errors import InterruptedRunError
from normlab.common.rng import key
from normlab.data.batches import Split
from normlab.norms import batch_statistics, independent_processes, precise_statistics
from normlab.probes import Probes, StepSnapshot
from normlab.training import class_incremental
from normlab.training.device import autocast, generator_of
from normlab.training.evaluation import Evaluation
from normlab.training.interrupt import StopRequest
from normlab.training.optimizers import learning_rate, set_learning_rate
from normlab.training.record import Recorder
from normlab.training.state import TrainingState
from normlab.training.supervision import DivergedError, Supervisor


def train(state: TrainingState, recorder: Recorder, stop: StopRequest) -> None:
    """Train from the state's position to the end of the run.

    The processes of a group make every step together, each with its share of the batch.

    Raises:
        DivergedError: at the first loss that is not finite (noticed within a second or two).
        InterruptedRunError: after a checkpoint, when `stop` was requested.
    """
    config, position = state.config, state.position
    supervisor = Supervisor(state, recorder, stop)
    try:
        while position.epoch < config.epochs:
            train_epoch(state, supervisor)
            done = position.epoch + 1
            if done % config.eval_every == 0 or done == config.epochs or state.ends_task:
                recorder.metrics(evaluate_epoch(state, supervisor))
            if state.ends_task and state.herding:
                class_incremental.choose_exemplars(state, state.herding)
            position.next_epoch()
            recorder.heartbeat(state)
    except InterruptedRunError:  # an interrupted evaluation or measurement of probes begins anew in a resume
        recorder.checkpoint(state)
        raise


def train_epoch(state: TrainingState, supervisor: Supervisor) -> None:
    """Train from the state's position to the end of its epoch.

    Raises:
        DivergedError: for a loss, or at the end a parameter, that is not finite.
        InterruptedRunError: when a stop was requested.
    """
    step, engine, position = state.step, state.engine, state.position
    if state.data.train.tasks:
        class_incremental.start_epoch(state, state.data.train.tasks)
    step.network.train()
    supervisor.start_epoch()
    engine.start_epoch(position.epoch)
    for number in range(state.step_number, state.steps_until(position.epoch + 1)):
        seed_step(state, number)  # of dropout and the like: the same after a resume, and in a probe
        step.layers.begin(number, state.total_steps)
        if state.probes and state.probes.due(number):
            measure(state, state.probes, supervisor)
        engine.step()  # loss and correct classifications stay on the device: reading them would wait for it
        position.train_images += state.data.train.images_of(position.batch)
        position.batch += 1
        state.interleaver.after_step()
        supervisor.after_batch(training=True)
    supervisor.gather_losses()
    check_parameters(step.network, state.step_number)
    supervisor.stopwatch.lap(training=True)


def seed_step(state: TrainingState, number: int) -> None:
    """Seed the global generator of the run's device for step `number`; processes draw numbers of their own."""
    device, rank = state.device, state.group.rank
    # The generator of this device alone: torch.manual_seed would seed every backend, at 0.1 ms a step.
    generator_of(device).manual_seed(key(state.config.seed, "step", number, *(("process", rank) if rank else ())))


def measure(state: TrainingState, probes: Probes, supervisor: Supervisor) -> None:
    """Let probes measure before the step that comes next."""
    config, step = state.config, state.step
    supervisor.gather_losses()
    supervisor.stopwatch.lap(training=True)
    lr = learning_rate(config, state.step_number, state.data.train.steps)
    rate = partial(learning_rate, config, state.step_number, state.data.train.steps)
    set_learning_rate(step.optimizer, rate)  # a probe may compute the update that the step will make
    step.optimizer.zero_grad(set_to_none=True)
    images, targets = state.engine.next_batch()
    snapshot = StepSnapshot(
        state.step_number,
        lr,
        images,
        targets,
        network=step.network,
        optimizer=step.optimizer,
        scaler=step.scaler,
        transform=step.transform,
        criterion=step.task.loss,
        forward_context=partial(autocast, config, state.device),
        seed=partial(seed_step, state),
        on_evaluation=partial(supervisor.after_batch, training=False),
    )
    probes.measure(snapshot)
    supervisor.stopwatch.lap(training=False)


def check_parameters(network: nn.Module, step: int) -> None:
    """Check that the last step of an epoch left finite parameters: no later training loss would show it in time.

    Raises:
        DivergedError: if one is not finite after step number `step`, counted from 1.
    """
    sums = torch.stack([parameter.detach().sum() for parameter in network.parameters()])  # one pass, no copies
    if not torch.isfinite(sums).all():
        raise DivergedError(step, "a parameter after the update")


def evaluate_epoch(state: TrainingState, supervisor: Supervisor) -> dict[str, Any]:
    """Evaluate the network, or the average of its weights; return the epoch's row of metrics.

    Training loss and accuracy are those seen while training this epoch.

    Raises:
        InterruptedRunError: when a stop was requested.
    """
    config, data, position, task = state.config, state.data, state.position, state.step.task
    tasks = data.train.tasks
    network = state.step.averaged.module if state.step.averaged else state.step.network
    end = state.steps_until(position.epoch + 1)
    sizes = torch.full_like(position.losses, config.batch)
    sizes[-1] = data.train.images_of(data.train.steps - 1)
    loss, correct = task.train_loss(position.losses, sizes), int(position.correct.sum())
    row = {"epoch": position.epoch + 1, "step": end, **task.metrics("train", loss, correct, data.train.images)}
    with independent_processes(), _statistics(state, network, supervisor):
        for name, split in (("val", data.val), ("test", data.test)):
            if split is not None:
                evaluation = evaluate(state, network, name, split, supervisor)
                images = tasks.seen_images(position.epoch, split.labels) if tasks else len(split)
                if images:  # of the classes that have come, there may be none
                    row |= task.metrics(name, float(evaluation.loss), int(evaluation.correct), images)
                if name == "test" and tasks:
                    row |= tasks.accuracies(position.epoch, evaluation.hits.cpu(), split.labels)
                if name == "test" and position.epoch + 1 == config.epochs and data.test_order:
                    state.correct = evaluation.hits.bool().cpu()
    supervisor.stopwatch.lap(training=False)
    row["lr"] = learning_rate(config, end - 1, data.train.steps)
    row["images_per_second"] = position.train_images / position.train_seconds
    row["wall_seconds"] = position.wall_seconds
    position.train_seconds, position.train_images = 0.0, 0
    return row


def _statistics(state: TrainingState, network: nn.Module, supervisor: Supervisor) -> AbstractContextManager[None]:
    """Return a context in which `network` normalizes by the statistics of `eval_stats`.

    Every process measures precise statistics by itself.
    """
    config = state.config
    if config.eval_stats == "batch":
        return batch_statistics(network)
    if config.eval_stats == "precise":
        batches = supervisor.supervise(state.data.train.plain_batches(config.precise_batches))
        return precise_statistics(network, batches, within=autocast(config, state.device))
    return nullcontext()


@torch.inference_mode()
def evaluate(state: TrainingState, network: nn.Module, part: str, split: Split, supervisor: Supervisor) -> Evaluation:
    """Return the sums over a part of the data, all processes' of it."""
    network.eval()
    if part not in state.evaluations:
        by_graph = state.engine.evaluation
        state.evaluations[part] = Evaluation(state.config, state.device, state.step.task, network, split, by_graph)
    evaluation = state.evaluations[part]
    for batch in supervisor.supervise(evaluation.batches(), split.shared_batches):
        batch()
        state.interleaver.after_step()
    state.interleaver.synchronize()
    if split.processes > 1:  # else every process has evaluated all of it
        for total in (evaluation.loss, evaluation.correct, evaluation.hits):
            state.group.all_reduce(total)
    return evaluation
