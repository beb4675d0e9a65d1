"""From a configuration to a network."""

import torch
import torchvision
from torch import nn

from normlab.config import SMALL_STEM_UP_TO, CustomModelConfig, ResNetConfig, RunConfig
from normlab.errors import UserError
from normlab.imports import locate
from normlab.norms import Variant, rewrite
from normlab.streams import key


def build(config: RunConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """The network of a run, float32 on the CPU, taking images (N, 3, image_size, image_size).

    The base network is constructed first, from a stream that only the seed chooses, and then rewritten: all
    arms of a seed start from the same convolution and linear weights.

    Raises:
        UserError: if the user's own network or variant cannot be made, or has no sites.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "init"))
        if isinstance(config.model, CustomModelConfig):
            network = _custom(config.model, num_classes)
        else:
            network = _resnet(config.model, config.depth, num_classes, image_size)
    return rewrite(network, variant(config))


def variant(config: RunConfig) -> Variant:
    """The variant that `norm` names, with its options."""
    kind = locate(config.norm.target, "norm._target_")
    try:
        made = kind(**config.norm.options, norm_batch=config.norm_batch)
    except TypeError as error:
        raise UserError(f"norm={config.norm.name} cannot be made with these options: {error}.") from error
    if not isinstance(made, Variant):
        raise UserError(f"norm._target_={config.norm.target} is no variant: derive it from normlab.norms.Variant.")
    return made


def _resnet(model: ResNetConfig, depth: int | None, num_classes: int, image_size: int) -> nn.Module:
    network = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=num_classes)
    if (model.stem or ("small" if image_size <= SMALL_STEM_UP_TO else "imagenet")) == "small":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        network.maxpool = nn.Identity()
    return network


def _custom(model: CustomModelConfig, num_classes: int) -> nn.Module:
    make = locate(model.target, "model.target")
    try:
        network = make(num_classes=num_classes, **model.kwargs)
    except TypeError as error:
        raise UserError(
            f"model.target={model.target} cannot be called with num_classes={num_classes} and model.kwargs: {error}."
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model.target={model.target} gave a {type(network).__name__}, not an nn.Module.")
    return network
