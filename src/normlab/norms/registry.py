"""The variants by the names and with the options that conf/norm has for them: without a configuration."""

from typing import Any

from torch import nn

from normlab.common.errors import UserError, nearest
from normlab.common.registry import Declaration, registered
from normlab.norms import sites
from normlab.norms.sites import Variant


def variants() -> dict[str, tuple[type[Variant], Declaration]]:
    """Return each variant that a network alone can be, with its declaration, by name."""
    return {name: found for name, found in registered(Variant).items() if not found[1].needs}


def named(name: str, **options: Any) -> Variant:
    """Return a variant by its name in docs/variants.md, e.g. ``named("renorm", rmax=2.0)``.

    Args:
        name: of a variant, perhaps of one of your own with `@register`.
        options: those of `conf/norm/<name>.yaml`, where each is explained and has its default. `norm_batch`,
            for all: the number of images that share statistics, inside of any batch.

    Raises:
        UserError: for a name or an option that does not exist, with the nearest that does; for a value out of range.
    """
    known = variants()
    if (found := registered(Variant).get(name)) and found[1].needs:
        raise UserError(
            f"{name} is more than a variant of a network: it needs {found[1].needs}, which train.py has.\n"
            f"Its layers alone are those of norms.{found[0].__name__}; docs/python.md says what belongs to them."
        )
    if name not in known:
        close = nearest(name, known)
        raise UserError(
            f"There is no variant {name}.{f' Did you mean {close}?' if close else ''}\n"
            f"Expected one of: {', '.join(sorted(known))}; or an object of your own, of a class derived from"
            " Variant."
        )
    cls, declaration = known[name]
    variant = cls(**declaration.defaults() | options)
    variant.name = name
    return variant


def rewrite(network: nn.Module, variant: str | Variant, **options: Any) -> nn.Module:
    """Put a variant in the place of every batch normalization, with the convolution before and the activation after it.

    As in ``model = rewrite(torchvision.models.resnet18(), "gn", groups=16)``.

    That is BatchNorm1d, 2d, 3d and SyncBatchNorm, and timm's layers that are norm and activation in one. Whatever else
    normalizes by the batch is refused, and a network that is refused stays as it was; other norms (LayerNorm, ...)
    stay in place. Layers keep device, dtype, mode and hooks, gamma and beta their start, and what is frozen stays
    frozen; in half precision they compute in float32. eps and momentum are the variant's.

    Networks are torch.fx's to trace: modules with batch normalization inside must not branch on tensors or their shape.

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
            has no batch normalization, or one that the variant cannot serve.
    """
    if isinstance(variant, str):
        variant = named(variant, **options)
    elif options:
        raise UserError(f"{type(variant).__name__} has its options already: give {', '.join(options)} when making it.")
    return sites.rewrite_sites(network, variant)
