"""`numbers_report`: predicted Gaussians and what was observed, as numbers with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.special import ndtri

from ..inputs import check_confidence_level
from ..report.sectioned import SectionedReport
from ..report.tables import Section, Table, number, pair
from ..resampling.bands import skewed_mean_interval, wilson_interval
from ..resampling.intervals import Band, NoiseFloor
from ..resampling.ranked import Interval
from ..scores.kinds import OF_NUMBERS
from .gaussian import NumberRows, as_number_rows, crps, pit, row_nll

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = {"coverage_50": 0.5, "coverage_90": 0.9}
BINS = 10
#: Central shares of the Gaussian at which a picture shows how many values lie inside.
SHARES = tuple(k / 20 for k in range(1, 20))


@dataclass(frozen=True, eq=False)
class NumbersReport(SectionedReport):
    """Scores of predicted Gaussians; as a mapping it holds the scores alone.

    Attributes:
        scores: Key to number, the keys of `OF_NUMBERS`.
        settings: Rows, level, and the p-value of the test that PIT values are uniform (`pit_p`).
        intervals: Key to `(low, high)`; None if none were asked for.
        floor: Of `pit_ks`, `coverage_50` and `coverage_90` where values fall if the Gaussians are right.
        pit_counts: `(10,)` rows in each tenth of the PIT.
        coverages: `(19,)` share of the values inside the central 5 %, 10 %, ..., 95 % of their Gaussian.
    """

    kind: ClassVar[str] = "numbers"
    title: ClassVar[str] = "Calibration report of numbers"

    scores: dict[str, float]
    settings: dict[str, Any]
    intervals: dict[str, Interval] | None
    floor: NoiseFloor | None
    pit_counts: tuple[int, ...]
    coverages: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The scores under their own keys, `settings`, `intervals`, `noise_floor`, `pit_counts` and `coverages`."""
        return {**super().to_dict(), "pit_counts": list(self.pit_counts), "coverages": list(self.coverages)}

    def verdict(self) -> str:
        """In words: whether the observed values look like draws from the predicted Gaussians."""
        told = (
            f"CRPS {self.scores['crps']:.4g} and RMSE {self.scores['rmse']:.4g} on {self.settings['num_rows']:,} rows"
        )
        p, inside = self.settings["pit_p"], self.scores["coverage_90"]
        judgement = "these rows cannot tell the predicted Gaussians from right ones"
        if p < 0.05:
            band = None if self.floor is None else self.floor["coverage_90"]
            how = "of another shape than the values, or lie beside them"
            if band is not None and not band.low <= inside <= band.high:
                how = "too narrow, or lie beside the values" if inside < band.low else "too wide"
            judgement = f"the predicted Gaussians are {how}"
        return f"{told}; central 90 % intervals hold {inside:.1%} of the values; {judgement} (PIT test: p = {p:.3g})."

    def figures(self, before: NumbersReport | None = None) -> dict[str, Figure]:
        """Where values fall in their Gaussian, and how many its central intervals hold."""
        from .plots import coverage_figure, pit_figure  # whoever wants numbers alone does not pay for matplotlib

        size, level = self.settings["num_rows"], self.settings["confidence_level"] or 0.95
        earlier = None if before is None else before.coverages
        return {
            "Where values fall in their Gaussian (PIT)": pit_figure(self.pit_counts, level=level),
            "Values inside central intervals": coverage_figure(SHARES, self.coverages, size, earlier, level=level),
        }

    def _sections(self) -> list[Section]:
        level = self.settings["confidence_level"]
        header = ["score", "value", *([f"{level:.0%} interval", "if right"] if level else []), "meaning"]
        lines = []
        for key, value in self.scores.items():
            cells = [key, number(value)]
            if level:
                band = (self.floor or {}).get(key)
                ends = pair((self.intervals or {}).get(key))
                cells += [ends, "–" if band is None else f"{number(band.mean)} {pair((band.low, band.high))}"]
            lines.append([*cells, OF_NUMBERS[key]])
        tenths = [[f"{k / BINS:.1f} to {(k + 1) / BINS:.1f}", f"{count:,}"] for k, count in enumerate(self.pit_counts)]
        note = f"{self.settings['num_rows'] / BINS:.1f} rows are expected in each tenth."
        return [
            Section("Scores", [Table(header, lines)], []),
            Section("Where values fall in their Gaussian", [Table(["PIT", "rows"], tenths)], [note]),
        ]


def numbers_report(mean: Any, sd: Any, values: Any, *, confidence_level: float | None = 0.95) -> NumbersReport:
    """Measure predicted Gaussians against observed numbers.

    Args:
        mean: `(N,)` predicted means.
        sd: `(N,)` predicted standard deviations, or one for all.
        values: `(N,)` observed numbers.
        confidence_level: Of intervals and bands; None computes neither.

    Returns:
        The report.

    Raises:
        ValueError, TypeError: For anything that is not what it should be.

    Example:
        >>> report = numbers_report([0.0, 1.0, 2.0], 1.0, [0.5, 1.0, 1.5], confidence_level=None)
        >>> round(report["rmse"], 4), report["coverage_90"]
        (0.4082, 1.0)
    """
    rows = as_number_rows(mean, sd, values)
    level = None if confidence_level is None else check_confidence_level(confidence_level)
    of_rows = _of_rows(rows)
    transform = pit(rows)
    distance, p_value = _distance(transform)
    squares = float((rows.residuals**2).mean())
    scores = {key: float(part.mean()) for key, part in of_rows.items()}
    scores |= {"rmse": math.sqrt(squares), "pit_ks": distance}
    settings = {"num_rows": len(rows.mean), "confidence_level": level, "pit_p": p_value}
    intervals = floor = None
    if level is not None:
        intervals = _intervals(rows, of_rows, level)
        floor = _floor(len(rows.mean), level)
    counts = np.bincount(np.minimum((transform * BINS).astype(int), BINS - 1), minlength=BINS)
    inside = tuple(float(_is_inside(rows, share).mean()) for share in SHARES)
    ordered = {key: scores[key] for key in OF_NUMBERS}
    return NumbersReport(ordered, settings, intervals, floor, tuple(map(int, counts)), inside)


def _of_rows(rows: NumberRows) -> dict[str, np.ndarray]:
    """`(N,)` values of which a score is the mean."""
    residuals, centred = rows.residuals, rows.values - rows.values.mean()
    total = float((centred**2).mean())
    missing = float((residuals**2).mean()) / total if total > 0 else float("nan")
    # each row's influence on one minus a quotient of two sums
    of_r2 = (
        1.0 - missing - (residuals**2 - missing * centred**2) / total if total > 0 else np.full_like(centred, np.nan)
    )
    found = {
        "mae": np.abs(residuals), "r2": of_r2, "bias": -residuals, "nll": row_nll(rows),
        "crps": crps(*rows), "mean_sd": rows.sd,
    }  # fmt: skip
    for key, share in LEVELS.items():
        found[key] = _is_inside(rows, share)
    return found


def _is_inside(rows: NumberRows, share: float) -> np.ndarray:
    """`(N,)` 1 where the value lies in the central share of its Gaussian."""
    return (np.abs(rows.residuals) <= ndtri(0.5 + 0.5 * share) * rows.sd).astype(np.float64)


def _intervals(rows: NumberRows, of_rows: Mapping[str, np.ndarray], level: float) -> dict[str, Interval]:
    tail = 0.5 * (1.0 - level)
    found = {key: skewed_mean_interval(part, tail) for key, part in of_rows.items() if np.isfinite(part).all()}
    low, high = skewed_mean_interval(rows.residuals**2, tail)
    found["rmse"] = math.sqrt(max(low, 0.0)), math.sqrt(max(high, 0.0))
    if "r2" in found:
        found["r2"] = found["r2"][0], min(found["r2"][1], 1.0)
    for key in LEVELS:
        lows, highs = wilson_interval(of_rows[key].sum(keepdims=True), np.array([len(rows.mean)]), level)
        found[key] = float(lows[0]), float(highs[0])
    return {
        key: (max(low, 0.0) if key in ("mae", "crps", "mean_sd") else low, high) for key, (low, high) in found.items()
    }


def _distance(transform: np.ndarray) -> tuple[float, float]:
    """Kolmogorov and Smirnov's distance from the uniform distribution, and its p-value."""
    from scipy.stats import kstest  # half a second to import

    found = kstest(transform, "uniform")
    return float(found.statistic), float(found.pvalue)


def _floor(size: int, level: float) -> NoiseFloor:
    """Where distance and coverages fall if every value is drawn from its Gaussian."""
    from scipy.stats import binom, kstwo

    tail = 0.5 * (1.0 - level)
    distance = kstwo(size)
    found = {"pit_ks": Band(float(distance.mean()), float(distance.ppf(tail)), float(distance.ppf(1.0 - tail)))}
    for key, share in LEVELS.items():
        ends = binom.ppf([tail, 1.0 - tail], size, share) / size
        found[key] = Band(share, float(ends[0]), float(ends[1]))
    return found
