"""Parameter groups, and schedules against PyTorch's own."""

import itertools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from normlab import models
from normlab.training.optimizers import build_optimizer, learning_rate, parameter_groups

STEPS, EPOCHS, BASE = 5, 8, 0.1
RUN = (f"epochs={EPOCHS}", f"optimizer.lr={BASE}")


def by_torch(scheduler) -> list[float]:
    rates = []
    for _ in range(EPOCHS):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("settings", "make_scheduler"),
    [
        (("schedule=constant",), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
        (("schedule=cosine",), lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS, eta_min=1e-8)),
        (("schedule=step",), lambda o: lr_scheduler.MultiStepLR(o, [4, 6], gamma=0.1)),
        (("schedule=polynomial",), lambda o: lr_scheduler.PolynomialLR(o, EPOCHS, power=2)),
    ],
)
def test_schedule_per_epoch_equals_pytorchs(make, settings, make_scheduler) -> None:
    config = make(*settings, *RUN)
    ours = [learning_rate(config, epoch * STEPS, STEPS) for epoch in range(EPOCHS)]
    within = [learning_rate(config, epoch * STEPS + STEPS - 1, STEPS) for epoch in range(EPOCHS)]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=BASE)
    assert ours == pytest.approx(by_torch(make_scheduler(optimizer)), rel=1e-9)
    assert within == ours


def test_schedule_per_step_moves_within_an_epoch(make) -> None:
    config = make("schedule=cosine", "schedule.per=step", *RUN)
    rates = [learning_rate(config, step, STEPS) for step in range(STEPS * EPOCHS)]
    assert rates[0] == BASE
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[STEPS * EPOCHS // 2] == pytest.approx(BASE / 2, rel=1e-6)


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_milestone_is_at_its_epoch_for_every_fraction(make, percent) -> None:
    """0.07 * 100 is a little more than 7 in floating point."""
    config = make("schedule=step", f"schedule.milestones=[{percent / 100}]", "epochs=100", "optimizer.lr=1.0")
    dropped = [learning_rate(config, epoch * STEPS, STEPS) < 1 for epoch in range(100)]
    assert dropped.index(True) == percent


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "polynomial"])
def test_warm_up_rises_linearly_to_the_full_rate(make, name) -> None:
    config = make(f"schedule={name}", "schedule.warmup_epochs=2", *RUN)
    rates = [learning_rate(config, step, STEPS) for step in range(2 * STEPS + 1)]
    assert rates[: 2 * STEPS] == pytest.approx([BASE * (step + 1) / 10 for step in range(10)])
    assert rates[2 * STEPS] == pytest.approx(BASE)


def test_weights_are_those_of_convolutions_and_linear_layers_by_module(make) -> None:
    network = models.build(make("norm=bn"), num_classes=10, image_size=8)
    weights, others = parameter_groups(network)
    kinds = (nn.Conv2d, nn.Linear)
    expected = {m.weight for m in network.modules() if isinstance(m, kinds)}
    assert set(weights) == expected
    assert set(others) == set(network.parameters()) - expected
    # papers.md section 4 has 11,164,352 weights for this network
    assert sum(p.numel() for p in weights) == 11_164_352


def test_one_output_linear_and_one_channel_norm_are_told_apart() -> None:
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 1))
    weights, others = parameter_groups(network)
    assert [tuple(p.shape) for p in weights] == [(1, 3, 1, 1), (1, 1)]
    assert len(others) == 4


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_one_switch_decays_norms_and_biases(make, name, decay_all) -> None:
    config = make(f"optimizer={name}", f"optimizer.decay_norm_and_bias={str(decay_all).lower()}")
    optimizer = build_optimizer(config.optimizer, models.build(config, num_classes=10, image_size=8))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 1e-4 if decay_all else 0.0]


def test_an_arm_without_norms_and_biases_still_has_an_optimizer(make) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
    assert len(build_optimizer(make().optimizer, network).param_groups) == 1
