"""Predictions that are Gaussians: checked rows, and what each row costs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

from ...json_files import describe
from ..fingerprint import row_hashes
from ..inputs import as_numpy


class NumberRows(NamedTuple):
    """Rows with a Gaussian each, and what was observed."""

    mean: np.ndarray  # `(N,)` float64
    sd: np.ndarray  # `(N,)` float64, of at least 0
    values: np.ndarray  # `(N,)` float64, observed

    @property
    def residuals(self) -> np.ndarray:
        return self.values - self.mean

    @property
    def hashes(self) -> np.ndarray:
        """`(N,)` uint64, of what was predicted and observed."""
        return row_hashes(np.stack(self, axis=1), np.zeros(len(self.mean), np.int64))

    def kept(self, mask: Any) -> NumberRows:
        """The rows of a mask; all where there is none."""
        return self if mask is None else NumberRows(*(part[np.asarray(mask, bool)] for part in self))


def as_number_rows(mean: Any, sd: Any, values: Any) -> NumberRows:
    """Check predictions and observations.

    Args:
        mean: `(N,)` or `(N, 1)` predicted means.
        sd: Standard deviations of that shape, or one for all.
        values: Observed numbers of that shape.

    Raises:
        ValueError, TypeError: If they are not paired or not finite, an sd is negative, or there is no row.
    """
    means, observed = (as_column(part, name) for part, name in ((mean, "mean"), (values, "values")))
    given = as_numpy(sd, "sd")
    if given.dtype.kind not in "fiu":
        raise TypeError(f"sd must be numbers, one for each row or one for all, such as 1.0; got {describe(sd)}.")
    spread = as_column(np.full(len(means), float(given)) if given.ndim == 0 else given, "sd")
    if not len(means) == len(observed) == len(spread):
        raise ValueError(
            f"There are {len(means)} means, {len(spread)} standard deviations and {len(observed)} observed values; "
            "they must be paired one to one."
        )
    if (spread < 0).any():
        raise ValueError("sd must be at least 0 in every row.")
    return NumberRows(means, spread, observed)


def as_column(given: Any, name: str) -> np.ndarray:
    """`(N,)` finite float64 numbers of `(N,)` or `(N, 1)`."""
    array = as_numpy(given, name)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be numbers, got dtype {array.dtype}.")
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be 1-D and not empty, got shape {array.shape}.")
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity, first in row {int(np.flatnonzero(~np.isfinite(values))[0])}.")
    return values


def crps(mean: Any, sd: Any, values: Any) -> np.ndarray:
    """Continuous ranked probability score of Gaussians: the integral of `(F(x) - 1[y <= x])^2`, lower is better.

    In closed form `sd (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))` with `z = (y - mean) / sd` (Gneiting & Raftery,
    2007); the absolute error where `sd` is 0.

    Args:
        mean: `(N,)` predicted means.
        sd: `(N,)` standard deviations, or one for all.
        values: `(N,)` observed numbers.

    Returns:
        `(N,)` scores in the unit of the values.

    Raises:
        ValueError, TypeError: See `as_number_rows`.

    Example:
        >>> crps([0.0], 1.0, [0.0]).round(4)
        array([0.2337])
    """
    rows = as_number_rows(mean, sd, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = rows.residuals / rows.sd
        density = np.exp(-0.5 * np.square(z)) / math.sqrt(2.0 * math.pi)
        scores = rows.sd * (z * (2.0 * ndtr(z) - 1.0) + 2.0 * density - 1.0 / math.sqrt(math.pi))
    return np.where(rows.sd > 0, scores, np.abs(rows.residuals))


def row_nll(rows: NumberRows) -> np.ndarray:
    """`(N,)` negative log-densities, nats; infinite where a standard deviation is 0 and the value is another one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        losses = 0.5 * (rows.residuals / rows.sd) ** 2 + np.log(rows.sd) + 0.5 * math.log(2.0 * math.pi)
    return np.where(rows.sd > 0, losses, np.where(rows.residuals == 0, -np.inf, np.inf))


def pit(rows: NumberRows) -> np.ndarray:
    """`(N,)` probability integral transform `F(y)`: uniform on [0, 1] if the Gaussians are right (Dawid, 1984)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = rows.residuals / rows.sd
    at_once = np.select([rows.residuals > 0, rows.residuals < 0], [np.inf, -np.inf], 0.0)
    return ndtr(np.where(rows.sd > 0, z, at_once))
