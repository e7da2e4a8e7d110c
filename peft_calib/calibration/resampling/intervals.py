"""How sure a score is: bootstrap intervals, and the noise floor of a perfectly calibrated model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from ..bins import top_label
from ..inputs import Rows
from ..scores.binned import loss_of_label, row_brier
from ..scores.table import CALIBRATION_ERRORS, CLASSWISE_KEYS, KEYS, MOST_RESAMPLED_CLASSES, RANKED
from .bands import skewed_mean_interval, wilson_interval
from .folded import folded_interval
from .ranked import auroc_interval, one_more
from .replicate_bins import ClassSums, RowSums, SmoothSums, TopSums
from .replicate_ranking import AreaSums, DriftSums, PrecisionSums
from .replicates import BLOCK, Batch, Design


class Family(Protocol):
    """Scores that share their sums over rows."""

    keys: ClassVar[tuple[str, ...]]

    def __init__(self, design: Design, total: np.ndarray) -> None: ...
    def add(self, batch: Batch) -> None: ...
    def scores(self) -> dict[str, np.ndarray]: ...


FAMILIES: tuple[type[Family], ...] = (RowSums, TopSums, SmoothSums, ClassSums, AreaSums, PrecisionSums, DriftSums)
METHODS = ("percentile", "bca")
JACKKNIFE_GROUPS = 100
# Beyond it a quantile is the smallest or largest resample anyway, and its normal deviate no longer finite.
SMALLEST_TAIL = 1e-6
# Rows whose every swap between two models is taken.
MOST_ROWS_IN_FULL = 10
# What is left inside bins lives by bins of few rows, where it shrinks with every row that a resample has twice: its
# quantiles held the truth in 88 of 100 data sets of 100 rows, and no correction tried did better everywhere.
WITHOUT_INTERVAL = frozenset({"brier_within_bin"})
WITH_ONE_MORE = RANKED - {"error_auroc", "error_aupr"}


class Band(NamedTuple):
    """Mean and central band of a score under perfect calibration."""

    mean: float
    low: float
    high: float


NoiseFloor = Mapping[str, Band]


def num_resamples_for(num_rows: int, num_classes: int = 2) -> int:
    """Resamples that keep the cost in bounds: 1,000, falling to 200 for large `N C`."""
    return int(np.clip(4e8 // (num_rows * min(num_classes, MOST_RESAMPLED_CLASSES)), 200, 1000))


def resampled_keys(num_classes: int) -> list[str]:
    """Scores that a report of so many classes has intervals and a noise band of."""
    return [key for key in KEYS if num_classes <= MOST_RESAMPLED_CLASSES or key not in CLASSWISE_KEYS]


def bootstrap_intervals(
    rows: Rows,
    *,
    num_bins: int = 15,
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    method: str = "bca",
    scores: Sequence[str] = KEYS,
) -> dict[str, tuple[float, float]]:
    """Interval of every score, all from the same resampled rows; NaN where a score is defined in no resample.

    Scores that fold at zero, calibration errors above all, get theirs by inverting a test (see `folded`), and
    accuracy, a share, gets Wilson's, which does not end where nothing was seen to go wrong. For the others
    `"percentile"` takes quantiles of the resampled scores. `"bca"` (Efron, 1987) shifts the quantiles for bias and
    skewness, with the acceleration from a jackknife that leaves out one of 100 random groups of rows at a time. Both
    widen the tails as Student's quantile is wider than the normal one; with `"bca"` the interval of `nll` and `brier`,
    whose rows have heavy tails, also holds that of a mean with its skewness taken off. Rankings of errors live by the
    rarer of right and wrong rows: there Student's quantile is that of so many rows, the shifted quantiles never
    shorten the interval, it reaches to where one row more of that kind would take the score, and `error_auroc` has
    Wilson's form (see `ranked`). `brier_within_bin` has none.
    """
    if method not in METHODS:
        raise ValueError(f"`interval_method` must be one of {METHODS}, got {method!r}.")
    check_num_resamples(num_resamples)
    tail = 0.5 * (1.0 - confidence_level)
    sums, draws = _resampled(rows, num_bins, num_resamples, seed, scores)
    intervals: dict[str, tuple[float, float]] = {}
    for family in sums:
        if hasattr(family, "folded"):
            found = {key: item for key, item in family.folded().items() if key in draws}
            intervals |= {key: folded_interval(item, tail) for key, item in found.items()}
    if "brier_uncertainty" in intervals:
        low, high = intervals["brier_uncertainty"]
        most = 1.0 - 1.0 / rows.num_classes
        intervals["brier_uncertainty"] = (max(most - high, 0.0), most - low)
    others = {key: values for key, values in draws.items() if key not in intervals}
    intervals |= _unfolded(rows, num_bins, others, tail, seed, method)
    if "accuracy" in draws:
        right = np.array([draws["accuracy"][-1] * len(rows.labels)])
        ends = wilson_interval(np.rint(right), np.array([len(rows.labels)]), confidence_level)
        intervals["accuracy"] = float(ends[0][0]), float(ends[1][0])
    intervals |= dict.fromkeys(WITHOUT_INTERVAL, (float("nan"), float("nan")))
    return {key: intervals[key] for key in draws}


def _unfolded(
    rows: Rows, num_bins: int, drawn: dict[str, np.ndarray], tail: float, seed: int, method: str
) -> dict[str, tuple[float, float]]:
    """Quantiles of the resampled scores; a last column has those of the rows at hand."""
    wrong = int((top_label(rows.probabilities)[1] != rows.labels).sum())
    size = len(rows.labels)
    rarer = min(wrong, size - wrong)
    draws = {key: values[:-1] for key, values in drawn.items()}
    tails = {key: _student_tail(tail, rarer if key in RANKED and rarer > 1 else size) for key in draws}
    intervals = {key: _quantiles(values, (tails[key], 1.0 - tails[key])) for key, values in draws.items()}
    if method == "bca" and size >= 2 and draws:
        for key, levels in _bca_levels(rows, num_bins, draws, tails, seed).items():
            low, high = _quantiles(draws[key], levels)
            plain = intervals[key] if key in RANKED else (low, high)
            intervals[key] = min(plain[0], low), max(plain[1], high)
        intervals |= _of_means(rows, intervals, tail)
    for key in sorted(WITH_ONE_MORE & set(draws)):
        if np.isfinite(drawn[key][-1]):
            intervals[key] = _with_one_more(intervals[key], draws[key], key, wrong, size, tail, seed)
    if "error_auroc" in draws and rarer:
        variance = float(np.nanvar(draws["error_auroc"]))
        intervals["error_auroc"] = auroc_interval(float(drawn["error_auroc"][-1]), variance, rarer, size, tail)
    return intervals


def _with_one_more(
    interval: tuple[float, float], draws: np.ndarray, key: str, wrong: int, num_rows: int, tail: float, seed: int
) -> tuple[float, float]:
    """Takes an interval to where one row more of the rarer kind would: a wrong one upwards, a right one downwards."""
    falls = key == "success_aupr"
    low, high = (1.0 - interval[1], 1.0 - interval[0]) if falls else interval
    errors = 1.0 - draws[np.isfinite(draws)] if falls else draws
    if 2 * wrong <= num_rows:
        high = max(high, min(float(np.quantile(one_more(errors, key, num_rows, seed), 1.0 - tail)), 1.0))
    else:
        low = min(low, max(1.0 - float(np.quantile(one_more(1.0 - errors, key, num_rows, seed), 1.0 - tail)), 0.0))
    return (1.0 - high, 1.0 - low) if falls else (low, high)


def _of_means(rows: Rows, intervals: dict[str, tuple[float, float]], tail: float) -> dict[str, tuple[float, float]]:
    """Those of `nll` and `brier`, which also hold the interval of a mean with its skewness taken off."""
    found = {}
    if "nll" in intervals:
        of_label = rows.probabilities[np.arange(len(rows.labels)), rows.labels]
        found["nll"] = _both(intervals["nll"], skewed_mean_interval(loss_of_label(of_label), tail), np.inf)
    if "brier" in intervals:
        of_rows = row_brier(rows.probabilities, rows.labels)
        found["brier"] = _both(intervals["brier"], skewed_mean_interval(of_rows, tail), 2.0)
    return found


def _both(one: tuple[float, float], other: tuple[float, float], most: float) -> tuple[float, float]:
    """The hull of two intervals of a score in `[0, most]`."""
    return max(min(one[0], other[0]), 0.0), min(max(one[1], other[1]), most)


def _student_tail(tail: float, num_rows: int) -> float:
    """The tail of the normal distribution beyond Student's quantile, as far out as a mean of few rows may lie."""
    if num_rows < 2:
        return tail
    reach = float(stdtrit(num_rows - 1, 1.0 - tail)) * np.sqrt(num_rows / (num_rows - 1.0))
    return max(float(ndtr(-reach)), SMALLEST_TAIL)


def down_to_zero(
    intervals: Mapping[str, tuple[float, float]], scores: Mapping[str, float], floor: NoiseFloor
) -> dict[str, tuple[float, float]]:
    """Holds the intervals of calibration errors against the noise floor of the same level.

    They begin at 0 where the score lies inside the noise band, as the data then cannot tell the error from none; and
    they reach at least to the mean of that band, because an error of its size cannot be told from none either.
    """
    held = dict(intervals)
    for key in CALIBRATION_ERRORS & set(intervals):
        low, high = intervals[key]
        held[key] = (0.0 if scores[key] <= floor[key].high else low, max(high, floor[key].mean))
    return held


def bootstrap_draws(
    rows: Rows, *, num_bins: int = 15, num_resamples: int = 1000, seed: int = 0, scores: Sequence[str] = KEYS
) -> dict[str, np.ndarray]:
    """The `(R,)` resampled scores, of the same rows for every model with as many and the same seed: a pairing."""
    check_num_resamples(num_resamples)
    return {key: values[:-1] for key, values in _resampled(rows, num_bins, num_resamples, seed, scores)[1].items()}


def _resampled(
    rows: Rows, num_bins: int, num_resamples: int, seed: int, scores: Sequence[str]
) -> tuple[list[Family], dict[str, np.ndarray]]:
    """Sums and scores of the resamples and, in a last column, of the rows at hand, by the same arithmetic."""
    families, design = _families(rows, num_bins, scores)
    counts = bootstrap_counts(np.random.default_rng([seed, 0]), design.num_rows, num_resamples)
    counts = np.concatenate([counts, np.ones((design.num_rows, 1), counts.dtype)], axis=1)
    total = np.full(num_resamples + 1, design.num_rows)
    weights = (counts[design.order[block]] for block in design.blocks())
    sums = _weighted_sums(design, total, weights, families)
    return sums, _collected(sums, scores)


def swapped_draws(
    a: Rows, b: Rows, *, num_bins: int = 15, num_resamples: int = 1000, seed: int = 0, scores: Sequence[str] = KEYS
) -> dict[str, np.ndarray]:
    """Differences of two models' scores when rows change sides at random: key to `(1 + R,)`, the models' own first.

    If it makes no difference which of the two a row's prediction comes from, all of them are equally likely, however
    few rows there are. Up to ten rows every way of swapping is taken, once each.
    """
    both = Rows(np.concatenate([a.probabilities, b.probabilities]), np.concatenate([a.labels, b.labels]))
    families, design = _families(both, num_bins, scores)
    size = len(a.labels)
    if size <= MOST_ROWS_IN_FULL:
        swapped = (np.arange(2**size) >> np.arange(size)[:, None]) & 1
    else:
        swapped = np.random.default_rng([seed, 3]).integers(0, 2, (size, num_resamples), dtype=np.uint8)
        swapped = np.concatenate([np.zeros((size, 1), np.uint8), swapped], axis=1)
    swapped = swapped.astype(np.uint8)
    # One side in the first half of the columns, what is left for the other in the second.
    weights = np.concatenate([np.concatenate([1 - swapped, swapped]), np.concatenate([swapped, 1 - swapped])], axis=1)
    total = np.full(weights.shape[1], size)
    sums = _weighted_sums(design, total, (weights[design.order[i]] for i in design.blocks()), families)
    values = _collected(sums, scores)
    half = swapped.shape[1]
    return {key: value[:half] - value[half:] for key, value in values.items()}


def noise_floor(
    rows: Rows,
    *,
    num_bins: int = 15,
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    scores: Sequence[str] = KEYS,
) -> dict[str, Band]:
    """What each score would be if the model were perfectly calibrated with just these predictions: its mean and band.

    Labels are redrawn from the predicted distributions, `y_i ~ p_i`, and the scores taken again. A calibration error
    inside the band cannot be told from zero on this many rows.
    """
    draws = perfect_draws(rows, num_bins=num_bins, num_resamples=num_resamples, seed=seed, scores=scores)
    tail = 0.5 * (1.0 - confidence_level)
    return {key: Band(_mean(values), *_quantiles(values, (tail, 1.0 - tail))) for key, values in draws.items()}


def perfect_draws(
    rows: Rows, *, num_bins: int = 15, num_resamples: int = 1000, seed: int = 0, scores: Sequence[str] = KEYS
) -> dict[str, np.ndarray]:
    """Scores under redrawn labels `y_i ~ p_i`: key to `(R,)` float64."""
    check_num_resamples(num_resamples)
    families, design = _families(rows, num_bins, scores)
    generator = np.random.default_rng([seed, 1])
    sums = [family(design, np.full(num_resamples, design.num_rows)) for family in families]
    for block in design.blocks():
        labels = _drawn_labels(generator, design.probabilities[block], num_resamples)
        correct = (labels == design.predicted[block, None]).astype(np.float32)
        batch = Batch(block, np.ones((len(labels), 1), np.float32), correct, labels)
        for family in sums:
            family.add(batch)
    return _collected(sums, scores)


def check_num_resamples(num_resamples: int) -> None:
    """Raises ValueError for fewer than 20 resamples, too few for any quantile."""
    if isinstance(num_resamples, bool) or not isinstance(num_resamples, (int, np.integer)) or num_resamples < 20:
        raise ValueError(f"`num_resamples` must be an integer of at least 20 (1000 is usual), got {num_resamples!r}.")


def bootstrap_counts(generator: np.random.Generator, num_rows: int, num_resamples: int) -> np.ndarray:
    """`(N, R)` uint8 how often each row is drawn in each resample: every column is multinomial and sums to N."""
    sizes = [min(BLOCK, num_rows - start) for start in range(0, num_rows, BLOCK)]
    shares = generator.multinomial(num_rows, np.asarray(sizes) / num_rows, size=num_resamples)
    counts = np.empty((num_rows, num_resamples), np.uint8)
    replicates = np.arange(num_resamples)
    for block, size in enumerate(sizes):
        cells = np.repeat(replicates * size, shares[:, block])
        cells += generator.integers(0, size, size=len(cells), dtype=np.uint16)
        drawn = np.bincount(cells, minlength=num_resamples * size).reshape(num_resamples, size)
        counts[block * BLOCK : block * BLOCK + size] = drawn.astype(np.uint8).T
    return counts


def _families(rows: Rows, num_bins: int, scores: Sequence[str]) -> tuple[list[type[Family]], Design]:
    """The sums that these scores need, and the rows prepared for them."""
    families = [family for family in FAMILIES if set(family.keys) & set(scores)]
    return families, Design(rows, num_bins, classwise=ClassSums in families)


def _weighted_sums(
    design: Design, total: np.ndarray, weights: Iterable[np.ndarray], families: list[type[Family]]
) -> list[Family]:
    sums = [family(design, total) for family in families]
    right = (design.predicted == design.labels).astype(np.float32)[:, None]
    for block, counts in zip(design.blocks(), weights, strict=True):
        weight = counts.astype(np.float32)
        batch = Batch(block, weight, weight * right[block], None)
        for family in sums:
            family.add(batch)
    return sums


def _collected(sums: Sequence[Family], scores: Sequence[str]) -> dict[str, np.ndarray]:
    values = {key: value for family in sums for key, value in family.scores().items()}
    return {key: np.asarray(values[key], dtype=np.float64) for key in KEYS if key in set(scores)}


def _bca_levels(
    rows: Rows, num_bins: int, draws: dict[str, np.ndarray], tails: dict[str, float], seed: int
) -> dict[str, tuple[float, float]]:
    """BCa levels of each score, the acceleration from leaving out one of 100 random groups of rows at a time."""
    families, design = _families(rows, num_bins, tuple(draws))
    groups = min(JACKKNIFE_GROUPS, design.num_rows)
    member = np.random.default_rng([seed, 2]).permutation(design.num_rows) % groups
    # A last column leaves nothing out: the score itself, by the same arithmetic.
    total = design.num_rows - np.append(np.bincount(member, minlength=groups), 0)
    weights = (member[design.order[block], None] != np.arange(groups + 1) for block in design.blocks())
    scores = _collected(_weighted_sums(design, total, weights, families), tuple(draws))
    return {key: bca_level(draws[key], float(scores[key][-1]), scores[key][:-1], tails[key]) for key in draws}


def bca_level(draws: np.ndarray, point: float, left_out: np.ndarray, tail: float) -> tuple[float, float]:
    """The two quantile levels of a BCa interval (Efron, 1987), by `(G,)` scores with one group of rows left out.

    They are `(tail, 1 - tail)` when there is neither bias nor skewness.
    """
    draws, left_out = draws[np.isfinite(draws)], left_out[np.isfinite(left_out)]
    if len(draws) == 0 or len(left_out) < 2:
        return tail, 1.0 - tail
    below = ((draws < point).sum() + 0.5 * (draws == point).sum()) / len(draws)
    bias = ndtri(np.clip(below, 0.5 / len(draws), 1.0 - 0.5 / len(draws)))
    deviation = left_out.mean() - left_out
    spread = (deviation**2).sum()
    acceleration = (deviation**3).sum() / (6.0 * spread**1.5) if spread > 0 else 0.0
    z = bias + ndtri([tail, 1.0 - tail])
    stretch = 1.0 - acceleration * z
    if (stretch <= 0.0).any():  # too skewed for the formula, whose quantiles would change places
        return tail, 1.0 - tail
    low, high = ndtr(bias + z / stretch)
    return float(low), float(high)


def _drawn_labels(generator: np.random.Generator, probabilities: np.ndarray, num_resamples: int) -> np.ndarray:
    """`(n, R)` labels from each row's distribution, by inverting its cumulative sum."""
    size, classes = probabilities.shape
    uniform = generator.random((size, num_resamples), dtype=np.float32)
    if classes > 16:
        # A row at a time: together they would take as much memory as the predictions.
        rows = zip(map(np.cumsum, probabilities), uniform, strict=True)
        return np.stack([np.searchsorted(c[:-1] / c[-1], u, side="right") for c, u in rows])
    cumulative = np.cumsum(probabilities, axis=1)
    cumulative /= cumulative[:, -1:]
    labels = np.zeros(uniform.shape, np.int8)
    for k in range(classes - 1):
        labels += uniform >= cumulative[:, k, None].astype(np.float32)
    return labels


def _quantiles(values: np.ndarray, levels: tuple[float, float]) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(values, levels)
    return float(low), float(high)


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
