# SPDX-License-Identifier: Apache-2.0
"""How sure a score is: bootstrap intervals, and the noise floor of a perfectly calibrated model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from peft_calib.calibration.inputs import Rows
from peft_calib.calibration.ranking_sums import RankingSums
from peft_calib.calibration.replicate_scores import replicate_scores
from peft_calib.calibration.replicates import Design, Sums

METHODS = ("percentile", "bca")
JACKKNIFE_GROUPS = 100


class Band(NamedTuple):
    """Mean and central band of a score under perfect calibration."""

    mean: float
    low: float
    high: float


NoiseFloor = Mapping[str, Band]


def num_resamples_for(num_rows: int, num_classes: int = 2) -> int:
    """Resamples that keep the cost in bounds: 1,000, falling to 200 for large `N C`."""
    return int(np.clip(4e8 // (num_rows * num_classes), 200, 1000))


def bootstrap_intervals(
    rows: Rows,
    *,
    num_bins: int = 15,
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    method: str = "percentile",
) -> dict[str, tuple[float, float]]:
    """Bootstrap interval of every score, all from the same resampled rows.

    `"percentile"` takes quantiles of the resampled scores. `"bca"` (Efron, 1987) shifts the quantiles for bias and
    skewness, with the acceleration from a jackknife that leaves out one of 100 random groups of rows at a time.

    Args:
        rows: checked rows.
        num_bins: bins of every binned score; their edges stay those of the full data.
        confidence_level: share of the distribution inside the interval.
        num_resamples: resamples of N rows with replacement.
        seed: of the private generator.
        method: `"percentile"` or `"bca"`.

    Returns:
        Key to `(low, high)`. Resamples where a score is not defined are left out; `(nan, nan)` if it never is.

    Raises:
        ValueError: for an unknown method or fewer than 20 resamples.
    """
    if method not in METHODS:
        raise ValueError(f"`interval_method` must be one of {METHODS}, got {method!r}.")
    draws = bootstrap_draws(rows, num_bins=num_bins, num_resamples=num_resamples, seed=seed)
    tail = 0.5 * (1.0 - confidence_level)
    levels = dict.fromkeys(draws, (tail, 1.0 - tail))
    if method == "bca":
        levels = _bca_levels(rows, num_bins, draws, tail, seed)
    return {key: _quantiles(values, levels[key]) for key, values in draws.items()}


def bootstrap_draws(
    rows: Rows, *, num_bins: int = 15, num_resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """The resampled scores themselves: key to `(R,)` float64, column r from the same resample for every key."""
    check_num_resamples(num_resamples)
    design = Design(rows, num_bins)
    total = np.full(num_resamples, design.num_rows)
    return _weighted_scores(design, total, _bootstrap_weights(design, num_resamples, seed))


def noise_floor(
    rows: Rows,
    *,
    num_bins: int = 15,
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Band]:
    """What each score would be if the model were perfectly calibrated with just these predictions.

    Labels are redrawn from the predicted distributions, `y_i ~ p_i`, and the scores taken again. A calibration error
    inside the band cannot be told from zero on this many rows.

    Args:
        rows: checked rows; their labels are not used.
        num_bins: bins of every binned score.
        confidence_level: share of the redrawn scores inside the band.
        num_resamples: redrawn label sets.
        seed: of the private generator.

    Returns:
        Key to mean and band.
    """
    check_num_resamples(num_resamples)
    draws = perfect_draws(rows, num_bins=num_bins, num_resamples=num_resamples, seed=seed)
    tail = 0.5 * (1.0 - confidence_level)
    return {key: Band(_mean(values), *_quantiles(values, (tail, 1.0 - tail))) for key, values in draws.items()}


def perfect_draws(
    rows: Rows, *, num_bins: int = 15, num_resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Scores under redrawn labels `y_i ~ p_i`: key to `(R,)` float64."""
    generator = np.random.default_rng([seed, 1])
    design = Design(rows, num_bins)
    fixed, varying = Sums(design, 1), Sums(design, num_resamples)
    ranking = RankingSums(np.full(num_resamples, design.num_rows))
    for block in design.blocks():
        confidence = design.confidence[block, None].astype(np.float32)
        labels = _drawn_labels(generator, design.probabilities[block], num_resamples)
        ones = np.ones((len(labels), 1), np.float32)
        fixed.add_weights(block, ones)
        for k in range(design.num_classes):
            varying.add_class_hits(block, k, (labels == k).astype(np.float32))
        correct = (labels == design.predicted[block, None]).astype(np.float32)
        varying.add_correct(block, ones, correct)
        counts = np.broadcast_to(ones, correct.shape).copy()
        ranking.add(counts, counts - correct, confidence - correct, design.last_of_group[block])
    for name in ("mass", "top", "top_confidence", "column", "column_value", "row"):
        setattr(varying, name, getattr(fixed, name))
    return replicate_scores(varying, ranking)


def check_num_resamples(num_resamples: int) -> None:
    """Raises ValueError for fewer than 20 resamples, too few for any quantile."""
    if isinstance(num_resamples, bool) or not isinstance(num_resamples, (int, np.integer)) or num_resamples < 20:
        raise ValueError(f"`num_resamples` must be an integer of at least 20 (1000 is usual), got {num_resamples!r}.")


def bootstrap_counts(generator: np.random.Generator, sizes: list[int], num_resamples: int) -> Iterator[np.ndarray]:
    """How often each row is drawn in each resample of all rows, block by block, jointly multinomial.

    Args:
        generator: a private generator.
        sizes: rows of each block.
        num_resamples: `R`.

    Yields:
        `(n, R)` float32 counts of each block.
    """
    total = sum(sizes)
    shares = generator.multinomial(total, np.asarray(sizes) / total, size=num_resamples)
    replicate = np.arange(num_resamples) * 1
    for block, size in enumerate(sizes):
        drawn = generator.integers(0, size, size=int(shares[:, block].sum()), dtype=np.uint16)
        cells = np.repeat(replicate * size, shares[:, block])
        cells += drawn
        counts = np.bincount(cells, minlength=num_resamples * size).reshape(num_resamples, size)
        yield np.ascontiguousarray(counts.T, dtype=np.float32)


def _bootstrap_weights(design: Design, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    sizes = [block.stop - block.start for block in design.blocks()]
    return bootstrap_counts(np.random.default_rng([seed, 0]), sizes, num_resamples)


def _weighted_scores(design: Design, total: np.ndarray, weights: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    sums, ranking = Sums(design, len(total)), RankingSums(total)
    right = design.predicted == design.labels
    for block, w in zip(design.blocks(), weights, strict=True):
        sums.add_weights(block, w)
        for k in range(design.num_classes):
            select = np.flatnonzero(design.labels[block] == k)
            if len(select):
                sums.add_class_hits(block, k, w[select], select)
        correct = w * right[block, None].astype(np.float32)
        sums.add_correct(block, w, correct)
        residuals = w * design.confidence[block, None].astype(np.float32) - correct
        ranking.add(w, w - correct, residuals, design.last_of_group[block])
    return replicate_scores(sums, ranking)


def _jackknife_scores(rows: Rows, num_bins: int, seed: int) -> dict[str, np.ndarray]:
    design = Design(rows, num_bins)
    groups = min(JACKKNIFE_GROUPS, design.num_rows)
    member = np.random.default_rng([seed, 2]).permutation(design.num_rows) % groups
    total = design.num_rows - np.bincount(member, minlength=groups)
    weights = ((member[block, None] != np.arange(groups)).astype(np.float32) for block in design.blocks())
    return _weighted_scores(design, total, weights)


def _bca_levels(
    rows: Rows, num_bins: int, draws: dict[str, np.ndarray], tail: float, seed: int
) -> dict[str, tuple[float, float]]:
    design = Design(rows, num_bins)
    point = _weighted_scores(
        design, np.array([design.num_rows]), (np.ones((b.stop - b.start, 1), np.float32) for b in design.blocks())
    )
    left_out = _jackknife_scores(rows, num_bins, seed)
    return {key: bca_level(draws[key], float(point[key][0]), left_out[key], tail) for key in draws}


def bca_level(draws: np.ndarray, point: float, left_out: np.ndarray, tail: float) -> tuple[float, float]:
    """The two quantile levels of a BCa interval (Efron, 1987).

    Args:
        draws: `(R,)` resampled scores.
        point: the score itself.
        left_out: `(G,)` scores with one group of rows left out.
        tail: probability outside on each side.

    Returns:
        Levels in (0, 1), equal to `(tail, 1 - tail)` when there is neither bias nor skewness.
    """
    draws, left_out = draws[np.isfinite(draws)], left_out[np.isfinite(left_out)]
    if len(draws) == 0 or len(left_out) < 2:
        return tail, 1.0 - tail
    below = ((draws < point).sum() + 0.5 * (draws == point).sum()) / len(draws)
    bias = _normal_quantile(np.clip(below, 0.5 / len(draws), 1.0 - 0.5 / len(draws)))
    deviation = left_out.mean() - left_out
    spread = (deviation**2).sum()
    acceleration = (deviation**3).sum() / (6.0 * spread**1.5) if spread > 0 else 0.0
    z = bias + np.array([_normal_quantile(tail), _normal_quantile(1.0 - tail)])
    low, high = _normal_cdf(bias + z / (1.0 - acceleration * z))
    return float(low), float(high)


def _drawn_labels(generator: np.random.Generator, probabilities: np.ndarray, num_resamples: int) -> np.ndarray:
    """`(n, R)` labels from each row's distribution, by inverting its cumulative sum."""
    size, classes = probabilities.shape
    uniform = generator.random((size, num_resamples), dtype=np.float32)
    cumulative = np.cumsum(probabilities, axis=1)
    cumulative /= cumulative[:, -1:]
    if classes > 16:
        return np.stack([np.searchsorted(c[:-1], u, side="right") for c, u in zip(cumulative, uniform, strict=True)])
    labels = np.zeros(uniform.shape, np.int8)
    for k in range(classes - 1):
        labels += uniform >= cumulative[:, k, None].astype(np.float32)
    return labels


def _quantiles(values: np.ndarray, levels: tuple[float, float]) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(values, levels)
    return float(low), float(high)


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def _normal_quantile(probability: float) -> float:
    import torch

    return float(torch.special.ndtri(torch.tensor(float(probability), dtype=torch.float64)))


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    import torch

    return torch.special.ndtr(torch.as_tensor(z, dtype=torch.float64)).numpy()
