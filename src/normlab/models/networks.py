"""The networks that `model` names, as they are before a variant rewrites them."""

from typing import Any

import torch
import torchvision
from torch import nn

from normlab.common.errors import UserError, nearest
from normlab.common.imports import locate
from normlab.config.schema import (
    SMALL_STEM_UP_TO,
    CifarResNetConfig,
    CustomModelConfig,
    DeepLinearConfig,
    GitmanCifarConfig,
    ResNetConfig,
    RunConfig,
    TorchvisionConfig,
    VGGConfig,
)
from normlab.models.paper_networks import CifarResNet, DeepLinear, GitmanCifarNet, he_fan_out


def make(config: RunConfig, num_classes: int, image_size: int) -> nn.Module:
    """Build with torch's global generator.

    Raises:
        UserError: if torchvision has no such network, or the arguments do not fit it or the user's own.
    """
    depth = config.depth or 0  # of the networks that have one: checked by the schema
    match config.model:
        case ResNetConfig() as model:
            return _resnet(model, depth, num_classes, image_size)
        case CifarResNetConfig():
            return CifarResNet(depth, num_classes)
        case VGGConfig() as model:
            return _vgg(model, depth, num_classes, image_size)
        case TorchvisionConfig() as model:
            return _torchvision(model, num_classes)
        case GitmanCifarConfig():
            return GitmanCifarNet(num_classes)
        case DeepLinearConfig():
            return DeepLinear(num_classes, depth)
        case CustomModelConfig() as model:
            return _custom(model, num_classes)


def _resnet(model: ResNetConfig, depth: int, num_classes: int, image_size: int) -> nn.Module:
    network = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=num_classes)
    if (model.stem or ("small" if image_size <= SMALL_STEM_UP_TO else "imagenet")) == "small":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        network.maxpool = nn.Identity()
    if model.dropout:
        network.avgpool = nn.Sequential(network.avgpool, nn.Dropout(model.dropout))
    return network


def _vgg(model: VGGConfig, depth: int, num_classes: int, image_size: int) -> nn.Module:
    make = getattr(torchvision.models, f"vgg{depth}_bn")
    if (model.head or ("small" if image_size <= SMALL_STEM_UP_TO else "imagenet")) == "imagenet":
        if model.width != 1:
            raise UserError(f"model.width={model.width:g} needs model.head=small: the large head takes 512 filters.")
        return make(weights=None, num_classes=num_classes)
    with torch.device("meta"):  # the large head would be 120 million numbers drawn and thrown away
        network = make(weights=None, init_weights=False)
        if model.width != 1:
            filters = [width if width == "M" else max(1, round(width * model.width)) for width in _vgg_filters(network)]
            network.features = torchvision.models.vgg.make_layers(filters, batch_norm=True)
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Linear(max(1, round(512 * model.width)), num_classes)
    network.to_empty(device="cpu")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    he_fan_out(network)
    nn.init.normal_(network.classifier.weight, std=0.01)  # as torchvision's
    nn.init.zeros_(network.classifier.bias)
    return network


def _vgg_filters(network: nn.Module) -> list[Any]:
    """Filters of each convolution, and "M" for each pooling, as torchvision writes them."""
    layers = network.get_submodule("features").modules()
    kinds = [layer for layer in layers if isinstance(layer, nn.Conv2d | nn.MaxPool2d)]
    return [layer.out_channels if isinstance(layer, nn.Conv2d) else "M" for layer in kinds]


def _torchvision(model: TorchvisionConfig, num_classes: int) -> nn.Module:
    names = torchvision.models.list_models(module=torchvision.models)
    if model.name not in names:
        close = nearest(model.name, names)
        raise UserError(
            f"model.name={model.name} is no classification network of torchvision {torchvision.__version__}."
            + (f"\nDid you mean model.name={close}?" if close else f"\nExpected one of {', '.join(names)}.")
        )
    own: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if model.name in ("googlenet", "inception_v3"):  # one output; and they warn if not told what they do by default
        own |= {"aux_logits": False, "init_weights": True}
    for key in own.keys() & model.kwargs.keys():
        raise UserError(
            f"model.kwargs.{key} is set already: a network has the classes of its data set, no trained weights and"
            " one output.\nLeave it out."
        )
    try:
        return torchvision.models.get_model(model.name, **own, **model.kwargs)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"model.name={model.name} cannot be made with model.kwargs={model.kwargs}: {error}.") from error


def _custom(model: CustomModelConfig, num_classes: int) -> nn.Module:
    make = locate(model.target, "model.target")
    if "num_classes" in model.kwargs:
        raise UserError("model.kwargs.num_classes is set already, to that of the data set.\nLeave it out.")
    try:
        network = make(num_classes=num_classes, **model.kwargs)
    except TypeError as error:
        raise UserError(
            f"model.target={model.target} cannot be called with num_classes={num_classes} and model.kwargs: {error}."
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model.target={model.target} gave a {type(network).__name__}, not an nn.Module.")
    return network
