"""The typed schema of a run, with the checks that need neither data nor network.

Defaults live in `conf/`, not here. Hydra composes a configuration, `parse` turns it into a `RunConfig`
or raises a `UserError`; `RunConfig.as_dict` is what a run's folder keeps and what its identity is made of.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from normlab.common.errors import UserError, exact, nearest
from normlab.common.registry import check_options, declarations, refuse_unknown
from normlab.common.sentences import sentence, wrong
from normlab.common.source import own_code
from normlab.config import weights

RESNET_DEPTHS = (18, 34, 50, 101, 152)
DEPTHS = {  # the sizes of each network that has several; None: any
    "resnet": RESNET_DEPTHS,
    "cifar_resnet": (20, 32, 44, 56, 110),
    "binary_resnet": (18,),
    "vgg": (11, 13, 16, 19),
    "deep_linear": None,
}
MOST_TASKS = 50  # of sampler=class_incremental: each has a column in a run's rows
TITLES = {
    "resnet": "a ResNet of torchvision",
    "cifar_resnet": "a CIFAR ResNet",
    "binary_resnet": "a depth of the binary ResNet",
    "vgg": "a VGG of torchvision",
}
IDLE_CALIBRATION_IMAGES, IDLE_PRECISE_BATCHES = 256, 200  # recorded where nothing uses them: conf/config.yaml's values
SMALL_STEM_UP_TO = 64  # pixels; above it the ImageNet stem is chosen unless model.stem says otherwise


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


def _dotted_path(setting: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(r"\w+(\.\w+)+", value):
            raise wrong(
                f"{setting}={value} is not valid: expected a dotted path, e.g. {setting}=my_package.my_module.MyClass."
            )
        return value

    return AfterValidator(check)


def _device(value: Any) -> Any:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
        word = str(value)
        if re.fullmatch(r"(mps|metal|xpu|hip|rocm|hpu|npu|tpu|xla|mtia|vulkan|opencl)(:\d+)?", word.lower()):
            raise wrong(
                f"device={value} is not valid: normlab runs on CPUs and CUDA devices; others have not been tried.\n"
                "Use device=cpu, or device=auto."
            )
        close = f"cuda:{word}" if word.isdigit() else nearest(word, ["auto", "cpu", "cuda", "cuda:0"]) or "auto"
        if gpu := re.fullmatch(r"gpus?:?(\d*)|nvidia", word.lower()):
            close = f"cuda:{gpu[1]}" if gpu[1] else "cuda"
        raise wrong(f"device={value} is not valid: expected auto, cpu, cuda or cuda:N.\nDid you mean device={close}?")
    return value


def _text(value: Any) -> Any:
    """A name that looks like a number reaches us as one: study=2024."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _whole(value: Any) -> Any:
    """Return a whole number that comes as text (depth='18', an environment variable) or as 1e2, as what it is."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _switch(value: Any) -> Any:
    """Return true and false that come as text as what they are."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


Integer = Annotated[StrictInt, BeforeValidator(_whole)]
Switch = Annotated[StrictBool, BeforeValidator(_switch)]
Count = Annotated[Integer, Field(ge=1)]
Whole = Annotated[Integer, Field(ge=0)]
Number = Annotated[FiniteFloat, BeforeValidator(_not_bool)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
UnitInterval = Annotated[Number, Field(gt=0, le=1)]
Name = Annotated[str, BeforeValidator(_text), Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
StudyName = Annotated[
    str, BeforeValidator(_text), Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*(/[A-Za-z0-9][A-Za-z0-9_.+-]*)*$")
]


_OPEN = ("norm", "model", "probe")  # groups whose choices have settings of their own
SettingName = Annotated[str, Field(pattern=r"^[a-z]\w*(\.\w+)*$")]
Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


@dataclass(frozen=True)
class Since:
    """Marks a setting that records of an earlier format do not have: `x: Annotated[Whole, Since(2, neutral=0)]`.

    With the value `neutral` the setting changes nothing and is no part of a run's identity, so that runs recorded
    before it stay the runs they are (`runs.identity`). A mark stays for good, with its value.

    Attributes:
        format: the first format of records that has the setting.
        neutral: the value that a record without the setting stands for.
    """

    format: int
    neutral: Any


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


@contextmanager
def _sentences() -> Iterator[None]:
    """Let a check of pydantic raise a UserError."""
    try:
        yield
    except UserError as error:
        raise wrong(str(error)) from None


class NormConfig(_Section):
    """One choice of `norm`. Keys beyond these belong to the variant's own class."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    name: Name
    target: Annotated[str, _dotted_path("norm._target_")] = Field(alias="_target_")

    @model_validator(mode="after")
    @_sentences()
    def _check_options(self) -> Self:
        """Check the options that a variant of normlab declares, with its defaults for those that are not given.

        Of another class, the options that bn and none have are checked.
        """
        declared = declarations("norms")
        options, given = {**declared["bn"].options, **declared["none"].options}, self.options
        package, _, class_name = self.target.rpartition(".")
        if package.startswith("normlab.norms"):
            of_class = {name: each for name, each in declared.items() if each.class_name == class_name}
            own = of_class.get(self.name) or next(iter(of_class.values()), None)
            if own:
                refuse_unknown(f"norm={self.name}", own.options, given)
                options, given = dict(own.options), own.defaults() | given
        return self.model_copy(update=check_options("norm", options, given))

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the variant's class."""
        return dict(self.model_extra or {})


def _weights(value: Any) -> Any:
    value = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
    if isinstance(value, bool):
        return weights.DEFAULT if value else None
    return str(Path(value).expanduser()) if weights.is_file(value) else value


Width = Annotated[Annotated[Number, Field(ge=1 / 8, le=1)], Since(4, neutral=1.0)]


class _Trainable(_Section):
    """A network that can start from trained weights."""

    weights: Annotated[Annotated[str, Field(min_length=1)] | None, BeforeValidator(_weights), Since(3, neutral=None)]


class ResNetConfig(_Trainable):
    """torchvision's ResNet of the top-level `depth`."""

    kind: Literal["resnet"]
    name: Name
    stem: Literal["small", "imagenet"] | None
    dropout: Fraction
    width: Width


class CustomModelConfig(_Trainable):
    """A network of the user's own, by dotted path."""

    kind: Literal["custom"]
    name: Name
    target: Annotated[str, _dotted_path("model.target")]
    kwargs: dict[str, Any]


class CifarResNetConfig(_Trainable):
    """The ResNets that He et al. 2016 built for 32x32 images, of the top-level `depth`."""

    kind: Literal["cifar_resnet"]
    name: Name


class BinaryResNetConfig(_Trainable):
    """The binary ResNet of Chen et al. 2021 for 32x32 images; `binarize_at` is a fraction of the run."""

    kind: Literal["binary_resnet"]
    name: Name
    binarize_at: Annotated[Number, Field(ge=0, le=1)]
    width: Width


class VGGConfig(_Trainable):
    """torchvision's VGG with batch normalization, of the top-level `depth`."""

    kind: Literal["vgg"]
    name: Name
    head: Literal["small", "imagenet"] | None
    width: UnitInterval


class TorchvisionConfig(_Trainable):
    """Any classification network of torchvision in which sites are found."""

    kind: Literal["torchvision"]
    name: Name
    kwargs: dict[str, Any]


class TimmConfig(_Trainable):
    """Any classification network of timm in which sites are found."""

    kind: Literal["timm"]
    name: Name
    kwargs: dict[str, Any]


class GitmanCifarConfig(_Section):
    """The CIFAR network of Gitman & Ginsburg 2017."""

    kind: Literal["gitman_cifar"]
    name: Name
    width: Width


class DeepLinearConfig(_Section):
    """The deep linear network of Santurkar et al. 2018; the top-level `depth` is its number of layers."""

    kind: Literal["deep_linear"]
    name: Name


ModelConfig = Annotated[
    ResNetConfig
    | CifarResNetConfig
    | BinaryResNetConfig
    | VGGConfig
    | TorchvisionConfig
    | TimmConfig
    | GitmanCifarConfig
    | DeepLinearConfig
    | CustomModelConfig,
    Field(discriminator="kind"),
]


class _Dataset(_Section):
    name: Name
    train_size: Count | None
    test_size: Count | None
    val_size: Whole
    split_seed: Whole
    flip: Switch
    crop_padding: Whole
    crop_size: Count | None


class BuiltinDataset(_Dataset):
    """A data set that is part of a package or that torchvision downloads; always held in memory."""

    kind: Literal["digits", "cifar10", "cifar100"]
    image_size: Count | None


class _OwnDataset(_Dataset):
    path: Folder
    image_size: Count | None
    test_fraction: Annotated[Annotated[Number, Field(gt=0, lt=1)] | None, Since(3, neutral=None)]

    @model_validator(mode="before")
    @classmethod
    def _name_after_path(cls, data: Any) -> Any:
        """The path is no part of a run's identity, so two folders must not share a name by default."""
        if isinstance(data, Mapping) and data.get("name") is None and isinstance(data.get("path"), str):
            folder = Path(data["path"]).expanduser().resolve().name.removesuffix(".npz")
            return {**data, "name": re.sub(r"[^A-Za-z0-9_.+-]+|^[^A-Za-z0-9]+", "_", folder).lstrip("_") or "images"}
        return data


class ArrayDataset(_OwnDataset):
    """Arrays of NumPy in .npz or .npy files, held in memory."""

    kind: Literal["npz"]


class FolderDataset(_OwnDataset):
    """Images in folders of their classes, decoded into memory or streamed."""

    kind: Literal["image_folder", "imagenet"]
    storage: Literal["auto", "memory", "stream"]
    memory_limit_gb: Positive
    crop_scale: Annotated[list[UnitInterval], Field(min_length=2, max_length=2)] | None
    workers: Whole
    value_range: Annotated[Annotated[list[Number], Field(min_length=2, max_length=2)] | None, Since(2, neutral=None)]
    skip_unreadable: Annotated[Switch, Since(3, neutral=False)]

    @model_validator(mode="after")
    def _check_folder(self) -> Self:
        if self.value_range and self.value_range[0] >= self.value_range[1]:
            raise wrong("dataset.value_range=[low,high] needs low < high")
        if self.kind == "imagenet" and self.test_fraction:
            raise wrong(
                f"dataset.test_fraction={exact(self.test_fraction)} is for folders without test images, and ImageNet's"
                " are those of val/.\nUse dataset.test_fraction=null, or dataset=image_folder."
            )
        if self.crop_scale and self.crop_scale[0] > self.crop_scale[1]:
            raise wrong("dataset.crop_scale=[low,high] needs low <= high")
        if self.crop_scale and self.storage == "memory":
            raise wrong(
                "dataset.crop_scale crops the original images, which dataset.storage=memory has already"
                " reduced to one size. Use dataset.storage=stream, or dataset.crop_scale=null",
            )
        return self


class RegressionDataset(_Section):
    """The synthetic task of Santurkar et al. 2018: y = A x with Gaussian A and x. A loss, no accuracy."""

    kind: Literal["linear_regression"]
    name: Name
    features: Count
    train_size: Count
    test_size: Count
    split_seed: Whole


ImageDataset = BuiltinDataset | FolderDataset | ArrayDataset
DatasetConfig = Annotated[
    BuiltinDataset | FolderDataset | ArrayDataset | RegressionDataset, Field(discriminator="kind")
]


class InitConfig(_Section):
    """The initialization of the weights."""

    name: Literal[
        "default", "he_fan_in", "glorot", "orthogonal", "zero_gamma", "uniform_gamma", "lsuv", "bn_folded", "fixup"
    ]


class IID(_Section):
    """Every training image once per epoch, in random order."""

    name: Literal["iid"]


class Paired(_Section):
    """Batches of batch / images_per_label labels, drawn with replacement, times images_per_label images."""

    name: Literal["paired"]
    images_per_label: Annotated[Integer, Field(ge=2)]


class ClassIncremental(_Section):
    """Classes that come task after task, with a memory of images of earlier ones (`data.incremental`)."""

    name: Literal["class_incremental"]
    tasks: Annotated[Integer, Field(ge=2, le=MOST_TASKS)]
    memory: Count
    memory_batch: Count
    exemplars: Literal["random", "herding"]


SamplerConfig = Annotated[IID | Paired | ClassIncremental, Field(discriminator="name")]


class _Optimizer(_Section):
    lr: Positive
    weight_decay: NonNegative
    decay_norm_and_bias: Switch
    agc: Positive | None
    agc_vectors: Annotated[StrictBool, Since(2, neutral=False)]
    precondition: Literal["bnp"] | None


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum, as torch.optim.SGD."""

    name: Literal["sgd"]
    momentum: Fraction
    nesterov: Switch

    @model_validator(mode="after")
    def _check_nesterov(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise wrong("optimizer.nesterov=true needs a momentum, e.g. optimizer.momentum=0.9")
        return self


class Adam(_Optimizer):
    """Adam; with `decoupled` weight decay, AdamW."""

    name: Literal["adam"]
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    eps: Positive
    decoupled: Switch


class RMSprop(_Optimizer):
    """RMSprop, as torch.optim.RMSprop."""

    name: Literal["rmsprop"]
    alpha: Fraction
    eps: Positive
    momentum: Fraction


OptimizerConfig = Annotated[SGD | Adam | RMSprop, Field(discriminator="name")]


class _Schedule(_Section):
    warmup_epochs: NonNegative
    per: Literal["step", "epoch"]


class Constant(_Schedule):
    """The learning rate stays as it is."""

    name: Literal["constant"]


class _Falling(_Schedule):
    """A schedule that runs `cycles` times, each over an equal part of the run, and starts again from the rate."""

    cycles: Annotated[Count, Since(4, neutral=1)]


class Step(_Falling):
    """The learning rate is multiplied by `gamma` at each milestone, a fraction of the cycle."""

    name: Literal["step"]
    milestones: list[Annotated[Number, Field(gt=0, lt=1)]]
    gamma: UnitInterval


class Cosine(_Falling):
    """The learning rate falls to `final_lr` along half a cosine."""

    name: Literal["cosine"]
    final_lr: NonNegative
    divide_final_lr: Annotated[StrictBool, Since(2, neutral=True)]


class Polynomial(_Falling):
    """The learning rate falls to `final_lr` along a polynomial of degree `power`."""

    name: Literal["polynomial"]
    power: Positive
    final_lr: NonNegative
    divide_final_lr: Annotated[StrictBool, Since(2, neutral=True)]


ScheduleConfig = Annotated[Constant | Step | Cosine | Polynomial, Field(discriminator="name")]


def _each_once(steps: list[int]) -> list[int]:
    return sorted(set(steps))


class ProbeConfig(_Section):
    """The steps that a probe measures at: `times` of them, evenly over the run, or before `steps`, counted from 0."""

    name: str
    times: Count | None
    steps: Annotated[list[Whole], Field(min_length=1), AfterValidator(_each_once)] | None

    @model_validator(mode="before")
    @classmethod
    @_sentences()
    def _check_options(cls, data: Any) -> Any:
        """Check the options that the probe's class declares; `times` is a field of this one."""
        declared = declarations("probes").get(cls.__name__)
        if not isinstance(data, Mapping) or not declared:
            return data
        options = {key: option for key, option in declared.options.items() if key not in ProbeConfig.model_fields}
        return check_options(f"probe.{declared.name}", options, data)

    @model_validator(mode="before")
    @classmethod
    def _steps_go_first(cls, data: Any) -> Any:
        return {**data, "times": None} if isinstance(data, Mapping) and data.get("steps") is not None else data

    @model_validator(mode="after")
    def _check_when(self) -> Self:
        if self.times is None and self.steps is None:
            raise wrong(
                f"probe={self.name} has neither times nor steps to measure at.\nUse probe.{self.name}.times=20."
            )
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the probe's class."""
        return {key: value for key, value in self if key not in ProbeConfig.model_fields}


def _probe_model(name: str, options: Iterable[str]) -> type[ProbeConfig]:
    fields: dict[str, Any] = {key: (Any, ...) for key in options if key not in ProbeConfig.model_fields}
    return create_model(name, __base__=ProbeConfig, **{"name": (Literal[name], ...), **fields})


PROBE_SECTIONS = {
    name: _probe_model(name, declared.options) for name, declared in sorted(declarations("probes").items())
}
if TYPE_CHECKING:
    _AnyProbe = ProbeConfig
else:
    _AnyProbe = Annotated[Union[tuple(PROBE_SECTIONS.values())], Field(discriminator="name")]  # noqa: UP007


class NoLogger(_Section):
    """A run's own folder is all there is."""

    name: Literal["none"]


class TensorBoardLogger(_Section):
    """Event files of TensorBoard in a run's folder."""

    name: Literal["tensorboard"]


class MLflowLogger(_Section):
    """A run of MLflow."""

    name: Literal["mlflow"]
    tracking_uri: str | None
    experiment: str | None


class WandbLogger(_Section):
    """A run of Weights & Biases."""

    name: Literal["wandb"]
    project: Name
    entity: Name | None
    mode: Literal["offline", "online"]


LoggerConfig = Annotated[NoLogger | TensorBoardLogger | MLflowLogger | WandbLogger, Field(discriminator="name")]


class RunConfig(_Section):
    """Everything about one run: one training, one seed."""

    study: StudyName
    experiment: Name | None
    budget: Literal["smoke", "laptop", "paper"] | None
    seed: Whole = Field(examples=[0])

    norm: NormConfig
    model: ModelConfig
    dataset: DatasetConfig
    sampler: SamplerConfig
    init: InitConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    probe: dict[str, _AnyProbe]

    depth: Integer | None = Field(examples=[18])
    batch: Count = Field(examples=[128])
    norm_batch: Count | None = Field(examples=[4])
    epochs: Count = Field(examples=[10])
    label_smoothing: Fraction
    drop_last: Switch
    input_norm: Literal["dataset", "none", "bn"]
    sync_stats: Switch
    train_only: Annotated[Literal["norm"] | None, Since(4, neutral=None)]
    calibration_images: Count
    weight_average: Annotated[Number, Field(gt=0, lt=1)] | None
    eval_stats: Literal["running", "precise", "batch"]
    precise_batches: Count
    eval_every: Count
    eval_batch: Count

    device: Annotated[str, BeforeValidator(_device)]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    deterministic: Switch
    engine: Literal["auto", "eager", "graph", "compile"]
    memory_format: Literal["auto", "contiguous", "channels_last"]
    threads: Count | None
    checkpoint_seconds: NonNegative | None
    save_weights: Switch
    tuned: Annotated[list[SettingName], Field(max_length=5), Since(4, neutral=[])]
    keep_checkpoint: Annotated[Switch | None, Since(3, neutral=None)]
    logger: LoggerConfig
    quiet: Switch
    output_dir: Folder
    data_dir: Folder

    @model_validator(mode="before")
    @classmethod
    def _drop_idle_settings(cls, data: Any) -> Any:
        """Give settings that mean nothing to a network or a data set one value: they must not make two runs of one."""
        if not isinstance(data, Mapping):
            return data
        changes: dict[str, Any] = {}
        if data.get("model", {}).get("kind") not in DEPTHS:
            changes["depth"] = None
        if data.get("dataset", {}).get("kind") == "linear_regression" and data.get("input_norm") == "dataset":
            changes["input_norm"] = "none"
        if data.get("sampler", {}).get("name") in ("paired", "class_incremental"):
            changes["drop_last"] = False  # every batch is full
        return {**data, **changes}

    @model_validator(mode="after")
    def _check_depth(self) -> Self:
        depths = DEPTHS.get(self.model.kind)
        if depths and self.depth not in depths:
            raise wrong(
                f"depth={self.depth} is not {TITLES[self.model.kind]}.\n"
                f"Expected one of {', '.join(map(str, depths))}; nearest: depth={nearest(self.depth or 0, depths)}.",
            )
        if self.model.kind == "deep_linear" and (self.depth is None or self.depth < 1):
            raise wrong(f"depth={self.depth} is no number of layers.\nExpected 1 or more; the paper has depth=25.")
        return self

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if (self.model.kind == "deep_linear") != (self.dataset.kind == "linear_regression"):
            raise wrong(
                f"model={self.model.name} cannot learn dataset={self.dataset.name}.\n"
                "The deep linear network and the synthetic regression task belong together:"
                " model=deep_linear dataset=linear_regression.",
            )
        if self.dataset.kind != "linear_regression":
            return self
        if self.input_norm == "bn":
            raise wrong("input_norm=bn normalizes images, and a regression has none.\nUse input_norm=none.")
        if self.label_smoothing:
            raise wrong(
                f"label_smoothing={exact(self.label_smoothing)} is about classes, and a regression has none.\n"
                "Use label_smoothing=0."
            )
        if not isinstance(self.sampler, IID):
            raise wrong(f"sampler={self.sampler.name} draws labels, and a regression has none.\nUse sampler=iid.")
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        given = self.weights
        if given is None:
            return self
        if self.init.name not in ("default", "bn_folded"):
            raise wrong(
                f"init={self.init.name} would write over the weights of model.weights={given}.\n"
                "Use init=default, or init=bn_folded for norms that do not normalize."
            )
        width = getattr(self.model, "width", 1.0)
        if width != 1 and not weights.is_file(given):
            raise wrong(
                f"model.weights={given} are those of the whole network, and model.width={exact(width)} makes a narrower"
                " one.\nUse model.width=1, or model.weights=null."
            )
        if self.model.kind in ("custom", "cifar_resnet", "binary_resnet") and not weights.is_file(given):
            raise wrong(
                f"model.weights={given} is no file, and model={self.model.kind} has no library of trained weights.\n"
                f"Give a file: its path, or a name that ends in {', '.join(weights.SUFFIXES)}."
            )
        return self

    @model_validator(mode="after")
    def _check_binary(self) -> Self:
        if self.model.kind == "binary_resnet" and self.init.name == "bn_folded":
            raise wrong(
                "init=bn_folded folds norms into convolutions, and model=binary_resnet has binary ones.\n"
                "Use init=default, or another network."
            )
        return self

    @model_validator(mode="after")
    def _check_sampler(self) -> Self:
        if not isinstance(self.sampler, Paired):
            return self
        each = self.sampler.images_per_label
        if self.batch % each:
            raise wrong(
                f"sampler=paired makes batches of labels x {each} images, and {each} does not divide"
                f" batch={self.batch}.\nNearest valid: batch={max(self.batch // each, 1) * each}.",
            )
        if self.eval_stats == "batch" and self.eval_batch % each:
            raise wrong(
                f"eval_stats=batch with sampler=paired makes test batches of labels x {each} images, and {each}"
                f" does not divide eval_batch={self.eval_batch}.\n"
                f"Nearest valid: eval_batch={max(self.eval_batch // each, 1) * each}.",
            )
        return self

    @model_validator(mode="after")
    def _check_incremental(self) -> Self:
        sampler, named = self.sampler, f"norm={self.norm.name}"
        balances = self.norm.target == "normlab.norms.TaskBalancedBatchNorm"
        if not isinstance(sampler, ClassIncremental):
            if balances:
                raise wrong(
                    f"{named} balances the images of current and earlier tasks in a batch, and sampler={sampler.name}"
                    " has no tasks.\nUse sampler=class_incremental, or another norm."
                )
            return self
        if balances and self.norm_batch is not None:
            raise wrong(f"{named} splits a batch by its tasks, and not by norm_batch.\nUse norm_batch=null.")
        if sampler.memory_batch >= self.batch:
            raise wrong(
                f"sampler.memory_batch={sampler.memory_batch} leaves no image of the current task in a batch of"
                f" {self.batch}.\nUse fewer: a quarter is sampler.memory_batch={max(self.batch // 4, 1)}."
            )
        if sampler.memory < sampler.memory_batch:
            raise wrong(
                f"sampler.memory={sampler.memory} images are fewer than the sampler.memory_batch={sampler.memory_batch}"
                f" of them in a batch.\nNearest valid: sampler.memory={sampler.memory_batch}."
            )
        if self.epochs % sampler.tasks:
            nearest_valid = max(round(self.epochs / sampler.tasks), 1) * sampler.tasks
            raise wrong(
                f"epochs={self.epochs} are those of all tasks, and sampler.tasks={sampler.tasks} do not divide them.\n"
                f"Nearest valid: epochs={nearest_valid}."
            )
        for setting, value, needed in (
            ("eval_stats", self.eval_stats, "running"),
            ("label_smoothing", exact(self.label_smoothing), "0"),
            ("init", self.init.name if self.init.name in ("lsuv", "bn_folded") else "default", "default"),
            ("norm.init", "data" if self.norm.options.get("init") == "data" else "weights", "weights"),
        ):
            if value != needed:
                raise wrong(
                    f"{setting}={value} is about images or classes of all tasks, and sampler=class_incremental has"
                    f" those of one task after another.\nUse {setting}={needed}."
                )
        return self

    @model_validator(mode="after")
    def _check_tuned(self) -> Self:
        for name in self.tuned:
            group, _, key = name.partition(".")
            section = getattr(self, group, None)
            known = type(section).model_fields if isinstance(section, _Section) else {}
            if group not in RunConfig.model_fields or (key and group not in _OPEN and key not in known):
                names = [f"{group}.{each}" for each in known] or list(RunConfig.model_fields)
                close = nearest(name, names)
                hint = f"\nDid you mean tuned=[{close}]?" if close else ""
                raise wrong(f"tuned=[{name}]: there is no setting {name} that a report could choose.{hint}")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.budget and not self.experiment:
            raise wrong(
                f"budget={self.budget} is the size of an experiment, and none is named.\n"
                "Add experiment=..., or leave budget out.",
            )
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.sync_stats and self.norm_batch is not None:
            raise wrong(
                "sync_stats=true makes one group of all processes' images, norm_batch makes several of one"
                " process's.\nUse one of the two.",
            )
        if self.norm_batch is not None and self.norm_batch > self.batch:
            raise wrong(
                f"norm_batch={self.norm_batch} is larger than batch={self.batch}.\n"
                "It is the number of images that share normalization statistics inside a batch."
                f" Nearest valid: norm_batch={self.batch}, or norm_batch=null.",
            )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        cycles = getattr(self.schedule, "cycles", 1)
        if self.schedule.warmup_epochs * cycles >= self.scheduled_epochs:
            each = "" if self.scheduled_epochs == self.epochs else f", {self.scheduled_epochs} for each task"
            raise wrong(
                f"schedule.warmup_epochs={exact(self.schedule.warmup_epochs)} leaves nothing of epochs="
                f"{self.epochs}{each}{f' in {cycles} cycles' if cycles > 1 else ''}.\n"
                "Use a shorter warm-up or more epochs.",
            )
        return self

    @model_validator(mode="after")
    def _neutralize_idle_settings(self) -> Self:
        """Give settings that another one makes idle one value, once all are known to be valid."""
        changes: dict[str, Any] = {}
        if not self.starts_from_data:
            changes["calibration_images"] = IDLE_CALIBRATION_IMAGES
        if self.eval_stats != "precise":
            changes["precise_batches"] = IDLE_PRECISE_BATCHES
        if self.norm_batch == self.batch and self.eval_stats != "batch" and not self.starts_from_data:
            changes["norm_batch"] = None  # the groups of batches of other sizes would differ
        if self.optimizer.agc is None:
            changes["optimizer"] = self.optimizer.model_copy(update={"agc_vectors": False})
        if isinstance(self.schedule, Cosine | Polynomial) and not (self.schedule.final_lr and self._divides_rates):
            changes["schedule"] = self.schedule.model_copy(update={"divide_final_lr": True})
        return self.model_copy(update=changes)

    @property
    def _divides_rates(self) -> bool:
        """Whether some parameters learn at a part of the rate, as far as the settings tell: a norm of one's own may."""
        divisors = [value for name, value in self.norm.options.items() if name.endswith("lr_divisor")]
        return any(divisor != 1 for divisor in divisors) or not self.norm.target.startswith("normlab.norms")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle plain values: the classes of probes, which are made at run time, cannot be looked up by a worker."""
        return parse, (self.as_dict(),)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values only, as they are kept in a run's `config.yaml`."""
        return self.model_dump(mode="json", by_alias=True)

    def own_code(self) -> dict[str, dict[str, Any]]:
        """Return digests of the user's own code that the run is made of, by the setting that names it."""
        named = {"norm._target_": self.norm.target}
        if isinstance(self.model, CustomModelConfig):
            named["model.target"] = self.model.target
        return {setting: code for setting, dotted in named.items() if (code := own_code(dotted))}

    @property
    def weights(self) -> str | None:
        """Return the trained weights that the network starts from, the name of a library's or a file; None: random."""
        return getattr(self.model, "weights", None)

    @property
    def scheduled_epochs(self) -> int:
        """Return the epochs that a schedule is over: those of the run, or of each of its tasks."""
        return self.epochs // self.sampler.tasks if isinstance(self.sampler, ClassIncremental) else self.epochs

    @property
    def starts_from_data(self) -> bool:
        """Return whether the initialization reads the calibration images."""
        return self.init.name in ("lsuv", "bn_folded") or self.norm.options.get("init") == "data"

    @property
    def study_folder(self) -> Path:
        """The folder of all runs of the study."""
        return Path(self.output_dir) / self.study


def parse(composed: Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration and return it as a typed one.

    Raises:
        UserError: naming the first wrong setting, what was expected, and the fix.
    """
    composed = {key: value for key, value in composed.items() if key != "cluster"}  # of a launcher, and of no run
    try:
        return RunConfig.model_validate(composed)
    except ValidationError as error:
        fields = RunConfig.model_fields
        examples = {name: field.examples[0] for name, field in fields.items() if field.examples}
        raise UserError(sentence(error.errors()[0], composed, fields, examples)) from None
