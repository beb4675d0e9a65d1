"""From a configuration to a network."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from normlab.common.errors import UserError
from normlab.common.imports import locate
from normlab.common.rng import key
from normlab.config.schema import RunConfig
from normlab.models import initialization as starts
from normlab.models import networks
from normlab.norms import (
    GroupedBatchNorm2d,
    Variant,
    batch_statistics,
    data_dependent_start,
    find_sites,
    rewrite,
    synchronize,
)
from normlab.norms.plain import set_bias


def build(config: RunConfig, *, num_classes: int, image_size: int) -> nn.Module:
    """The network of a run, float32 on the CPU, taking images (N, 3, image_size, image_size) to (N, num_classes).

    A deep linear network takes x (N, num_classes, 1, 1), its features.

    The base network is constructed and initialised first, from streams that only the seed chooses, and then
    rewritten: all arms of a seed start from the same convolution and linear weights.

    Raises:
        UserError: if the user's own network or variant cannot be made, or has no sites, or does not fit `init`.
    """
    network = base(config, num_classes, image_size)
    made = variant(config)
    probes = (("probe", name) for name in config.probe)
    for setting, value in (("init", config.init.name), ("precision", config.precision), *probes):
        if value in made.refused.get(setting, {}):
            raise UserError(
                f"norm={config.norm.name} cannot have {setting}={value}: {made.refused[setting][value]}.\n"
                f"Use another {setting}, or another norm."
            )
    sites = find_sites(network) if config.init.name == "bn_folded" and not made.normalizes else []
    network = rewrite(network, made)
    for site in sites:
        if site.convolution is not None and starts.is_free(network, site):
            convolution = network.get_submodule(site.convolution)
            assert isinstance(convolution, nn.Conv2d)
            set_bias(convolution)
    if config.input_norm == "bn":
        network = nn.Sequential(OrderedDict(input_norm=_input_norm(config), network=network))
    return synchronize(network) if config.sync_stats else network


def base(config: RunConfig, num_classes: int, image_size: int) -> nn.Module:
    """The network that variants rewrite, with its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "init"))
        network = networks.make(config, num_classes, image_size)
    starts.initialise(network, config.init.name, config.seed)
    return network


def start(config: RunConfig, network: nn.Module, images: Tensor, *, num_classes: int, image_size: int) -> None:
    """The part of a start that looks at data, the calibration images (N, 3, S, S), before the first step; in place.

    Raises:
        UserError: if the network does not fit `init`.
    """
    inner = network
    if config.input_norm == "bn":
        inner, input_norm = network.get_submodule("network"), network.get_submodule("input_norm")
        with torch.no_grad(), batch_statistics(input_norm.eval()):
            images = input_norm(images)
        input_norm.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "start"))  # of dropout that is called as a function
        if config.init.name == "lsuv":
            starts.lsuv(inner, images)
        elif config.init.name == "bn_folded" and not variant(config).normalizes:
            starts.fold(inner, base(config, num_classes, image_size), images)
        data_dependent_start(inner, images)


def _input_norm(config: RunConfig) -> nn.Module:
    """Davis & Frank 2021: a batch normalisation of the input's channels, its shift frozen at 0, its scale starting
    at 0.58 times that of the network's norms (0.58: the standard deviation of a normalised and rectified channel).
    """
    layer = GroupedBatchNorm2d(3, norm_batch=config.norm_batch)
    options = config.norm.options
    nn.init.constant_(layer.weight, 0.58 * options.get("scale_init", 1.0))
    layer.lr_divisors = {"weight": options.get("scale_lr_divisor", 1.0)}
    layer.bias.requires_grad_(False)
    return layer


def variant(config: RunConfig) -> Variant:
    """The variant that `norm` names, with its options."""
    kind = locate(config.norm.target, "norm._target_")
    try:
        made = kind(**config.norm.options, norm_batch=config.norm_batch)
    except TypeError as error:
        raise UserError(f"norm={config.norm.name} cannot be made with these options: {error}.") from error
    if not isinstance(made, Variant):
        raise UserError(f"norm._target_={config.norm.target} is no variant: derive it from normlab.norms.Variant.")
    made.name = config.norm.name
    return made
