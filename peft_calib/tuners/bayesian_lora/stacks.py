"""The parameters of a posterior, stacked over factors: bases, cores, and scales that cannot freeze."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..factors import NoFactorsError
from ..replication import jitter_variance
from ..transfer import to_device
from .config import BayesianLoraConfig
from .flow import MaskedAffineFlow
from .inducing import DIVERGENCES, DRAWS, CholeskyError, Whitened, kl_sampled, mean_of_product, whiten

#: Pairs of antithetic draws behind the mean of a core with a flow.
MEAN_PAIRS = 512


class BoundedScale(nn.Module):
    """Positive scales `upper * sigmoid(logit(start / upper) + gain * offset)` with trained offsets, zero at the start.

    An offset survives a cast to bfloat16, where a stored `logit(start)` would be too coarse to move; the sigmoid has
    no dead gradient at its bound; and the gain is the scales' own learning rate under any Adam-like optimiser.
    """

    def __init__(self, shape: tuple[int, ...], start: float, upper: float, gain: float) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(shape))
        self.logit, self.upper, self.gain = math.log(start) - math.log(upper - start), upper, gain

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        return self.upper * torch.sigmoid(self.logit + _amplified(self.offset.to(dtype), self.gain))

    @torch.no_grad()
    def ratio(self) -> torch.Tensor:
        """The scales over their start value, float32."""
        return self(torch.float32) / float(self.upper * torch.sigmoid(torch.tensor(self.logit)))


class BasisStack(nn.Module):
    """Bases Z of equal shape (count, size, dim), with the diagonals of their kernels; names are for messages."""

    def __init__(self, Z: torch.Tensor, config: BayesianLoraConfig, names: list[str]) -> None:
        super().__init__()
        self.Z = nn.Parameter(Z)
        self.names = names
        self.init_d, self.jitter = config.init_d, config.jitter
        if config.learn_d:
            self.log_d = nn.Parameter(torch.zeros(Z.shape[:2]))
        if config.learn_jitter:
            self.jitter_offset = nn.Parameter(torch.zeros(Z.shape[:2]))

    def forward(self, dtype: torch.dtype) -> Whitened:
        """The whitened bases, computed in `dtype`; an error names the slot of a kernel without a factor."""
        Z = self.Z.to(dtype)
        if hasattr(self, "log_d"):
            variance = (self.init_d * self.log_d.to(dtype).exp()).square()
        else:
            variance = Z.new_full((1, 1), self.init_d**2)
        if hasattr(self, "jitter_offset"):
            variance = variance + jitter_variance(self.jitter_offset.to(dtype), Z.shape[-1])
        try:
            return whiten(Z, variance, self.jitter)
        except CholeskyError as error:
            raise NoFactorsError(
                f"The kernel of {self.names[error.index]} could not be factorised, even with a relative jitter of "
                f"{error.jitter:g}: its basis is not finite or too badly scaled. Lower the learning rate, raise "
                "init_d or jitter, and check the training data for values that are not finite."
            ) from error


class CoreStack(nn.Module):
    """q(V) for cores of equal shape: mean (count, R, C) in units of the prior, spread, and optionally a flow.

    A step of size one in a stored entry moves the core's by `step` (count,); `generator` fills the flow.
    """

    def __init__(
        self, mean: torch.Tensor, step: torch.Tensor, config: BayesianLoraConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        count, R, C = mean.shape
        self.unit: torch.Tensor
        self.prior_mean: torch.Tensor | None
        self.register_buffer("unit", step.view(-1, 1, 1))
        self.mean = nn.Parameter(mean / self.unit)
        # a copy in stored units: equal to the mean to the last bit, whatever the precision
        start = self.mean.detach().clone() if config.prior_mean == "initial" else torch.zeros_like(mean)
        self.register_buffer("prior_mean", None if config.prior_mean == "learned" else start)
        # the mean behind a flow is a part of the function, so it hangs on no seed that was taken at the start
        self.family, self.seed = config.posterior, config.given_seed or 0
        self.gain = gain = config.variance_lr_multiplier
        start, upper = config.init_sd, config.max_sd
        if self.family == "diagonal":
            self.sd = BoundedScale((count, R, C), start, upper, gain)
        elif self.family == "matrix_normal":
            self.row_sd = BoundedScale((count, R), math.sqrt(start), math.sqrt(upper), gain)
            self.col_sd = BoundedScale((count, C), math.sqrt(start), math.sqrt(upper), gain)
            self.row_mix = nn.Parameter(torch.zeros(count, R * (R - 1) // 2))
            self.col_mix = nn.Parameter(torch.zeros(count, C * (C - 1) // 2))
        else:
            self.sd = BoundedScale((count, R * C), start, upper, gain)
            self.mix = nn.Parameter(torch.zeros(count, R * C * (R * C - 1) // 2))
        if config.flow == "maf":
            self.flow = MaskedAffineFlow(count, C, config.flow_hidden, config.flow_depth, generator)
            # Drawn here and not where it is used: torch 2.11 cannot trace a generator into an exported graph. No
            # buffer either, as `to_empty` would leave it without values.
            seeded = torch.Generator().manual_seed(self.seed)
            self._half_noise = torch.randn(MEAN_PAIRS, count, R, C, generator=seeded, device="cpu")

    @property
    def shape(self) -> torch.Size:
        """(count, R, C)."""
        return self.mean.shape

    def draw(self, noise: torch.Tensor) -> torch.Tensor:
        """Cores for given standard normal noise, (K, count, R, C) each."""
        return self._transform(noise)[0]

    def draw_with_kl(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One draw and the KL of q from the prior in nats: in closed form, with a flow estimated from this draw."""
        V, log_det = self._transform(noise)
        dtype = noise.dtype
        if hasattr(self, "flow"):
            return V, kl_sampled(noise, log_det, V - self._prior_mean(dtype))
        mean, spread = self._mean(dtype) - self._prior_mean(dtype), self._spread(dtype)
        return V, DIVERGENCES[self.family](mean, *spread)

    def expectation(self, dtype: torch.dtype) -> torch.Tensor:
        """E[V], (1, count, R, C): the mean, or with a flow the average of fixed antithetic draws."""
        if not hasattr(self, "flow"):
            return self._mean(dtype).unsqueeze(0)
        return self.draw(self._fixed_noise(dtype)).mean(0, keepdim=True)

    def expected_product(self, middle: torch.Tensor) -> torch.Tensor:
        """E[V X V] for given X of shape (count, C, R), with a leading dimension of size one."""
        if hasattr(self, "flow"):
            V = self.draw(self._fixed_noise(middle.dtype))
            return (V @ middle @ V).mean(0, keepdim=True)
        return mean_of_product(self._mean(middle.dtype), self._root(middle.dtype), middle).unsqueeze(0)

    def marginal_sd(self, dtype: torch.dtype) -> torch.Tensor:
        """Standard deviation of each entry, (count, R, C); before any flow."""
        spread = self._spread(dtype)
        if self.family == "diagonal":
            return spread[0]
        rows = [factor.norm(dim=-1) for factor in spread]
        return rows[0].view(self.shape) if self.family == "full" else rows[0].unsqueeze(-1) * rows[1].unsqueeze(-2)

    def spread_parameters(self) -> list[nn.Parameter]:
        scales = [p for m in self.children() if isinstance(m, BoundedScale) for p in m.parameters()]
        return [*scales, *(getattr(self, name) for name in ("row_mix", "col_mix", "mix") if hasattr(self, name))]

    def _mean(self, dtype: torch.dtype) -> torch.Tensor:
        return self.mean.to(dtype) * self.unit.to(dtype)

    def _prior_mean(self, dtype: torch.dtype) -> torch.Tensor:
        """The prior's mean; a learned one is wherever the posterior's is, which is where the evidence is largest."""
        return self._mean(dtype) if self.prior_mean is None else self.prior_mean.to(dtype) * self.unit.to(dtype)

    def _spread(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        if self.family == "diagonal":
            return (self.sd(dtype),)
        if self.family == "full":
            return (_triangular(self.sd(dtype), _amplified(self.mix.to(dtype), self.gain)),)
        rows = _triangular(self.row_sd(dtype), _amplified(self.row_mix.to(dtype), self.gain))
        return rows, _triangular(self.col_sd(dtype), _amplified(self.col_mix.to(dtype), self.gain))

    def _root(self, dtype: torch.dtype) -> torch.Tensor:
        spread = self._spread(dtype)
        if self.family == "diagonal":
            return torch.diag_embed(spread[0].flatten(-2))
        if self.family == "full":
            return spread[0]
        rows, columns = spread
        return torch.einsum("nik,njl->nijkl", rows, columns).flatten(3).flatten(1, 2)

    def _transform(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """V, and with a flow log |det dV/dnoise|."""
        spread = self._spread(noise.dtype)
        V = DRAWS[self.family](self._mean(noise.dtype), *spread, noise)
        if not hasattr(self, "flow"):
            return V, None
        rows, change = self.flow(V.transpose(0, 1).flatten(1, 2))
        return rows.unflatten(1, (noise.shape[0], -1)).transpose(0, 1), self._log_det(spread) + change.sum()

    def _log_det(self, spread: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if self.family == "diagonal":
            return spread[0].log().sum()
        _, R, C = self.shape
        weights = (1,) if self.family == "full" else (C, R)
        return sum(w * t.diagonal(dim1=-2, dim2=-1).log().sum() for w, t in zip(weights, spread, strict=True))

    def _fixed_noise(self, dtype: torch.dtype) -> torch.Tensor:
        half = to_device(self._half_noise, self.mean.device, dtype)
        return torch.cat([half, -half])


def _amplified(offset: torch.Tensor, gain: float) -> torch.Tensor:
    """`gain * offset` with the gradient divided by gain.

    An Adam-like optimiser, blind to the scale of a gradient, moves the result gain times as far. The gradient itself
    stays small, so that it does not make clipping by the global norm shrink everybody else's.
    """
    return offset / gain + (gain - 1 / gain) * offset.detach()


def _triangular(diagonal: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Lower triangular `diag(s) (I + N)` from the packed strict lower triangle of N."""
    size = diagonal.shape[-1]
    row, column = torch.tril_indices(size, size, -1, device=mix.device)
    lower = mix.new_zeros(*mix.shape[:-1], size, size)
    lower[..., row, column] = mix
    return diagonal.unsqueeze(-1) * (lower + torch.eye(size, dtype=mix.dtype, device=mix.device))
