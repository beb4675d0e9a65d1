"""The noise of Santurkar et al. 2018, which makes the inputs of every layer unstable on purpose."""

from typing import Any

import torch
from torch import Tensor, nn

from normlab.norms.batch import BatchNorm
from normlab.norms.layer_statistics import full_precision
from normlab.norms.options import check_range
from normlab.norms.plain import NoNorm


class Noise(nn.Module):
    """y = s · a + m for a (N, C, H, W) in training, fresh at every call; y = a in evaluation [A].

    Per unit (channel; H and W count as batch), then per value of that unit:

        mu ~ U(-mu_range, mu_range),          sigma ~ U(sigma_low, sigma_high)
        m ~ U(mu - spread, mu + spread),      s ~ Normal(mean sigma, standard deviation spread [A: not variance])

    Draws come from the device's global generator, which a training loop can seed per step; no gradient passes them.
    Invariant: dy/da = s.
    """

    def __init__(self, *, mu_range: float, sigma_low: float, sigma_high: float, spread: float) -> None:
        super().__init__()
        check_range("mu_range", mu_range)
        check_range("sigma_low", sigma_low)
        check_range("sigma_high", sigma_high, sigma_low)
        check_range("spread", spread)
        self.mu_range, self.sigma_low, self.sigma_high, self.spread = mu_range, sigma_low, sigma_high, spread

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        a = full_precision(input)
        mu = a.new_empty(1, a.shape[1], 1, 1).uniform_(-self.mu_range, self.mu_range)
        sigma = torch.empty_like(mu).uniform_(self.sigma_low, self.sigma_high)
        m = torch.empty_like(a).uniform_(-self.spread, self.spread).add_(mu)
        s = torch.empty_like(a).normal_(0.0, self.spread).add_(sigma)
        return m.addcmul_(s, a).to(input.dtype)

    def extra_repr(self) -> str:
        return f"mu_range={self.mu_range}, sigma=[{self.sigma_low}, {self.sigma_high}], spread={self.spread}"


class NoisyBatchNorm(BatchNorm):
    """Batch normalisation, then `Noise` (Santurkar et al. 2018, "Noisy BN").

    Evaluation is that of `BatchNorm`. Its moving averages have seen noisy inputs, whose scale is larger by the mean of
    sigma; eval_stats=precise measures them without noise.
    Invariant: with mu_range = spread = 0 and sigma_low = sigma_high = 1 it is `BatchNorm`.
    """

    def __init__(
        self, *, mu_range: float, sigma_low: float, sigma_high: float, spread: float, **batch_norm: Any
    ) -> None:
        super().__init__(**batch_norm)
        self.noise = {"mu_range": mu_range, "sigma_low": sigma_low, "sigma_high": sigma_high, "spread": spread}
        Noise(**self.noise)  # says what is wrong with them

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        return nn.Sequential(super().norm(norm), Noise(**self.noise))


class NoisyNoNorm(NoNorm):
    """The same `Noise` in a network without normalisation. Santurkar et al. 2018 find that it keeps their VGG from
    training.

    Invariant: with mu_range = spread = 0 and sigma_low = sigma_high = 1 it is `NoNorm`.
    """

    def __init__(self, *, mu_range: float, sigma_low: float, sigma_high: float, spread: float, **no_norm: Any) -> None:
        super().__init__(**no_norm)
        self.noise = {"mu_range": mu_range, "sigma_low": sigma_low, "sigma_high": sigma_high, "spread": spread}
        Noise(**self.noise)  # says what is wrong with them

    def norm(self, norm: nn.BatchNorm2d) -> nn.Module:
        return Noise(**self.noise)
