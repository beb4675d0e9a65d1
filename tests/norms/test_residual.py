"""Residual branches: what is found in networks whose blocks are known, and the starts that are about branches."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.models.networks import CifarBlock
from normlab.norms import find_branches, fixup_start, trace, zero_gamma

OPTIONS = {"googlenet": {"init_weights": False, "aux_logits": False}}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=10, **OPTIONS.get(name, {}))


def blocks(base: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in base.named_modules() if isinstance(module, kind)]


class Sum(nn.Module):
    """h + f(h) behind a stem, summed in a given way; f has two convolutions, the shortcut none or `shortcut`."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.f = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.shortcut = shortcut
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.add(self.f(h), h if self.shortcut is None else self.shortcut(h))


def in_place(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


@pytest.mark.parametrize(
    "add",
    [
        lambda a, b: a + b,
        lambda a, b: b + a,
        in_place,
        lambda a, b: a.add(b),
        lambda a, b: a.add_(b),
        lambda a, b: torch.add(a, b),
        lambda a, b: torch.add(input=b, other=a),
    ],
)
@pytest.mark.parametrize("shortcut", [None, nn.Conv2d(4, 4, 1)])
def test_a_branch_is_found_however_it_is_summed(
    add: Callable[[Tensor, Tensor], Tensor], shortcut: nn.Module | None
) -> None:
    traced = trace(Sum(add, shortcut))
    (branch,) = find_branches(traced)
    assert branch.convolutions == ("f.0", "f.3")
    assert branch.shortcut_convolutions == (("shortcut",) if shortcut else ())
    assert branch.norm == "f.4"
    assert str(branch.entry.target) == "stem"
    assert str(branch.end.target) == "f.4"
    assert str(branch.shortcut.target) == ("shortcut" if shortcut else "stem")
    assert [str(node.target) for node in branch.takers] == ["f.0"]
    assert [str(node.target) for node in branch.shortcut_takers] == (["shortcut"] if shortcut else [])
    assert {branch.end, branch.shortcut} == set(branch.sum.all_input_nodes)


@pytest.mark.parametrize(
    "add",
    [lambda a, b: a + 1.0, lambda a, b: a + a, lambda a, b: a * b, lambda a, b: b + F.relu(b)],
)
def test_other_sums_are_no_branches(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = find_branches(trace(Sum(add)))
    assert [branch.convolutions for branch in found] == []


def test_a_sum_of_unrelated_tensors_is_no_branch() -> None:
    class Unrelated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.position = nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.position

    assert find_branches(trace(Unrelated())) == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_branches_of_a_resnet_are_its_blocks(name: str) -> None:
    base = network(name)
    m = 2 if name == "resnet18" else 3
    kind = (torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck)[m - 2]
    names = blocks(base, kind)
    branches = find_branches(trace(base))
    assert [b.convolutions for b in branches] == [tuple(f"{n}.conv{i + 1}" for i in range(m)) for n in names]
    assert [b.norm for b in branches] == [f"{n}.bn{m}" for n in names]
    projected = [base.get_submodule(n).downsample is not None for n in names]
    expected = [(f"{n}.downsample.0",) if p else () for n, p in zip(names, projected, strict=True)]
    assert [b.shortcut_convolutions for b in branches] == expected
    assert all((b.shortcut is b.entry) is not p for b, p in zip(branches, projected, strict=True))
    assert str(branches[0].entry.target) == "maxpool"


def test_branches_of_inverted_residuals_are_those_blocks_that_sum() -> None:
    base = network("efficientnet_b0")
    names = blocks(base, torchvision.models.efficientnet.MBConv)
    summed = [name for name in names if base.get_submodule(name).use_res_connect]
    traced = trace(base)
    branches = find_branches(traced)
    assert [b.convolutions[0].startswith(f"{n}.") for n, b in zip(summed, branches, strict=True)] == [True] * 9
    assert all(len(b.convolutions) == 3 and not b.shortcut_convolutions for b in branches)
    assert all(isinstance(traced.get_submodule(str(b.end.target)), torchvision.ops.StochasticDepth) for b in branches)


def test_branches_with_zero_padded_shortcuts_are_found() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), CifarBlock(4, 4), CifarBlock(4, 8), CifarBlock(8, 8))
    branches = find_branches(trace(base))
    assert [b.convolutions for b in branches] == [(f"{i}.conv1", f"{i}.conv2") for i in (1, 2, 3)]
    assert all(b.shortcut_convolutions == () for b in branches)
    assert branches[1].shortcut is not branches[1].entry


@pytest.mark.parametrize("name", ["googlenet", "densenet121"])
def test_networks_without_sums_have_no_branches(name: str) -> None:
    base = network(name)
    assert find_branches(trace(base)) == []
    for start in (zero_gamma, fixup_start):
        with pytest.raises(UserError, match="is about residual branches"):
            start(base)


def test_zero_gamma_is_what_torchvision_calls_zero_init_residual() -> None:
    for make in (torchvision.models.resnet18, torchvision.models.resnet50):
        torch.manual_seed(0)
        ours = make(weights=None)
        torch.manual_seed(0)
        theirs = make(weights=None, zero_init_residual=True)
        zero_gamma(ours)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("last", [nn.Identity(), nn.BatchNorm2d(4, affine=False)])
def test_zero_gamma_refuses_a_branch_without_a_scale(last: nn.Module) -> None:
    base = Sum(lambda a, b: a + b)
    base.f[1] = nn.Identity()
    base.f[4] = last
    with pytest.raises(UserError, match=r"the branch of Sum that ends in f\.3 has none"):
        zero_gamma(base)


@pytest.mark.parametrize(("name", "factor"), [("resnet18", 8 ** (-1 / 2)), ("resnet50", 16 ** (-1 / 4))])
def test_fixup_scales_inner_convolutions_by_the_formula(name: str, factor: float) -> None:
    base = network(name).double()
    started = copy.deepcopy(base)
    fixup_start(started)
    last = "conv2" if name == "resnet18" else "conv3"
    for key, weight in base.named_parameters():
        inner = key.startswith("layer") and ".conv" in key
        if key.startswith("fc.") or (inner and last in key):
            expected = torch.zeros_like(weight)
        else:
            expected = weight * (factor if inner else 1)
        torch.testing.assert_close(started.get_parameter(key), expected, rtol=1e-14, atol=0)


def test_fixup_start_leaves_gates_as_they_are() -> None:
    base = network("regnet_y_400mf")
    started = copy.deepcopy(base)
    fixup_start(started)
    factor = 16 ** (-1 / 4)
    block = "trunk_output.block2.block2-1.f"
    for key, scale in {"a.0": factor, "b.0": factor, "c.0": 0, "se.fc1": 1, "se.fc2": 1}.items():
        expected = base.get_parameter(f"{block}.{key}.weight") * scale
        torch.testing.assert_close(started.get_parameter(f"{block}.{key}.weight"), expected)


class OneLayer(nn.Module):
    """A branch of one convolution, and a convolution with bias for a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.classifier = nn.Conv2d(4, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.classifier(h + self.f(h)).mean((2, 3))


def test_fixup_of_a_branch_of_one_convolution_sets_it_to_zero() -> None:
    base = OneLayer()
    stem = base.stem.weight.clone()
    fixup_start(base)
    zero = [name for name, parameter in base.named_parameters() if not parameter.any()]
    assert zero == ["f.weight", "f.bias", "classifier.weight", "classifier.bias"]
    assert torch.equal(base.stem.weight, stem)
