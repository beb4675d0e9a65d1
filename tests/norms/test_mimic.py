"""MimicNorm: weights centered by hand, and PyTorch's BatchNorm1d over the logits."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norms.oracle import images, members
from small import SmallResNet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from normlab.common.errors import UserError
from normlab.norms import (
    MimicNorm,
    NoNorm,
    Steps,
    parameter_roles,
    rewrite,
)
from normlab.norms.mimic import LogitBatchNorm

OPTIONS: dict[str, Any] = {"eps": 1e-5, "momentum": 0.1}
PLAIN: dict[str, Any] = {"affine": True, "branch_scale": False, "conv_bias": False}


def centre_by_hand(network: nn.Module, centered: str) -> None:
    for module in network.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        inputs = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        if {"all": True, "large": inputs > 50, "ungrouped": module.groups == 1}[centered]:
            for weights in module.weight.data:
                weights -= weights.sum() / weights.numel()


class Grouped(nn.Module):
    """A stem of few inputs to a filter, a wide convolution and a wide one of two groups; one without a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 12, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(12)
        self.conv4, self.fc = nn.Conv2d(12, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = bn(conv(x)).relu()
        return self.fc(self.conv4(x).mean((2, 3)))


@pytest.mark.parametrize("centered", ["large", "ungrouped", "all"])
@pytest.mark.parametrize("affine", [False, True])
def test_a_training_run_equals_one_without_norms_centered_by_hand_and_batch_norm_1d_at_the_end(
    affine: bool, centered: str
) -> None:
    base = Grouped().double()
    options = OPTIONS | {"affine": affine, "centered": centered, "conv_bias": False}
    ours = rewrite(copy.deepcopy(base), MimicNorm(**options)).double().train()
    plain = rewrite(base, NoNorm(conv_bias=False))
    theirs = nn.Sequential(plain, nn.BatchNorm1d(5, affine=affine)).double().train()
    centre_by_hand(theirs, centered)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2) for net in (ours, theirs)]
    steps, labels = Steps(ours), torch.tensor([0, 1, 2, 3, 4, 0])
    first = ours.get_submodule("conv1").weight.detach().clone()  # type: ignore[union-attr,operator]
    for step in range(4):
        steps.begin(step, 4)
        outputs = []
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(network(images(6, 3, 8, 8, seed=step)))
            F.cross_entropy(outputs[-1], labels).backward()
            optimizer.step()
        steps.end()
        centre_by_hand(theirs, centered)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
        x = images(3, 3, 8, 8, seed=9)
        evaluated = [copy.deepcopy(network).eval()(x) for network in (ours, theirs)]
        torch.testing.assert_close(*evaluated, rtol=1e-9, atol=1e-9)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert (ours.get_submodule("conv1").weight - first).abs().max() > 1e-4  # type: ignore[union-attr,operator]


class Scaled(nn.Module):
    """The authors' ResNet of basic blocks with biases: branch b times a scalar from 1.2²/b, a projection by 1.2."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        blocks = [*base.layer1, *base.layer2]
        self.of_branch = nn.ParameterList(torch.tensor([1.44 / b]).double() for b in range(1, 1 + len(blocks)))
        self.of_shortcut = nn.Parameter(torch.tensor([1.2]).double())  # as float32 has it
        self.norm = nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base.maxpool(F.relu(self.base.conv1(x)))
        for scale, block in zip(self.of_branch, [*self.base.layer1, *self.base.layer2], strict=True):
            shortcut = x if block.downsample is None else block.downsample(x) * self.of_shortcut
            x = F.relu(block.conv2(F.relu(block.conv1(x))) * scale + shortcut)
        return self.norm(self.base.fc(x.mean((2, 3))))


class TwoStages(ResNet):
    """torchvision's, with two stages alone."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(BasicBlock, [1, 2, 1, 1], num_classes=5)
        self.layer3, self.layer4, self.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 5)


def test_a_residual_network_equals_the_authors_one() -> None:
    ours = rewrite(TwoStages().double(), MimicNorm(**OPTIONS)).double().train()
    theirs = Scaled(rewrite(TwoStages().double(), NoNorm(conv_bias=True))).double().train()
    centre_by_hand(theirs, "large")
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (ours, theirs)]
    for step in range(4):
        outputs = []
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(network(images(6, 3, 17, 17, seed=step)))
            F.cross_entropy(outputs[-1], torch.tensor([0, 1, 2, 3, 4, 0])).backward()
            optimizer.step()
        Steps(ours).end()
        centre_by_hand(theirs, "large")
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-8, atol=1e-8)
    scales = {name: p.item() for name, p in ours.named_parameters() if name.endswith("_scale.weight")}
    expected = [*(p.item() for p in theirs.of_branch), theirs.of_shortcut.item()]
    names = [f"layer{n}.conv2_scale.weight" for n in ("1.0", "2.0", "2.1")]
    assert scales == pytest.approx(dict(zip([*names, "layer2.0.downsample.0_scale.weight"], expected, strict=True)))


def test_no_norm_remains_but_one_of_the_logits_and_parameters_keep_their_roles() -> None:
    base = SmallResNet(5).double()
    network = rewrite(copy.deepcopy(base), MimicNorm(**OPTIONS | PLAIN))
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert list(norms) == ["logit_norm"]
    weights = sum(p.numel() for m in base.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters())
    assert sum(p.numel() for p in network.parameters()) == weights + 2 * 5
    roles = {id(p): role for p, role, _ in parameter_roles(network)}
    assert roles[id(norms["logit_norm"].weight)] == "scale"
    assert roles[id(network.get_submodule("conv1").weight)] == "weight"  # type: ignore[union-attr]
    assert norms["logit_norm"].norm_batch is None
    grouped = rewrite(copy.deepcopy(base), MimicNorm(**OPTIONS, norm_batch=2))
    assert grouped.get_submodule("logit_norm").norm_batch == 2  # type: ignore[union-attr]
    biased = rewrite(copy.deepcopy(base), MimicNorm(**OPTIONS))
    assert biased.get_submodule("conv1").bias is not None  # type: ignore[union-attr]


@pytest.mark.parametrize(("count", "k"), [(6, None), (1, None), (6, 2), (7, 3), (7, 4), (5, 2), (2, 2)])
def test_logits_are_normalized_group_by_group(count: int, k: int | None) -> None:
    layer = LogitBatchNorm(4, norm_batch=k, eps=1e-5, momentum=0.1).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.running_mean.normal_()  # type: ignore[union-attr]
    before_mean, before_var = layer.running_mean.clone(), layer.running_var.clone()  # type: ignore[union-attr]
    x = images(count, 4, scale=2.0, shift=1.0).requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    expected, mean, var = torch.zeros_like(x), 0.0, 0.0
    for index in members(count, k):
        part, share = theirs[index], len(index) / count
        own = len(index) > 1  # an image alone: by the moving averages
        mu, v = (part.mean(0), part.var(0, correction=0)) if own else (before_mean, before_var)
        y = (part - mu) / torch.sqrt(v + 1e-5) * layer.weight.detach() + layer.bias.detach()
        expected = expected.index_put((torch.tensor(index),), y)
        mean, var = mean + share * mu.detach(), var + share * (part.var(0).detach() if own else v)
    cotangent = images(count, 4, seed=1)
    output = layer(x)
    output.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close((output, x.grad), (expected, theirs.grad), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_mean, 0.9 * before_mean + 0.1 * mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.running_var, 0.9 * before_var + 0.1 * var, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_lower_precision_are_normalized_in_float32(dtype: torch.dtype) -> None:
    layer, reference = LogitBatchNorm(4, eps=1e-5, momentum=0.1), nn.BatchNorm1d(4).double()
    logits = images(16, 4, shift=20.0).to(dtype)  # a mean that half-precision statistics would lose
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = layer(logits)
    assert output.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(output.double(), reference(logits.double()), rtol=bound, atol=bound)
    assert layer.running_var.dtype == torch.float32  # type: ignore[union-attr]


class Pair(nn.Module):
    """Two outputs, as of a network with an auxiliary classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.bn(self.conv(x)).mean((2, 3))
        return self.fc(features), features


def test_what_cannot_be_served_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="does not return one tensor"):
        rewrite(Pair(), MimicNorm(**OPTIONS))
    with pytest.raises(UserError, match="Set norm_batch=2 or more"):
        MimicNorm(**OPTIONS, norm_batch=1)
