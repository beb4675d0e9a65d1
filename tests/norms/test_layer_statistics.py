"""Evaluation statistics and synchronization, against pooled moments and a single process."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from norms.oracle import images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normlab import models
from normlab.common.errors import UserError
from normlab.norms import (
    BatchNorm,
    BatchStatistics,
    Steps,
    batch_statistics,
    layer_statistics,
    precise_statistics,
    rewrite,
    synchronize,
)
from normlab.norms.layer_statistics import statistics_layers

# Every arm with statistics of the batch; noisy_bn's are bn's.
WITH_STATISTICS = [
    "bn", "bnminus", "bn_scaled", "renorm", "lp1", "lp2", "lpinf", "wn_mean", "evonorm_b0", "mabn", "powernorm",
    "mimicnorm", "bn_var", "bn_mean", "online", "mbn_style", "cbn",
]  # fmt: skip

SYNCHRONIZED = [arm for arm in WITH_STATISTICS if arm != "online"]  # in which images have an order


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def network(arm: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return rewrite(Net(), arm, **options).double()


def test_precise_statistics_are_those_of_all_batches_pooled() -> None:
    torch.manual_seed(0)
    net = rewrite(Net(), BatchNorm(eps=1e-5, momentum=0.1)).double()
    batches = [images(count, 6, 5, 5, seed=count, shift=count) for count in (3, 8, 5)]
    first, second = (net.body[i] for i in (1, 4))

    before_first = [net.body[0](batch) for batch in batches]
    pooled = torch.cat(before_first)
    normalized = [torch.batch_norm(x, first.weight, first.bias, None, None, True, 0, 1e-5, False) for x in before_first]
    before_second = torch.cat([net.body[3](x.relu()) for x in normalized])
    with precise_statistics(net.eval(), batches):
        for layer, inputs in ((first, pooled), (second, before_second)):
            torch.testing.assert_close(layer.running_mean, inputs.mean((0, 2, 3)), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(layer.running_var, inputs.var((0, 2, 3), correction=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arm", SYNCHRONIZED)  # online normalizes by the images before
def test_precise_statistics_of_one_batch_evaluate_it_as_its_own_statistics_do(arm) -> None:
    net = network(arm)
    batch = images(8, 6, 5, 5)
    with precise_statistics(net, [batch]):
        precise = net.eval()(batch)
    with batch_statistics(net):
        own = net.eval()(batch)
    torch.testing.assert_close(precise, own, rtol=1e-9, atol=1e-9)
    assert (own - net(batch)).abs().max() > 1e-3  # the moving averages are far from it


@pytest.mark.parametrize("arm", [*WITH_STATISTICS, "noisy_bn"])
@pytest.mark.parametrize("kind", ["batch", "precise"])
def test_evaluation_statistics_leave_the_network_as_it_was(arm, kind) -> None:
    net = network(arm)
    net(images(8, 6, 5, 5))
    before = copy.deepcopy(net.state_dict())
    training = [images(4, 6, 5, 5, seed=s) for s in (1, 2)]
    with batch_statistics(net) if kind == "batch" else precise_statistics(net, training):
        net.eval()(images(5, 6, 5, 5, seed=3))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(layer.evaluates_on_batch for layer in statistics_layers(net))


@pytest.mark.parametrize("arm", WITH_STATISTICS)
@pytest.mark.parametrize("k", [None, 4])
def test_batch_statistics_are_those_of_the_groups_of_training(arm, k) -> None:
    net = network(arm, norm_batch=k)
    batch = images(6, 6, 5, 5)
    with batch_statistics(net.eval()):
        evaluated = net(batch)
    torch.testing.assert_close(evaluated, net.train()(batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arm", ["bn", "bnminus", "bn_var", "bn_mean", "lp1", "lpinf", "wn_mean", "evonorm_b0"])
@pytest.mark.parametrize("together", [False, True])
def test_statistics_of_a_single_value_are_refused(arm, together) -> None:
    net = network(arm)
    if together:
        synchronize(net)
    net(images(2, 6, 3, 3))
    with pytest.raises(ValueError, match=r"more than (1|one) value"):
        net(images(1, 6, 3, 3))


@pytest.mark.parametrize("passes", [1, 2], ids=["once", "a layer called twice in a step"])
@pytest.mark.parametrize("arm", WITH_STATISTICS)
def test_averages_that_move_together_are_those_that_layers_move_alone(arm, passes) -> None:
    alone, together = network(arm, norm_batch=4), network(arm, norm_batch=4)
    for net in (alone, together):
        layers = Steps(net)
        for step in range(3):
            layers.begin(step, 4)
            if net is together:
                layers.start()
            for number in range(passes):
                loss_of(net(images(6, 6, 5, 5, seed=step + number))).backward()
            layers.end()
    for name, value in state(alone).items():
        assert torch.equal(value, state(together)[name]), name


def test_a_pass_between_steps_moves_averages_at_once() -> None:
    net = network("bn")
    layers = Steps(net)
    layers.start()
    layers.end()
    before = state(net)
    net(images(6, 6, 5, 5))
    assert any(not torch.equal(value, state(net)[name]) for name, value in before.items())


class Means(BatchStatistics):
    momentum = 0.5

    def normalize(self, x: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x, (x.mean((0, 2, 3)), x.square().mean((0, 2, 3)))


def test_one_value_in_each_of_two_processes_is_enough_for_statistics_of_both(monkeypatch) -> None:
    monkeypatch.setattr(layer_statistics, "processes", lambda: 2)
    layer = Means(3)
    with pytest.raises(ValueError, match="more than one value"):
        layer(torch.zeros(1, 3, 1, 1))
    synchronize(layer)
    for count in (1, 2):
        layer(torch.zeros(count, 3, 1, 1))


def test_means_of_processes_count_by_their_weights(monkeypatch) -> None:
    other = torch.tensor([8.0, 1.0]) * 3
    monkeypatch.setattr(layer_statistics._AllReduce, "apply", lambda local: local + other)
    assert layer_statistics.mean_over_processes(torch.tensor([4.0]), 2.0) == pytest.approx(6.4)


def test_processes_can_be_independent_for_a_while(monkeypatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    one, other = layer_statistics.independent_processes(), layer_statistics.independent_processes()
    one.__enter__()
    other.__enter__()
    for each in (one, other):  # crosswise, as threads of packed runs leave them
        assert layer_statistics.processes() == 1
        each.__exit__(None, None, None)
    assert layer_statistics.processes() == 2


def test_a_norm_without_these_statistics_is_named_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"body\.1 is a BatchNorm2d of PyTorch"), batch_statistics(Net()):
        pass


# --- two processes -------------------------------------------------------------------------------------------------


CLOSE = {"rtol": 1e-8, "atol": 1e-10}
STEPS = (0, 3, 6, 9)  # of ten: warm-ups, ramps and what follows them


def loss_of(output: Tensor) -> Tensor:
    factors = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).cos()
    return (output * factors).square().mean()


# Averages of the loss' gradient, whose scale follows the loss: two means of halves are twice a mean of the whole.
OF_GRADIENTS = ("noted", "gradients", "nu")


def state(net: nn.Module) -> dict[str, Tensor]:
    named = net.named_buffers()
    buffers = {name: buffer.clone() for name, buffer in named if not name.endswith(OF_GRADIENTS)}
    return buffers | {f"grad {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def one_of_two(rank: int, port: int, folder: str, nets: dict[str, nn.Module]) -> None:
    """Half of each batch, under DistributedDataParallel."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for name, net in nets.items():
        net = copy.deepcopy(net)  # what is handed to a process lies in memory shared by all
        parallel, layers = DistributedDataParallel(net), Steps(net)
        for step in STEPS:
            batch = images(8, 6, 5, 5, seed=step)[4 * rank : 4 * rank + 4]
            layers.begin(step, 10)
            net.zero_grad()
            loss_of(parallel(batch)).backward()
            layers.end(lambda parallel=parallel, batch=batch: parallel(batch))
        found[name] = state(net)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


BURNT_IN = {"cbn": {"burn_in": 0}}
LOCAL = {"bn": {}, "renorm": {}, "lp2": {}, "gn": {"groups": 2}}  # arms, with options, of processes on their own


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    """What two processes end with, one half of each batch in each."""
    folder = tmp_path_factory.mktemp("ddp")
    nets = {arm: synchronize(network(arm, **BURNT_IN.get(arm, {}))) for arm in SYNCHRONIZED}
    nets |= {f"local {arm}": network(arm, **options) for arm, options in LOCAL.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (port, str(folder), nets), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("arm", SYNCHRONIZED)
def test_synchronized_statistics_make_two_processes_one(both, arm) -> None:
    single = network(arm, **BURNT_IN.get(arm, {}))
    layers = Steps(single)
    for step in STEPS:
        layers.begin(step, 10)
        single.zero_grad()
        halves = [loss_of(half) for half in single(images(8, 6, 5, 5, seed=step)).split(4)]
        (sum(halves) / 2).backward()
        layers.end(lambda step=step: single(images(8, 6, 5, 5, seed=step)))
    for found in both:
        torch.testing.assert_close({name: found[arm][name] for name in state(single)}, state(single), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("arm", LOCAL)
def test_local_statistics_are_each_processes_own(both, arm) -> None:
    single = network(arm, **LOCAL[arm])
    for step in STEPS:
        Steps(single).begin(step, 10)
        single.zero_grad()
        halves = images(8, 6, 5, 5, seed=step).split(4)
        first = copy.deepcopy(single)  # each process begins the step with the first one's averages
        (loss_of(first(halves[0])) / 2).backward()
        second = copy.deepcopy(single)
        (loss_of(second(halves[1])) / 2).backward()
        for p, a, b in zip(single.parameters(), first.parameters(), second.parameters(), strict=True):
            p.grad = a.grad + b.grad
        for buffer, kept in zip(single.buffers(), first.buffers(), strict=True):
            buffer.copy_(kept)
    expected = {name: value for name, value in state(single).items() if name.startswith("grad")}
    for found in both:
        torch.testing.assert_close({name: found[f"local {arm}"][name] for name in expected}, expected, **CLOSE)


def test_the_setting_reaches_every_layer(make) -> None:
    net = models.build(make("sync_stats=true", "norm=renorm", "input_norm=bn"), num_classes=10, image_size=8)
    layers = [module for module in net.modules() if isinstance(module, BatchStatistics)]
    assert len(layers) == 21
    assert all(layer.synchronized for layer in layers)
