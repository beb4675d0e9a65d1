"""Convolutions without the taps of their kernels that meet nothing but padding.

On small maps most taps do: on a map of one pixel, all of a 3x3 kernel but its centre. Their products and gradients are
zeros, and so they are left out: outputs and gradients are the same up to the order of sums.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def trim(network: nn.Module, images: Tensor) -> None:
    """Let every convolution of `network` leave such taps out; in place. Names and values of parameters stay.

    Args:
        images: float (B, C, S, S) of the size that will be trained on; the network looks at them once, in evaluation
            mode. A convolution that leaves taps out of these has its weight laid out in memory tap by tap, so that
            those it needs are in one piece.
    """
    trimmed = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module._conv_forward = _Trimmed(module)  # type: ignore[method-assign]  # of this module alone
            trimmed.append(module)
    training = network.training
    with torch.no_grad():
        network.eval()(images)
        network.train(training)
        for module in trimmed:
            if module._conv_forward.cut:  # type: ignore[attr-defined]
                module.weight.data = module.weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


class _Trimmed:
    """In place of a module's own `_conv_forward`; an object, so that it can be copied together with the module."""

    def __init__(self, module: nn.Conv2d) -> None:
        assert not isinstance(module.padding, str)
        self.kernel_size, self.stride, self.padding = module.kernel_size, module.stride, module.padding
        self.dilation, self.groups = module.dilation, module.groups
        self.cut = False  # whether the last images left taps out

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = (
            live(*numbers)
            for numbers in zip(
                input.shape[-2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )
        cuts = (-columns[0], -columns[1], -rows[0], -rows[1])
        self.cut = any(cuts)
        if self.cut:  # by padding of a negative width, whose gradient is padded with zeros
            weight = F.pad(weight.permute(2, 3, 0, 1), (0, 0, 0, 0, *cuts)).permute(2, 3, 0, 1)
        return F.conv2d(input, weight, bias, self.stride, (rows[2], columns[2]), self.dilation, self.groups)


@lru_cache(maxsize=4096)
def live(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int, int]:
    """In one dimension: the taps to leave out at the start and at the end, and the padding that is then needed."""
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
