"""MimicNorm: centered weights, and one batch normalization before the loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normlab.common.errors import UserError
from normlab.common.registry import option, register
from normlab.norms.batch import GroupedBatchNorm2d
from normlab.norms.layer_statistics import BatchStatistics, processes
from normlab.norms.plain import NoNorm, set_bias
from normlab.norms.residual import Branch, end_with, find_branches, insert_after
from normlab.norms.sites import Site

LARGE = 50  # inputs of a filter, above which the authors' code for CIFAR centers a convolution


class MimicConv2d(nn.Conv2d):
    """A convolution whose weight (out, in, kh, kw) is centered over (in, kh, kw) at its start and after each step.

    Invariant: whenever a training loop calls it, the mean of every filter is 0 (to rounding).
    """

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> "MimicConv2d":
        """Return the same convolution, with the same parameters, as one of these."""
        new = cls.__new__(cls)
        new.__dict__ = convolution.__dict__
        new.after_step()
        return new

    @torch.no_grad()
    def after_step(self) -> None:
        """Center the weight."""
        self.weight.sub_(self.weight.mean((1, 2, 3), keepdim=True))


class LearnedScale(nn.Module):
    """y = s · x for x of any shape and one learned s (1,)."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), start))

    def forward(self, input: Tensor) -> Tensor:
        """Return s · x."""
        return (input * self.weight).to(input.dtype)


class LogitBatchNorm(GroupedBatchNorm2d):
    """Batch normalization of logits (N, K): each class is a channel, with one value per image.

    One image has no variance: a batch, or last group, of one is normalized by the moving averages and leaves them
    as they are [A].
    """

    takes_single_values = True

    def forward(self, input: Tensor) -> Tensor:
        """Normalize logits (N, K) or (N, K, H, W).

        Raises:
            UserError: if there are not as many as the last layer has outputs.
        """
        if input.shape[1] != self.num_features:
            raise UserError(
                f"norm=mimicnorm takes the {self.num_features} outputs of the last layer for logits, and the network"
                f" has {input.shape[1]}.\nLet it end in a linear layer, or in a convolution with a filter per class."
            )
        x = input.reshape(*input.shape[:2], -1, 1)
        y: Tensor = BatchStatistics.forward(self, x) if len(x) == 1 else super().forward(x)
        return y.reshape(input.shape)

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `BatchStatistics.normalize`."""
        if len(input) > 1 or (self.synchronized and processes() > 1):
            return super().normalize(input, groups)
        # Copies, as `update` writes into the averages before the backward pass reads these.
        mean, var = self.get_buffer("running_mean").clone(), self.get_buffer("running_var").clone()
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps), (mean, var)

    def moments(self, input: Tensor) -> tuple[Tensor, ...]:
        """See `BatchStatistics.moments`."""
        return super().moments(input.reshape(*input.shape[:2], -1, 1))


@register(
    "mimicnorm", aliases=("mimic",), family="statistics of the batch", order=13,
    formula="no norms; after each update W <- W - mean W where filters have over 50 inputs; branches times a scalar; "
    "(a - mu) / sqrt(v + eps) of the logits a",
    source="2010.09278, as its code", over="the logits over N", parameters="a bias per filter, a scalar per branch",
    conv="yes", use="to train with a single norm, over the logits", cost="two small operations per convolution",
)  # fmt: skip
class MimicNorm(NoNorm):
    """MimicNorm (2010.09278), as its authors' code has it: no norm but one, over the logits, just before the loss.

    The weight W (out, in, kh, kw) of a convolution is centered, W <- W - mean(W) over (in, kh, kw), at the start and
    after each update; its gradient and the optimizer's moments are as they come. `centered` says which convolutions:

    - large: those with more than 50 inputs of a filter, in · kh · kw (the code for CIFAR; no 3x3 stem, none depthwise)
    - ungrouped: those of one group (the code for ImageNet);
    - all: as the paper's formula.

    The logits (N, K) become, per class over the batch, (a - mean) / sqrt(var + eps); `affine` adds gamma and beta.
    Residual branch number b (from 1) of L convolutions is multiplied by one learned scalar from 1.2^L / b, and a
    shortcut of L convolutions by one from 1.2^L, unless `branch_scale` is false. The authors start weights by
    init=he_fan_in, and decay all parameters (optimizer.decay_norm_and_bias=true).

    Invariant: without gradient through the centering, the output is the one of `none` with centered weights, scaled
    branches and a batch normalization after it.
    """

    needs_convolution = True

    eps: float = option(1e-5, gt=0)
    momentum: float = option(0.1, gt=0, le=1)
    conv_bias: bool = option(True)
    affine: bool = option(False)
    centered: str = option("large", choices=("large", "ungrouped", "all"))
    branch_scale: bool = option(True)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.norm_batch == 1:
            raise UserError(
                "norm=mimicnorm cannot normalize groups of one image: its batch normalization is over logits,\n"
                "of which one image has one per class. Set norm_batch=2 or more."
            )

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        """Return the convolution, with a bias if `conv_bias`."""
        return set_bias(convolution) if self.conv_bias else convolution

    def _is_centered(self, convolution: nn.Conv2d) -> bool:
        if self.centered == "large":
            return convolution.weight[0].numel() > LARGE
        return self.centered == "all" or convolution.groups == 1

    def graph(self, network: fx.GraphModule, sites: list[Site]) -> None:
        """Center convolutions, scale branches, and put a `LogitBatchNorm` before the output."""
        output = network.graph.output_node()
        logits = output.args[0]
        classes = _channels(network, logits) if isinstance(logits, fx.Node) else None
        if not isinstance(logits, fx.Node) or classes is None:
            raise UserError(
                "norm=mimicnorm normalizes the logits, but this network does not return one tensor from its last\n"
                "linear layer or convolution. Use a network that returns logits (N, classes), or another norm."
            )
        for name, module in list(network.named_modules()):
            if type(module) is nn.Conv2d and self._is_centered(module):
                network.set_submodule(name, MimicConv2d.of(module))
        if self.branch_scale:
            for number, branch in enumerate(find_branches(network), start=1):
                scale_branch(network, branch, number)
        options = {"eps": self.eps, "momentum": self.momentum, "affine": self.affine}
        layer = LogitBatchNorm(classes, norm_batch=self.norm_batch, **options)
        network.add_submodule("logit_norm", layer)
        with network.graph.inserting_before(output):
            output.args = (network.graph.call_module("logit_norm", (logits,)),)


def scale_branch(network: fx.GraphModule, branch: Branch, number: int) -> None:
    """Multiply the output of a residual branch, and of a shortcut that has convolutions, by a `LearnedScale`."""
    start = 1.2 ** len(branch.convolutions) / number
    end_with(network, branch, "scale", LearnedScale(start))
    if branch.shortcut_convolutions:
        name = f"{branch.shortcut_convolutions[-1]}_scale"
        start = 1.2 ** len(branch.shortcut_convolutions)
        scaled = insert_after(network, branch.shortcut, name, LearnedScale(start))
        branch.sum.replace_input_with(branch.shortcut, scaled)


def _channels(network: fx.GraphModule, node: fx.Node | None) -> int | None:
    """The channels of the value of `node`: those of the last linear layer or convolution on its way."""
    modules = dict(network.named_modules())
    while node is not None:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, nn.Conv2d):
            return module.out_channels
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return None
