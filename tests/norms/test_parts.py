"""The division and the centering of batch normalization alone, against their formulas group after group."""

import pytest
import torch
from norms.oracle import CASES, compare, compare_rounded, images, members
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.norms import named, synchronize

EPS = 1e-3
OPTIONS = {"bn_var": {"eps": EPS, "momentum": 0.3}, "bn_mean": {"momentum": 0.3}}


def make(name: str, norm_batch: int | None = None, affine: bool = True) -> nn.Module:
    return named(name, norm_batch=norm_batch, affine=affine, **OPTIONS[name]).norm(nn.BatchNorm2d(6))


class Formula:
    """Group after group; the average is of the unbiased variance, or of the mean."""

    def __init__(self, name: str, k: int | None = None) -> None:
        self.name, self.k = name, k
        self.average = (torch.ones if name == "bn_var" else torch.zeros)(6, dtype=torch.float64)

    def apply(self, x: Tensor, statistic: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        statistic = statistic.reshape(-1, 1, 1)
        z = x / (statistic + EPS) ** 0.5 if self.name == "bn_var" else x - statistic
        return parameters["weight"].reshape(-1, 1, 1) * z + parameters["bias"].reshape(-1, 1, 1)

    def train(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        y, total = torch.empty_like(x), torch.zeros(6, dtype=torch.float64)
        for index in members(len(x), self.k):
            values = x[index].transpose(0, 1).reshape(6, -1)
            used = kept = values.sum(1) / values.shape[1]
            if self.name == "bn_var":
                squares = ((values - used[:, None]) ** 2).sum(1)
                used, kept = squares / values.shape[1], squares / (values.shape[1] - 1)
            y = y.index_put((torch.tensor(index),), self.apply(x[index], used, parameters))
            total = total + kept.detach() * len(index) / len(x)
        self.average = 0.7 * self.average + 0.3 * total
        return y

    def evaluate(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self.apply(x, self.average, parameters)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case: str, name: str) -> None:
    compare(make(name), Formula(name), CASES[case])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_groups_inside_the_batch_are_the_formula_for_each(k: int, name: str) -> None:
    compare(make(name, norm_batch=k), Formula(name, k), CASES["odd sizes"])


@pytest.mark.parametrize("name", OPTIONS)
def test_synchronized_statistics_of_one_process_are_its_own(name: str) -> None:
    layer = make(name)
    synchronize(layer)
    compare(layer, Formula(name), CASES["plain"])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close_to_the_formula(dtype: torch.dtype, name: str) -> None:
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    case = lambda step: images(8, 6, 4, 4, seed=step, shift=2.0)  # noqa: E731
    compare_rounded(make(name), Formula(name), dtype, case, bound=bound, steps=3)


@pytest.mark.parametrize("name", OPTIONS)
def test_without_affine_there_is_nothing_to_train_nor_to_start_elsewhere(name: str) -> None:
    norm = nn.BatchNorm2d(6)
    nn.init.zeros_(norm.weight)
    plain = named(name, affine=False)
    layer = plain.norm(norm).double()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x = images(4, 6, 3, 3).requires_grad_()
    ones = {"weight": torch.ones(6).double(), "bias": torch.zeros(6).double()}
    formula = Formula(name)
    expected = x / ((x.var((0, 2, 3), correction=0) + 1e-5) ** 0.5)[:, None, None]
    expected = formula.apply(x, x.mean((0, 2, 3)), ones) if name == "bn_mean" else expected
    torch.testing.assert_close(layer(x), expected)
    assert "zero_gamma" in plain.refused["init"]
    assert "scales" not in plain.takes
    assert "init" not in named(name).refused
    with pytest.raises(UserError, match="affine=1 is not valid"):
        named(name, affine=1)
