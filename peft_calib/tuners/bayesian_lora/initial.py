"""Where a posterior starts: at LoRA's initialisation, at a trained LoRA, or where the authors start."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..factors import Pair, ShapeGroup, stacked
from ..lora_factors import plain_factors
from .config import BayesianLoraConfig
from .inducing import embed

#: `prior_std="auto"` in units of the root mean square of the core that stands for LoRA's initial A. From 1/2 on the
#: noise of the prior costs accuracy on a few hundred rows, however it is learned.
AUTO_PRIOR_STD = 0.25
#: Norm of the basis vectors in the space of inputs (that of the rows of LoRA's A) and of outputs. Only the direction
#: of a basis vector matters, so its length is how little an optimiser step of given size turns it; B's are random at
#: the start and have to turn first.
LENGTH_A, LENGTH_B = 3**-0.5, 0.1
#: How much farther a step moves B's core than it moves LoRA's B, in norm. At 1 a short training falls behind LoRA's;
#: at 10 it diverges.
CORE_STEP_B = 2.0


class FactorStart(NamedTuple):
    """Initial values of a stack of factors (m, n): bases (count, R, m) and (count, C, n).

    The mean of the core is in units of the prior (count, R, C), whose standard deviation is sigma (count,).
    """

    rows: torch.Tensor
    columns: torch.Tensor
    mean: torch.Tensor
    sigma: torch.Tensor


def core_shape(config: BayesianLoraConfig, r: int) -> tuple[int, int]:
    """The sizes R and C of the cores of a slot of rank `r`."""
    return config.inducing_rows or r, config.inducing_cols or r


def core_step(config: BayesianLoraConfig, side: str, start: FactorStart) -> torch.Tensor:
    """How far a step of size one in a stored entry of a core's mean moves the core, so that LoRA's step sizes work.

    A's core moves as the entries of LoRA's A do. B starts at zero and can only grow through its core, which reaches a
    small part of its directions; it moves twice as far in norm as LoRA's B, `2 sqrt(m n)` a step. In units of the
    prior, (count,).
    """
    if config.core_units == "whitened":
        return torch.ones_like(start.sigma)
    _, R, C = start.mean.shape
    numel = start.rows.shape[-1] * start.columns.shape[-1]
    return (1.0 if side == "A" else CORE_STEP_B * math.sqrt(numel / (R * C))) / start.sigma


def start_factors(
    config: BayesianLoraConfig, group: ShapeGroup, count: int, pairs: list[Pair] | None, generator: torch.Generator
) -> tuple[FactorStart, FactorStart]:
    """Initial values of A and B for the slots of one shape; those of a trained LoRA where `pairs` has one a slot."""
    R, C = core_shape(config, group.r)
    if config.init == "random" or (not config.init_weights and pairs is None):
        return _random(config, group, count, R, C, generator)
    if pairs is None:
        A, B = plain_factors(group, count, True, generator)
    else:
        A, B = stacked(pairs)
    sigma_a, sigma_b = _prior_std(config, group, count, R, C, A if pairs is not None else None)
    small_a = _directions(count, R, group.r, generator)
    large_a = LENGTH_A * _directions(count, C, group.in_features, generator)
    small_b = _directions(count, C, group.r, generator)
    large_b = LENGTH_B * _directions(count, R, group.out_features, generator)
    if min(R, C) < group.r:
        if pairs is not None:
            raise ValueError(
                f"init_from embeds a LoRA of rank {group.r}, which needs inducing_rows and inducing_cols of at least "
                f"{group.r}, got {R} and {C}."
            )
        mean = torch.randn(count, R, C, generator=generator)
        return (
            FactorStart(small_a, large_a, mean, sigma_a),
            FactorStart(large_b, small_b, torch.zeros(count, R, C), sigma_b),
        )
    variance = config.init_d**2
    sigma_a, sigma_b = sigma_a.view(-1, 1, 1), sigma_b.view(-1, 1, 1)
    A_start = embed(A, small_a, large_a, sigma_a, variance, config.jitter, LENGTH_A)
    columns, rows, mean = embed(B.mT, small_b, large_b, sigma_b, variance, config.jitter, LENGTH_B)
    sigma_a, sigma_b = sigma_a.flatten(), sigma_b.flatten()
    return FactorStart(*A_start, sigma_a), FactorStart(rows, columns, mean.mT.contiguous(), sigma_b)


def _random(
    config: BayesianLoraConfig, group: ShapeGroup, count: int, R: int, C: int, generator: torch.Generator
) -> tuple[FactorStart, FactorStart]:
    starts = []
    sigmas = _prior_std(config, group, count, R, C, None)
    shared = torch.randn(count, R, C, generator=generator)
    for (m, n), sigma in zip(((group.r, group.in_features), (group.out_features, group.r)), sigmas, strict=True):
        rows = torch.randn(count, R, m, generator=generator) / math.sqrt(R)
        columns = torch.randn(count, C, n, generator=generator) / math.sqrt(C)
        mean = shared if config.share_inducing else torch.randn(count, R, C, generator=generator)
        starts.append(FactorStart(rows, columns, mean, sigma))
    return starts[0], starts[1]


def _prior_std(
    config: BayesianLoraConfig, group: ShapeGroup, count: int, R: int, C: int, A: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigma of A and B: 0.25 |A| / sqrt(R C) for both (a LoRA's B starts at 0), or what the configuration says."""
    if config.prior_std == "auto":
        # norm of LoRA's initial A, entries of variance 1/(3 d)
        expected = torch.full((count,), math.sqrt(group.r / 3))
        norm = expected if A is None else A.norm(dim=(-2, -1))
        sigma = AUTO_PRIOR_STD * torch.where(norm > 0, norm, expected) / math.sqrt(R * C)
        return sigma, sigma
    fan_in = (group.in_features, group.r) if config.prior_std_scaling == "sqrt_fan_in" else (1, 1)
    return tuple(torch.full((count,), float(config.prior_std) / math.sqrt(n)) for n in fan_in)


def _directions(count: int, size: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, size, dim, generator=generator), dim=-1)
