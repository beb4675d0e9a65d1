"""Normalisation variants as rewrites of a network's sites, for any project: needs torch and `normlab.errors`.

from normlab.norms import Affine, rewrite
network = rewrite(torchvision.models.resnet18(num_classes=10), Affine())
"""

from normlab.norms.batch import BatchNorm, BatchNormMinus, GroupedBatchNorm2d
from normlab.norms.plain import Affine, ChannelAffine, NoNorm
from normlab.norms.sites import Site, Variant, find_sites, rewrite, trace
from normlab.norms.statistics import BatchStatistics, batch_statistics, statistics_layers, synchronise
from normlab.norms.steps import Clock, Steps, parameter_roles

__all__ = [
    "Affine",
    "BatchNorm",
    "BatchNormMinus",
    "BatchStatistics",
    "ChannelAffine",
    "Clock",
    "GroupedBatchNorm2d",
    "NoNorm",
    "Site",
    "Steps",
    "Variant",
    "batch_statistics",
    "find_sites",
    "parameter_roles",
    "rewrite",
    "statistics_layers",
    "synchronise",
    "trace",
]
