"""Task-balanced batch normalization against its definition, with every split and copy made one by one."""

import copy

import pytest
import torch
from norms.oracle import compare, compare_rounded, images
from small import SmallNet
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms import Steps, TaskBalancedBatchNorm, batch_statistics, rewrite
from normlab.norms.task_balanced import TaskBalancedBatchNorm2d, number_of_splits

EPS, MOMENTUM = 1e-3, 0.4


def variant(tasks: int, current: int, memory: int) -> TaskBalancedBatchNorm:
    made = TaskBalancedBatchNorm(eps=EPS, momentum=MOMENTUM)
    made.replay = tasks, current, memory
    return made


def layer(tasks: int, current: int, memory: int) -> TaskBalancedBatchNorm2d:
    made = variant(tasks, current, memory).norm(nn.BatchNorm2d(6))
    assert isinstance(made, TaskBalancedBatchNorm2d)
    return made


class Definition:
    """Loops over splits, each a batch of its own, whose memory images are copies; r as a test has it."""

    def __init__(self, current: int, r: int) -> None:
        self.current, self.r = current, r
        self.mean, self.var = torch.zeros(6).double(), torch.ones(6).double()

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        outputs: list[list[Tensor]] = [[] for _ in x]
        means, variances = [], []
        for split in range(self.r):
            members = [n for n in range(len(x)) if n >= self.current or n % self.r == split]
            part = torch.stack([x[n] for n in members])
            m = part.numel() // 6
            mu = torch.stack([part[:, c].sum() / m for c in range(6)])
            v = torch.stack([((part[:, c] - mu[c]) ** 2).sum() / m for c in range(6)])
            for n in members:
                channels = [
                    parameters["weight"][c] * (x[n, c] - mu[c]) / torch.sqrt(v[c] + EPS) + parameters["bias"][c]
                    for c in range(6)
                ]
                outputs[n].append(torch.stack(channels))
            # each split has moving averages of its own, which start where the last step's mean over splits is
            means.append((1 - MOMENTUM) * self.mean + MOMENTUM * mu.detach())
            variances.append((1 - MOMENTUM) * self.var + MOMENTUM * v.detach() * m / (m - 1))
        self.mean, self.var = sum(means) / self.r, sum(variances) / self.r
        assert [len(copies) for copies in outputs] == [1 if n < self.current else self.r for n in range(len(x))]
        return torch.stack([sum(copies[1:], copies[0]) / len(copies) for copies in outputs])

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        mean, var, weight, bias = (
            value[:, None, None] for value in (self.mean, self.var, parameters["weight"], parameters["bias"])
        )
        return weight * (x - mean) / torch.sqrt(var + EPS) + bias


@pytest.mark.parametrize(
    ("tasks", "current", "memory", "task", "r"),
    [(3, 6, 2, 0, 1), (3, 6, 2, 1, 2), (3, 12, 4, 1, 2), (3, 12, 4, 2, 4), (2, 5, 3, 1, 1), (4, 6, 3, 3, 3)],
)
@pytest.mark.parametrize("maps", [(4, 3), (1, 1)])
def test_it_is_its_definition(tasks, current, memory, task, r, maps) -> None:
    made = layer(tasks, current, memory)
    compare(
        made,
        Definition(current, r),
        lambda step: images(current + memory, 6, *maps, seed=step, scale=1.5, shift=0.3),
        before_step=lambda step: made.splits.at_step(task * 5 + step, tasks * 5),
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_statistics_are_in_full_precision(dtype, bound) -> None:
    made = layer(2, 6, 2)
    compare_rounded(
        made,
        Definition(6, 2),
        dtype,
        lambda step: images(8, 6, 4, 4, seed=step, scale=0.5, shift=20.0 if dtype == torch.float32 else 2.0),
        bound=bound * (10 if dtype == torch.float32 else 1),
        before_step=lambda step: made.splits.at_step(1, 2),
    )


def test_the_splits_are_the_papers() -> None:
    """48 + 16 images: the official code's r (papers.md)."""
    assert [number_of_splits(task, 48, 16) for task in range(10)] == [1, 2, 4, 8, 8, 8, 16, 16, 16, 16]
    assert [number_of_splits(task, 15, 5) for task in range(4)] == [1, 1, 5, 5]
    assert number_of_splits(3, 8, 32) == 1  # a memory that already outweighs the task


@pytest.mark.parametrize("task", [0, 1])
def test_with_one_split_or_another_batch_it_is_batch_norm(task) -> None:
    ours = layer(2, 5, 3)  # without a common divisor
    theirs = nn.BatchNorm2d(6, eps=EPS, momentum=MOMENTUM)
    ours.splits.at_step(task, 2)
    for step, count in enumerate((8, 3, 8)):
        a = images(count, 6, 4, 3, seed=step).float().requires_grad_()
        b = a.detach().clone().requires_grad_()
        outputs = ours(a), theirs(b)
        torch.testing.assert_close(*outputs)
        for output in outputs:
            (output**3).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    x = images(8, 6, 4, 3, seed=9).float()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    with batch_statistics(ours):
        torch.testing.assert_close(ours(x), theirs.train()(x))


def test_all_layers_follow_the_run_and_copies_go_on() -> None:
    network = rewrite(SmallNet(10), variant(3, 6, 2)).train()
    splits = {module.splits for module in network.modules() if isinstance(module, TaskBalancedBatchNorm2d)}
    assert len(splits) == 1
    steps = Steps(network)
    used = []
    for step in range(6):
        steps.begin(step, 6)
        used.append(int(next(iter(splits)).members.amax(1).sum()))
    assert used == [1, 1, 2, 2, 2, 2]
    other = copy.deepcopy(network)
    assert next(m for m in other.modules() if isinstance(m, TaskBalancedBatchNorm2d)).splits not in splits
    Steps(other).begin(0, 6)
    assert int(next(iter(splits)).members.amax(1).sum()) == 2


def test_without_tasks_it_is_refused() -> None:
    with pytest.raises(UserError, match="nothing says which images are of which"):
        rewrite(SmallNet(10), TaskBalancedBatchNorm())
