"""What a head is trained to lower: errors told, the frozen model's own score kept near, and the start not left far."""

from __future__ import annotations

import torch

# The least number a logarithm is taken of: float32's smallest, below which a score has lost its gradient anyway.
_SMALLEST = 1.2e-38
# The least distance from 1: float32 has no number nearer.
_NEAREST = 6e-8


def objective(
    scores: torch.Tensor,
    errors: torch.Tensor,
    anchors: torch.Tensor,
    distances: torch.Tensor,
    alpha: torch.Tensor | float,
    beta: torch.Tensor | float,
) -> torch.Tensor:
    """The three-term loss of AdUE and ALIEN, for each of T trials.

        mean_i BCE(U_i, e_i) + alpha mean_i (U_i - a_i)^2 + beta |theta - theta0|^2

    Args:
        scores: `(T, N)`, the head's score U of each item.
        errors: `(N,)`, 1 where the frozen model is wrong.
        anchors: `(N,)`, the frozen model's own score.
        distances: `(T,)`, squared distance of all parameters from their start, summed and not averaged.
        alpha: `(T,)`, weight of staying near the anchors.
        beta: `(T,)`, weight of the distance.

    Returns:
        `(T,)`.
    """
    kept = (scores - anchors).square().mean(-1)
    return cross_entropy(scores, errors).mean(-1) + alpha * kept + beta * distances


def cross_entropy(scores: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """`-log U` at errors and `-log(1 - U)` elsewhere; clamped inside the logarithm only, so that gradients stay."""
    wrong = scores.clamp_min(_SMALLEST).log()
    right = (1 - scores).clamp_min(_NEAREST).log()
    return -torch.where(errors.bool(), wrong, right)
