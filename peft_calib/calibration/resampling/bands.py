"""Intervals by formula: of the frequency in one bin, and of a mean."""

from __future__ import annotations

import numpy as np
import torch


def normal_quantile(probability: float) -> float:
    """Inverse of the standard normal distribution function; infinite at 0 and 1."""
    return float(torch.special.ndtri(torch.tensor(float(probability), dtype=torch.float64)))


def normal_cdf(z: np.ndarray) -> np.ndarray:
    """Standard normal distribution function."""
    return torch.special.ndtr(torch.as_tensor(z, dtype=torch.float64)).numpy()


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for a whole number of degrees of freedom, above the median.

    The distribution function is a finite sum of powers of the cosine of `atan(t / sqrt(degrees))` (Abramowitz &
    Stegun, 26.7.3 and 26.7.4), which bisection inverts; above 200 degrees an expansion around the normal is exact to
    1e-6.

    Example:
        >>> round(student_quantile(0.975, 10), 4)
        2.2281
    """
    z = normal_quantile(probability)
    if degrees > 200:
        first, second = (z**3 + z) / 4.0, (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0
        return z + first / degrees + second / degrees**2
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if 0.5 + 0.5 * _student_within(middle, degrees) < probability else (low, middle)
    return high


def _student_within(t: float, degrees: int) -> float:
    """Probability of `|T| < t`."""
    angle = np.arctan(t / np.sqrt(degrees))
    cosine, odd = np.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= k / (k + 1.0) * cosine**2
    total *= np.sin(angle)
    return float(2.0 / np.pi * (angle + total)) if odd else float(total)


def skewed_mean_interval(values: np.ndarray, tail: float) -> tuple[float, float]:
    """Interval of a mean by Student's quantile and Hall's (1992) transform, which takes the skewness off.

    A few rows of a heavy-tailed loss seldom hold its largest values: the mean then lies low and seems sure, and
    Student's interval ends below the truth too often (100 rows of skewness 5: 9 % instead of 2.5 %).

    Args:
        values: `(N,)`.
        tail: Probability outside on each side.

    Returns:
        Lower and upper end; the mean itself where values do not differ or are fewer than three.

    Example:
        >>> low, high = skewed_mean_interval(np.array([0.0, 0.0, 0.0, 0.1, 0.2, 1.5]), 0.025)
        >>> round(low, 2), round(high, 2)  # Student's: (-0.32, 0.92)
        (-0.11, 2.33)
    """
    size, mean = len(values), float(values.mean())
    centred = values - mean
    spread = float((centred**2).mean())
    if size < 3 or spread <= 1e-24 * (mean**2 + 1e-12):
        return mean, mean
    error = np.sqrt(spread / (size - 1))
    skewness = float((centred**3).mean()) / spread**1.5 / np.sqrt(size)
    reach = student_quantile(1.0 - tail, size - 1)

    def corrected(t: float) -> float:
        if abs(skewness) < 1e-6:
            return t
        return 3.0 * float(np.cbrt(1.0 + skewness * (t - skewness / 6.0)) - 1.0) / skewness

    return float(mean - error * corrected(reach)), float(mean - error * corrected(-reach))


def wilson_interval(hits: np.ndarray, counts: np.ndarray, confidence_level: float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's (1927) interval of a frequency.

    Args:
        hits: `(B,)` number of events, or their mass.
        counts: `(B,)` number of trials.
        confidence_level: Nominal coverage.

    Returns:
        `(B,)` lower and upper ends, NaN where there was no trial.
    """
    z = normal_quantile(0.5 + 0.5 * confidence_level)
    counts = np.where(counts > 0, counts, np.nan).astype(np.float64)
    frequency = hits / counts
    centre = (frequency + 0.5 * z**2 / counts) / (1.0 + z**2 / counts)
    half = z / (1.0 + z**2 / counts) * np.sqrt(frequency * (1.0 - frequency) / counts + 0.25 * z**2 / counts**2)
    # At 0 and 1 the ends are exact; rounding would leave them an ulp inside.
    low = np.where(hits <= 0, np.where(counts > 0, 0.0, np.nan), np.maximum(centre - half, 0.0))
    high = np.where(hits >= counts, 1.0, np.minimum(centre + half, 1.0))
    return low, high


def consistency_band(
    confidence: np.ndarray, counts: np.ndarray, confidence_level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where the frequency of a bin would fall if its mean confidence were its true probability.

    Quantiles of `Binomial(n, confidence) / n` (Broecker & Smith, 2007), from its normal approximation above 10,000
    rows.

    Args:
        confidence: `(B,)` mean confidence of each bin.
        counts: `(B,)` rows in each bin.
        confidence_level: Share of such frequencies inside.

    Returns:
        `(B,)` lower and upper ends, NaN where a bin is empty.
    """
    low, high = np.full(len(counts), np.nan), np.full(len(counts), np.nan)
    tail = 0.5 * (1.0 - confidence_level)
    for b, (n, p) in enumerate(zip(counts, confidence, strict=True)):
        if n > 0:
            low[b], high[b] = _binomial_quantiles(int(n), float(np.clip(p, 0.0, 1.0)), tail)
    return low, high


def _binomial_quantiles(n: int, p: float, tail: float) -> tuple[float, float]:
    if p in (0.0, 1.0):
        return p, p
    if n > 10_000:
        half = normal_quantile(1.0 - tail) * np.sqrt(p * (1.0 - p) / n)
        return max(p - half, 0.0), min(p + half, 1.0)
    k = torch.arange(n + 1, dtype=torch.float64)
    whole = torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64))
    choices = whole - torch.lgamma(k + 1.0) - torch.lgamma(n - k + 1.0)
    cumulative = torch.exp(choices + k * np.log(p) + (n - k) * np.log1p(-p)).cumsum(0).numpy()
    low, high = np.searchsorted(cumulative, [tail, 1.0 - tail])
    return low / n, min(high, n) / n
