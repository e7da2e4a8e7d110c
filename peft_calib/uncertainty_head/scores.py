"""How unsure a distribution over classes is: scores that can be trained to say how likely an error is.

In a form that keeps its gradient where a prediction is confident: there the literal one, `1 - max p`, is exactly 0 in
float32. Every function works on the last axis, the classes, with any axes before it.
"""

from __future__ import annotations

import math

import torch

#: `entropy` of the classes (ALIEN); one minus the smooth maximum, brought to [0, 1] or as it is (AdUE).
SCORES = ("entropy", "sr_norm", "sr_raw")
#: How K functions become one score: that of their mean probabilities, or the mean of their scores.
AGGREGATES = ("bma", "mean_u")
# Log-probability of an answer that an item does not have: its probability is exactly 0, and no gradient is NaN.
_NEVER = -1e4


def uncertainty(
    logits: torch.Tensor,
    score: str = "entropy",
    *,
    sharpness: float = 100.0,
    options: torch.Tensor | None = None,
    aggregate: str = "bma",
) -> torch.Tensor:
    """The trainable score U of the logits of K functions.

    With `p` the mean of the K softmaxes, `m` its largest class and `q = sum_{c != m} p_c`:

        sr_raw  = q - log1p(sum_{c != m} exp(-s (p_m - p_c))) / s    (one minus the smooth maximum of sharpness s)
        sr_norm = sr_raw / (1 - 1/C)
        entropy = -((1 - q) log1p(-q) + sum_{c != m} p_c log p_c) / log C

    Args:
        logits: `(..., K, N, C)`.
        score: One of `SCORES`.
        sharpness: Of the smooth maximum, which is at most `log(C) / sharpness` above the maximum.
        options: `(N, C)` bool, the answers an item can have; C is then their number, item by item.
        aggregate: `"bma"`, the score of the mean probabilities, or `"mean_u"`, the mean of the K scores.

    Returns:
        `(..., N)`, larger where a prediction is less sure.

    Example:
        >>> uncertainty(torch.tensor([[[25.0, 0.0], [0.0, 0.0]]]), "sr_raw")  # e^-25, and 1 - 1/2 - log(2) / 100
        tensor([1.3888e-11, 4.9307e-01])
    """
    return _scored(logits, score, sharpness, options, aggregate)


def base_score(
    logits: torch.Tensor, score: str = "entropy", *, options: torch.Tensor | None = None, aggregate: str = "bma"
) -> torch.Tensor:
    """What a score is without a head: entropy over its largest value, or `1 - max p` (over `1 - 1/C` for `sr_norm`).

    The base score of a frozen model is what a head must beat, and the anchor that its training keeps close to.

    Args:
        logits: `(..., K, N, C)` of the frozen model.
        score: One of `SCORES`.
        options: `(N, C)` bool, the answers an item can have.
        aggregate: `"bma"` or `"mean_u"`.

    Returns:
        `(..., N)`.
    """
    return _scored(logits, score, None, options, aggregate)


def check_choice(name: str, value: str, among: tuple[str, ...]) -> str:
    """One of a few names; another is refused in words."""
    if value not in among:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, among))}, got {value!r}.")
    return value


def _scored(
    logits: torch.Tensor, score: str, sharpness: float | None, options: torch.Tensor | None, aggregate: str
) -> torch.Tensor:
    check_choice("score", score, SCORES)
    check_choice("aggregate", aggregate, AGGREGATES)
    log_p = _log_probabilities(logits, options)
    averages = aggregate == "bma" and log_p.shape[-3] > 1
    if averages:
        log_p = log_p.logsumexp(-3, keepdim=True) - math.log(log_p.shape[-3])
    found = _entropy(log_p, options) if score == "entropy" else _distance_from_sure(log_p, options, sharpness)
    return (found / _largest(score, log_p, options)).mean(-2)


def _log_probabilities(logits: torch.Tensor, options: torch.Tensor | None) -> torch.Tensor:
    if options is None:
        return logits.log_softmax(-1)
    return logits.masked_fill(~options, -torch.inf).log_softmax(-1).masked_fill(~options, _NEVER)


def _others(log_p: torch.Tensor, options: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which classes are not the largest one, and their probabilities, 0 at the largest."""
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, log_p.argmax(-1, keepdim=True), False)
    others = others if options is None else others & options
    return others, torch.where(others, log_p.exp(), 0.0)


def _entropy(log_p: torch.Tensor, options: torch.Tensor | None) -> torch.Tensor:
    others, p = _others(log_p, options)
    rest = p.sum(-1)
    return -((1 - rest) * torch.log1p(-rest) + (p * torch.where(others, log_p, 0.0)).sum(-1))


def _distance_from_sure(log_p: torch.Tensor, options: torch.Tensor | None, sharpness: float | None) -> torch.Tensor:
    """One minus the maximum, or minus the smooth maximum of a sharpness."""
    others, p = _others(log_p, options)
    rest = p.sum(-1)
    if sharpness is None:
        return rest
    behind = torch.where(others, torch.exp(-sharpness * ((1 - rest)[..., None] - p)), 0.0)
    return rest - torch.log1p(behind.sum(-1)) / sharpness


def _largest(score: str, log_p: torch.Tensor, options: torch.Tensor | None) -> torch.Tensor | float:
    """The largest value a score is divided by; an item with a single option is always sure."""
    if score == "sr_raw":
        return 1.0
    if options is None:
        return math.log(log_p.shape[-1]) if score == "entropy" else 1 - 1 / log_p.shape[-1]
    count = options.sum(-1).clamp_min(2).to(log_p.dtype)
    return count.log() if score == "entropy" else 1 - 1 / count
