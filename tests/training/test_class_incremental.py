"""sampler=class_incremental: a classifier of the classes seen, tasks that begin anew, resumes, and what is recorded."""

import math

import pytest
import torch
import torch.nn.functional as F
from outcome import folder, outcome, rows, status
from steps import rewritten
from torch import nn

from normlab.common.errors import UserError
from normlab.norms.task_balanced import TaskSplits
from normlab.runs import Run
from normlab.runs.shorter import find_shorter
from normlab.training import checkpoint
from normlab.training.class_incremental import classifier
from normlab.training.distributed.checks import check_settings
from normlab.training.optimizers import build_optimizer, learning_rate, restart_optimizer
from normlab.training.run import train_run
from normlab.training.tasks import SeenClasses

RUN = (
    *("sampler=class_incremental", "sampler.tasks=5", "sampler.memory=20", "sampler.memory_batch=4", "epochs=10"),
    *("dataset.train_size=60", "dataset.test_size=40", "dataset.val_size=20", "norm=tbbn"),
)


def test_masked_logits_are_a_classifier_that_grows() -> None:
    """Loss, gradients, classifications and evaluation of one with rows for classes 4, 1 and 2 alone."""
    torch.manual_seed(0)
    whole, features = nn.Linear(7, 6), torch.randn(9, 7)
    order = [4, 1, 2]
    grown = nn.Linear(7, 3)
    grown.load_state_dict({name: value[order] for name, value in whole.state_dict().items()})
    own = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2])
    targets = torch.tensor(order)[own]
    task = SeenClasses(6, torch.device("cpu"))
    task.seen.copy_(torch.tensor([False, True, True, False, True, False]))
    loss, expected = task.loss(whole(features), targets), F.cross_entropy(grown(features), own)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(whole.weight.grad[order], grown.weight.grad)
    assert not whole.weight.grad[[0, 3, 5]].any()
    assert task.hits(whole(features), targets).tolist() == (grown(features).argmax(1) == own).tolist()
    more, unseen = torch.cat([features, features]), torch.tensor([0, 3, 5] * 3)
    total = task.test_loss(whole(more), torch.cat([targets, unseen]))
    torch.testing.assert_close(total, F.cross_entropy(grown(features), own, reduction="sum"))
    assert task.correct(whole(more), torch.cat([targets, unseen])) == (grown(features).argmax(1) == own).sum()


@pytest.mark.parametrize(
    "optimizer",
    ["optimizer=sgd", "optimizer=adam", "optimizer=rmsprop +optimizer.momentum=0.9"],
)
def test_an_optimizer_that_is_restarted_is_a_new_one(make, optimizer) -> None:
    config = make(*optimizer.replace("+", "").split()).optimizer
    torch.manual_seed(0)
    used = nn.Linear(3, 3)
    first = build_optimizer(config, used)

    def step(network: nn.Module, by: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        network.zero_grad()
        network(torch.randn(4, 3)).square().sum().backward()
        by.step()

    for seed in range(3):
        step(used, first, seed)
    other = nn.Linear(3, 3)
    other.load_state_dict(used.state_dict())
    anew = build_optimizer(config, other)
    restart_optimizer(first)
    for seed in range(3, 6):
        step(used, first, seed)
        step(other, anew, seed)
    assert all(torch.equal(a, b) for a, b in zip(used.parameters(), other.parameters(), strict=True))


def test_every_task_has_a_schedule_of_its_own(make) -> None:
    tasks = make(*RUN, "schedule=step", "optimizer.lr=0.1", "epochs=20", "schedule.warmup_epochs=1", "batch=16")
    alone = make("schedule=step", "optimizer.lr=0.1", "epochs=4", "schedule.warmup_epochs=1")
    expected = [learning_rate(alone, step, 3) for step in range(12)]
    assert [learning_rate(tasks, step, 3) for step in range(60)] == expected * 5
    assert len(set(expected)) > 3


def test_rows_say_how_tasks_are_kept(tiny) -> None:
    """All from the last row's bits: accuracies of tasks are those of the classes, and the whole their mean."""
    config = tiny(*RUN, "eval_every=10")
    train_run(config)
    found = rows(config)
    assert [(row["epoch"], row["task"]) for row in found] == [(2, 1), (4, 2), (6, 3), (8, 4), (10, 5)]
    for row in found:
        names = [name for name in row if name.startswith("task_")]
        assert names == [f"task_{number}_accuracy" for number in range(1, row["task"] + 1)]
        assert row["test_accuracy"] == pytest.approx(sum(row[name] for name in names) / len(names))  # 4 images a class
        assert math.isfinite(row["test_loss"] + row["val_loss"] + row["train_loss"])
        assert 0 <= row["val_accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("exemplars", ["random", "herding"])
def test_a_run_interrupted_after_any_step_ends_bit_identical(tiny, steps, exemplars) -> None:
    """Within a task, right at its end, and at the start of the next; the memory is that of the whole run."""
    settings = (*RUN, f"sampler.exemplars={exemplars}", "optimizer.momentum=0.9", "dataset.flip=true", "batch=8")
    whole = tiny("study=whole", *settings)
    train_run(whole)
    per_epoch, total = rows(whole)[0]["step"], steps.taken
    assert per_epoch > 1
    for after in (3 * per_epoch + 1, 4 * per_epoch, 6 * per_epoch + 1):
        parts = tiny(f"study=parts{after}", *settings)
        steps.taken = 0
        steps.interrupt(parts, after)
        train_run(parts)
        assert steps.taken == total, "a step was repeated or left out"
        assert outcome(parts) == outcome(whole)


def test_herding_keeps_other_images_than_chance(tiny) -> None:
    one, other = (tiny(*RUN, f"sampler.exemplars={kind}") for kind in ("random", "herding"))
    train_run(one)
    train_run(other)
    assert rows(one)[:2] == rows(other)[:2], "the first task has no memory"
    assert rows(one)[2:] != rows(other)[2:]


def test_a_checkpoint_whose_memory_is_empty_is_left_out(tiny, steps) -> None:
    whole, parts = (tiny(f"study={name}", *RUN, "sampler.exemplars=herding") for name in ("whole", "parts"))
    train_run(whole)
    steps.interrupt(parts, rows(whole)[2]["step"] + 1)
    rewritten(folder(parts) / checkpoint.NEWEST, lambda saved: saved["exemplar_ranks"].fill_(10**6))
    train_run(parts)
    assert "exemplar_ranks leave the memory empty" in (folder(parts) / "run.log").read_text()
    assert status(parts)["weights_sha256"] == status(whole)["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("exemplars", ["random", "herding"])
def test_captured_steps_are_the_same(tiny, exemplars) -> None:
    """The tasks' classes and splits change in place, outside of the graph."""
    settings = (*RUN, f"sampler.exemplars={exemplars}", "optimizer.momentum=0.9")
    eager, graph = (tiny(*settings, f"study={name}", f"engine={name}") for name in ("eager", "graph"))
    train_run(eager)
    train_run(graph)
    assert outcome(graph) == outcome(eager)
    assert "WARNING" not in (folder(graph) / "run.log").read_text()


def test_the_layers_are_of_the_task_of_each_step(tiny, monkeypatch) -> None:
    used = []
    at_step = TaskSplits.at_step

    def noted(self: TaskSplits, step: int, steps: int) -> None:
        at_step(self, step, steps)
        used.append(int(self.members.amax(1).sum()))

    monkeypatch.setattr(TaskSplits, "at_step", noted)
    config = tiny(*RUN)  # 12 + 4 images: r is 1, then 2, then 4
    train_run(config)
    each = len(used) // 5
    assert used == [1] * each + [2] * each + [4] * 3 * each


def test_several_processes_are_refused(tiny) -> None:
    with pytest.raises(UserError, match="which 2 processes would not divide alike"):
        check_settings(tiny(*RUN), 2)


def test_fewer_epochs_are_other_tasks(tiny) -> None:
    train_run(tiny(*RUN, "epochs=5", "schedule=constant", "keep_checkpoint=true"))
    found = find_shorter(Run(tiny(*RUN, "schedule=constant", "keep_checkpoint=true").as_dict()))
    assert found is not None
    assert "sampler=class_incremental spreads its tasks over all epochs" in found.hindrance


def test_herding_needs_a_classifier() -> None:
    with pytest.raises(UserError, match="looks at the inputs of the last linear layer"):
        classifier(nn.Sequential(nn.Conv2d(3, 3, 1)))


@pytest.mark.no_cover
@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "tbbn"])
def test_it_learns_several_tasks(make, norm) -> None:
    """Two tasks of five digits with all images remembered: chance is 10 %, and the first task alone 50 %."""
    settings = ("sampler=class_incremental", "sampler.memory=1400", "batch=64", "sampler.memory_batch=32", "epochs=8")
    config = make("device=cpu", "model=cifar_resnet", "depth=20", f"norm={norm}", *settings, "eval_every=8")
    assert train_run(config)["test_accuracy"] > 0.7
