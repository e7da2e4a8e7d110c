"""Smooth calibration error: a kernel instead of bins, with a bandwidth the data choose."""

from __future__ import annotations

import numpy as np
from scipy.fft import dct, idct

from ..bins import Groups

# Cells of [0, 1] that residuals are collected in; the error this makes is below 1 / (2 GRID).
GRID = 2048
SMALLEST_BANDWIDTH = 1e-3


def residual_grid(groups: Groups, size: int = GRID) -> np.ndarray:
    """`(size,)` mean residual `(outcome - value) / N` collected in equal cells of [0, 1]."""
    means = groups.value_sums / groups.counts
    index = np.minimum((means * size).astype(np.int64), size - 1)
    residuals = groups.outcome_sums - groups.value_sums
    return np.bincount(index, weights=residuals, minlength=size) / groups.counts.sum()


def cosine_series(residuals: np.ndarray) -> np.ndarray:
    """Cosine coefficients (DCT-II) of `(..., G)` residuals over their even extension, `(..., G)`."""
    return dct(residuals, axis=-1) / residuals.shape[-1]


def smoothed(series: np.ndarray, bandwidth: np.ndarray) -> np.ndarray:
    """`(R, G)` residuals of cosine coefficients, each row with its bandwidth; those that vanish are left out."""
    size = series.shape[-1]
    kept = min(size, int(6.2 / (np.pi * bandwidth.min())) + 2)
    damped = series[:, :kept] * np.exp(-0.5 * (np.pi * np.arange(kept) * bandwidth[:, None]) ** 2)
    return idct(damped, n=size, axis=-1) * size


def smooth_error_of_grid(residuals: np.ndarray, iterations: int = 12) -> np.ndarray:
    """Solves `smECE_s = s` for each row of `(R, G)` residuals by bisection; the left side falls with `s`.

    `smECE_s = integral |sum_i (y_i - f_i) K_s(t, f_i) / N| dt` with the Gaussian kernel reflected at 0 and 1: an even
    extension, so smoothing multiplies cosine coefficient j by `exp(-(pi j s)^2 / 2)`.
    """
    series = cosine_series(residuals)
    low, high = np.full(len(residuals), SMALLEST_BANDWIDTH), np.ones(len(residuals))
    for _ in range(iterations):
        middle = np.sqrt(low * high)
        above = np.abs(smoothed(series, middle)).sum(axis=-1) > middle
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.abs(smoothed(series, high)).sum(axis=-1)


def smooth_calibration_error(groups: Groups) -> np.ndarray:
    """SmECE of Blasiok & Nakkiran (2023), arXiv:2309.12236: consistent, and continuous in the predictions."""
    return smooth_error_of_grid(residual_grid(groups)[None])[0]
