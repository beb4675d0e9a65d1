"""Statistics of the batch: groups inside it, moving averages, several processes, statistics for evaluation."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, library, nn
from torch.utils.hooks import RemovableHandle

from normlab.common.errors import UserError
from normlab.norms.adapter import FullPrecision

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class BatchStatistics(FullPrecision):
    """A layer over x (N, C, H, W) with statistics per channel over the images of a group, and H and W.

    It has `weight` (C,) from 1, `bias` (C,) from 0, a buffer (C,) for each of `averages`, and an attribute for each
    further keyword. A subclass defines `normalize` for one group and `evaluate`; with other averages than
    running_mean and running_var also `averages_of`, for precise statistics.

    With `norm_batch` = k and N = G·k + r, image n < G·k belongs to group n mod G, so that the groups are a view
    (k, G·C, H, W) of x in which every group's channel is a channel; the last r images are a smaller group.
    """

    averages: ClassVar[dict[str, float]] = {"running_mean": 0.0, "running_var": 1.0}  # name -> initial value
    counter: ClassVar[str | None] = None  # a buffer that counts batches; with it averages begin as plain means
    alone: bool = True  # moves its averages in its forward pass; else `Steps.end` moves those of all layers together
    pending: tuple[Tensor, ...] | None = None  # statistics of the newest batch, which the averages have yet to take
    takes_single_values: ClassVar[bool] = False  # whether a group may have a single value per channel
    forwards_again: ClassVar[bool] = False  # whether the averages take the batch as it is after the update
    slides_over_groups: ClassVar[bool] = False  # whether several processes must have as many groups each
    norm_batch: int | None = None  # images of a group; None: all of the batch
    synchronized = False  # one group over all processes of torch.distributed
    averages_over_processes = False  # groups of each process's own, and moving averages over all processes' groups
    evaluates_on_batch = False  # in evaluation, use the batch's statistics as in training

    weight: nn.Parameter
    bias: nn.Parameter
    momentum: float  # weight of the newest batch in the moving averages

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        for name, start in self.averages.items():
            self.register_buffer(name, torch.full((channels,), start))
        if self.counter is not None:
            self.register_buffer(self.counter, torch.zeros((), dtype=torch.long))

    def normalize(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output for (k, G·C, H, W), and statistics (G·C,) without gradient, one for each of `averages`.

        Parameters and averages (C,) belong to channel c of every group: `per_group` repeats them.
        """
        raise NotImplementedError

    def evaluate(self, input: Tensor) -> Tensor:
        """Return the output for (N, C, H, W) by moving averages."""
        raise NotImplementedError

    def averages_of(self, *moments: Tensor) -> tuple[Tensor, ...]:
        """Return the value (C,) for each of `averages` from means over many batches of what `moments` returns.

        By default from the mean and the mean square: the mean and the biased variance.
        """
        mean, square = moments
        known = {"running_mean": mean, "running_var": (square - mean.square()).clamp_min(0)}
        return tuple(known[name] for name in self.averages)

    def start_averages(self, mean: Tensor, var: Tensor, batches: int) -> None:
        """Start at the moving averages (C,) of a BatchNorm that was trained, as far as this layer's follow from them.

        Args:
            mean: of x.
            var: of x, unbiased.
            batches: those that the averages are over.
        """
        for name, value in zip(self.averages, self.averages_of(mean, var + mean.square()), strict=True):
            self.get_buffer(name).copy_(value)
        if self.counter is not None:  # so that the averages go on with `momentum`
            self.get_buffer(self.counter).fill_(max(batches, math.ceil(1 / self.momentum)))

    def moments(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return statistics (C,) of the whole input for `averages_of`; by default the mean and the mean square."""
        return _mean(input.double()), _mean(input.double().square())

    def newest(self, count: Tensor) -> float | Tensor:
        """Return the weight of the newest batch in the moving averages of L layers that differ in channels alone.

        Args:
            count: of each layer's batches, the newest included; (L,), as is the weight if it depends on the count.
        """
        return self.momentum if self.counter is None else count.reciprocal().clamp_min(self.momentum)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W) group by group.

        Raises:
            ValueError: if a group has a single value per channel, of which normalization would leave nothing.
        """
        if not (self.training or self.evaluates_on_batch):
            return self.evaluate(input)
        if self.training and self.pending is not None:  # a network calls it several times in a step
            move_averages([self])
        images = len(input)
        size = min(self.norm_batch or images, images)
        groups, rest = divmod(images, size)
        values = (rest or size) * input[0, 0].numel() * (processes() if self.synchronized else 1)
        if values == 1 and not self.takes_single_values:
            raise ValueError(f"Expected more than one value per channel and group, got maps of {tuple(input.shape)}")
        if groups == 1 and rest == 0:
            output, statistics = self.normalize(input, 1)
        else:
            whole, shape = groups * size, input.shape[1:]
            viewed = input[:whole].reshape(size, groups * shape[0], *shape[1:])
            output, statistics = self.normalize(viewed, groups)
            output = output.reshape(whole, *shape)
            statistics = tuple(s.view(groups, -1).mean(0) for s in statistics)
            if rest:
                last, others = self.normalize(input[whole:], 1)
                output = torch.cat([output, last])
                pairs = zip(statistics, others, strict=True)
                statistics = tuple(torch.lerp(s, other, rest / images) for s, other in pairs)
        if self.training:
            statistics = self.to_note(*statistics)
            with torch.no_grad():
                if self.averages_over_processes and processes() > 1:
                    together = mean_over_processes(torch.cat(statistics), images)
                    statistics = torch.split(together, [len(each) for each in statistics])
            self.note(*statistics)
        return output

    def note(self, *statistics: Tensor) -> None:
        """Note a batch's statistics (C,), means over its groups weighted by images, for `move_averages`."""
        self.pending = statistics
        if self.alone:
            move_averages([self])

    def to_note(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Return what is noted of a batch, vectors without gradient, from the means over groups of its statistics."""
        return statistics

    def remember(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        """Return what each of `averages` takes of a batch's statistics, as noted, after the step; without gradient."""
        return statistics

    def batch_mean(self, input: Tensor) -> Tensor:
        """Return the mean (C,) over images, H and W of float32 or float64 (n, C, H, W).

        Over all processes, if the layer is synchronized. Differentiable, also across processes.
        """
        mean = _mean(input)
        if not self.synchronized or processes() == 1:
            return mean
        return mean_over_processes(mean, input.numel() / mean.numel())

    def batch_count(self, input: Tensor) -> Tensor | float:
        """Return the number of values per channel that `batch_mean` takes the mean of."""
        count = input.numel() / input.shape[1]
        if not self.synchronized or processes() == 1:
            return count
        total = torch.tensor(count, device=input.device)
        dist.all_reduce(total)
        return total

    def batch_max(self, input: Tensor) -> Tensor:
        """Return the maximum (C,) over images, H and W, as `batch_mean` does the mean."""
        highest = input.amax((0, 2, 3))
        if not self.synchronized or processes() == 1:
            return highest
        over_processes: Tensor = _AllReduceMax.apply(highest)
        return over_processes


@torch.no_grad()
def move_averages(layers: Iterable[BatchStatistics]) -> None:
    """Take what layers have noted into their moving averages, for layers of a kind in a handful of operations."""
    kinds: dict[object, list[BatchStatistics]] = {}
    for layer in layers:
        if layer.pending is not None:  # else it has not run
            kinds.setdefault((type(layer), layer.momentum, getattr(layer, "clock", None)), []).append(layer)
    for same in kinds.values():
        counters = [layer.get_buffer(layer.counter) for layer in same if layer.counter is not None]
        if counters:
            torch._foreach_add_(counters, 1)
        pairs = [(layer.get_buffer(name), statistic) for layer in same for name, statistic in _to_take(layer)]
        for layer in same:
            layer.pending = None
        if not pairs:
            continue
        averages, statistics = map(list, zip(*pairs, strict=True))
        newest = same[0].newest(torch.stack(counters).to(averages[0].dtype) if counters else averages[0])
        if isinstance(newest, Tensor):  # one kernel for all layers takes weights in the averages' shapes alone
            weights = [weight for weight in newest.unbind() for _ in same[0].averages]
            sizes = [len(average) for average in averages]
            spread = torch.cat([weight.expand(size) for weight, size in zip(weights, sizes, strict=True)])
            torch._foreach_lerp_(averages, statistics, torch.split(spread, sizes))
        else:
            torch._foreach_lerp_(averages, statistics, newest)


def _to_take(layer: BatchStatistics) -> Iterator[tuple[str, Tensor]]:
    taken = layer.remember(*layer.pending) if layer.pending else ()  # nothing where PyTorch's kernel took it already
    return zip(layer.averages, taken, strict=bool(taken))


class _AllReduce(torch.autograd.Function):
    """The sum over processes; its gradients are summed likewise."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class _AllReduceMax(torch.autograd.Function):
    """The maximum over processes; the sum of its gradients goes to the processes that have it, in equal parts."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        highest = local.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        ctx.save_for_backward(local == highest)
        return highest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (has_it,) = ctx.saved_tensors
        total = torch.stack([gradient, has_it.to(gradient.dtype)])
        dist.all_reduce(total)
        share: Tensor = has_it * total[0] / total[1]
        return share


def mean_over_processes(mean: Tensor, weight: float) -> Tensor:
    """Return the mean (C,) of the processes' means, each weighted by its `weight`; differentiable."""
    total: Tensor = _AllReduce.apply(torch.cat([mean, torch.ones_like(mean[:1])]) * weight)
    return total[:-1] / total[-1]


def per_group(per_channel: Tensor, groups: int) -> Tensor:
    """Return (C,) as (G·C,), the same for the channels of every group."""
    return per_channel if groups == 1 else per_channel.repeat(groups)


def broadcast(per_channel: Tensor) -> Tensor:
    """Return (C,) as (1, C, 1, 1)."""
    return per_channel[None, :, None, None]


def full_precision(input: Tensor) -> Tensor:
    """Return the input in float32, or float64 if it is that: the precision that statistics are computed in."""
    return input if input.dtype == torch.float64 else input.float()


@library.custom_op("normlab::keep", mutates_args=())
def _copies(values: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in values]


@_copies.register_fake
def _(values: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in values]


def keep_for_backward(*values: Tensor) -> Sequence[Tensor]:
    """Return values of which the forward pass uses at least one, as they are now also in a compiled backward pass.

    torch.compile recomputes cheap values in the backward pass, or computes them there alone, from buffers that have
    moved on by then; it does so with no operation that it does not know, and that the forward pass needs.
    """
    kept: Sequence[Tensor] = _copies(values) if torch.compiler.is_compiling() else values
    return kept


def _mean(input: Tensor) -> Tensor:
    return input.mean((0, 2, 3))


_independent = 0  # blocks under way; packed runs, which are threads, enter and leave theirs crosswise


def processes() -> int:
    """Return the number of processes that batch statistics and averages can be over."""
    return dist.get_world_size() if not _independent and dist.is_available() and dist.is_initialized() else 1


@contextmanager
def independent_processes() -> Iterator[None]:
    """Let every process of a distributed run be on its own inside, for work that each of them does on equal images."""
    global _independent
    _independent += 1
    try:
        yield
    finally:
        _independent -= 1


def synchronize(network: nn.Module) -> nn.Module:
    """Let every layer with batch statistics take them over all processes of a distributed run; in place."""
    for layer in statistics_layers(network):
        layer.synchronized = True
    return network


def statistics_layers(network: nn.Module) -> list[BatchStatistics]:
    """Return the layers of a network that have batch statistics.

    Raises:
        UserError: if the network has a batch normalization of PyTorch, which cannot do what they can.
    """
    layers = []
    for name, module in network.named_modules():
        if isinstance(module, BatchStatistics):
            layers.append(module)
        elif getattr(module, "track_running_stats", False):
            raise UserError(
                f"{name} is a {type(module).__name__} of PyTorch, without precise, batch or synchronized statistics.\n"
                "Use normlab.norms.GroupedBatchNorm2d in its place, or eval_stats=running sync_stats=false."
            )
    return layers


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Let a network in evaluation mode normalize each batch by its own statistics inside, and keep its averages.

    Raises:
        UserError: see `statistics_layers`.
    """
    layers = statistics_layers(network)
    for layer in layers:
        layer.evaluates_on_batch = True
    try:
        yield
    finally:
        for layer in layers:
            layer.evaluates_on_batch = False


def is_random(module: nn.Module) -> bool:
    """Return whether a layer draws random numbers in training."""
    return isinstance(module, DROPOUTS) or type(module).__name__ in ("StochasticDepth", "Noise")


@contextmanager
def _restored_buffers(network: nn.Module) -> Iterator[None]:
    saved = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def _restored_modes(network: nn.Module) -> Iterator[None]:
    saved = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in saved:
            module.training = mode


@torch.no_grad()
def run_hooks(network: nn.Module, images: Tensor, hooks: Iterable[RemovableHandle]) -> None:
    """Run one forward pass for the sake of its hooks, and remove them.

    In training mode, but without what is random (dropout, stochastic depth, noise). Buffers and modes stay as they are.
    """
    with ExitStack() as stack, _restored_buffers(network), _restored_modes(network):
        for hook in hooks:
            stack.enter_context(hook)
        network.train()
        for module in network.modules():
            if is_random(module):
                module.eval()
        network(images)


@contextmanager
def precise_statistics(
    network: nn.Module, batches: Iterable[Tensor], within: AbstractContextManager[object] | None = None
) -> Iterator[None]:
    """Set the moving averages of a network to the statistics of all of `batches` inside; restore them afterwards.

    Every layer's mean and variance (or other averages) are those of the pooled batches (Wu & Johnson 2021, 2105.07576,
    section 3), while the layers before it normalize as in training; dropout and noise are off.

    Args:
        network: any; layers without batch statistics do not matter.
        batches: images (N, 3, H, W).
        within: a context for the forward passes, e.g. autocast.

    Raises:
        UserError: see `statistics_layers`.
    """
    layers = statistics_layers(network)
    sums: dict[nn.Module, list[Tensor]] = {}
    images: dict[nn.Module, int] = {}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, BatchStatistics)
        count = len(inputs[0])
        moments = [moment.double() * count for moment in layer.moments(inputs[0])]
        sums[layer] = [a + b for a, b in zip(sums[layer], moments, strict=True)] if layer in sums else moments
        images[layer] = images.get(layer, 0) + count

    with _restored_buffers(network):
        with torch.no_grad():
            with ExitStack() as stack, _restored_buffers(network), _restored_modes(network), within or nullcontext():
                for layer in layers:
                    stack.enter_context(layer.register_forward_pre_hook(add))
                network.eval()
                for layer in layers:
                    layer.train()
                for batch in batches if layers else ():
                    network(batch)
            for layer in layers:
                if layer in sums:
                    values = layer.averages_of(*(total / images[layer] for total in sums[layer]))
                    for name, value in zip(layer.averages, values, strict=True):
                        layer.get_buffer(name).copy_(value)
        yield
