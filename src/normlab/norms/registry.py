"""The variants by the names and with the options that conf/norm has for them: norms without a configuration."""

from typing import Any

from torch import nn

from normlab.common.errors import UserError, nearest
from normlab.norms import sites
from normlab.norms.batch import BatchNorm, BatchNormMinus
from normlab.norms.group import GroupNorm, InstanceNorm, LayerNorm
from normlab.norms.lp import LpNorm
from normlab.norms.mimic import MimicNorm
from normlab.norms.moving_average import MABN, PowerNorm
from normlab.norms.noise import NoisyBatchNorm, NoisyNoNorm
from normlab.norms.norm_activation import EvoNormB0, EvoNormS0, FilterResponseNorm
from normlab.norms.normalizer_free import Fixup, NormaliserFree
from normlab.norms.plain import Affine, NoNorm
from normlab.norms.renorm import BatchRenorm
from normlab.norms.sites import Variant
from normlab.norms.weights import MeanOnlyWeightNorm, NormProp, TReLUWeightNorm, WeightNorm

# The only defaults that are not in conf/ alone: this package is to be of use without it. A test compares the two.
# (bnp is not here: it is none with conv_bias=True and a preconditioner of gradients, which no network holds.)
NAMED: dict[str, tuple[type[Variant], dict[str, Any]]] = {
    "affine": (Affine, {}),
    "bn": (BatchNorm, {"eps": 1e-05, "momentum": 0.1, "scale_init": 1.0, "scale_lr_divisor": 1.0}),
    "bn_scaled": (BatchNorm, {"eps": 1e-05, "momentum": 0.1, "scale_init": 0.1, "scale_lr_divisor": 100.0}),
    "bnminus": (BatchNormMinus, {"eps": 1e-05, "momentum": 0.1}),
    "evonorm_b0": (EvoNormB0, {"eps": 1e-05, "momentum": 0.1}),
    "evonorm_s0": (EvoNormS0, {"groups": 32, "eps": 1e-05}),
    "fixup": (Fixup, {}),
    "frn": (FilterResponseNorm, {"eps": 1e-06, "learned_eps": False}),
    "gn": (GroupNorm, {"groups": 32, "eps": 1e-05}),
    "in": (InstanceNorm, {"eps": 1e-05}),
    "ln": (LayerNorm, {"eps": 1e-05}),
    "lp1": (LpNorm, {"p": 1, "eps": 1e-05, "momentum": 0.1}),
    "lp2": (LpNorm, {"p": 2, "eps": 1e-05, "momentum": 0.1}),
    "lpinf": (LpNorm, {"p": "inf", "eps": 1e-05, "momentum": 0.1}),
    "mabn": (
        MABN,
        {"eps": 1e-05, "momentum": 0.02, "window": 16, "rmax": 5.0, "warmup": 0.05, "r_from": 0.2, "unit": "fraction"},
    ),
    "mimicnorm": (MimicNorm, {"eps": 1e-05, "momentum": 0.1, "conv_bias": False}),
    "nf": (NormaliserFree, {"alpha": 0.2, "eps": 0.0001}),
    "noisy_bn": (
        NoisyBatchNorm,
        {"eps": 1e-05, "momentum": 0.1, "mu_range": 0.5, "sigma_low": 1.0, "sigma_high": 1.25, "spread": 0.1},
    ),
    "noisy_none": (
        NoisyNoNorm,
        {"conv_bias": False, "mu_range": 0.5, "sigma_low": 1.0, "sigma_high": 1.25, "spread": 0.1},
    ),
    "none": (NoNorm, {"conv_bias": False}),
    "normprop": (NormProp, {"eps": 1e-12}),
    "powernorm": (PowerNorm, {"eps": 1e-05, "alpha": 0.9, "alpha_backward": 0.9, "warmup": 0.25, "unit": "fraction"}),
    "renorm": (
        BatchRenorm,
        {
            "eps": 1e-05,
            "momentum": 0.1,
            "rmax": 3.0,
            "dmax": 5.0,
            "ramp_unit": "fraction",
            "ramp_start": 0.0384615,
            "dmax_end": 0.1923077,
            "rmax_end": 0.3076923,
            "learn_scale": True,
        },
    ),
    "wn": (WeightNorm, {"init": "weights", "eps": 1e-24}),
    "wn_mean": (MeanOnlyWeightNorm, {"init": "weights", "eps": 1e-24, "momentum": 0.1}),
    "wn_trelu": (TReLUWeightNorm, {"eps": 1e-06}),
}


def named(name: str, **options: Any) -> Variant:
    """A variant by its name in docs/variants.md, e.g. ``named("renorm", rmax=2.0)``.

    Args:
        options: those of `conf/norm/<name>.yaml`, which says what each is; what is not given is as there. `norm_batch`,
            for all: the number of images that share statistics, inside of any batch.

    Raises:
        UserError: for a name or an option that does not exist, with the nearest that does; for a value out of range.
    """
    if name not in NAMED:
        close = nearest(name, NAMED)
        raise UserError(
            f"There is no variant {name}.{f' Did you mean {close}?' if close else ''}\n"
            f"Expected one of: {', '.join(sorted(NAMED))}; or an object of your own, of a class derived from Variant."
        )
    kind, usual = NAMED[name]
    known = [*usual, "norm_batch"]
    for option in options:
        if option not in known:
            close = nearest(option, known)
            raise UserError(
                f"{name} has no option {option}.{f' Did you mean {close}?' if close else ''}\n"
                f"Expected one of: {', '.join(known)}."
            )
    made = kind(**usual | options)
    made.name = name
    return made


def rewrite(network: nn.Module, variant: str | Variant, **options: Any) -> nn.Module:
    """Make every `nn.BatchNorm2d` of a network, with the convolution before and the activation after it, what a variant
    says: ``model = rewrite(torchvision.models.resnet18(), "gn", groups=16)``.

    Networks are torch.fx's to trace: a forward pass must not branch on the values of tensors. Layers keep device, dtype
    and mode, and gamma and beta their start; other norms (BatchNorm1d, LayerNorm, ...) stay as they are.

    Args:
        network: changed in place, right after its construction; use what is returned.
        variant: a name in docs/variants.md, or a variant, perhaps of a class of your own.
        options: of a variant that is given by its name, see `named`.

    Returns:
        The same network, or a graph over its modules where a variant changes activations or what is between the sites;
        from images (N, C, H, W) to the same shapes as before.

    Some variants have more to them than layers: `Steps` drives those that change in the course of training (renorm,
    mabn, powernorm) or act after a step (mimicnorm); `parameter_roles` has the divisors of learning rates
    (bn_scaled); `data_dependent_start` starts wn and wn_mean with init="data"; nf goes with adaptive gradient clipping.

    Raises:
        UserError: for a name or an option that does not exist, a value out of range, a network that cannot be traced or
            has no BatchNorm2d, and one that the variant cannot serve.
    """
    if isinstance(variant, str):
        variant = named(variant, **options)
    elif options:
        raise UserError(f"{type(variant).__name__} has its options already: give {', '.join(options)} when making it.")
    return sites.rewrite_sites(network, variant)
