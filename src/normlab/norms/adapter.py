"""Lets layers for maps (N, C, H, W) in float32 serve inputs of other shapes, and networks of half precision."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

HALF = (torch.float16, torch.bfloat16)


class FullPrecision(nn.Module):
    """A layer that computes in float32 in a network of half precision.

    Its parameters have the network's dtype and are used as float32; its floating-point buffers (moving averages,
    clocks) stay float32, whichever of rewriting and conversion comes first. So it works as under autocast.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with float32 in the place of half-precision parameters."""
        half = {name: p.float() for name, p in self._parameters.items() if p is not None and p.dtype in HALF}
        return functional_call(self, half, args, kwargs) if half else super().__call__(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in HALF:
                self._buffers[name] = before[name].to(buffer.device, torch.float32)  # type: ignore[union-attr]
        return self


class AnyShape(nn.Module):
    """Runs `layer`, which is for maps (N, C, H, W), on x (N, C, ...), seen as maps (N, C, positions, 1)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output in the shape of the input."""
        maps = input if input.dim() == 4 else input.reshape(*input.shape[:2], -1, 1)
        output: Tensor = self.layer(maps)
        return output.reshape(input.shape)


class Copy(nn.Identity):
    """y = x in other memory, as a norm's output is: what follows may work in place, and others use x."""

    def forward(self, input: Tensor) -> Tensor:
        """Return a copy."""
        return input.clone()


def fit(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return a layer for maps (N, C, H, W) so that it takes the inputs of `norm`, of any kind of batch normalization.

    A class of layers that take any shape (N, C, ...) says so by ``takes_any_shape = True``.
    """
    any_shape = isinstance(norm, nn.BatchNorm2d) or isinstance(layer, nn.Identity)
    return layer if any_shape or getattr(layer, "takes_any_shape", False) else AnyShape(layer)
