"""`ConformalInterval`: an interval around a predicted number that holds the observed one, for finitely many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...json_files import Fields, without_nan
from ..decide.base import DecisionRule
from ..decide.bounds import NoGuaranteeError, band_text, check_share, exact_interval, percent
from ..decide.set_report import CoverageLaw
from ..decide.set_scores import rank_for
from ..fingerprint import SplitFingerprint
from .gaussian import NumberRows, as_column, as_number_rows

#: What is cut: the absolute residual, or that divided by the predicted standard deviation.
SCORES = ("absolute", "normalised")
DEFAULT_ALPHA = 0.1


@dataclass(frozen=True)
class IntervalReport:
    """Coverage and width of intervals on new rows.

    Attributes:
        num_rows: Rows.
        alpha: Highest share of values outside.
        coverage: Share of values inside.
        coverage_interval: Its exact interval (Clopper & Pearson).
        band: Where the coverage of so many rows falls, the rows of the fit and these being random (beta-binomial).
        below: Share of values below their interval.
        above: Share of values above it.
        mean_width: Mean width.
        median_width: Median width.
        confidence_level: Of interval and band.
        promise: What the rule guarantees.
    """

    num_rows: int
    alpha: float
    coverage: float
    coverage_interval: tuple[float, float]
    band: tuple[float, float]
    below: float
    above: float
    mean_width: float
    median_width: float
    confidence_level: float
    promise: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return without_nan({**vars(self)})

    def verdict(self) -> str:
        """In one sentence, how the coverage compares with its law."""
        where = "inside" if self.band[0] <= self.coverage <= self.band[1] else "outside"
        return (
            f"{percent(self.coverage)} {band_text(self.coverage_interval)} of {self.num_rows} values lie in their "
            f"interval; for rows like those of the fit this share falls into {band_text(self.band)}, it lies {where}."
        )

    def to_markdown(self, class_names: Sequence[str] | None = None) -> str:
        """The verdict, widths, and the promise."""
        return "\n".join([
            self.verdict(), "",
            f"{percent(self.below)} lie below, {percent(self.above)} above. The intervals are {self.mean_width:.4g} "
            f"wide on average, {self.median_width:.4g} in the middle.", "", f"Promised: {self.promise}",
        ])  # fmt: skip

    def __str__(self) -> str:
        return self.to_markdown()


class ConformalInterval(DecisionRule):
    """An interval around a predicted mean that holds the observed number with a guarantee (split-conformal).

    With `score="absolute"` it reaches equally far for all rows; with `"normalised"` as far as a multiple of the
    predicted standard deviation, so that it is wider where draws disagree (Lei et al., 2018). Its coverage is at least
    `1 - alpha` on average over calibration splits, or with a `confidence`: with that probability over them, whatever
    the model, for new rows drawn like those of the fit. It follows Beta(k, n + 1 - k) where no scores are tied.

    Args:
        alpha: In (0, 1); 0.1 if not given.
        score: One of `"absolute"` and `"normalised"`.
        confidence: In (0, 1), or None: on average.

    Attributes:
        reach: What the scores are cut at.

    Example:
        >>> y = np.arange(99.0) - 49
        >>> rule = ConformalInterval(alpha=0.1).fit(np.zeros(99), np.ones(99), y)
        >>> [ends.tolist() for ends in rule.predict([0.0, 10.0], [1.0, 1.0])]
        [[-45.0, -35.0], [45.0, 55.0]]
    """

    kind = "interval"

    def __init__(self, alpha: float | None = None, score: str = "absolute", confidence: float | None = None) -> None:
        super().__init__(None)
        self.alpha = DEFAULT_ALPHA if alpha is None else check_share(alpha, "alpha", DEFAULT_ALPHA)
        if score not in SCORES:
            raise ValueError(f"`score` must be one of {SCORES}, got {score!r}.")
        self.score = score
        self.confidence = None if confidence is None else check_share(confidence, "confidence", 0.95)
        self.reach: float | None = None
        self.law: CoverageLaw | None = None
        self.num_rows = 0

    def fit(self, mean: Any, sd: Any, values: Any) -> ConformalInterval:
        """Find how far intervals must reach, on rows that the model was not trained on.

        Args:
            mean: `(N,)` predicted means.
            sd: `(N,)` predicted standard deviations.
            values: `(N,)` observed numbers.

        Returns:
            The object itself.

        Raises:
            NoGuaranteeError: If there are too few rows for `alpha`; a ValueError that says how many it takes.
            ValueError: For bad input, or a standard deviation of 0 where it is divided by.
        """
        rows = as_number_rows(mean, sd, values)
        scores = np.abs(rows.residuals) / self._units(rows.sd)
        size = len(scores)
        rank = rank_for(size, self.alpha, self.confidence)
        if rank > size:
            needed = next(n for n in range(size + 1, 10**7) if rank_for(n, self.alpha, self.confidence) <= n)
            raise NoGuaranteeError(
                f"{size} rows are too few for intervals that miss at most {percent(self.alpha)} of the values: that "
                f"takes {needed} rows. Label more rows, or ask for less.", size, needed,
            )  # fmt: skip
        self.reach = float(np.partition(scores, rank - 1)[rank - 1])
        self.law = CoverageLaw(rank, size + 1 - rank)
        self.num_classes, self.num_rows = 1, size
        self.fitted_on = SplitFingerprint.of_hashes(rows.hashes)
        return self

    def _units(self, sd: np.ndarray) -> np.ndarray:
        if self.score == "absolute":
            return np.ones(len(sd))
        if not (sd > 0).all():
            raise ValueError('score="normalised" divides by the standard deviation, which is 0 in some rows.')
        return sd

    def predict(self, mean: Any, sd: Any) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends `(N,)` of the intervals of any rows.

        Raises:
            ValueError: If the rule is not fitted, or for bad input.
        """
        self._check_fitted()
        means = as_column(mean, "mean")
        rows = as_number_rows(means, sd, means)
        assert self.reach is not None
        units = self._units(rows.sd)
        return _end(rows.mean, units, self.reach, -1.0), _end(rows.mean, units, self.reach, 1.0)

    def evaluate(
        self, mean: Any, sd: Any, values: Any, *, mask: Any = None, confidence_level: float = 0.95
    ) -> IntervalReport:
        """Coverage reached on rows that the rule was not fitted on; `mask` leaves rows out.

        Raises:
            ValueError: If more than 5 % of the rows were fitted on: such a report would flatter.
        """
        level = check_share(confidence_level, "confidence_level", 0.95)
        rows: NumberRows = as_number_rows(mean, sd, values).kept(mask)
        self._refuse_own(rows.hashes)
        low, high = self.predict(rows.mean, rows.sd)
        below, above, size = rows.values < low, rows.values > high, len(low)
        inside = size - int(below.sum()) - int(above.sum())
        assert self.law is not None
        width = high - low
        return IntervalReport(
            size, self.alpha, inside / size, exact_interval(inside, size, level), self.law.band(size, level),
            float(below.mean()), float(above.mean()), float(width.mean()), float(np.median(width)), level,
            self.promise(),
        )  # fmt: skip

    def promise(self) -> str:
        """What the rule guarantees, in one sentence."""
        how = "on average over such fits" if self.confidence is None else f"with {percent(self.confidence)} confidence"
        return f"The interval holds the observed number in at least {percent(1.0 - self.alpha)} of the rows, {how}."

    def to_markdown(self, class_names: Sequence[str] | None = None) -> str:
        """The promise, how far intervals reach, and what is not promised."""
        self._check_fitted()
        unit = "" if self.score == "absolute" else " predicted standard deviations"
        return "\n".join([
            self.promise(), "", f"It reaches {self.reach:.4g}{unit} to both sides of the mean, fitted on "
            f"{self.num_rows} rows.", "", "This holds for rows drawn like those, and not after a shift.",
        ])  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "score": self.score, "confidence": self.confidence}

    def _fitted(self) -> dict[str, Any]:
        assert self.law is not None
        return {"reach": self.reach, "rank": int(self.law.first), "num_rows": self.num_rows}

    @classmethod
    def _from_fields(
        cls, settings: Fields, fitted: Fields, num_classes: int, temperature: float | None
    ) -> ConformalInterval:
        rule = cls(
            settings.number("alpha"), settings.text("score", among=SCORES), settings.number("confidence", default=None)
        )
        rule.reach = float(fitted.number("reach", least=0.0))
        rule.num_rows, rank = fitted.integer("num_rows", least=1), fitted.integer("rank", least=1)
        if rank > rule.num_rows:
            raise fitted.wrong("rank", f"at most {rule.num_rows}, the number of rows")
        rule.law = CoverageLaw(rank, rule.num_rows + 1 - rank)
        return rule


def _end(mean: np.ndarray, units: np.ndarray, reach: float, side: float) -> np.ndarray:
    """`(N,)` ends below (-1) or above (1) the means, no value beyond which has a score of at most `reach`.

    A score is `|value - mean| / unit`, rounded; `mean + reach * unit` is rounded in another way, and may come out an
    ulp short of the value whose score is the cut. Of values in steps, such as ratings, that is a large share.
    """
    end = mean + side * reach * units
    is_short = np.abs(np.nextafter(end, side * np.inf) - mean) / units <= reach
    slack = 4.0 * np.finfo(np.float64).eps * (np.abs(mean) + reach * units)
    return np.where(is_short, end + side * slack, end)
