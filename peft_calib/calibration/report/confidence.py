"""Measures one number a prediction that says how likely it is right, from wherever it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bins import group_by_value, uniform_bins
from ..inputs import Rows, as_numpy, check_confidence_level, check_num_bins, check_seed
from ..resampling.intervals import NoiseFloor, bootstrap_intervals, down_to_zero, noise_floor, num_resamples_for
from ..resampling.ranked import Interval
from ..scores.binned import scores_of_bins
from ..scores.panel import panel_of, scores_of_groups
from ..scores.table import keys_from
from .measured import ScoreMapping

#: Scores of a confidence that resamples give an interval of.
RESAMPLED = (*keys_from("top"), *keys_from("smooth"), *keys_from("areas"), *keys_from("precisions"), "brier")


@dataclass(frozen=True, eq=False)
class ConfidenceReport(ScoreMapping):
    """Every score of a confidence, with its interval and the score of a perfectly calibrated one.

    As a mapping it holds the scores alone; `to_dict` has everything.

    Attributes:
        scores: `ece`, `ace`, `error_auroc`, `aurc` and the others of `scores.table.DEFINITIONS` that follow from how
            sure and how right predictions are; `brier` is the mean of `(confidence - correct)^2`, in [0, 1].
        settings: What the numbers depend on: rows, errors, bins, resamples, seed.
        intervals: Key to `(low, high)`, or None if none were asked for.
        floor: Mean and band of the calibration errors under perfect calibration, or None likewise.
    """

    scores: dict[str, float]
    settings: dict[str, Any]
    intervals: dict[str, Interval] | None
    floor: NoiseFloor | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `CalibrationReport.to_dict` has them."""
        floor = None if self.floor is None else {key: band._asdict() for key, band in self.floor.items()}
        intervals = None if self.intervals is None else {key: list(ends) for key, ends in self.intervals.items()}
        return {**self.scores, "settings": dict(self.settings), "intervals": intervals, "noise_floor": floor}


def confidence_report(
    confidence: Any,
    correct: Any,
    *,
    num_bins: int = 15,
    confidence_level: float | None = 0.95,
    num_resamples: int | None = None,
    interval_method: str = "bca",
    seed: int = 0,
) -> ConfidenceReport:
    """Measures a confidence that is no class probability, such as one minus the P(error) of an uncertainty head.

    Args:
        confidence: `(N,)` probabilities that predictions are right, in [0, 1].
        correct: `(N,)` bool, or zeros and ones, which of them are.
        num_bins: Bins of every binned score, over [0, 1].
        confidence_level: Level of the intervals and of the noise band; None computes neither.
        num_resamples: Bootstrap resamples; by default 1,000, fewer above 10^5 rows.
        interval_method: `"bca"` or `"percentile"`.
        seed: Of the private generator of the intervals and of the floor.

    Raises:
        ValueError: If the two are not paired, not probabilities, or not zeros and ones.

    Example:
        >>> report = confidence_report([0.9, 0.6, 0.2], [1, 1, 0], confidence_level=None)
        >>> report["error_auroc"], round(report["brier"], 2)
        (1.0, 0.07)
    """
    num_bins = check_num_bins(num_bins)
    seed = check_seed(seed)
    sure, right = _checked(confidence, correct)
    groups, bins = group_by_value(sure, right), uniform_bins(sure, right.astype(np.float64), num_bins)
    means = {"accuracy": right.mean(), "mean_confidence": sure.mean(), "brier": ((sure - right) ** 2).mean()}
    scores = panel_of(means, scores_of_bins(bins), scores_of_groups(groups, num_bins))
    settings: dict[str, Any] = {"num_rows": len(right), "num_errors": int((~right).sum()), "num_bins": num_bins}
    settings["confidence_level"] = confidence_level
    if confidence_level is None:
        return ConfidenceReport(scores, settings, None, None)
    resamples = num_resamples_for(len(right)) if num_resamples is None else num_resamples
    how: dict[str, Any] = {"confidence_level": check_confidence_level(confidence_level), "num_resamples": resamples}
    how |= {"seed": seed, "num_bins": num_bins, "scores": RESAMPLED}
    rows = Rows(np.stack([1.0 - sure, sure], axis=1), right.astype(np.int64), against_rest=True)
    floor = noise_floor(rows, **how)
    intervals = down_to_zero(bootstrap_intervals(rows, method=interval_method, **how), scores, floor)
    low, high = intervals["brier"]
    intervals["brier"] = 0.5 * low, 0.5 * high  # two equal columns
    settings |= {"interval_method": interval_method, "num_resamples": resamples, "seed": seed}
    return ConfidenceReport(scores, settings, intervals, {key: floor[key] for key in floor if key != "brier"})


def _checked(confidence: Any, correct: Any) -> tuple[np.ndarray, np.ndarray]:
    """Confidence as float64 and correctness as bool, of the same rows."""
    sure, right = as_numpy(confidence, "confidence").astype(np.float64), as_numpy(correct, "correct")
    if sure.ndim != 1 or right.shape != sure.shape or not len(sure):
        raise ValueError(
            f"confidence and correct must be 1-D, paired and not empty, got {sure.shape} and {right.shape}."
        )
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError(f"confidence must lie in [0, 1], got {sure.min():.6g} to {sure.max():.6g}.")
    if not np.isin(right, (0, 1)).all():
        raise ValueError("correct must be booleans or zeros and ones (1 where the prediction is right).")
    return sure, right.astype(bool)
