"""From a configuration to a network."""

from collections import OrderedDict
from itertools import chain

import torch
from torch import Tensor, nn

from normlab import norms
from normlab.common.errors import UserError, exact, listed
from normlab.common.imports import locate
from normlab.common.rng import key
from normlab.config.schema import ClassIncremental, RunConfig
from normlab.models import initialization, networks, pretrained
from normlab.models.pretrained import Log
from normlab.norms.batch import BatchNorm
from normlab.norms.plain import set_bias


def build(
    config: RunConfig, *, num_classes: int, image_size: int, trained: bool = True, log: Log = lambda sentence: None
) -> nn.Module:
    """Build the network of a run, float32 on the CPU, taking images (N, 3, image_size, image_size) to (N, num_classes).

    A deep linear network takes x (N, num_classes, 1, 1), its features.

    The base network is constructed and initialized first, from streams that only the seed chooses, and then
    rewritten: all arms of a seed start from the same convolution and linear weights.

    Args:
        config: the run's settings.
        num_classes: outputs.
        image_size: in pixels.
        trained: whether to start from the weights that `model.weights` names; not for a run that goes on.
        log: called with a sentence about trained weights: their download, what of them is left out.

    Raises:
        UserError: if the user's own network or variant cannot be made, or has no sites, or does not fit `init` or the
            trained weights.
    """
    network = base(config, num_classes, image_size, trained=trained, log=log)
    _check_dtype(config, network)
    rewriting = variant(config)
    others = [("probe", name) for name in config.probe] + [("sync_stats", str(config.sync_stats).lower())]
    others += [("init", config.init.name), ("precision", config.precision), ("engine", config.engine)]
    for setting, value in others:
        if value in rewriting.refused.get(setting, {}):
            raise UserError(
                f"norm={config.norm.name} cannot have {setting}={value}: {rewriting.refused[setting][value]}.\n"
                f"Use {'sync_stats=false' if setting == 'sync_stats' else f'another {setting}'}, or another norm."
            )
    if config.weights is not None and (why := rewriting.refused.get("model.weights")):
        raise UserError(
            f"norm={config.norm.name} cannot start from model.weights={config.weights}: {why['*']}.\n"
            "Use model.weights=null, or another norm."
        )
    if config.weights is not None and isinstance(rewriting, BatchNorm) and rewriting.scale_init != 1:
        if trained:
            log(f"norm.scale_init={exact(rewriting.scale_init)} is for a fresh start: gamma stays as in model.weights.")
        rewriting.scale_init = 1.0
    folds = config.init.name == "bn_folded" and not rewriting.normalizes
    sites = norms.find_sites(network) if folds or config.train_only else []
    network = norms.rewrite(network, rewriting)
    if trained:
        _tell_of_start(config, network, rewriting, log)
    if config.train_only:
        _freeze_all_but_norms(config, network, sites)
    for site in sites if folds else ():
        if site.convolution is not None and initialization.can_fold(network, site):
            convolution = network.get_submodule(site.convolution)
            assert isinstance(convolution, nn.Conv2d)
            set_bias(convolution)
    if config.input_norm == "bn":
        network = nn.Sequential(OrderedDict(input_norm=_input_norm(config), network=network))
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(
            f"{config.model.name} with norm={config.norm.name} has no trainable parameter.\n"
            "Let some of its parameters require gradients, so that there is something to train."
        )
    return norms.synchronize(network) if config.sync_stats else network


def _freeze_all_but_norms(config: RunConfig, network: nn.Module, sites: list[norms.Site]) -> None:
    """Leave trainable, of what is, the scales and shifts of the layers at the sites alone."""
    layers = [layer for site in sites for layer in network.get_submodule(site.norm).modules()]
    scaling = [layer for layer in layers if getattr(getattr(layer, "weight", None), "requires_grad", False)]
    if not scaling:
        raise UserError(
            f"train_only=norm trains the scales and shifts of norms alone, and norm={config.norm.name} has no scale per"
            " channel to train.\nUse a norm that has one, e.g. norm=bn or norm=gn, or train_only=null."
        )
    kept = {parameter for layer in scaling for parameter in (layer.weight, layer.bias)}
    for parameter in network.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)


def _check_dtype(config: RunConfig, network: nn.Module) -> None:
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{name} of {config.model.name} is {dtype}, and images are float32.\n"
                "Leave the network in float32; precision=bf16 or fp16 trains it in less where a device can."
            )


def _tell_of_start(config: RunConfig, network: nn.Module, rewriting: norms.Variant, log: Log) -> None:
    """Tell what a variant leaves out of trained weights, or that it has none where it needs them."""
    frozen = [module for module in network.modules() if isinstance(module, norms.FrozenBatchNorm2d)]
    if frozen and not any(map(_has_statistics, frozen)):
        log(
            f"norm={config.norm.name} has fixed statistics of mean 0 and variance 1, so that it normalizes nothing:"
            " it is meant for a start from trained weights, model.weights=..."
        )
    left = [each for each in ("scales", "shifts", "running statistics") if each not in rewriting.takes]
    folded = config.init.name == "bn_folded" and not rewriting.normalizes
    if config.weights is not None and left and not folded and type(rewriting).__module__.startswith("normlab."):
        log(f"norm={config.norm.name} has no use for the {listed(left, 3)} of norms in model.weights: left out.")


def _has_statistics(layer: norms.FrozenBatchNorm2d) -> bool:
    return layer.weight.is_meta or bool(
        layer.get_buffer("running_mean").any() or (layer.get_buffer("running_var") != 1).any()
    )


def base(
    config: RunConfig,
    num_classes: int,
    image_size: int,
    *,
    trained: bool = True,
    log: Log = lambda sentence: None,
) -> nn.Module:
    """Build the network that variants rewrite, and initialize it or give it trained weights; see `build`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "init"))
        network = networks.make(config, num_classes, image_size)
        names = list(network.state_dict())
        network = norms.separate(network)
        if trained and config.weights is not None:
            start = pretrained.read(config, log)

            def other() -> nn.Module:
                return norms.separate(networks.make(config, num_classes + 1, image_size))

            if line := pretrained.put(network, names, start, other):
                log(line)
    initialization.initialize(network, config.init.name, config.seed)
    return network


def start(config: RunConfig, network: nn.Module, images: Tensor, *, num_classes: int, image_size: int) -> None:
    """Run the part of an initialization that needs data, before the first step; in place.

    `images` are the calibration images (N, 3, S, S).

    Raises:
        UserError: if the network does not fit `init`.
    """
    inner = network
    if config.input_norm == "bn":
        inner, input_norm = network.get_submodule("network"), network.get_submodule("input_norm")
        with torch.no_grad(), norms.batch_statistics(input_norm.eval()):
            images = input_norm(images)
        input_norm.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "start"))  # of dropout that is called as a function
        if config.init.name == "lsuv":
            initialization.lsuv(inner, images)
        elif config.init.name == "bn_folded" and not variant(config).normalizes:
            initialization.fold(inner, base(config, num_classes, image_size), images)
        norms.data_dependent_start(inner, images)


def _input_norm(config: RunConfig) -> nn.Module:
    """A batch normalization of the input's channels (Davis & Frank 2021).

    Its shift is frozen at 0, its scale starts at 0.58 times that of the network's norms (the standard deviation of a
    normalized and rectified channel).
    """
    layer = norms.GroupedBatchNorm2d(3, norm_batch=config.norm_batch)
    options = config.norm.options
    nn.init.constant_(layer.weight, 0.58 * options.get("scale_init", 1.0))
    layer.lr_divisors = {"weight": options.get("scale_lr_divisor", 1.0)}
    layer.bias.requires_grad_(False)
    return layer


def variant(config: RunConfig) -> norms.Variant:
    """Make the variant that `norm` names, with its options.

    Raises:
        UserError: if it cannot be made.
    """
    kind = locate(config.norm.target, "norm._target_")
    if isinstance(kind, type) and not issubclass(kind, norms.Variant):
        raise _no_variant(config)
    try:
        made = kind(**config.norm.options, norm_batch=config.norm_batch)
    except TypeError as error:
        raise UserError(f"norm={config.norm.name} cannot be made with these options: {error}.") from error
    if not isinstance(made, norms.Variant):
        raise _no_variant(config)
    made.name = config.norm.name
    if isinstance(config.sampler, ClassIncremental):
        memory = config.sampler.memory_batch
        made.replay = config.sampler.tasks, config.batch - memory, memory
    return made


def _no_variant(config: RunConfig) -> UserError:
    return UserError(f"norm._target_={config.norm.target} is no variant: derive it from normlab.norms.Variant.")
