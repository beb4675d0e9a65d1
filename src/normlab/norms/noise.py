"""The noise of Santurkar et al. 2018, which makes the inputs of every layer unstable on purpose."""

import torch
from torch import Tensor, nn

from normlab.common.registry import option, register
from normlab.norms.batch import BatchNorm
from normlab.norms.layer_statistics import full_precision
from normlab.norms.plain import NoNorm
from normlab.norms.sites import Variant


class Noise(nn.Module):
    """y = s · a + m for a (N, C, ...) in training, fresh at every call; y = a in evaluation [A].

    Per unit (channel; H and W count as batch), then per value of that unit:

        mu ~ U(-mu_range, mu_range),          sigma ~ U(sigma_low, sigma_high)
        m ~ U(mu - spread, mu + spread),      s ~ Normal(mean sigma, standard deviation spread [A: not variance])

    Draws come from the device's global generator, which a training loop can seed per step; no gradient passes them.
    Invariant: dy/da = s.
    """

    takes_any_shape = True

    def __init__(self, mu_range: float, sigma_low: float, sigma_high: float, spread: float) -> None:
        super().__init__()
        self.mu_range, self.sigma_low, self.sigma_high, self.spread = mu_range, sigma_low, sigma_high, spread

    def forward(self, input: Tensor) -> Tensor:
        """Add noise in training."""
        if not self.training:
            return input
        a = full_precision(input)
        mu = a.new_empty(1, a.shape[1], *[1] * (a.dim() - 2)).uniform_(-self.mu_range, self.mu_range)
        sigma = torch.empty_like(mu).uniform_(self.sigma_low, self.sigma_high)
        m = torch.empty_like(a).uniform_(-self.spread, self.spread).add_(mu)
        s = torch.empty_like(a).normal_(0.0, self.spread).add_(sigma)
        return m.addcmul_(s, a).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the options for `repr`."""
        return f"mu_range={self.mu_range}, sigma=[{self.sigma_low}, {self.sigma_high}], spread={self.spread}"


class _NoisyVariant(Variant):
    """A variant whose layer is followed by `Noise`."""

    mu_range: float = option(0.5, ge=0)
    sigma_low: float = option(1.0, ge=0)
    sigma_high: float = option(1.25, ge="sigma_low")
    spread: float = option(0.1, ge=0)

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        noise = Noise(self.mu_range, self.sigma_low, self.sigma_high, self.spread)
        layer = super().norm(norm)
        return noise if isinstance(layer, nn.Identity) else nn.Sequential(layer, noise)


@register(
    "noisy_bn", aliases=("noisybatchnorm",), family="BN and its parts", order=5,
    formula="training: s · BN(x) + m; per step and channel mean ~ U(-0.5, 0.5), deviation ~ U(1, 1.25); per value m ~ "
    "U(mean ± 0.1), s ~ N(deviation, 0.1)",
    source="Santurkar et al. 2018", over="N, H, W", parameters="gamma, beta",
    use="to test whether unstable distributions of activations harm training",
    cost="a uniform and a normal number drawn for every value",
)  # fmt: skip
class NoisyBatchNorm(_NoisyVariant, BatchNorm):
    """Batch normalization, then `Noise` (Santurkar et al. 2018, "Noisy BN").

    Evaluation is that of `BatchNorm`. Its moving averages have seen noisy inputs, whose scale is larger by the mean of
    sigma; eval_stats=precise measures them without noise.
    Invariant: with mu_range = spread = 0 and sigma_low = sigma_high = 1 it is `BatchNorm`.
    """


@register(
    "noisy_none", family="BN and its parts", order=6,
    formula="training: s · x + m, the same noise", source="Santurkar et al. 2018", over="nothing", parameters="none",
    use="the control of `noisy_bn`", cost="the same draws",
)  # fmt: skip
class NoisyNoNorm(_NoisyVariant, NoNorm):
    """The same `Noise` in a network without normalization.

    Santurkar et al. 2018 find that it keeps their VGG from training.
    Invariant: with mu_range = spread = 0 and sigma_low = sigma_high = 1 it is `NoNorm`.
    """
