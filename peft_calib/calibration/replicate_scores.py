# SPDX-License-Identifier: Apache-2.0
"""From the sums of many replicates to their scores: the panel once more, with a last axis over replicates."""

from __future__ import annotations

import numpy as np

from peft_calib.calibration.panel import KEYS
from peft_calib.calibration.ranking_sums import RankingSums
from peft_calib.calibration.replicates import Sums
from peft_calib.calibration.smooth import smooth_error_of_grid


def replicate_scores(sums: Sums, ranking: RankingSums) -> dict[str, np.ndarray]:
    """Every score of the panel for each replicate.

    Args:
        sums: binned and row-wise sums.
        ranking: sums over rows in order of confidence.

    Returns:
        Key to `(R,)` float64, in the panel's order.
    """
    size = len(ranking.total)
    total = np.broadcast_to(sums.mass, (size,))
    brier = np.broadcast_to(sums.row[2], (size,)) / total - 2.0 * sums.of_label / total + 1.0
    values = {
        "accuracy": sums.top_hits[: sums.design.num_bins].sum(axis=0) / total,
        "nll": sums.nll / total,
        "brier": brier,
        "mean_confidence": np.broadcast_to(sums.row[0] / sums.mass, (size,)),
        "mean_entropy": np.broadcast_to(sums.row[1] / sums.mass, (size,)),
    }
    values |= _brier_parts(sums, brier)
    values |= _top_label(sums)
    values |= _classwise(sums)
    values |= ranking.scores()
    values["smooth_ece"] = smooth_error_of_grid((sums.grid / total).T, iterations=10)
    return {key: np.asarray(values[key], dtype=np.float64) for key in KEYS}


def _top_label(sums: Sums) -> dict[str, np.ndarray]:
    bins, total = sums.design.num_bins, sums.mass
    counts, gap = sums.top[:bins], sums.top_confidence - sums.top_hits
    weighted, mean_gap = gap[:bins] / total, _ratio(gap[:bins], counts)
    frequency = _ratio(sums.top_hits[:bins], counts)
    variance = frequency * (1.0 - frequency) / np.maximum(counts - 1.0, 1.0)
    debiased = np.where(counts >= 2, mean_gap**2 - variance, 0.0) * (counts / total)
    return {
        "ece": np.abs(weighted).sum(axis=0),
        "mce": np.abs(mean_gap).max(axis=0),
        "rmsce": np.sqrt((mean_gap * weighted).sum(axis=0)),
        "rmsce_debiased": np.sqrt(np.maximum(debiased.sum(axis=0), 0.0)),
        "ace": np.abs(gap[bins:] / total).sum(axis=0),
        "overconfidence": np.maximum(weighted, 0.0).sum(axis=0),
        "underconfidence": np.maximum(-weighted, 0.0).sum(axis=0),
    }


def _classwise(sums: Sums) -> dict[str, np.ndarray]:
    bins = sums.design.num_bins
    gap = np.abs(sums.column_value - sums.column_hits)
    uniform, all_mass, kept = (gap[:, i * bins : (i + 1) * bins] for i in range(3))
    kept_mass = sums.column[:, 2 * bins : 3 * bins].sum(axis=1)
    # The gaps of pooled bins add up over classes before their magnitude is taken.
    pooled = np.abs((sums.column_value - sums.column_hits)[:, 3 * bins :].sum(axis=0)).sum(axis=0)
    pooled_mass = sums.column[:, 3 * bins :].sum(axis=(0, 1))
    return {
        "classwise_ece": uniform.sum(axis=1).mean(axis=0) / sums.mass,
        "ace_classwise": all_mass.sum(axis=1).mean(axis=0) / sums.mass,
        "tace_classwise": _ratio(kept.sum(axis=1), kept_mass).mean(axis=0),
        "tace": _ratio(pooled, pooled_mass),
    }


def _brier_parts(sums: Sums, brier: np.ndarray) -> dict[str, np.ndarray]:
    bins, total = sums.design.num_bins, sums.mass
    counts, hits = sums.column[:, :bins], sums.column_hits[:, :bins]
    frequency, gap = _ratio(hits, counts), _ratio(sums.column_value[:, :bins] - hits, counts)
    share, base = counts / total, hits.sum(axis=1, keepdims=True) / total
    reliability = (share * gap**2).sum(axis=(0, 1))
    resolution = (share * (frequency - base) ** 2).sum(axis=(0, 1))
    uncertainty = (base * (1.0 - base)).sum(axis=(0, 1))
    return {
        "brier_reliability": reliability,
        "brier_resolution": resolution,
        "brier_uncertainty": uncertainty,
        "brier_within_bin": brier - (reliability - resolution + uncertainty),
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient that is zero where nothing was counted; the operands may differ in their last axis (shared sums)."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 1e-9)
