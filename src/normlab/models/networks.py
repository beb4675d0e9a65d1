"""The networks that `model` names, before a variant rewrites them: torchvision's, timm's, papers', one's own."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from normlab.common.errors import UserError, described, did_you_mean
from normlab.common.imports import locate
from normlab.config import schema
from normlab.config.weights import is_file
from normlab.models.binary_resnet import BinaryResNet


def make(config: schema.RunConfig, num_classes: int, image_size: int) -> nn.Module:
    """Build the network of a run, with torch's global generator.

    Raises:
        UserError: if torchvision has no such network, or the arguments do not fit it or the user's own.
    """
    depth = config.depth or 0  # of the networks that have one: checked by the schema
    match config.model:
        case schema.ResNetConfig() as model:
            return _resnet(model, depth, num_classes, image_size)
        case schema.CifarResNetConfig():
            return CifarResNet(depth, num_classes)
        case schema.BinaryResNetConfig() as model:
            if image_size > schema.SMALL_STEM_UP_TO:
                raise UserError(
                    f"model=binary_resnet is for images of up to {schema.SMALL_STEM_UP_TO} pixels, and these have"
                    f" {image_size}.\nUse dataset.image_size=32: its authors' network for ImageNet is another one."
                )
            return BinaryResNet(num_classes, model.binarize_at, model.width)
        case schema.VGGConfig() as model:
            return _vgg(model, depth, num_classes, image_size)
        case schema.TorchvisionConfig() as model:
            return _torchvision(model, num_classes)
        case schema.TimmConfig() as model:
            return _timm(model, num_classes)
        case schema.GitmanCifarConfig() as model:
            return GitmanCifarNet(num_classes, model.width)
        case schema.DeepLinearConfig():
            return DeepLinear(num_classes, depth)
        case schema.CustomModelConfig() as model:
            return _custom(model, num_classes, image_size)


def _resnet(model: schema.ResNetConfig, depth: int, num_classes: int, image_size: int) -> nn.Module:
    make = getattr(torchvision.models, f"resnet{depth}")
    if model.width == 1:
        network: nn.Module = make(weights=None, num_classes=num_classes)
    else:
        with torch.device("meta"):  # all weights are made anew
            network = make(weights=None, num_classes=num_classes)
        _narrow(network, model.width)
        he_fan_out(network)
    if (model.stem or ("small" if image_size <= schema.SMALL_STEM_UP_TO else "imagenet")) == "small":
        stem = network.get_submodule("conv1")
        assert isinstance(stem, nn.Conv2d)
        network.conv1 = nn.Conv2d(3, stem.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        he_fan_out(network.conv1)
        network.maxpool = nn.Identity()
    if model.dropout:
        network.avgpool = nn.Sequential(network.get_submodule("avgpool"), nn.Dropout(model.dropout))
    return network


def _narrow(network: nn.Module, width: float) -> None:
    """Replace each layer by one of round(width · C) channels where it has C; in place.

    Images and logits keep theirs. Equal numbers stay equal, so that residual sums fit.
    """

    def fewer(channels: int) -> int:
        return max(1, round(channels * width))

    for name, module in list(network.named_modules()):
        parent, _, own = name.rpartition(".")
        made: nn.Module
        if isinstance(module, nn.Conv2d):
            before = module.in_channels if name == "conv1" else fewer(module.in_channels)
            shape = {"kernel_size": module.kernel_size, "stride": module.stride, "padding": module.padding}
            made = nn.Conv2d(before, fewer(module.out_channels), **shape, bias=False)  # type: ignore[arg-type]
        elif isinstance(module, nn.BatchNorm2d):
            made = nn.BatchNorm2d(fewer(module.num_features))
        elif isinstance(module, nn.Linear):
            made = nn.Linear(fewer(module.in_features), module.out_features)
        else:
            continue
        setattr(network.get_submodule(parent), own, made)


def _vgg(model: schema.VGGConfig, depth: int, num_classes: int, image_size: int) -> nn.Module:
    make = getattr(torchvision.models, f"vgg{depth}_bn")
    if (model.head or ("small" if image_size <= schema.SMALL_STEM_UP_TO else "imagenet")) == "imagenet":
        if model.width != 1:
            raise UserError(f"model.width={model.width} needs model.head=small: the large head takes 512 filters.")
        network: nn.Module = make(weights=None, num_classes=num_classes)
        return network
    with torch.device("meta"):  # the large head would be 120 million numbers drawn and thrown away
        network = make(weights=None, init_weights=False)
        if model.width != 1:
            filters = [width if width == "M" else max(1, round(width * model.width)) for width in _vgg_filters(network)]
            network.features = torchvision.models.vgg.make_layers(filters, batch_norm=True)
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = classifier = nn.Linear(max(1, round(512 * model.width)), num_classes)
    network.to_empty(device="cpu")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    he_fan_out(network)
    nn.init.normal_(classifier.weight, std=0.01)  # as torchvision's
    nn.init.zeros_(classifier.bias)
    return network


def _vgg_filters(network: nn.Module) -> list[Any]:
    """Filters of each convolution, and "M" for each pooling, as torchvision writes them."""
    layers = network.get_submodule("features").modules()
    kinds = [layer for layer in layers if isinstance(layer, nn.Conv2d | nn.MaxPool2d)]
    return [layer.out_channels if isinstance(layer, nn.Conv2d) else "M" for layer in kinds]


def check_torchvision(name: str) -> None:
    """Check that torchvision has a classification network of a name.

    Raises:
        UserError: if not, with the nearest name.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        hint = did_you_mean(name, names, "model.name=") or f"\nExpected one of {', '.join(names)}."
        raise UserError(
            f"model.name={name} is no classification network of torchvision {torchvision.__version__}.{hint}"
        )


def _torchvision(model: schema.TorchvisionConfig, num_classes: int) -> nn.Module:
    check_torchvision(model.name)
    own: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    kwargs = model.kwargs
    if model.name in ("googlenet", "inception_v3"):
        # One output; and both warn about their default initialization otherwise.
        own |= {"aux_logits": False, "init_weights": True}
        if model.weights and not is_file(model.weights):  # these were trained on images in [-1, 1]
            kwargs = {"transform_input": True} | kwargs
    for key in own.keys() & kwargs.keys():
        raise UserError(
            f"model.kwargs.{key} is set already: a network has the classes of its data set and one output.\n"
            "Leave it out; trained weights are model.weights=..."
        )
    try:
        network: nn.Module = torchvision.models.get_model(model.name, **own, **kwargs)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"model.name={model.name} cannot be made with model.kwargs={kwargs}: {error}.") from error
    return network


def check_timm(name: str) -> None:
    """Check that timm is installed and has a network of a name.

    Raises:
        UserError: if not, with the nearest name.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"model=timm needs timm, and importing it failed: {error}.\nInstall it: pip install 'normlab[timm]'."
        ) from error
    names = timm.list_models()
    if name not in names:
        hint = did_you_mean(name, names, "model.name=") or "\nIts names: timm.list_models('*part_of_a_name*')."
        architecture, _, tag = name.partition(".")
        if architecture in names:
            hint = f"\nDid you mean model.name={architecture} model.weights={tag or 'DEFAULT'}?"
        raise UserError(f"model.name={name} is no network of timm {timm.__version__}.{hint}")


def _timm(model: schema.TimmConfig, num_classes: int) -> nn.Module:
    check_timm(model.name)
    import timm

    own: dict[str, Any] = {"pretrained": False, "num_classes": num_classes}
    for key in (own.keys() | {"checkpoint_path", "pretrained_strict"}) & model.kwargs.keys():
        raise UserError(
            f"model.kwargs.{key} is set already: a network has the classes of its data set.\n"
            "Leave it out; trained weights are model.weights=..."
        )
    try:
        network: nn.Module = timm.create_model(model.name, **own, **model.kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"model.name={model.name} cannot be made with model.kwargs={model.kwargs}: {described(error)}."
        ) from error
    return network


def _custom(model: schema.CustomModelConfig, num_classes: int, image_size: int) -> nn.Module:
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
    if any(getattr(module, "has_uninitialized_params", bool)() for module in network.modules()):
        _give_shapes(network, image_size, model.target)
    return network


def _give_shapes(network: nn.Module, image_size: int, target: str) -> None:
    """Let lazy layers make their parameters, by one forward pass in evaluation."""
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:
        raise UserError(
            f"model.target={target} has lazy layers, and fails on an image of {image_size}x{image_size} pixels, which"
            f" would give them their shapes:\n{described(error)}."
        ) from error
    for module, mode in modes.items():
        module.training = mode


def he_fan_out(network: nn.Module) -> None:
    """Start convolutions as torchvision does: normal with variance 2 / (out · kh · kw), biases at 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class CifarResNet(nn.Module):
    """The ResNet of He et al. 2016, section 4.2, of depth 6n + 2, for images (N, 3, H, W).

    A 3x3 stem of 16 filters, three stages of n blocks with 16, 32 and 64 channels, the mean over H and W, one linear
    layer. The convolutions start as torchvision's ([A]: the paper names He et al. 2015, which has fan-in and fan-out).
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        he_fan_out(self)

    @staticmethod
    def _stage(before: int, channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(CifarBlock(before, channels), *(CifarBlock(channels, channels) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class CifarBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x))))));  3x3 convolutions, at stride 2 where the channels grow.

    The shortcut has no parameters (option A): every second pixel, and zeros for the new channels ([A]: behind the
    old ones).
    """

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if channels == before else 2
        self.new_channels = channels - before
        self.conv1 = nn.Conv2d(before, channels, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, activated."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        output: Tensor = self.relu(residual + x)
        return output


class GitmanCifarNet(nn.Module):
    """The CIFAR network of Gitman & Ginsburg 2017, after the co-author's configuration files of the time.

    Images (N, 3, 28, 28): 3 x conv3x3-128, pool to 14x14, 3 x conv3x3-256, pool to 7x7, conv3x3-320 to 5x5,
    conv1x1-320, conv1x1-classes, mean over H and W. A ReLU follows every convolution, the last one too; batch
    normalization stands between the third and the sixth and their ReLU ([A]: not behind it).

    Those are files for Caffe, whose pooling rounds sizes up, and whose "xavier" is U(-a, a) with
    a = sqrt(3 / fan-in) and biases at 0 ([A]: not Glorot's mean of fan-in and fan-out).

    Args:
        num_classes: of the images.
        width: this share of the filters, rounded ([A]: the files have all).
    """

    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        inner = (round(filters * width) for filters in (128, 128, 128, 256, 256, 256, 320, 320))
        widths = (3, *inner, num_classes)
        layers: list[nn.Module] = []
        for number, (before, filters) in enumerate(itertools.pairwise(widths), start=1):
            normalized = number in (3, 6)
            size, padding = (3, 1) if number <= 6 else (3, 0) if number == 7 else (1, 0)
            convolution = nn.Conv2d(before, filters, size, padding=padding, bias=not normalized)
            nn.init.kaiming_uniform_(convolution.weight, nonlinearity="linear")  # U(-a, a), a = sqrt(3 / fan-in)
            layers.append(convolution)
            if normalized:
                layers.append(nn.BatchNorm2d(filters, eps=1e-4, momentum=0.1))  # 0.1 is 1 - Caffe's fraction of 0.9
            else:
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            layers.append(nn.ReLU(inplace=True))
            if normalized:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        return torch.flatten(self.avgpool(self.features(images)), 1)


class DeepLinear(nn.Module):
    """The deep linear network of Santurkar et al. 2018: y = W_k ... W_1 x, square matrices, no activation.

    x (N, features, 1, 1) -> (N, features). The matrices are 1x1 convolutions, each with batch normalization behind
    it ([A]: also the last), and start as Glorot's U(-a, a), a = sqrt(3 / features) ([A]: uniform, not normal).
    """

    def __init__(self, features: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(depth):
            matrix = nn.Conv2d(features, features, 1, bias=False)
            nn.init.xavier_uniform_(matrix.weight)
            self.layers.extend([matrix, nn.BatchNorm2d(features)])

    def forward(self, x: Tensor) -> Tensor:
        """Return y (N, features)."""
        return torch.flatten(self.layers(x), 1)
