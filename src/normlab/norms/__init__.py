"""Normalisation variants as rewrites of a network's sites, for any project: needs torch and `normlab.errors`.

from normlab.norms import Affine, rewrite
network = rewrite(torchvision.models.resnet18(num_classes=10), Affine())
"""

from normlab.norms.batch import BatchNorm, BatchNormMinus, GroupedBatchNorm2d
from normlab.norms.plain import Affine, ChannelAffine, NoNorm
from normlab.norms.sites import Site, Variant, find_sites, rewrite

__all__ = [
    "Affine",
    "BatchNorm",
    "BatchNormMinus",
    "ChannelAffine",
    "GroupedBatchNorm2d",
    "NoNorm",
    "Site",
    "Variant",
    "find_sites",
    "rewrite",
]
