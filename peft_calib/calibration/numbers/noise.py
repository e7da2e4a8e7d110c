"""The noise of observations around a predicted mean, fitted on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import chdtri

from ...json_files import Fields
from ..fingerprint import SplitFingerprint
from ..recalibrate.fitted import FittedMethod
from ..recalibrate.temperature_fit import FEWEST_ROWS, LEVEL
from .gaussian import as_column, as_number_rows
from .report import NumbersReport, numbers_report

#: The least noise variance, as a share of the mean square of the residuals.
LEAST = 1e-9


class GaussianNoise(FittedMethod):
    """A noise variance: an observation is Gaussian around the predicted mean, `y ~ N(mean, noise + variance)`.

    `variance` is that of the draws, what the model does not know; 0 where there is one. By the law of total variance
    it adds to the noise. The noise is that of greatest likelihood on rows that the model was not trained on.

    Attributes:
        noise_variance: After `fit`, in the square of the unit of the values.
        interval: Its 95 % interval by likelihood ratio (Wilks, 1938); None where it was read from a file.
        reason: In one sentence.

    Example:
        >>> noise = GaussianNoise().fit(np.zeros(40), None, np.tile([-1.0, 1.0], 20))
        >>> noise.noise_variance, noise.transform(np.zeros(2), [0.0, 3.0]).tolist()
        (1.0, [1.0, 2.0])
    """

    parameter_names = ("noise_variance",)
    noise_variance: float
    interval: tuple[float, float] | None = None
    reason: str = ""

    def fit(self, mean: Any, variance: Any, values: Any) -> GaussianNoise:
        """Fit on a calibration split.

        Args:
            mean: `(N,)` predicted means.
            variance: `(N,)` variance between draws; None for none.
            values: `(N,)` observed numbers.

        Returns:
            The object itself.

        Raises:
            ValueError: For bad input, fewer than 10 rows, or rows that are all predicted exactly.
        """
        rows = as_number_rows(mean, np.sqrt(_variances(mean, variance)), values)
        if len(rows.mean) < FEWEST_ROWS:
            raise ValueError(
                f"A noise variance needs at least {FEWEST_ROWS} held-out rows, and there are {len(rows.mean)}."
            )
        squares = rows.residuals**2
        largest = float(squares.mean())
        if largest == 0.0:
            raise ValueError("Every row is predicted exactly, so no noise can be fitted: are these training rows?")
        spread = rows.sd**2
        best = _fitted(squares, spread, largest)
        self.noise_variance = best
        self.interval = _interval(squares, spread, best, largest)
        self.num_classes = 1
        self.fitted_on = SplitFingerprint.of_hashes(rows.hashes)
        low, high = (math.sqrt(end) for end in self.interval)
        self.reason = (
            f"The noise has a standard deviation of {math.sqrt(best):.4g} [{low:.4g}, {high:.4g}], fitted on "
            f"{len(squares):,} rows."
        )
        return self

    def transform(self, mean: Any, variance: Any = None) -> np.ndarray:
        """`(N,)` standard deviation of an observation: of the noise, and of the draws.

        Raises:
            ValueError: If it is not fitted, or for bad input.
        """
        self._check_fitted()
        return np.sqrt(self.noise_variance + _variances(mean, variance))

    def evaluate(self, mean: Any, variance: Any, values: Any, **options: Any) -> NumbersReport:
        """Report on rows it was not fitted on; `options` as for `numbers_report`.

        Raises:
            ValueError: If more than 5 % of the rows were fitted on: such a report would flatter.
        """
        rows = as_number_rows(mean, np.sqrt(_variances(mean, variance)), values)
        self._refuse_own(rows.hashes)
        return numbers_report(rows.mean, self.transform(mean, variance), rows.values, **options)

    def state(self) -> dict[str, Any]:
        """The fitted method as JSON-ready values."""
        return {**super().state(), "interval": None if self.interval is None else list(self.interval),
                "reason": self.reason}  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | Fields) -> GaussianNoise:
        """The inverse of `state`."""
        method = super().from_state(state)
        fields = cls._checked_fields(state)
        if fields.get("interval", None) is not None:
            low, high = fields.array("interval", (2,))
            method.interval = float(low), float(high)
        method.reason = fields.text("reason")
        return method

    def _read_parameter(self, parameters: Fields, name: str) -> Any:
        return float(parameters.number(name, above=0.0))


def _variances(mean: Any, variance: Any) -> np.ndarray:
    if variance is None:
        return np.zeros(len(as_column(mean, "mean")))
    found = as_column(variance, "variance")
    if (found < 0).any():
        raise ValueError("variance must be at least 0 in every row.")
    return found


def _loss(noise: float, squares: np.ndarray, spread: np.ndarray) -> float:
    """Negative log-likelihood of residuals, up to a constant."""
    total = noise + spread
    return 0.5 * float((np.log(total) + squares / total).sum())


def _fitted(squares: np.ndarray, spread: np.ndarray, largest: float) -> float:
    if not spread.any():
        return largest
    ends = math.log(LEAST * largest), math.log(float(squares.max()))
    grid = np.linspace(*ends, 65)  # the likelihood may have several summits
    start = int(np.argmin([_loss(math.exp(place), squares, spread) for place in grid]))
    around = grid[max(start - 1, 0)], grid[min(start + 1, len(grid) - 1)]
    found = minimize_scalar(
        lambda place: _loss(math.exp(place), squares, spread),
        bounds=around,
        method="bounded",
        options={"xatol": 1e-10},
    )
    return float(math.exp(found.x))


def _interval(squares: np.ndarray, spread: np.ndarray, best: float, largest: float) -> tuple[float, float]:
    allowed = _loss(best, squares, spread) + 0.5 * float(chdtri(1, 1.0 - LEVEL))

    def end(outside: float) -> float:
        inside = math.log(best)

        def excess(place: float) -> float:
            return _loss(math.exp(place), squares, spread) - allowed

        return math.exp(brentq(excess, inside, outside) if excess(outside) > 0 else outside)

    low, high = end(math.log(LEAST * largest)), end(math.log(1e3 * max(largest, best)))
    return min(low, best), max(high, best)
