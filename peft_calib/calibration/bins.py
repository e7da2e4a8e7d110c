"""The only kernel: rows in, sufficient statistics out, in one pass, in float64 sums and int64 counts.

Uniform (equal-width) bins are `(lo, hi]` with the first closed at zero. Equal-mass bins hold *exactly* `N / num_bins`
rows each: the row on a boundary is split between its two bins, and tied values are spread evenly. That makes them
independent of the order of the rows and of how often the data are repeated, which splitting by rank is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Rows handled at once: the working set of a chunk stays in a core's own cache.
CHUNK = 1 << 13
# Rows at least, however many classes: what a chunk costs by class is shared by so many.
FEWEST_ROWS = 16


@dataclass(frozen=True)
class BinStatistics:
    """What every binned score needs to know, additive over batches and ranks."""

    counts: np.ndarray  # `(..., B)` rows in each bin; int64 for uniform bins, float64 (mass) for equal-mass bins
    confidence_sums: np.ndarray  # `(..., B)` float64 sums of the predicted probability
    outcome_sums: np.ndarray  # `(..., B)` float64 sums of the outcome (1 where the event happened)

    def __add__(self, other: BinStatistics) -> BinStatistics:
        return BinStatistics(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __getitem__(self, index: int) -> BinStatistics:
        return BinStatistics(self.counts[index], self.confidence_sums[index], self.outcome_sums[index])

    @property
    def weights(self) -> np.ndarray:
        """`(..., B)` share of the rows in each bin; zeros for a group without rows."""
        total = self.counts.sum(axis=-1, keepdims=True)
        return np.divide(self.counts, total, out=np.zeros(self.counts.shape), where=total > 0)

    @property
    def confidence(self) -> np.ndarray:
        """`(..., B)` mean predicted probability, NaN in an empty bin."""
        return _divide(self.confidence_sums, self.counts)

    @property
    def outcome(self) -> np.ndarray:
        """`(..., B)` observed frequency, NaN in an empty bin."""
        return _divide(self.outcome_sums, self.counts)

    @property
    def gaps(self) -> np.ndarray:
        """`(..., B)` mean confidence minus frequency, positive where over-confident, 0 in an empty bin."""
        return np.nan_to_num(_divide(self.confidence_sums - self.outcome_sums, self.counts))


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows grouped by distinct value, ascending: the exact form of an equal-mass sketch."""

    counts: np.ndarray  # `(G,)` rows with that value (or in that cell)
    value_sums: np.ndarray  # `(G,)` float64 sum of the values
    outcome_sums: np.ndarray  # `(G,)` float64 sum of the outcomes

    @cached_property
    def up_to(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(G + 1,)` float64 sums of rows, values and outcomes below each group, and of all."""
        rows, values, outcomes = np.zeros((3, len(self.counts) + 1))
        np.cumsum(self.counts, out=rows[1:])
        np.cumsum(self.value_sums, out=values[1:])
        np.cumsum(self.outcome_sums, out=outcomes[1:])
        return rows, values, outcomes


# Bins are found by multiplication with a little less than their number, so that a value on an edge, or an ulp from
# it, always lands below the whole number. Products so near below one are looked up among the edges.
SHRINK, NEAR = 1e-10, 1e-9


def uniform_edges(num_bins: int) -> np.ndarray:
    """`(num_bins + 1,)` float64 edges from 0 to 1."""
    return np.linspace(0.0, 1.0, num_bins + 1)


def uniform_index(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Index of the `(lo, hi]` bin of each value in [0, 1], the first bin closed at zero.

    `ceil(v * B) - 1` is only a guess (0.8 * 15 is not 12), held against the edges: a fifth of a binary search's time.
    """
    edges = uniform_edges(num_bins)
    index = np.ceil(values * num_bins).astype(np.int64)
    index -= 1
    np.clip(index, 0, num_bins - 1, out=index)
    index += values > edges[1:][index]
    index -= values <= edges[index]
    return np.clip(index, 0, num_bins - 1, out=index)


def accumulate(index: np.ndarray, values: np.ndarray, outcomes: np.ndarray, num_bins: int) -> BinStatistics:
    """`(num_bins,)` statistics of rows whose bins are known."""
    return BinStatistics(
        np.bincount(index, minlength=num_bins),
        np.bincount(index, weights=values, minlength=num_bins),
        np.bincount(index, weights=outcomes, minlength=num_bins),
    )


def uniform_bins(values: np.ndarray, outcomes: np.ndarray, num_bins: int) -> BinStatistics:
    """Equal-width sufficient statistics of `(N,)` values and outcomes, chunk by chunk."""
    total = _zeros((num_bins,))
    for start in range(0, len(values), CHUNK):
        part, happened = values[start : start + CHUNK], outcomes[start : start + CHUNK]
        total = total + accumulate(uniform_index(part, num_bins), part, happened, num_bins)
    return total


def classwise_uniform_bins(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> BinStatistics:
    """`(C, num_bins)` equal-width statistics of each class column against `labels == class`."""
    num_classes = probabilities.shape[1]
    cells = num_classes * num_bins
    counts, sums, hits = np.zeros(cells, np.int64), np.zeros(cells), np.zeros(cells)
    rows = max(FEWEST_ROWS, CHUNK // num_classes)
    offsets = np.arange(num_classes)[:, None] * num_bins
    for start in range(0, len(labels), rows):
        columns = np.ascontiguousarray(probabilities[start : start + rows].T)
        index = uniform_index(columns.reshape(-1), num_bins).reshape(columns.shape)
        index += offsets
        counts += np.bincount(index.reshape(-1), minlength=cells)
        sums += np.bincount(index.reshape(-1), weights=columns.reshape(-1), minlength=cells)
        label = labels[start : start + rows]
        hits += np.bincount(index[label, np.arange(len(label))], minlength=cells)
    shape = (num_classes, num_bins)
    return BinStatistics(counts.reshape(shape), sums.reshape(shape), hits.reshape(shape))


def columnwise_uniform_bins(probabilities: np.ndarray, outcomes: np.ndarray, num_bins: int) -> BinStatistics:
    """`(L, num_bins)` equal-width statistics of each column against its own outcomes, of which any may be 1."""
    parts = [uniform_bins(p, y, num_bins) for p, y in zip(probabilities.T, outcomes.T, strict=True)]
    return BinStatistics(*(np.stack(of) for of in zip(*(vars(part).values() for part in parts), strict=True)))


def tie_key(values: np.ndarray) -> np.ndarray:
    """Float64 values with the lowest mantissa bit cleared: values with the same key count as tied."""
    keys = np.add(values, 0.0, dtype=np.float64).view(np.int64)  # a copy, and -0.0 becomes 0.0
    keys &= ~1
    return keys.view(np.float64)


# A value's distance from the nearer end of [0, 1] is told apart down to this.
FINEST = np.float32(2.0**-30)


def cells_of(values: np.ndarray, fineness: int) -> np.ndarray:
    """The uint16 cell of each value in [0, 1]: the leading bits of its distance from the nearer end.

    So each octave of that distance has `2 ** fineness` (at most 2 ** 9) cells, and they narrow towards the ends, where
    models keep theirs. A greater value is never in an earlier cell; what counts as tied is in one.
    """
    cells = np.empty(len(values), np.uint16)
    first, last = np.array(FINEST).view(np.int32) >> 23 - fineness, num_cells(fineness) - 1
    for start in range(0, len(values), CHUNK):
        # what counts as tied becomes equal first; then rounding keeps the order
        keys = (values[start : start + CHUNK].view(np.int64) & ~1).view(np.float64).astype(np.float32)
        distance = np.float32(1.0) - keys
        upper = distance < np.float32(0.5)
        np.minimum(distance, keys, out=distance)
        np.maximum(distance, FINEST, out=distance)
        index = distance.view(np.int32)
        index >>= 23 - fineness
        index -= first + last * upper.astype(np.int32)
        cells[start : start + CHUNK] = np.abs(index, out=index)
    return cells


def num_cells(fineness: int) -> int:
    """How many cells there are: those of the lower half, the one of a half, and those of the upper."""
    return 2 * (29 << fineness) + 1


def ascending(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sorts int64 keys that are in the order of their values, cell by cell: half the time of one sort of many."""
    if len(keys) < 1 << 16:
        return np.sort(keys)
    cells = cells_of(values, 6)
    keys = keys[np.argsort(cells, kind="stable")]
    start = 0
    for end in np.cumsum(np.bincount(cells)).tolist():
        keys[start:end].sort()
        start = end
    return keys


def group_by_value(values: np.ndarray, outcomes: np.ndarray) -> Groups:
    """Groups rows by distinct value in [0, 1], in ascending order.

    The outcome rides in the lowest bit of the mantissa, so one plain sort orders both; values equal but for it tie.
    """
    keys = tie_key(values).view(np.int64)
    keys |= outcomes.astype(np.int64)
    keys = ascending(keys, values)
    hits = (keys & 1).astype(np.float64)
    keys &= ~1
    new = keys[1:] != keys[:-1]
    if new.all():
        return Groups(np.ones(len(keys), np.int64), keys.view(np.float64), hits)
    starts = np.append(0, np.flatnonzero(new) + 1)
    counts = np.diff(np.append(starts, len(keys)))
    return Groups(counts, keys[starts].view(np.float64) * counts, np.add.reduceat(hits, starts))


def equal_mass_bins(groups: Groups, num_bins: int) -> BinStatistics:
    """Cuts ascending groups into bins of exactly equal mass; interpolated sums spread a group over its bins."""
    rows, values, outcomes = groups.up_to
    if rows[-1] == 0.0:
        return _zeros((num_bins,))
    targets = rows[-1] * np.arange(num_bins + 1) / num_bins
    return BinStatistics(
        np.diff(targets), np.diff(np.interp(targets, rows, values)), np.diff(np.interp(targets, rows, outcomes))
    )


def top_label(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(N,)` confidence and predicted class (the first one among equals) of each row."""
    if probabilities.shape[1] > 32:
        predicted = probabilities.argmax(axis=1)
        return np.take_along_axis(probabilities, predicted[:, None], axis=1)[:, 0], predicted
    confidence = np.empty(len(probabilities))
    predicted = np.zeros(len(probabilities), np.int64)
    for start in range(0, len(probabilities), CHUNK):
        columns = np.ascontiguousarray(probabilities[start : start + CHUNK].T)
        best, arg = columns[0].copy(), predicted[start : start + CHUNK]
        for k in range(1, len(columns)):
            np.copyto(arg, k, where=columns[k] > best)
            np.maximum(best, columns[k], out=best)
        confidence[start : start + CHUNK] = best
    return confidence, predicted


def top_outcomes(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(N,)` confidence of each row, and whether its predicted class is the label."""
    confidence, predicted = top_label(probabilities)
    return confidence, predicted == labels


def _divide(numerator: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(numerator, counts, out=np.full(np.shape(numerator), np.nan), where=counts > 0)


def _zeros(shape: tuple[int, ...]) -> BinStatistics:
    return BinStatistics(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))
