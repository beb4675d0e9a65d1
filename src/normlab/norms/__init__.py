"""Normalization variants as rewrites of a network's sites, for any project: needs torch and `normlab.common`.

    from normlab import norms
    model = norms.rewrite(torchvision.models.resnet18(num_classes=10), "renorm", rmax=2.0)
    steps = norms.Steps(model)  # steps.begin(step, total) before each training step, steps.end() after it

`rewrite` takes a variant by its name (docs/variants.md) or as an object; docs/python.md shows a whole loop.
"""

from normlab.common.registry import option, register
from normlab.norms.batch import BatchNorm, BatchNormMinus, FrozenBatchNorm, FrozenBatchNorm2d, GroupedBatchNorm2d
from normlab.norms.batch_norm_calls import batch_norm_refused
from normlab.norms.binary import BinaryActivation, BinaryConv2d, BinaryNormalizerFree, GainedConv2d, RPReLU, Shift
from normlab.norms.group import GroupNorm, InstanceNorm, LayerNorm
from normlab.norms.layer_statistics import (
    BatchStatistics,
    batch_statistics,
    independent_processes,
    precise_statistics,
    statistics_layers,
    synchronize,
)
from normlab.norms.lp import LpNorm
from normlab.norms.mimic import MimicConv2d, MimicNorm
from normlab.norms.moving_average import MABN, PowerNorm
from normlab.norms.noise import Noise, NoisyBatchNorm, NoisyNoNorm
from normlab.norms.norm_activation import EvoNormB0, EvoNormS0, FilterResponseNorm
from normlab.norms.normalizer_free import Fixup, NormalizerFree, SkipInit
from normlab.norms.online import OnlineNorm
from normlab.norms.parts import MeanNorm, VarianceNorm
from normlab.norms.past_batches import CrossIterationBatchNorm, MemorizedBatchNorm
from normlab.norms.plain import Affine, ChannelAffine, NoNorm
from normlab.norms.pointwise import DynamicErf, DynamicTanh
from normlab.norms.registry import named, rewrite, variants
from normlab.norms.renorm import BatchRenorm
from normlab.norms.residual import Branch, find_branches, fixup_start, zero_gamma
from normlab.norms.sites import Site, Variant, find_sites
from normlab.norms.steps import Clock, Steps, decayed_parameters, parameter_roles
from normlab.norms.task_balanced import TaskBalancedBatchNorm
from normlab.norms.tracing import separate, trace
from normlab.norms.weights import MeanOnlyWeightNorm, NormProp, TReLUWeightNorm, WeightNorm, data_dependent_start

NAMED = {name: cls for name, (cls, _) in variants().items()}

__all__ = [
    "MABN",
    "NAMED",
    "Affine",
    "BatchNorm",
    "BatchNormMinus",
    "BatchRenorm",
    "BatchStatistics",
    "BinaryActivation",
    "BinaryConv2d",
    "BinaryNormalizerFree",
    "Branch",
    "ChannelAffine",
    "Clock",
    "CrossIterationBatchNorm",
    "DynamicErf",
    "DynamicTanh",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "Fixup",
    "FrozenBatchNorm",
    "FrozenBatchNorm2d",
    "GainedConv2d",
    "GroupNorm",
    "GroupedBatchNorm2d",
    "InstanceNorm",
    "LayerNorm",
    "LpNorm",
    "MeanNorm",
    "MeanOnlyWeightNorm",
    "MemorizedBatchNorm",
    "MimicConv2d",
    "MimicNorm",
    "NoNorm",
    "Noise",
    "NoisyBatchNorm",
    "NoisyNoNorm",
    "NormProp",
    "NormalizerFree",
    "OnlineNorm",
    "PowerNorm",
    "RPReLU",
    "Shift",
    "Site",
    "SkipInit",
    "Steps",
    "TReLUWeightNorm",
    "TaskBalancedBatchNorm",
    "VarianceNorm",
    "Variant",
    "WeightNorm",
    "batch_norm_refused",
    "batch_statistics",
    "data_dependent_start",
    "decayed_parameters",
    "find_branches",
    "find_sites",
    "fixup_start",
    "independent_processes",
    "named",
    "option",
    "parameter_roles",
    "precise_statistics",
    "register",
    "rewrite",
    "separate",
    "statistics_layers",
    "synchronize",
    "trace",
    "variants",
    "zero_gamma",
]
