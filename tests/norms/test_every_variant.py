"""What every norm of the menu has to stand: each file of conf/norm on a small ResNet."""

import copy
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import SmallResNet
from torch import Tensor, nn

from normlab import models, runs
from normlab.common.errors import InterruptedRunError, UserError
from normlab.config.schema import RunConfig
from normlab.models.build import variant
from normlab.norms import BatchStatistics, Steps, rewrite, trace
from normlab.training import engines, loop
from normlab.training.gradient_transforms import build_transform
from normlab.training.optimizers import build_optimizer
from normlab.training.run import train_run

NORMS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "norm").glob("*.yaml"))
RANDOM = ("noisy_bn", "noisy_none")  # whose training forward pass is another one each time
WITH_STATE = (  # beyond parameters: averages, phases, random numbers, work of the optimizer; one norm of each kind
    *("bn", "renorm", "lpinf", "mabn", "powernorm", "online", "tbbn", "evonorm_b0", "wn_mean", "mimicnorm"),
    *("noisy_bn", "bnp", "nf", "bnn_free", "mbn_style", "cbn"),
)
# One norm for each code: test_moving_average.py compiles mabn and powernorm; draws come from another stream than eager.
COMPILED = (
    *("bn", "bn_var", "bn_mean", "derf", "online", "gn", "renorm", "lp1", "lpinf", "frn", "evonorm_s0", "evonorm_b0"),
    *("wn", "wn_mean", "wn_trelu", "normprop", "mimicnorm", "nf", "fixup", "tbbn", "bnn_free", "mbn_style"),
)
SMALL = (
    "model=custom",
    "model.target=small.SmallResNet",
    "model.name=small_resnet",
    "device=cpu",
    "batch=16",
    "optimizer.lr=1e-3",
)


def batch(images: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def build(make, norm: str, *settings: str) -> tuple[RunConfig, nn.Module]:
    config = make(*SMALL, f"norm={norm}", *settings)
    return config, models.build(config, num_classes=10, image_size=8)


def train(config: RunConfig, network: nn.Module, first: int = 0, steps: int = 3) -> None:
    """A few steps as the loop takes them: of a run of ten, so that warm-ups and ramps are seen."""
    optimizer = build_optimizer(config.optimizer, network)
    transform, layers = build_transform(config.optimizer, network), Steps(network)
    network.train()
    for step in range(first, first + steps):
        torch.manual_seed(step)
        layers.begin(step, 10)
        optimizer.zero_grad()
        F.cross_entropy(network(batch(seed=step)), torch.arange(8)).backward()
        if transform:
            transform()
        optimizer.step()
        layers.end()


def forward(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The training output and the gradients of all parameters by name, noise repeated."""
    torch.manual_seed(5)
    network.zero_grad()
    output = network(images)
    output.square().mean().backward()
    parameters = {name.removeprefix("_orig_mod."): p for name, p in network.named_parameters()}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    return {"output": output.detach(), **grads}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        atol = tolerance * max(b.abs().max().item(), 1e-4)  # a gradient that is zero by construction is rounding
        torch.testing.assert_close(ours[name], b, rtol=tolerance, atol=atol, msg=name)


@pytest.mark.parametrize("norm", NORMS)
def test_copies_and_saved_states_go_on_like_the_original(make, norm) -> None:
    config, network = build(make, norm, "norm_batch=4")
    train(config, network)
    _, loaded = build(make, norm, "norm_batch=4")
    loaded.load_state_dict(copy.deepcopy(network.state_dict()))
    others = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), loaded]
    for other in [*others, network]:
        train(config, other, first=3, steps=2)
    for other in others:
        for name, value in network.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("norm", NORMS)
def test_a_graph_another_memory_format_and_smaller_batches_give_the_same(make, norm) -> None:
    config, network = build(make, norm)
    train(config, network)
    network, images = network.double(), batch().double()
    graph, other = trace(copy.deepcopy(network)), copy.deepcopy(network).to(memory_format=torch.channels_last)
    expected, trained = forward(network, images), network.eval()(images)
    assert_same(forward(graph, images), expected, 0.0)
    torch.testing.assert_close(graph.eval()(images), trained, rtol=0, atol=0)
    parts = torch.cat([network(part) for part in images.split([1, 2, 5])])
    torch.testing.assert_close(parts, trained, rtol=1e-8, atol=1e-8)
    theirs = forward(other, images.contiguous(memory_format=torch.channels_last))
    if norm in RANDOM:  # draws are laid out as the tensor is
        assert torch.isfinite(theirs["output"]).all()
        return
    assert_same(theirs, expected, 1e-8)
    torch.testing.assert_close(other.eval()(images), trained, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_keeps_statistics_and_averages_in_float32(make, norm) -> None:
    config, network = build(make, norm)
    train(config, network)
    other = copy.deepcopy(network)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        output = other(batch())
    torch.manual_seed(0)
    expected = network(batch())
    assert torch.isfinite(output).all()
    for name, buffer in other.named_buffers():
        if buffer.is_floating_point():
            assert buffer.dtype == torch.float32, name
    # bfloat16 has 8 bits; the first layers' rounding grows through 13 layers.
    error = (output.float() - expected).norm() / expected.norm().clamp_min(1e-3)
    assert error < (0.5 if norm in RANDOM else 0.15), error


@pytest.mark.slow
@pytest.mark.parametrize("norm", COMPILED)
def test_compiled_it_is_the_same_network(make, norm) -> None:
    """torch.compile's capture of forward and backward, without the minutes that generating code would take."""
    torch.compiler.reset()
    config, network = build(make, norm)
    train(config, network)
    network = network.double()
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager", fullgraph=True)
    assert_same(forward(compiled, batch().double()), forward(network, batch().double()), 1e-8)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm not in (*RANDOM, "tbbn")])  # which has no groups
def test_groups_inside_the_batch_are_independent_exactly_where_there_are_statistics(make, norm) -> None:
    """With norm_batch=4, image 2 of 8 shares statistics with the even images, and with no odd one."""
    _, network = build(make, norm, "norm_batch=4")
    network = network.double().train()
    images = batch().double()
    other, another = images.clone(), images.clone()
    other[1::2] += 1.0
    another[0] += 1.0
    first, second, third = (copy.deepcopy(network)(x) for x in (images, other, another))
    torch.testing.assert_close(first[0::2], second[0::2], rtol=1e-9, atol=1e-9)
    if norm != "fixup":  # whose classifier starts at zero
        assert (first[1::2] - second[1::2]).abs().max() > 1e-6
    has_statistics = any(isinstance(module, BatchStatistics) for module in network.modules())
    assert bool((first[2] - third[2]).abs().max() > 1e-9) == has_statistics


@pytest.mark.parametrize("norm", WITH_STATE)
def test_an_interrupted_run_ends_bit_identical(make, norm, monkeypatch) -> None:
    settings = (
        *SMALL, f"norm={norm}", "norm_batch=4", "dataset.train_size=40", "dataset.test_size=20", "epochs=2",
        "threads=1", "weight_average=0.9", "eval_stats=precise", "precise_batches=2",
    )  # fmt: skip
    whole = train_run(make(*settings, "study=whole"))
    config = make(*settings, "study=parts")
    steps, set_learning_rate = iter(range(99)), engines.set_learning_rate

    def counted(optimizer: torch.optim.Optimizer, lr: float) -> None:
        if next(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        set_learning_rate(optimizer, lr)

    monkeypatch.setattr(engines, "set_learning_rate", counted)
    with pytest.raises(InterruptedRunError):
        train_run(config)
    parts = train_run(config)
    assert parts["state"] == whole["state"]
    assert parts.get("weights_sha256") == whole.get("weights_sha256")
    assert runs.Run(config.as_dict()).state in runs.FINISHED
    assert parts.get("test_loss") == whole.get("test_loss")


@pytest.mark.parametrize("norm", ["renorm", "mabn"])
def test_an_interrupted_evaluation_is_repeated_with_the_layers_where_they_were(make, norm, monkeypatch) -> None:
    """No step follows it that would tell the layers how far the run is."""
    settings = (
        *SMALL, f"norm={norm}", "dataset.train_size=64", "dataset.test_size=20", "epochs=1", "threads=1",
        "eval_stats=precise", "precise_batches=2",
    )  # fmt: skip
    whole = train_run(make(*settings, "study=whole"))
    config = make(*settings, "study=parts")

    def interrupted(*arguments: object) -> None:
        monkeypatch.undo()
        raise InterruptedRunError("a test")

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(InterruptedRunError):
        train_run(config)
    assert train_run(config)["test_loss"] == whole["test_loss"]


@pytest.mark.parametrize(
    "settings",
    [
        ("norm=nf", "init=fixup"),
        ("norm=normprop", "init=fixup"),
        ("norm=wn_trelu", "init=fixup"),
        ("norm=fixup", "init=fixup"),
        ("norm=fixup", "init=lsuv"),
        ("norm=mabn", "precision=fp16"),
        ("norm=skipinit", "init=fixup"),
        ("norm=skipinit", "init=bn_folded"),
        ("norm=cbn", "precision=fp16"),
        ("norm=cbn", "engine=compile"),
    ],
)
def test_what_a_norm_cannot_have_is_refused_by_its_name(make, settings) -> None:
    with pytest.raises(UserError, match=f"{settings[0]} cannot have {settings[1]}"):
        models.build(make(*SMALL, *settings), num_classes=10, image_size=8)


def test_networks_that_share_what_a_variant_rewrites_are_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
            self.norm = nn.BatchNorm2d(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.second(self.norm(self.first(x)).relu()))

    with pytest.raises(UserError, match="norm of Shared is called at two places"):
        rewrite(Shared(), "bn")


@pytest.mark.parametrize("norm", ["affine", "none"])
def test_an_activation_in_place_does_not_overwrite_a_shortcut(make, norm) -> None:
    """In a block that normalizes before its convolution, the norm's input is the shortcut as well."""

    class Block(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.conv = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1)
            self.bn, self.relu = nn.BatchNorm2d(32), nn.ReLU(inplace=inplace)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.conv(self.relu(self.bn(x)))

    networks = [rewrite(Block(inplace), variant(make(f"norm={norm}"))).eval() for inplace in (True, False)]
    assert torch.equal(*(network(batch()) for network in networks))


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_rewritten_keeps_dtype_and_mode(make, norm) -> None:
    network = rewrite(SmallResNet(10).double().eval(), variant(make(f"norm={norm}")))
    assert not any(module.training for module in network.modules())
    network(batch(2).double())


SETTINGS = {  # what a norm needs that the others do not; docs/variants.md says why
    "bnp": ("optimizer.lr=1e-3",),
    "powernorm": ("optimizer.lr=5e-3",),
    "nf": ("optimizer.lr=0.1",),  # adaptive clipping keeps steps small
    "fixup": ("dataset.train_size=null", "epochs=4"),
    "skipinit": ("optimizer.lr=0.1",),  # nothing sets the scale of its steps, nor that of the next two
    "dyt": ("optimizer.lr=0.1",),
    "derf": ("optimizer.lr=0.1",),
    "noisy_bn": ("eval_stats=precise",),
    "noisy_none": ("model=resnet",),  # its noise grows from layer to layer
    "gn": ("norm.groups=8",),  # the network's layers have 16 channels and more
    "evonorm_s0": ("norm.groups=8",),
}


@pytest.mark.slow
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "tbbn"])  # test_class_incremental.py trains it
def test_every_norm_trains(make, norm) -> None:
    """20 layers, 700 of the digits, three epochs: chance is 10 % of 359 test images, three sigma 15 %."""
    short = ("dataset.train_size=700", "batch=32", "epochs=3", "schedule.warmup_epochs=1", "eval_every=9")
    status = train_run(make("device=cpu", "model=cifar_resnet", f"norm={norm}", *short, *SETTINGS.get(norm, ())))
    assert status["state"] == "done"
    assert status["test_accuracy"] > 0.3
