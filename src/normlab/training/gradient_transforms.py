"""Changes of the gradients between the backward pass and the optimizer's step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.config.schema import OptimizerConfig
from normlab.norms.residual import classifier_of

AGC_LEAST_NORM = 1e-3  # of a unit's weights (Brock et al. 2021, section 4.1): small ones must not freeze
BNP_FLOOR = 0.01  # [A] an input's variance counts as at least this share of its layer's mean variance
BNP_VARIES = 1e-4  # [A] a layer whose mean variance is a smaller share of its inputs' mean square has none


def build_transform(config: OptimizerConfig, network: nn.Module) -> Callable[[], None] | None:
    """Return the changes of the gradients by `optimizer.precondition` and then `optimizer.agc`, or None.

    Raises:
        UserError: if the network has layers that the preconditioner cannot condition.
    """
    transforms: list[Callable[[], None]] = []
    if config.precondition == "bnp":
        transforms.append(Preconditioner(network))
    if config.agc is not None:
        transforms.append(AdaptiveClipping(network, config.agc, vectors=config.agc_vectors))
    return _InTurn(transforms) if transforms else None


@dataclass
class _InTurn:
    """An object and no closure, so that it can be copied together with its network."""

    transforms: list[Callable[[], None]]

    def __call__(self) -> None:
        for apply in self.transforms:
            apply()


class AdaptiveClipping:
    """Adaptive gradient clipping (Brock et al. 2021, 2102.06171, section 4.1).

    Per output unit i (a row of the first dimension) of every weight but the classifier's (`classifier_of`), with its
    gradient G_i:

        G_i <- G_i · min(1, ratio · max(||W_i||, 1e-3) / ||G_i||)

    With `vectors`, as in the authors' code, every vector and scalar (bias, gain, a branch's scalar, also the
    classifier's bias) counts as one unit. One that starts at 0 then takes at most 1e-3 · ratio of a gradient at first.
    A module that is `unclipped` is left alone.
    Invariant: no unit's gradient is longer than `ratio` times its weights, which keeps relative updates small.
    """

    def __init__(self, network: nn.Module, ratio: float, *, vectors: bool) -> None:
        self.ratio = ratio
        left_alone = set(network.get_submodule(classifier_of(network)).parameters())
        unclipped = {p for m in network.modules() if getattr(m, "unclipped", False) for p in m.parameters()}
        self.parameters = [
            p
            for p in network.parameters()
            if p.requires_grad and p not in unclipped and (vectors if _is_vector(p) else p not in left_alone)
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """Clip the gradients, in place."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                longest = _unit_norms(parameter).clamp_min(AGC_LEAST_NORM) * self.ratio
                # The least positive number: a gradient of zero stays zero.
                lengths = _unit_norms(parameter.grad).clamp_min(torch.finfo(parameter.dtype).tiny)
                parameter.grad.mul_((longest / lengths).clamp_max(1.0))


def _is_vector(tensor: Tensor) -> bool:
    return tensor.dim() <= 1


def _unit_norms(tensor: Tensor) -> Tensor:
    """L2 norm per row of the first dimension, (O, 1, ...); of all of a vector."""
    dims = None if _is_vector(tensor) else tuple(range(1, tensor.dim()))
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norms


class Preconditioner:
    """BNP-style conditioning, after Batch Normalization Preconditioning (Lange, Helfrich & Ye 2022).

    For a layer a = W·h + b, with mean mu and variance s² of each input (of each input channel over N, H, W for a
    convolution) in the current batch, constants in the derivation:

        dW = (g_W - g_b·mu^T) / s²  column by column,   db = g_b - dW·mu

    which is a plain gradient step in the parameters of the same layer with normalized inputs (docs/papers.md, section
    6; a test checks it). Ours [A]: statistics of the current batch only, and s² is at least `BNP_FLOOR` times its mean
    over the layer's inputs; a layer whose inputs do not vary (`BNP_VARIES`), as with a single image of one pixel, keeps
    its gradients. The paper's scaling, running averages and its convolution's form are not known to us. At the padded
    border of a convolution the step is approximate.
    """

    def __init__(self, network: nn.Module) -> None:
        self.statistics: dict[nn.Conv2d | nn.Linear, tuple[Tensor, Tensor]] = {}
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if type(module) not in (nn.Conv2d, nn.Linear):
                    raise UserError(
                        f"optimizer.precondition=bnp conditions the weights of plain layers, and {name} is a"
                        f" {type(module).__name__}.\n"
                        "Use norm=bnp, or optimizer.precondition=null with this norm."
                    )
                if module.bias is None:
                    raise UserError(
                        f"optimizer.precondition=bnp conditions weights and biases together, and {name} has no bias.\n"
                        "Use norm=bnp, or norm=none norm.conv_bias=true, and a network whose convolutions feed norms."
                    )
                module.register_forward_pre_hook(self._note)

    @torch.no_grad()
    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        if module.training:
            h = inputs[0].float() if inputs[0].dtype != torch.float64 else inputs[0]
            over = (0, 2, 3) if isinstance(module, nn.Conv2d) else tuple(range(h.dim() - 1))
            variance, mean = torch.var_mean(h, over, correction=0)
            self.statistics[module] = (mean, variance)

    @torch.no_grad()
    def __call__(self) -> None:
        """Condition the gradients by the statistics of the last training batch, in place."""
        for module, (mean, variance) in self.statistics.items():
            if module.weight.grad is None or module.bias is None or module.bias.grad is None:
                continue
            varies = variance.mean() > BNP_VARIES * (variance + mean.square()).mean()
            s2 = variance.maximum(BNP_FLOOR * variance.mean()).clamp_min(torch.finfo(variance.dtype).eps)
            mean, s2 = mean.where(varies, 0.0), s2.where(varies, 1.0)
            mean, s2 = (_per_weight(statistic, module) for statistic in (mean, s2))
            g_b = module.bias.grad
            g_w = module.weight.grad
            g_w.sub_(g_b.view(-1, *[1] * (g_w.dim() - 1)) * mean).div_(s2)
            g_b.sub_((g_w * mean).flatten(1).sum(1))


def _per_weight(per_input: Tensor, module: nn.Conv2d | nn.Linear) -> Tensor:
    """(I,) in the shape of a weight (O, I / groups, ...), broadcast over the kernel."""
    if isinstance(module, nn.Linear):
        return per_input[None]
    each = per_input.view(module.groups, 1, -1).expand(-1, module.out_channels // module.groups, -1)
    return each.reshape(module.out_channels, -1, 1, 1)
