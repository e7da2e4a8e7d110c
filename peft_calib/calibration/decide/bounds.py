"""Exact binomial statements: bounds of a share, tests of a risk, and how many rows a guarantee needs at least."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import bdtr, betaincinv


class NoGuaranteeError(ValueError):
    """The rows do not allow the guarantee that was asked for.

    Attributes:
        rows: Rows there are.
        rows_needed: How many it takes: exactly where even flawless rows would be too few, roughly where errors are
            too frequent for this number of rows; None where no number of such rows would do.
    """

    def __init__(self, message: str, rows: int, rows_needed: int | None) -> None:
        super().__init__(message)
        self.rows = rows
        self.rows_needed = rows_needed


def upper_end(hits: Any, trials: Any, tail: float) -> Any:
    """Clopper and Pearson's (1934) upper bound of a share; the truth lies above it with probability `tail` at most.

    Args:
        hits: Number of hits, numbers or arrays.
        trials: Number of trials.
        tail: Error probability of this one bound.

    Returns:
        Bounds in [0, 1]; 1 where every trial was a hit, or there was none.

    Example:
        >>> round(float(upper_end(0, 59, 0.05)), 4)  # no error in 59 rows
        0.0495
    """
    hits, trials = np.asarray(hits, np.float64), np.asarray(trials, np.float64)
    rest = np.maximum(trials - hits, 1.0)
    return np.where(hits >= trials, 1.0, betaincinv(hits + 1.0, rest, 1.0 - tail))[()]


def lower_end(hits: Any, trials: Any, tail: float) -> Any:
    """The lower bound likewise; 0 where there was no hit."""
    return 1.0 - upper_end(np.asarray(trials) - np.asarray(hits), trials, tail)


def exact_interval(hits: int, trials: int, confidence_level: float) -> tuple[float, float]:
    """Clopper and Pearson's two-sided interval of a share; [0, 1] without a trial."""
    tail = 0.5 * (1.0 - confidence_level)
    return float(lower_end(hits, trials, tail)) if trials else 0.0, float(upper_end(hits, trials, tail))


def chance_of_so_few(errors: Any, trials: Any, risk: float) -> Any:
    """`P(Binomial(trials, risk) <= errors)`: the p-value of "the risk is above `risk`", valid for every such risk.

    It is at most `tail` exactly where `upper_end(errors, trials, tail)` is at most `risk`.
    """
    return bdtr(np.asarray(errors, np.float64), np.asarray(trials, np.int64), risk)


def fewest_rows(risk: float, tail: float) -> int:
    """The fewest rows, none of them wrong, whose upper bound at `tail` is at most `risk`: `(1 - risk)^n <= tail`.

    Example:
        >>> fewest_rows(0.05, 0.05), fewest_rows(0.10, 0.05)
        (59, 29)
    """
    rows = max(1, math.ceil(math.log(tail) / math.log1p(-risk) - 1e-9))
    while chance_of_so_few(0, rows, risk) > tail:
        rows += 1
    return rows


def conformal_rank(num_rows: int, alpha: float) -> int:
    """`ceil((n + 1) (1 - alpha))`: which of n sorted scores bounds that of a new row with probability `1 - alpha`.

    Above n where n is too small. Rounding of `alpha` must not ask for one rank more: `100 * (1 - 0.1)` is not 90.

    Example:
        >>> conformal_rank(99, 0.1), conformal_rank(8, 0.1)
        (90, 9)
    """
    return num_rows + 1 - math.floor((num_rows + 1) * alpha + 1e-9)


def check_share(value: Any, name: str, example: float) -> float:
    """Returns a number strictly between 0 and 1, and raises ValueError for anything else."""
    number = isinstance(value, (float, int, np.floating)) and not isinstance(value, bool)
    if not number or not 0.0 < float(value) < 1.0:
        raise ValueError(f"`{name}` must lie strictly between 0 and 1 ({example:g}, say), got {value!r}.")
    return float(value)


def band_text(ends: tuple[float, float]) -> str:
    """Two shares in per cent, as they are told.

    Example:
        >>> band_text((0.027, 0.0634))
        '[2.7, 6.3]'
    """
    return f"[{100.0 * ends[0]:.1f}, {100.0 * ends[1]:.1f}]"


def percent(share: float) -> str:
    """A share in per cent, to three digits: 5 %, 2.5 %, 0.12 %."""
    return f"{100.0 * share:.3g} %"
