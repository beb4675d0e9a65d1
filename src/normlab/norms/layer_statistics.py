"""What layers with statistics of the batch share: groups inside the batch, moving averages, synchronisation."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, library, nn

from normlab.common.errors import UserError


class BatchStatistics(nn.Module):
    """A layer over x (N, C, H, W) with statistics per channel over the images of a group, and H and W.

    A subclass says what happens to one group (`normalise`), in evaluation (`evaluate`), to the moving averages
    (`update`), and which moments of its input make up its averages (`moments`, `adopt`).

    With `norm_batch` = k and N = G·k + r, image n < G·k belongs to group n mod G, so that the groups are a view
    (k, G·C, H, W) of x in which every group's channel is a channel; the last r images are a smaller group.
    """

    norm_batch: int | None = None  # images of a group; None: all of the batch
    takes_single_values = False  # whether a group may have a single value per channel
    synchronised = False  # one group over all processes of torch.distributed
    shares_averages = False  # groups of each process's own, and moving averages over all processes' groups
    evaluates_on_batch = False  # in evaluation, use the batch's statistics as in training

    def normalise(self, input: Tensor, groups: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(k, G·C, H, W) -> the output, and statistics (G·C,) without gradient for the moving averages.

        Parameters and averages (C,) belong to channel c of every group: `per_group` repeats them.
        """
        raise NotImplementedError

    def evaluate(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> the output, by moving averages."""
        raise NotImplementedError

    def update(self, *statistics: Tensor) -> None:
        """Take a step's statistics (C,), means over its groups weighted by images, into the moving averages."""
        raise NotImplementedError

    def moments(self, input: Tensor) -> tuple[Tensor, ...]:
        """Statistics (C,) of the whole input whose means over many batches `adopt` can use; by default the mean
        and the mean square.
        """
        return _mean(input.double()), _mean(input.double().square())

    def adopt(self, *means: Tensor) -> None:
        """Set the moving averages to what `moments` says of many batches."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training or self.evaluates_on_batch):
            return self.evaluate(input)
        images = len(input)
        size = min(self.norm_batch or images, images)
        groups, rest = divmod(images, size)
        values = (rest or size) * input[0, 0].numel() * (processes() if self.synchronised else 1)
        if values == 1 and not self.takes_single_values:
            raise ValueError(f"Expected more than one value per channel and group, got maps of {tuple(input.shape)}")
        if groups == 1 and rest == 0:
            output, statistics = self.normalise(input, 1)
        else:
            whole, shape = groups * size, input.shape[1:]
            viewed = input[:whole].reshape(size, groups * shape[0], *shape[1:])
            output, statistics = self.normalise(viewed, groups)
            output = output.reshape(whole, *shape)
            statistics = tuple(s.view(groups, -1).mean(0) for s in statistics)
            if rest:
                last, others = self.normalise(input[whole:], 1)
                output = torch.cat([output, last])
                pairs = zip(statistics, others, strict=True)
                statistics = tuple(torch.lerp(s, other, rest / images) for s, other in pairs)
        if self.training:
            with torch.no_grad():
                self.update(*self._over_processes(statistics, images))
        return output

    def _over_processes(self, statistics: tuple[Tensor, ...], images: int) -> tuple[Tensor, ...]:
        """Their means over all processes, weighted by images, if these share their averages."""
        if not self.shares_averages or processes() == 1:
            return statistics
        total = torch.cat([*statistics, torch.ones_like(statistics[0][:1])]) * images
        dist.all_reduce(total)
        return (total[:-1] / total[-1]).chunk(len(statistics))

    def batch_mean(self, input: Tensor) -> Tensor:
        """Mean over images, H and W of float32 or float64 (n, C, H, W), over all processes if synchronised; (C,).

        Differentiable, also across processes.
        """
        mean = _mean(input)
        if not self.synchronised or processes() == 1:
            return mean
        count = torch.full_like(mean[:1], input.numel() / mean.numel())
        total = _AllReduce.apply(torch.cat([mean * count, count]))
        return total[:-1] / total[-1]

    def batch_count(self, input: Tensor) -> Tensor | float:
        """Values per channel that `batch_mean` takes the mean of."""
        count = input.numel() / input.shape[1]
        if not self.synchronised or processes() == 1:
            return count
        total = torch.tensor(count, device=input.device)
        dist.all_reduce(total)
        return total

    def batch_max(self, input: Tensor) -> Tensor:
        """Maximum over images, H and W, over all processes if synchronised; (C,). Differentiable."""
        highest = input.amax((0, 2, 3))
        if not self.synchronised or processes() == 1:
            return highest
        return _AllReduceMax.apply(highest)


class _AllReduce(torch.autograd.Function):
    """The sum over processes, and of its gradients."""

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
        return has_it * total[0] / total[1]


def per_group(per_channel: Tensor, groups: int) -> Tensor:
    """(C,) -> (G·C,), the same for the channels of every group."""
    return per_channel if groups == 1 else per_channel.repeat(groups)


def broadcast(per_channel: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return per_channel[None, :, None, None]


def full_precision(input: Tensor) -> Tensor:
    """Statistics are computed in float32 at least."""
    return input if input.dtype == torch.float64 else input.float()


@library.custom_op("normlab::held", mutates_args=())
def _copy(x: Tensor) -> Tensor:
    return x.clone()


@_copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def held(x: Tensor) -> Tensor:
    """x, also to the backward pass of a compiled forward pass that goes on to change what x was computed from.

    torch.compile recomputes cheap values in the backward pass, from buffers that `update` has changed by then; it does
    not recompute operations that it does not know.
    """
    return _copy(x) if torch.compiler.is_compiling() else x


def _mean(input: Tensor) -> Tensor:
    return input.mean((0, 2, 3))


_apart = False


def processes() -> int:
    return dist.get_world_size() if not _apart and dist.is_available() and dist.is_initialized() else 1


@contextmanager
def apart() -> Iterator[None]:
    """Inside, every process of a distributed run is on its own, for what each of them does with the same images."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def synchronise(network: nn.Module) -> nn.Module:
    """Let every layer with batch statistics take them over all processes of a distributed run; in place."""
    for layer in statistics_layers(network):
        layer.synchronised = True
    return network


def statistics_layers(network: nn.Module) -> list[BatchStatistics]:
    """
    Raises:
        UserError: if the network has a batch normalisation that does not know what the others know.
    """
    layers = []
    for name, module in network.named_modules():
        if isinstance(module, BatchStatistics):
            layers.append(module)
        elif isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise UserError(
                f"{name} is a {type(module).__name__} of PyTorch, without precise, batch or synchronised statistics.\n"
                "Use normlab.norms.GroupedBatchNorm2d in its place, or eval_stats=running sync_stats=false."
            )
    return layers


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, a network in evaluation mode normalises each batch by its own statistics and keeps its averages.

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
    """Whether a layer draws random numbers in training."""
    return isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in ("StochasticDepth", "Noise")


@torch.no_grad()
def look_at(network: nn.Module, images: Tensor) -> None:
    """One forward pass for what hooks see of it: in training mode, but without what is random (dropout, stochastic
    depth, noise), and with buffers and modes left as they were.
    """
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    modes = {module: module.training for module in network.modules()}
    network.train()
    for module in network.modules():
        if is_random(module):
            module.eval()
    try:
        network(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])


@contextmanager
def precise_statistics(
    network: nn.Module, batches: Iterable[Tensor], within: AbstractContextManager[object] | None = None
) -> Iterator[None]:
    """Inside, the moving averages of a network are what its layers see over all of `batches`, in place of what
    training left; afterwards they are again what they were.

    Every layer's mean and variance (or what it has) are those of the pooled batches (Wu & Johnson 2021,
    2105.07576, section 3), while the layers before it normalise as in training; dropout and noise are off.
    `within` is a context for the forward passes, e.g. autocast.

    Raises:
        UserError: see `statistics_layers`.
    """
    layers = statistics_layers(network)
    sums: dict[nn.Module, list[Tensor]] = {}
    images: dict[nn.Module, int] = {}
    training = network.training
    before = {layer: {name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers}

    def restore() -> None:
        for layer, saved in before.items():
            for name, buffer in layer.named_buffers():
                buffer.copy_(saved[name])

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, BatchStatistics)
        count = len(inputs[0])
        moments = [moment.double() * count for moment in layer.moments(inputs[0])]
        sums[layer] = [a + b for a, b in zip(sums[layer], moments, strict=True)] if layer in sums else moments
        images[layer] = images.get(layer, 0) + count

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    with torch.no_grad():
        try:
            network.eval()
            for layer in layers:
                layer.train()
            with within or nullcontext():
                for batch in batches if layers else ():
                    network(batch)
        finally:
            for hook in hooks:
                hook.remove()
            restore()
            network.train(training)
        for layer in layers:
            if layer in sums:
                layer.adopt(*(total / images[layer] for total in sums[layer]))
    try:
        yield
    finally:
        with torch.no_grad():
            restore()
