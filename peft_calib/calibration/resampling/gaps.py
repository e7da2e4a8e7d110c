r"""How far the scores of groups of rows lie from those of all rows, with intervals that hold for all groups at once.

Rows are resampled inside their groups, so that every group keeps its size, and the score of a group and that of all
rows come from the same resamples: one tells how much they go together, `r`. The interval of a gap is made of the two
scores' own, which know about floors, ceilings and noise that only adds (Zou & Donner, 2008): with arms `a` of the
group's and `b` of the whole's interval towards and away from the gap, :math:`\sqrt{a^2 - 2 r a b + b^2}`.

Each arm is then stretched from one interval's quantile to that of the largest of all groups' standardised gaps in the
resamples, in few rows' Student distribution. No arm is shorter than that many standard errors of the gap itself in the
resamples: a skewed score's short arm is right for the score, and too short for the difference of two such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from ..inputs import Rows
from .intervals import bootstrap_counts, weighted_draws
from .ranked import Interval


class Gap(NamedTuple):
    """A group's score minus that of all rows; NaN ends where there is no interval."""

    gap: float
    low: float
    high: float


class Draws(NamedTuple):
    """One score in the same resamples."""

    groups: np.ndarray  # `(G, R)` of each group
    whole: np.ndarray  # `(R,)` of all rows


def stratified_draws(
    rows: Rows,
    groups: Sequence[np.ndarray],
    measured: Sequence[int],
    *,
    num_bins: int,
    num_resamples: int,
    seed: int,
    scores: Sequence[str],
) -> dict[str, Draws]:
    """Scores of some groups and of all rows in resamples that keep the size of every group.

    Args:
        rows: All rows.
        groups: Indices of each group's rows, which together are all.
        measured: The groups whose scores are wanted.
        num_bins: Bins of every binned score.
        num_resamples: R.
        seed: Of the private generators, one a group.
        scores: Keys of a report.
    """
    counts = np.empty((len(rows.labels), num_resamples), np.uint8)
    for index, members in enumerate(groups):
        counts[members] = bootstrap_counts(np.random.default_rng([seed, 5, index]), len(members), num_resamples)
    whole = weighted_draws(rows, counts, num_bins=num_bins, scores=scores)
    parts = [
        weighted_draws(part_of(rows, groups[index]), counts[groups[index]], num_bins=num_bins, scores=scores)
        for index in measured
    ]
    return {key: Draws(np.stack([part[key] for part in parts]), whole[key]) for key in whole}


def part_of(rows: Rows, members: np.ndarray) -> Rows:
    """Some of the rows."""
    return rows._replace(probabilities=rows.probabilities[members], labels=rows.labels[members], kept=None)


def simultaneous_gaps(
    group: Sequence[tuple[float, Interval]],
    whole: tuple[float, Interval],
    sizes: Sequence[int],
    draws: Draws,
    level: float,
    asked: float,
    num_rows: int,
) -> list[Gap]:
    """The gap of one score for each group, in intervals that hold all true gaps with probability `asked`.

    Args:
        group: Score and interval of each group.
        whole: Those of all rows.
        sizes: Rows of each group.
        draws: The score in the same resamples.
        level: Confidence level of the given intervals, each by itself.
        asked: Confidence level of all gaps together.
        num_rows: All rows, those of groups without an interval among them.
    """
    reach = largest_deviation(draws, asked)
    value, (low, high) = whole
    gaps = []
    for index, (score, (group_low, group_high)) in enumerate(group):
        if sizes[index] == num_rows:
            gaps.append(Gap(score - value, 0.0, 0.0))  # the group is all rows
            continue
        shared = correlation(draws.groups[index], draws.whole)
        wider = stretch(reach, level, sizes[index])
        least = quantile_of(reach, sizes[index]) * standard_error(draws.groups[index] - draws.whole)
        down = max(wider * _together(score - group_low, high - value, shared), least)
        up = max(wider * _together(group_high - score, value - low, shared), least)
        gaps.append(Gap(score - value, score - value - down, score - value + up))
    return gaps


def largest_deviation(draws: Draws, level: float) -> float:
    """The quantile of the largest standardised deviation of any group's gap; never below that of a single one."""
    gaps = draws.groups - draws.whole
    gaps = gaps[np.isfinite(gaps).mean(axis=1) > 0.5]
    single = float(ndtri(0.5 + 0.5 * level))
    if not len(gaps):
        return single
    deviation = gaps - np.nanmean(gaps, axis=1, keepdims=True)
    error = np.nanstd(gaps, axis=1, keepdims=True)
    varies = error[:, 0] > 1e-12
    if not varies.any():
        return float(ndtri(1.0 - 0.5 * (1.0 - level) / len(draws.groups)))
    largest = np.nanmax(np.abs(deviation[varies]) / error[varies], axis=0, initial=0.0)
    return max(single, float(np.quantile(largest, level)))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two scores over resamples; 0 where one does not vary."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or a[both].std() < 1e-12 or b[both].std() < 1e-12:
        return 0.0
    return float(np.corrcoef(a[both], b[both])[0, 1])


def stretch(reach: float, level: float, size: int) -> float:
    """By how much the arms of one interval at `level` grow to lie `reach` normal deviates away, for `size` rows."""
    return quantile_of(reach, size) / float(stdtrit(max(size - 1, 1), 0.5 + 0.5 * level))


def quantile_of(reach: float, size: int) -> float:
    """Student's quantile for `size` rows, as improbable as `reach` normal deviates."""
    return float(stdtrit(max(size - 1, 1), ndtr(reach)))


def standard_error(values: np.ndarray) -> float:
    """Of a score over resamples; 0 where it is not defined."""
    values = values[np.isfinite(values)]
    return float(values.std()) if len(values) else 0.0


def _together(a: float, b: float, shared: float) -> float:
    a, b = max(a, 0.0), max(b, 0.0)
    return float(np.sqrt(max(a * a - 2.0 * shared * a * b + b * b, 0.0)))


def worst_of(gaps: Mapping[str, Gap], better: str | None) -> str | None:
    """The group whose gap is the largest in the worse direction, or in either where none is better."""
    sign = {"high": -1.0, "low": 1.0}
    known = {name: gap.gap for name, gap in gaps.items() if np.isfinite(gap.gap)}
    if not known:
        return None
    return max(known, key=lambda name: abs(known[name]) if better is None else sign[better] * known[name])


def is_worse(gap: Gap, better: str | None) -> bool:
    """Whether the whole interval lies on the worse side of 0."""
    return gap.low > 0.0 if better == "low" else gap.high < 0.0 if better == "high" else False
