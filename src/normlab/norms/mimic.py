"""MimicNorm: centred weights, and one batch normalisation before the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normlab.common.errors import UserError
from normlab.norms.batch import GroupedBatchNorm2d
from normlab.norms.layer_statistics import BatchStatistics, processes
from normlab.norms.plain import NoNorm
from normlab.norms.sites import Site


class MimicConv2d(nn.Conv2d):
    """A convolution whose weight (out, in, kh, kw) is centred over (in, kh, kw) at its start and after each step.

    Invariant: whenever a training loop calls it, the mean of every filter is 0 (to rounding).
    """

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> "MimicConv2d":
        """The same convolution, with the same parameters, as one of these."""
        new = cls.__new__(cls)
        new.__dict__ = convolution.__dict__
        new.after_step()
        return new

    @torch.no_grad()
    def after_step(self) -> None:
        self.weight.sub_(self.weight.mean((1, 2, 3), keepdim=True))


class LogitBatchNorm(GroupedBatchNorm2d):
    """Batch normalisation of logits (N, K): each class is a channel, with one value per image.

    One image has no variance: a batch, or last group, of one is normalised by the moving averages and leaves them
    as they are [A].
    """

    takes_single_values = True

    def forward(self, input: Tensor) -> Tensor:
        x = input[:, :, None, None]
        y = BatchStatistics.forward(self, x) if len(x) == 1 else super().forward(x)
        return y[:, :, 0, 0]

    def normalise(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        if len(input) > 1 or (self.synchronised and processes() > 1):
            return super().normalise(input, groups)
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        # Copies, as `update` writes into the averages before the backward pass reads these.
        mean, var = mean.clone(), var.clone()
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps), (mean, var)

    def moments(self, input: Tensor) -> tuple[Tensor, ...]:
        return super().moments(input[:, :, None, None])


class MimicNorm(NoNorm):
    """MimicNorm (2010.09278): no norm but one, over the logits, just before the loss.

    Each convolution that had a norm has its weight W (out, in, kh, kw) centred, W <- W - mean(W) over (in, kh, kw), at
    the start [A] and after each update; its gradient and the optimizer's moments are as they come. The logits (N, K)
    become, per class over the batch, gamma · (a - mean) / sqrt(var + eps) + beta.

    Invariant: without gradient through the centring, the output is the one of `none` with centred weights and a batch
    normalisation after it.
    """

    needs_convolution = True

    def __init__(self, *, eps: float, momentum: float, conv_bias: bool, norm_batch: int | None = None) -> None:
        super().__init__(conv_bias=conv_bias, norm_batch=norm_batch)
        if norm_batch == 1:
            raise UserError(
                "norm=mimicnorm cannot normalise groups of one image: its batch normalisation is over logits,\n"
                "of which one image has one per class. Set norm_batch=2 or more."
            )
        self.eps = eps
        self.momentum = momentum

    def convolution(self, convolution: nn.Conv2d) -> nn.Module:
        return MimicConv2d.of(super().convolution(convolution))  # type: ignore[arg-type]

    def graph(self, network: fx.GraphModule, sites: list[Site]) -> None:
        output = network.graph.output_node()
        logits = output.args[0]
        classes = _channels(network, logits) if isinstance(logits, fx.Node) else None
        if classes is None:
            raise UserError(
                "norm=mimicnorm normalises the logits, but this network does not return one tensor from its last\n"
                "linear layer or convolution. Use a network that returns logits (N, classes), or another norm."
            )
        assert isinstance(logits, fx.Node)
        layer = LogitBatchNorm(classes, eps=self.eps, momentum=self.momentum, norm_batch=self.norm_batch)
        network.add_submodule("logit_norm", layer)
        with network.graph.inserting_before(output):
            output.args = (network.graph.call_module("logit_norm", (logits,)),)


def _channels(network: fx.GraphModule, node: fx.Node | None) -> int | None:
    """Channels of what `node` computes: those of the last linear layer or convolution on its way."""
    modules = dict(network.named_modules())
    while node is not None:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, nn.Conv2d):
            return module.out_channels
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return None
