"""Intervals by formula: of the frequency in one bin, and of a mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit


def skewed_mean_interval(values: np.ndarray, tail: float) -> tuple[float, float]:
    """Interval of a mean by Student's quantile and Hall's (1992) transform, which takes the skewness off.

    A few rows of a heavy-tailed loss seldom hold its largest values, so the mean lies low and seems sure. The mean
    itself where values do not differ or are fewer than three; `tail` lies outside on each side.
    """
    size, mean = len(values), float(values.mean())
    centred = values - mean
    spread = float((centred**2).mean())
    if size < 3 or spread <= 1e-24 * (mean**2 + 1e-12):
        return mean, mean
    error = np.sqrt(spread / (size - 1))
    skewness = float((centred**3).mean()) / spread**1.5 / np.sqrt(size)
    reach = float(stdtrit(size - 1, 1.0 - tail))

    def corrected(t: float) -> float:
        if abs(skewness) < 1e-6:
            return t
        return 3.0 * float(np.cbrt(1.0 + skewness * (t - skewness / 6.0)) - 1.0) / skewness

    return float(mean - error * corrected(reach)), float(mean - error * corrected(-reach))


def wilson_interval(hits: np.ndarray, counts: np.ndarray, confidence_level: float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's (1927) interval of the frequency of `(B,)` hits among `(B,)` trials, NaN where there was no trial."""
    z = ndtri(0.5 + 0.5 * confidence_level)
    counts = np.where(counts > 0, counts, np.nan).astype(np.float64)
    low, high = wilson_ends(hits / counts, counts, z)
    # At 0 and 1 the ends are exact; rounding would leave them an ulp inside.
    low = np.where(hits <= 0, np.where(counts > 0, 0.0, np.nan), np.maximum(low, 0.0))
    return low, np.where(hits >= counts, 1.0, np.minimum(high, 1.0))


def wilson_ends(frequency: Any, trials: Any, z: float) -> tuple[Any, Any]:
    """Where a frequency lies `z` standard errors from its truth, by that truth's own error; numbers or arrays."""
    centre = (frequency + 0.5 * z**2 / trials) / (1.0 + z**2 / trials)
    half = z / (1.0 + z**2 / trials) * np.sqrt(frequency * (1.0 - frequency) / trials + 0.25 * z**2 / trials**2)
    return centre - half, centre + half


def clustered_share_interval(
    share: float, variance: float, clusters: float, answers: float, tail: float
) -> tuple[float, float]:
    """Interval of a share of answers that hang together in clusters: Wilson's form, by its own number of trials.

    That is the number which has its variance, at most all answers. Where nothing varies, as where all answers are
    right, resamples know of no error that might have been: then a cluster is one trial, and of none or all of them the
    interval is the exact one (Clopper & Pearson, 1934).

    Args:
        share: Of right answers, or of wrong ones.
        variance: Of the share, over other clusters.
        clusters: Independent parts of the data that have an answer.
        answers: In all of them.
        tail: Lies outside on each side.

    Example:
        >>> low, high = clustered_share_interval(1.0, 0.0, 30, 90, 0.025)
        >>> round(low, 3), high
        (0.884, 1.0)
    """
    if clusters <= 0.0 or not np.isfinite(share):
        return float("nan"), float("nan")
    if variance <= 1e-12 and share in (0.0, 1.0):
        least = tail ** (1.0 / clusters)
        return (least, 1.0) if share else (0.0, 1.0 - least)
    trials, z = clusters, float(ndtri(1.0 - tail))
    if variance > 1e-12:
        trials, z = share * (1.0 - share) / variance, float(stdtrit(max(clusters - 1.0, 1.0), 1.0 - tail))
    low, high = wilson_ends(share, float(np.clip(trials, 1.0, max(answers, 1.0))), z)
    return max(min(float(low), share), 0.0), min(max(float(high), share), 1.0)


def trials_of_shares(found: np.ndarray, true: np.ndarray, either: np.ndarray) -> dict[str, tuple[float, float]]:
    """Of precision, recall and F1, clusters that have an answer and answers in all, of `(S, K)` counts or booleans."""
    every = {"precision": found, "recall": true, "f1": either}
    counts = {key: (float(part.any(axis=1).sum()), float(part.sum())) for key, part in every.items()}
    return {**counts, "f1_macro": (clusters_of_mean((either > 0).sum(axis=0)), float(either.sum()))}


def clusters_of_mean(counts: np.ndarray) -> float:
    """Clusters that say as much of one share as `(K,)` ones of each part say of the mean of K shares; 0 of none."""
    counts = counts[counts > 0]
    return float(len(counts) ** 2 / (1.0 / counts).sum()) if len(counts) else 0.0


def consistency_band(
    confidence: np.ndarray, counts: np.ndarray, confidence_level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where frequencies fall if predictions are right: quantiles of `Binomial(n, p) / n` (Broecker & Smith, 2007)."""
    # Half a second to import, for pictures alone.
    from scipy.stats import binom

    tail = 0.5 * (1.0 - confidence_level)
    counts = np.floor(np.where(counts >= 1, counts, np.nan))
    chance = np.clip(confidence, 0.0, 1.0)
    return binom.ppf(tail, counts, chance) / counts, binom.ppf(1.0 - tail, counts, chance) / counts
