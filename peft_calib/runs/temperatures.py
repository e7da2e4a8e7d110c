"""Temperatures of a run: fitted on its calibration rows, with an interval, and left off where that holds 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..calibration import TemperatureScaling
from ..calibration.fingerprint import SplitFingerprint
from ..calibration.recalibrate.temperature import BOUNDS, FEWEST_ROWS, TemperatureFit
from ..calibration.recalibrate.temperature_fit import LEVEL, judged

RESAMPLES = 1000


def class_temperature(logits: Any, labels: Any) -> TemperatureScaling:
    """A temperature on held-out rows; on too few of them none, instead of an error after hours of training."""
    if len(labels) >= FEWEST_ROWS:
        return TemperatureScaling().fit(logits, labels)
    values = np.asarray(logits, np.float64)
    scaling = TemperatureScaling()
    scaling.num_classes = values.shape[1]
    scaling.fitted_on = SplitFingerprint.of(values, np.asarray(labels))
    scaling.temperature, scaling.fit_result = 1.0, _too_few(len(labels), "rows")
    return scaling


def text_temperature(temperatures: np.ndarray, losses: np.ndarray) -> TemperatureFit:
    """A temperature over a vocabulary, from each text's summed loss at each temperature tried, (N, T)."""
    if len(losses) < FEWEST_ROWS:
        return _too_few(len(losses), "texts")
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(losses), np.full(len(losses), 1 / len(losses)), size=RESAMPLES)
    drawn = temperatures[(weights @ losses).argmin(1)]
    best = float(temperatures[losses.sum(0).argmin()])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    ends = max(min(float(low), best), BOUNDS[0]), min(max(float(high), best), BOUNDS[1])
    return judged(best, ends, len(losses))


def shown(fit: Mapping[str, Any] | None, temperature: float) -> str:
    """A temperature for the head of a column: with its interval, or that there is none."""
    if fit is None:  # of an earlier release
        return f"T = {temperature:.2f}"
    if not fit["applied"]:
        return "T left off"
    return f"T = {temperature:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"


def _too_few(num_rows: int, what: str) -> TemperatureFit:
    reason = f"No temperature is fitted: it takes {FEWEST_ROWS} {what}, and there are {num_rows}."
    return TemperatureFit(1.0, *BOUNDS, num_rows, False, None, reason)
