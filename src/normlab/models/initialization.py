"""Initialization: the methods of `init`, those without data and those by calibration images."""

import copy
import math

import torch
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.common.rng import stream
from normlab.norms import ChannelAffine, MimicConv2d, Noise, Site, find_sites, fixup_start, zero_gamma
from normlab.norms.layer_statistics import run_hooks
from normlab.norms.steps import WEIGHT_LAYERS
from normlab.norms.tracing import BatchNormalization

RELU_GAIN = math.sqrt(2)


def initialize(network: nn.Module, method: str, seed: int) -> None:
    """Initialize a network, as it was constructed, by the part of an `init` method that needs no data; in place.

    Draws are keyed by seed and the parameter's name.

    Raises:
        UserError: if the network has no residual branches and the method is about them, or no sites.
    """
    if method == "zero_gamma":
        zero_gamma(network)
    elif method == "fixup":
        fixup_start(network)
    elif method == "uniform_gamma":  # Frankle et al. 2021, 2003.00152
        for name, module in network.named_modules():
            if isinstance(module, BatchNormalization) and module.affine:
                nn.init.uniform_(module.weight, generator=stream(seed, "init", f"{name}.weight"))
                nn.init.zeros_(module.bias)
    elif method in ("he_fan_in", "glorot", "orthogonal", "lsuv"):
        layers = [(name, module) for name, module in network.named_modules() if isinstance(module, WEIGHT_LAYERS)]
        linear = [module for _, module in layers if isinstance(module, nn.Linear)]
        active = method == "orthogonal" and any(site.activation for site in find_sites(network))
        with torch.no_grad():
            for name, module in layers:
                draw = stream(seed, "init", f"{name}.weight")
                if method == "he_fan_in":
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=draw)
                elif method == "glorot":
                    nn.init.xavier_uniform_(module.weight, generator=draw)
                else:
                    gain = RELU_GAIN if active and module not in linear[-1:] else 1.0
                    nn.init.orthogonal_(module.weight, gain, generator=draw)
                if module.bias is not None:
                    module.bias.zero_()


def lsuv(network: nn.Module, images: Tensor) -> None:
    """Scale weights to layer-sequential unit variance on `images` (N, 3, H, W), in place.

    Mishkin & Matas 2016, 1511.06422, algorithm 1.

    In one forward pass each convolution and linear layer, in order of execution, is divided by the standard
    deviation of its output; being linear (biases are 0), it needs no iteration. A convolution whose weight is
    reparametrized keeps the scale that its norm gives it.
    """

    def scale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        std = output.std(correction=0)
        if std < 1e-8:  # a layer that starts at zero stays there
            return output
        layer.weight.div_(std)  # type: ignore[operator]
        return output / std

    plain = [module for module in network.modules() if type(module) in (nn.Conv2d, nn.Linear, MimicConv2d)]
    run_hooks(network, images, [layer.register_forward_hook(scale) for layer in plain])


def fold(network: nn.Module, base: nn.Module, images: Tensor) -> None:
    """Fold the BatchNorms of `base` into `network`, which is `base` rewritten without normalization; in place.

    It computes the function that `base` computes on `images` (N, 3, H, W) in training mode: statistics, gamma and beta
    go into convolutions' weights and biases.

        W' = gamma / sqrt(v + eps) · W,   b' = beta - gamma · mu / sqrt(v + eps)

    A site of `network` that normalizes is left as it is.

    Raises:
        UserError: at a site with neither a convolution nor an affine layer to fold into.
    """
    base = copy.deepcopy(base).to(images)
    norms = [module for module in base.modules() if isinstance(module, BatchNormalization)]
    folded: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def add(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(norm, BatchNormalization)
        over = (0, *range(2, inputs[0].dim()))
        variance, mean = torch.var_mean(inputs[0].double(), over, correction=0)
        scale = torch.rsqrt(variance + norm.eps)
        shift = -mean * scale
        if norm.weight is not None:
            scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
        folded[norm] = (scale, shift)

    run_hooks(base, images, [norm.register_forward_hook(add) for norm in norms])
    with torch.no_grad():
        for site in find_sites(base):
            if not can_fold(network, site):
                continue
            scale, shift = folded[base.get_submodule(site.norm)]
            layer = network.get_submodule(site.norm)
            if site.convolution is not None:
                convolution = network.get_submodule(site.convolution)
                assert isinstance(convolution, nn.Conv2d)
                assert convolution.bias is not None
                own = base.get_submodule(site.convolution).bias
                convolution.bias.copy_(shift if own is None else own * scale + shift)  # type: ignore[operator]
                convolution.weight.mul_(scale[:, None, None, None])
                if isinstance(layer, ChannelAffine):  # it started as gamma and beta, which are folded now
                    layer.weight.fill_(1.0)
                    layer.bias.zero_()
            elif isinstance(layer, ChannelAffine):
                layer.weight.copy_(scale)
                layer.bias.copy_(shift)
            else:
                raise UserError(
                    f"init=bn_folded has nothing to fold {site.norm} into: no convolution is before it.\n"
                    "Use norm=affine, or a network with norms after convolutions."
                )


def can_fold(network: nn.Module, site: Site) -> bool:
    """Return whether a rewritten site does not normalize, so that `fold` may change it."""
    plain = site.convolution is None or type(network.get_submodule(site.convolution)) is nn.Conv2d
    return plain and isinstance(network.get_submodule(site.norm), nn.Identity | ChannelAffine | Noise)
