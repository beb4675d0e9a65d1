"""Parameter groups, and schedules against PyTorch's own."""

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from normlab import models, runs
from normlab.training.optimizers import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    restore_optimizer,
    set_learning_rate,
    updating,
)

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


@pytest.mark.parametrize("schedule", ["cosine", "step", "polynomial"])
def test_each_cycle_is_a_run_of_its_own_with_a_warm_up_of_its_own(make, schedule) -> None:
    settings = (f"schedule={schedule}", "schedule.warmup_epochs=0.5", "schedule.per=step", *RUN)
    third = make(*settings, f"epochs={EPOCHS}")
    whole = make(*settings, f"epochs={3 * EPOCHS}", "schedule.cycles=3")
    expected = [learning_rate(third, step, STEPS) for step in range(EPOCHS * STEPS)]
    assert [learning_rate(whole, step, STEPS) for step in range(3 * EPOCHS * STEPS)] == pytest.approx(expected * 3)
    assert runs.run_id(third.as_dict()) != runs.run_id(make(*settings, "schedule.cycles=3").as_dict())


def test_cycles_that_do_not_divide_the_run_begin_at_the_next_step(make) -> None:
    config = make("schedule=polynomial", "schedule.power=1", "schedule.per=step", *RUN, "epochs=1", "schedule.cycles=2")
    rates = [learning_rate(config, step, 7) for step in range(7)]
    assert rates == pytest.approx([BASE * (1 - t) for t in (0, 1 / 3.5, 2 / 3.5, 3 / 3.5, 0, 1 / 3.5, 2 / 3.5)])


@pytest.mark.parametrize(
    ("schedule", "make_scheduler"),
    [
        ("cosine", lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS, eta_min=1e-4)),
        # PyTorch's polynomial ends at 0: from 1e-4 on it is the rest.
        ("polynomial", None),
    ],
)
def test_parameters_that_learn_slowly_end_at_the_same_rate(make, schedule, make_scheduler) -> None:
    config = make(f"schedule={schedule}", "schedule.final_lr=1e-4", *RUN, "norm=bn_scaled")
    ours = [learning_rate(config, epoch * STEPS, STEPS, 100.0) for epoch in range(EPOCHS)]
    if make_scheduler:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=BASE / 100)
        expected = by_torch(make_scheduler(optimizer))
    else:
        expected = [1e-4 + (BASE / 100 - 1e-4) * (1 - epoch / EPOCHS) ** 2 for epoch in range(EPOCHS)]
    assert ours == pytest.approx(expected, rel=1e-9)
    divided = make(f"schedule={schedule}", "schedule.final_lr=1e-4", "schedule.divide_final_lr=true", *RUN)
    pairs = [(learning_rate(divided, s, STEPS, 100.0), learning_rate(divided, s, STEPS)) for s in (0, 7, 39)]
    assert all(slow == full / 100 for slow, full in pairs)


def test_gammas_last_rate_is_the_one_of_davis_and_franks_code(make) -> None:
    """Worked out in docs/papers.md, section 4, from their recipe: 180 epochs from 0.1 to 1e-8, c = 100."""
    config = make("norm=bn_scaled", "epochs=180", "optimizer.lr=0.1")
    assert learning_rate(config, 179 * STEPS, STEPS, 100.0) == pytest.approx(8.6152e-8, rel=1e-4)


def test_new_settings_of_schedules_and_clipping_leave_the_identity_of_runs_that_they_do_not_concern(make) -> None:
    plain = make("norm=bn", "schedule.divide_final_lr=false", "optimizer.agc_vectors=true").as_dict()
    assert runs.run_id(plain) == runs.run_id(make("norm=bn", "schedule.divide_final_lr=true").as_dict())
    for settings, setting in (
        (("norm=bn_scaled",), "schedule.divide_final_lr"),
        (("norm=nf",), "optimizer.agc_vectors"),
    ):
        ids = {runs.run_id(make(*settings, f"{setting}={value}").as_dict()) for value in ("true", "false")}
        assert len(ids) == 2


def test_schedule_per_step_moves_within_an_epoch(make) -> None:
    config = make("schedule=cosine", "schedule.per=step", *RUN)
    rates = [learning_rate(config, step, STEPS) for step in range(STEPS * EPOCHS)]
    assert rates[0] == BASE
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[STEPS * EPOCHS // 2] == pytest.approx(BASE / 2, rel=1e-6)


def test_a_milestone_is_at_its_epoch_for_every_fraction(make) -> None:
    """0.07 * 100 is a little more than 7 in floating point."""
    config = make("schedule=step", "epochs=100", "optimizer.lr=1.0")
    for percent in range(1, 100):
        schedule = config.schedule.model_copy(update={"milestones": [percent / 100]})
        given = config.model_copy(update={"schedule": schedule})
        assert learning_rate(given, percent * STEPS - 1, STEPS) == 1, percent
        assert learning_rate(given, percent * STEPS, STEPS) < 1, percent


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "polynomial"])
def test_warm_up_rises_linearly_to_the_full_rate(make, name) -> None:
    config = make(f"schedule={name}", "schedule.warmup_epochs=2", *RUN)
    rates = [learning_rate(config, step, STEPS) for step in range(2 * STEPS + 1)]
    assert rates[: 2 * STEPS] == pytest.approx([BASE * (step + 1) / 10 for step in range(10)])
    assert rates[2 * STEPS] == pytest.approx(BASE)


def scalars(network: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for group in parameter_groups(network):
        counts[group["role"]] = counts.get(group["role"], 0) + sum(p.numel() for p in group["params"])
    return counts


def test_groups_are_weights_biases_scales_and_shifts_by_module(make) -> None:
    network = models.build(make("norm=bn"), num_classes=10, image_size=8)
    weights = {m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    groups = {group["role"]: group["params"] for group in parameter_groups(network)}
    assert set(groups["weight"]) == weights
    assert set(itertools.chain(*groups.values())) == set(network.parameters())
    assert groups["bias"] == [network.fc.bias]


def test_groups_have_the_sizes_worked_out_for_the_paper(make) -> None:
    """docs/papers.md, section 4: scalars of ResNet18 with the input BN and 10 classes."""
    config = make("norm=bn_scaled", "input_norm=bn")
    counts = scalars(models.build(config, num_classes=10, image_size=32))
    assert counts["weight"] == 11_164_352
    assert counts["scale"] == 4_803
    assert counts["bias"] + counts["shift"] == 4_810


def test_scales_learn_slowly_where_the_paper_says_so_and_shifts_do_not(make) -> None:
    config = make("norm=bn_scaled", "input_norm=bn", "optimizer.lr=0.1")
    network = models.build(config, num_classes=10, image_size=8)
    assert network.network.bn1.weight.tolist() == pytest.approx([0.1] * 64)
    assert network.input_norm.weight.tolist() == pytest.approx([0.058] * 3)
    optimizer = build_optimizer(config.optimizer, network)
    assert {g["role"]: g["lr"] for g in optimizer.param_groups} == pytest.approx(
        {"weight": 0.1, "bias": 0.1, "shift": 0.1, "scale": 0.001}
    )
    set_learning_rate(optimizer, 0.05)
    assert {g["role"]: g["lr"] for g in optimizer.param_groups}["scale"] == pytest.approx(0.0005)


def test_one_output_linear_and_one_channel_norm_are_distinguished() -> None:
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 1))
    assert scalars(network) == {"weight": 4, "bias": 2, "scale": 1, "shift": 1}


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_one_switch_decays_norms_and_biases(make, name, decay_all) -> None:
    config = make(f"optimizer={name}", f"optimizer.decay_norm_and_bias={str(decay_all).lower()}")
    optimizer = build_optimizer(config.optimizer, nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1)))
    decays = {group["role"]: group["weight_decay"] for group in optimizer.param_groups}
    others = 1e-4 if decay_all else 0.0
    assert decays == {"weight": 1e-4, "bias": others, "scale": others, "shift": others}


def test_fixups_scalars_and_biases_learn_slowly_and_decay(make) -> None:
    config = make("norm=fixup", "optimizer.lr=0.1")
    network = models.build(config, num_classes=10, image_size=8)
    slow = {name for name, p in network.named_parameters() if p.numel() == 1 or name == "fc.bias"}
    names = {parameter: name for name, parameter in network.named_parameters()}
    for group in build_optimizer(config.optimizer, network).param_groups:
        assert group["weight_decay"] == 1e-4
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.01 if names[parameter] in slow else 0.1)
    plain = make("norm=fixup", "norm.scalar_lr_divisor=1", "norm.decay_scalars=false")
    groups = build_optimizer(plain.optimizer, models.build(plain, num_classes=10, image_size=8)).param_groups
    assert {(group["role"], group["lr"], group["weight_decay"]) for group in groups} == {
        ("weight", 0.02, 1e-4), ("bias", 0.02, 0.0), ("scale", 0.02, 0.0), ("shift", 0.02, 0.0)
    }  # fmt: skip


def test_an_arm_without_norms_and_biases_still_has_an_optimizer(make) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
    assert len(build_optimizer(make().optimizer, network).param_groups) == 1


# In memory


LAYOUTS = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "by taps": (2, 3, 0, 1)}


def laid_out(values: Tensor, layout: str) -> Tensor:
    order = LAYOUTS[layout]
    return values.permute(order).contiguous().permute([order.index(dimension) for dimension in range(4)])


class OneConvolution(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Conv2d(*weight.shape[1::-1], weight.shape[2], bias=False)
        self.layer.weight.data = weight


@pytest.mark.parametrize("gradients", [*LAYOUTS])
@pytest.mark.parametrize("weights", [*LAYOUTS])
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (("optimizer=sgd", "optimizer.nesterov=true"), functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
        (("optimizer=adam",), torch.optim.Adam),
        (("optimizer=adam", "optimizer.decoupled=true"), torch.optim.AdamW),
    ],
)
def test_an_update_is_the_same_however_weights_and_gradients_are_laid_out(
    make, settings, kind, weights, gradients
) -> None:
    """As by PyTorch's updates of one operation after the other, which go by index."""
    options = (
        ("optimizer.lr=0.1", "optimizer.momentum=0.9") if settings[0] == "optimizer=sgd" else ("optimizer.lr=0.1",)
    )
    config = make(*settings, *options, "optimizer.weight_decay=0.01").optimizer
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(6, 4, 3, 3, generator=generator) for _ in range(4))
    own = OneConvolution(laid_out(start, weights))
    other = nn.Parameter(start.clone())
    optimizers = build_optimizer(config, own), kind([other], lr=0.1, weight_decay=0.01, foreach=False, fused=False)
    for number, grad in enumerate(grads):
        own.layer.weight.grad, other.grad = laid_out(grad, gradients), grad.clone()
        with updating(torch.device("cpu")):
            optimizers[0].step()
        optimizers[1].step()
        if number == 0:  # as a resumed run, whose weights are laid out in another way than when it was saved
            saved = optimizers[0].state_dict()
            own = OneConvolution(laid_out(own.layer.weight.detach(), gradients))
            optimizers = build_optimizer(config, own), optimizers[1]
            restore_optimizer(optimizers[0], saved)
    torch.testing.assert_close(own.layer.weight, other, rtol=1e-5, atol=1e-6)
