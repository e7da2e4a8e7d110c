"""Scores, intervals and noise floor of one set of rows: what a report has of all rows, and of each group."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..inputs import Rows, check_confidence_level, effective_rows
from ..resampling.intervals import (
    NoiseFloor,
    bootstrap_intervals,
    down_to_zero,
    is_carried_by_few,
    noise_floor,
    num_resamples_for,
    resampled_keys,
)
from ..resampling.ranked import Interval
from ..scores.panel import Tables, build_tables, compute_panel
from .conventions import convention_scores


@dataclass(frozen=True)
class ReportSettings:
    """How to measure; see `calibration_report` for what each option means."""

    num_bins: int
    convention: str
    confidence_level: float | None
    num_resamples: int | None
    interval_method: str
    seed: int
    scores: Collection[str] | None = None  # Of which intervals and floors are wanted; None for all that can have them


class ScoreMapping(Mapping[str, float]):
    """What has scores, as a mapping of them."""

    scores: dict[str, float]

    def __getitem__(self, key: str) -> float:
        return self.scores[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


class Measured(NamedTuple):
    """What was measured of one set of rows."""

    scores: dict[str, float]
    settings: dict[str, Any]
    intervals: dict[str, Interval] | None
    floor: NoiseFloor | None
    tables: Tables


def measured(rows: Rows, asked: ReportSettings, *, warn: bool = True) -> Measured:
    """Measures rows; `warn` says whether clipped losses are told."""
    tables = build_tables(rows, asked.num_bins)
    values = compute_panel(rows, asked.num_bins, tables, warn=warn)
    redefined = convention_scores(asked.convention, rows, asked.num_bins, values)
    settings: dict[str, Any] = {
        "num_rows": len(rows.labels),
        "num_classes": rows.num_classes,
        "num_bins": asked.num_bins,
        "convention": asked.convention,
        "confidence_level": None,
    }
    if rows.weights is not None:
        settings |= {"sum_of_weights": float(rows.weights.sum()), "effective_rows": effective_rows(rows.weights)}
    intervals = floor = None
    if asked.confidence_level is not None:
        level = check_confidence_level(asked.confidence_level)
        resamples = num_resamples_for(len(rows.labels), rows.num_classes)
        resamples = resamples if asked.num_resamples is None else asked.num_resamples
        wanted = resampled_keys(rows.num_classes) if asked.scores is None else asked.scores
        scores = [key for key in wanted if key not in redefined]
        how: dict[str, Any] = {"confidence_level": level, "num_resamples": resamples, "seed": asked.seed}
        floor = noise_floor(rows, num_bins=asked.num_bins, scores=scores, **how)
        if rows.weights is not None and is_carried_by_few(len(rows.labels), settings["effective_rows"]):
            intervals = dict.fromkeys(scores, (float("nan"), float("nan")))
        else:
            options: dict[str, Any] = {"num_bins": asked.num_bins, "scores": scores, "method": asked.interval_method}
            intervals = down_to_zero(bootstrap_intervals(rows, **options, **how), values, floor)
        settings |= {"confidence_level": asked.confidence_level, "interval_method": asked.interval_method, **how}
    return Measured(values | redefined, settings, intervals, floor, tables)
