"""Functions of each value by itself in the place of a norm: no statistics at all."""

import torch
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.norms.adapter import FullPrecision
from normlab.norms.layer_statistics import full_precision
from normlab.norms.sites import Variant, copy_affine
from normlab.norms.steps import Role


class Pointwise(FullPrecision):
    """See `DynamicTanh` and `DynamicErf`. weight and bias are (C,), alpha and s, if there is one, (1,)."""

    takes_any_shape = True
    roles: dict[str, Role]

    def __init__(self, channels: int, *, alpha: float, shifts: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.s = nn.Parameter(torch.zeros(1)) if shifts else None
        self.roles = {"s": "shift"}

    def forward(self, input: Tensor) -> Tensor:
        """Return y for (N, C, ...), of input's dtype."""
        x, shape = full_precision(input), (-1, *[1] * (input.dim() - 2))
        z = torch.tanh(self.alpha * x) if self.s is None else torch.erf(torch.addcmul(self.s, x, self.alpha))
        return torch.addcmul(self.bias.view(shape), z, self.weight.view(shape)).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the channels for `repr`."""
        return str(self.weight.numel())


@register(
    "dyt", aliases=("dynamictanh",), family="statistics of a sample", order=31,
    formula="gamma · tanh(alpha · x) + beta", source="Zhu et al. 2025, 2503.10622", over="nothing",
    parameters="gamma, beta, one alpha from 0.5", use="transformers; its authors report losses in the place of `bn`",
    cost="a function and two products per value",
)  # fmt: skip
class DynamicTanh(Variant):
    """Dynamic tanh (Zhu et al. 2025, 2503.10622), for each value of x (N, C, H, W) by itself.

        y = gamma · tanh(alpha · x) + beta        gamma, beta (C,); one learned alpha per layer, from 0.5

    Its authors made it for transformers, and report that it loses accuracy in the place of batch normalization.
    Invariant: |y - beta| is at most |gamma|, and an image's output depends on no other image.
    """

    shifts = False

    alpha: float = option(0.5, gt=0)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        """Return a `Pointwise`."""
        return copy_affine(norm, Pointwise(norm.num_features, alpha=self.alpha, shifts=self.shifts))


@register(
    "derf", aliases=("dynamicerf",), family="statistics of a sample", order=32,
    formula="gamma · erf(alpha · x + s) + beta", source="Chen et al. 2025, 2512.10938", over="nothing",
    parameters="gamma, beta, one alpha from 0.5, one s from 0",
    use="transformers, with Adam or AdamW: SGD takes too large steps of s", cost="as `dyt`",
)  # fmt: skip
class DynamicErf(DynamicTanh):
    """Dynamic erf (Chen et al. 2025, 2512.10938): `DynamicTanh` with another function and a shift.

    y = gamma · erf(alpha · x + s) + beta        one learned alpha, from 0.5, and s, from 0, per layer
    """

    shifts = True
