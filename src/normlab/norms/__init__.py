"""Normalization variants as rewrites of a network's sites, for any project: needs torch and `normlab.common`.

    from normlab import norms
    model = norms.rewrite(torchvision.models.resnet18(num_classes=10), "renorm", rmax=2.0)
    steps = norms.Steps(model)  # steps.begin(step, total) before each training step, steps.end() after it

`rewrite` takes a variant by its name (docs/variants.md) or as an object; docs/python.md shows a whole loop.
"""

from normlab.norms.batch import BatchNorm, BatchNormMinus, GroupedBatchNorm2d
from normlab.norms.group import GroupNorm, GroupNorm2d, InstanceNorm, LayerNorm
from normlab.norms.layer_statistics import (
    BatchStatistics,
    apart,
    batch_statistics,
    precise_statistics,
    statistics_layers,
    synchronize,
)
from normlab.norms.lp import LpNorm, LpNorm2d
from normlab.norms.mimic import LogitBatchNorm, MimicConv2d, MimicNorm
from normlab.norms.moving_average import MABN, CenteredConv2d, MovingAverageBatchNorm2d, PowerNorm, PowerNorm2d
from normlab.norms.noise import Noise, NoisyBatchNorm, NoisyNoNorm
from normlab.norms.norm_activation import (
    EvoNorm2dB0,
    EvoNorm2dS0,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    FilterResponseNorm2d,
)
from normlab.norms.normalizer_free import (
    ConstantScale,
    Fixup,
    NormaliserFree,
    ScalarAffine,
    ScalarBias,
    ScalarScale,
    ScaledStandardConv2d,
    activation_gain,
)
from normlab.norms.plain import Affine, ChannelAffine, NoNorm
from normlab.norms.registry import named, rewrite, variants
from normlab.norms.renorm import BatchRenorm, BatchRenorm2d
from normlab.norms.residual import Branch, find_branches, fixup_start, zero_gamma
from normlab.norms.sites import Site, Variant, find_sites, trace
from normlab.norms.steps import Clock, Steps, parameter_roles
from normlab.norms.weights import (
    MeanOnlyBatchNorm2d,
    MeanOnlyWeightNorm,
    NormProp,
    PropagatedReLU,
    ReparametrizedConv2d,
    TReLU,
    TReLUWeightNorm,
    UnitNormConv2d,
    WeightNorm,
    WeightNormConv2d,
    data_dependent_start,
)

NAMED = {name: cls for name, (cls, _) in variants().items()}

__all__ = [
    "MABN",
    "NAMED",
    "Affine",
    "BatchNorm",
    "BatchNormMinus",
    "BatchRenorm",
    "BatchRenorm2d",
    "BatchStatistics",
    "Branch",
    "CenteredConv2d",
    "ChannelAffine",
    "Clock",
    "ConstantScale",
    "EvoNorm2dB0",
    "EvoNorm2dS0",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "FilterResponseNorm2d",
    "Fixup",
    "GroupNorm",
    "GroupNorm2d",
    "GroupedBatchNorm2d",
    "InstanceNorm",
    "LayerNorm",
    "LogitBatchNorm",
    "LpNorm",
    "LpNorm2d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyWeightNorm",
    "MimicConv2d",
    "MimicNorm",
    "MovingAverageBatchNorm2d",
    "NoNorm",
    "Noise",
    "NoisyBatchNorm",
    "NoisyNoNorm",
    "NormProp",
    "NormaliserFree",
    "PowerNorm",
    "PowerNorm2d",
    "PropagatedReLU",
    "ReparametrizedConv2d",
    "ScalarAffine",
    "ScalarBias",
    "ScalarScale",
    "ScaledStandardConv2d",
    "Site",
    "Steps",
    "TReLU",
    "TReLUWeightNorm",
    "UnitNormConv2d",
    "Variant",
    "WeightNorm",
    "WeightNormConv2d",
    "activation_gain",
    "apart",
    "batch_statistics",
    "data_dependent_start",
    "find_branches",
    "find_sites",
    "fixup_start",
    "named",
    "parameter_roles",
    "precise_statistics",
    "rewrite",
    "statistics_layers",
    "synchronize",
    "trace",
    "variants",
    "zero_gamma",
]
