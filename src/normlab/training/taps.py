"""Convolutions without the taps of their kernels that meet nothing but padding.

On small maps most taps do: on a map of one pixel, all of a 3x3 kernel but its center. Their products and gradients are
zeros, and so they are left out: outputs and gradients are the same up to the order of sums.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.norms.weights import ReparametrizedConv2d

Padding = tuple[int, int, int]


def trim(network: nn.Module, images: Tensor) -> None:
    """Let every convolution of `network` leave such taps out; in place. Names and values of parameters stay.

    A convolution that leaves taps out becomes one of a subclass of its class, with its weight laid out in memory tap by
    tap, so that those it needs are in one piece.

    Args:
        images: float (B, C, S, S) of the size that will be trained on, for a forward pass in evaluation mode.
    """
    sizes: dict[nn.Conv2d, torch.Size] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        sizes[module] = inputs[0].shape[-2:]

    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    handles = [module.register_forward_pre_hook(note) for module in convolutions]
    training = network.training
    with torch.no_grad():
        network.eval()(images)
    network.train(training)
    for handle in handles:
        handle.remove()
    for module, size in sizes.items():
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        known = isinstance(module, ReparametrizedConv2d) or type(module).forward is nn.Conv2d.forward
        if known and zeros and any(start or end for start, end, _ in _live_taps(module, size)):
            module.__class__ = _trimmed(type(module))
            module.weight.data = module.weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


class _Trimmed(nn.Conv2d):
    """Overrides the method by which `ReparametrizedConv2d` convolves with its weight."""

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve without those taps."""
        rows, columns = _live_taps(self, input.shape[-2:])
        cuts = (-columns[0], -columns[1], -rows[0], -rows[1])
        if any(cuts):  # by padding of a negative width, whose gradient is padded with zeros
            weight = F.pad(weight.permute(2, 3, 0, 1), (0, 0, 0, 0, *cuts)).permute(2, 3, 0, 1)
        return F.conv2d(input, weight, bias, self.stride, (rows[2], columns[2]), self.dilation, self.groups)


class _TrimmedConv2d(_Trimmed):
    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.weight, self.bias)


def _trimmed(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    base = _Trimmed if issubclass(kind, ReparametrizedConv2d) else _TrimmedConv2d
    return type(kind.__name__, (base, kind), {})


def _live_taps(module: nn.Conv2d, size: torch.Size) -> tuple[Padding, Padding]:
    """Return `live` of rows and of columns for images of that size."""
    assert not isinstance(module.padding, str)
    numbers = zip(size, module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    rows, columns = (live(*one) for one in numbers)
    return rows, columns


@lru_cache(maxsize=4096)
def live(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Padding:
    """Return, for one dimension, the taps to leave out at the start and at the end, and the padding then needed."""
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    firsts = [place * stride - padding for place in range(outputs)]
    taps = [tap for tap in range(kernel) if any(0 <= first + tap * dilation < size for first in firsts)]
    if not taps:
        return 0, 0, padding
    start, end = taps[0], kernel - 1 - taps[-1]
    left = padding - start * dilation
    # Padding is the same on both sides: what is left of it must still give as many outputs, in the same places.
    if left < 0 or (size + 2 * left - dilation * (kernel - start - end - 1) - 1) // stride + 1 != outputs:
        return 0, 0, padding
    return start, end, left
