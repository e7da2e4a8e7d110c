# SPDX-License-Identifier: Apache-2.0
"""Smooth calibration error: kernel regression instead of bins, with a bandwidth the data choose (no free
parameter).
"""

from __future__ import annotations

import numpy as np

from peft_calib.calibration.bins import Groups

# Cells of [0, 1] that residuals are collected in; the error this makes is below 1 / (2 GRID).
GRID = 2048
SMALLEST_BANDWIDTH = 1e-3


def residual_grid(groups: Groups, size: int = GRID) -> np.ndarray:
    """Mean residual `(outcome - value) / N` collected in `size` equal cells of [0, 1].

    Args:
        groups: rows grouped by confidence (or the cells of a histogram).
        size: number of cells.

    Returns:
        `(size,)` float64.
    """
    total = groups.counts.sum()
    occupied = groups.counts > 0
    means = groups.value_sums[occupied] / groups.counts[occupied]
    index = np.minimum((means * size).astype(np.int64), size - 1)
    residuals = (groups.outcome_sums - groups.value_sums)[occupied]
    return np.bincount(index, weights=residuals, minlength=size) / total


def smoothed_error(residuals: np.ndarray, bandwidth: np.ndarray | float) -> np.ndarray:
    """`smECE_s = integral |sum_i (y_i - f_i) K_s(t, f_i) / N| dt` with the Gaussian kernel reflected at 0 and 1.

    Reflection is an even extension, so smoothing is a product with `exp(-(pi j s)^2 / 2)` on the cosine series.

    Args:
        residuals: `(..., G)` mean residuals on the grid.
        bandwidth: `s`, a number or one a leading index.

    Returns:
        `(...)` errors.
    """
    size = residuals.shape[-1]
    spectrum = np.fft.rfft(np.concatenate([residuals, residuals[..., ::-1]], axis=-1), axis=-1)
    frequency = np.arange(spectrum.shape[-1])
    width = np.asarray(bandwidth, dtype=np.float64)[..., None]
    spectrum = spectrum * np.exp(-0.5 * (np.pi * frequency * width) ** 2)
    return np.abs(np.fft.irfft(spectrum, n=2 * size, axis=-1)[..., :size]).sum(axis=-1)


def smooth_error_of_grid(residuals: np.ndarray, iterations: int = 12) -> np.ndarray:
    """Solves `smECE_s = s` for each row of residuals by bisection.

    The left side falls with `s`, so the root is unique; it is found to `2^-12`, a quarter of the grid's own error...
    of any practical difference.

    Args:
        residuals: `(..., G)`.
        iterations: halvings of [0.001, 1].

    Returns:
        `(...)` errors at the chosen bandwidth.
    """
    low = np.full(residuals.shape[:-1], SMALLEST_BANDWIDTH)
    high = np.ones(residuals.shape[:-1])
    for _ in range(iterations):
        middle = 0.5 * (low + high)
        above = smoothed_error(residuals, middle) > middle
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return smoothed_error(residuals, high)


def smooth_calibration_error(groups: Groups) -> float:
    """SmECE of Blasiok & Nakkiran (2023), arXiv:2309.12236: consistent, and continuous in the predictions.

    Args:
        groups: top-label rows grouped by confidence, ascending.

    Returns:
        The error, in [0, 1].
    """
    return float(smooth_error_of_grid(residual_grid(groups)))
