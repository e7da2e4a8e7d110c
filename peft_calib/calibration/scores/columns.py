"""Bins of every class column, equal-width and equal-mass, without putting all rows in order.

A score over bins needs the order of rows only where a bin ends. So each column is distributed over fine cells of
[0, 1] in one pass, and only the rows of cells in which some bin ends are sorted. The numbers are those of a full sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..bins import (
    BinStatistics,
    Groups,
    cells_of,
    classwise_uniform_bins,
    equal_mass_bins,
    group_by_value,
    num_cells,
    uniform_bins,
    uniform_edges,
    uniform_index,
)
from ..inputs import Rows
from .table import TACE_THRESHOLD

# Of so many rows cells are as coarse as they come, and one step finer each time they double: few rows are quicker to
# sort than many cells to look through.
FEWEST_ROWS, FINEST_CELLS = 1 << 13, 6


@dataclass(frozen=True)
class ColumnBins:
    """Bins of class columns against `labels == class`, of one set of rows or of many."""

    uniform: BinStatistics  # `(..., C, B)` equal-width bins
    # `(..., C, B)` equal-mass bins with ties spread. Of a class that no row has, only the sums are told: its error is
    # its mean probability wherever bins end.
    mass: BinStatistics
    kept: BinStatistics  # The same for probabilities above the threshold
    # `(..., B)` equal-mass bins of the probabilities above the threshold of all columns together
    pooled: BinStatistics


class _Sums(NamedTuple):
    """Sums over the rows of each cell."""

    counts: np.ndarray
    values: np.ndarray
    hits: np.ndarray

    def of(self, chosen: np.ndarray) -> _Sums:
        """Those of some cells; zero in the others."""
        return _Sums(*(np.where(chosen, part, 0) for part in self))

    def around(self, fine: Groups, cells: np.ndarray) -> Groups:
        """Cells as they are and, in their place among them, the rows of cells left out, with the cell of each."""
        coarse = np.flatnonzero(self.counts)
        at = np.searchsorted(fine.up_to[0][1:], np.searchsorted(cells, coarse), side="right")
        parts = (fine.counts, fine.value_sums, fine.outcome_sums)
        return Groups(*(np.insert(rows, at, whole[coarse]) for rows, whole in zip(parts, self, strict=True)))


class _Part(NamedTuple):
    """Some entries of a column, with the cell of each."""

    values: np.ndarray
    outcomes: np.ndarray
    cells: np.ndarray

    def where(self, chosen: np.ndarray) -> _Part:
        return _Part(*(part[chosen] for part in self))


class _Column:
    """Values distributed over cells; `having` are the rows whose label is `label`, None where there is none."""

    def __init__(self, values: np.ndarray, label: int | None, having: np.ndarray, fineness: int) -> None:
        self.values, self.label = values, label
        size = num_cells(fineness)
        # As an index once: each `bincount` and look-up would make one of 16 bits by itself.
        self.cells = cells_of(values, fineness).astype(np.intp)
        self.sums = _Sums(
            np.bincount(self.cells, minlength=size),
            np.bincount(self.cells, weights=values, minlength=size),
            np.bincount(self.cells[having], minlength=size).astype(np.float64),
        )
        self.num_low = int(np.count_nonzero(values <= TACE_THRESHOLD))

    def ends(self, num_bins: int) -> np.ndarray:
        """Cells in which an equal-mass bin of all values, or of those above the threshold, ends."""
        parts = np.arange(1, num_bins) / num_bins
        size = len(self.values)
        ranks = np.concatenate([size * parts, self.num_low + (size - self.num_low) * parts])
        return _holding(self.sums.counts, ranks)

    def rows(self, cut: np.ndarray, labels: np.ndarray) -> _Part:
        """The rows in some cells."""
        chosen = np.flatnonzero(np.take(cut, self.cells))
        hits = labels[chosen] == self.label if self.label is not None else np.zeros(len(chosen), bool)
        return _Part(self.values[chosen], hits, self.cells[chosen].astype(np.uint16))


def column_bins(rows: Rows, num_bins: int) -> ColumnBins:
    """All bins of all class columns."""
    p, labels = rows.probabilities, rows.labels
    fineness = int(np.clip(np.log2(len(labels) / FEWEST_ROWS), 0, FINEST_CELLS))
    # of 16 bits numpy sorts by counting
    order = np.argsort(labels.astype(np.uint16) if p.shape[1] <= 1 << 16 else labels, kind="stable")
    having = np.bincount(labels, minlength=p.shape[1])
    present, ends = np.flatnonzero(having), np.cumsum(having)
    columns = [
        _Column(np.ascontiguousarray(p[:, k]), k, order[ends[k] - having[k] : ends[k]], fineness)
        for k in present.tolist()
    ]
    if len(present) < p.shape[1]:
        # of classes that no row has, all that is above the threshold, as one column
        others = p > TACE_THRESHOLD
        others[:, present] = False
        columns.append(_Column(p[others], None, order[:0], fineness))
    border = cells_of(np.append(uniform_edges(num_bins), TACE_THRESHOLD), fineness)
    always = np.zeros(num_cells(fineness), bool)
    always[border] = True
    above = np.arange(len(always)) > border[-1]
    every, cut = _pooled_cells(columns, above, num_bins)
    cuts = [column.ends(num_bins) | always | cut for column in columns]
    rows_of = [column.rows(part, labels) for column, part in zip(columns, cuts, strict=True)]
    parts = [_bins_of(columns[i].sums.of(~cuts[i]), rows_of[i], above, num_bins) for i in range(len(present))]
    uniform, mass, kept = (stacked(bins) for bins in zip(*parts, strict=True))
    if len(present) < p.shape[1]:
        uniform = classwise_uniform_bins(p, labels, num_bins)
        high = p > TACE_THRESHOLD
        mass = _with_others(mass, np.full(p.shape[1], float(len(p))), p.sum(axis=0), present)
        sums = np.add.reduce(p, axis=0, where=high)
        kept = _with_others(kept, high.sum(axis=0).astype(np.float64), sums, present)
    chosen = [part.where(cut[part.cells] & (part.values > TACE_THRESHOLD)) for part in rows_of]
    together = _Part(*(np.concatenate(part) for part in zip(*chosen, strict=True)))
    pooled = every.around(group_by_value(together.values, together.outcomes), np.sort(together.cells, kind="stable"))
    return ColumnBins(uniform, mass, kept, equal_mass_bins(pooled, num_bins))


def _bins_of(
    whole: _Sums, rows: _Part, above: np.ndarray, num_bins: int
) -> tuple[BinStatistics, BinStatistics, BinStatistics]:
    """Equal-width bins, equal-mass bins, and equal-mass bins of what is above the threshold, of one column."""
    coarse = np.flatnonzero(whole.counts)
    # a cell in which no equal-width bin ends lies in the bin of the mean of its rows
    bin_of = uniform_index(whole.values[coarse] / whole.counts[coarse], num_bins)
    counts, sums, hits = (np.bincount(bin_of, weights=part[coarse], minlength=num_bins) for part in whole)
    uniform = uniform_bins(rows.values, rows.outcomes, num_bins) + BinStatistics(counts.astype(np.int64), sums, hits)
    fine, cells = group_by_value(rows.values, rows.outcomes), np.sort(rows.cells, kind="stable")
    # the threshold is the greater of two numbers that count as tied, so no group has rows on both sides of it
    low = int(np.count_nonzero(rows.values <= TACE_THRESHOLD))
    first = int(np.searchsorted(fine.up_to[0][1:], low, side="right"))
    high = Groups(fine.counts[first:], fine.value_sums[first:], fine.outcome_sums[first:])
    return (
        uniform,
        equal_mass_bins(whole.around(fine, cells), num_bins),
        equal_mass_bins(whole.of(above).around(high, cells[low:]), num_bins),
    )


def _pooled_cells(columns: Sequence[_Column], above: np.ndarray, num_bins: int) -> tuple[_Sums, np.ndarray]:
    """Sums above the threshold of all columns, without cells in which that or an equal-mass bin ends; and those."""
    sums = _Sums(*(np.sum(parts, axis=0) for parts in zip(*(column.sums for column in columns), strict=True)))
    kept = sum(len(column.values) - column.num_low for column in columns)
    border = np.flatnonzero(~above)[-1]
    counts = np.where(above, sums.counts, 0)
    counts[border] = kept - counts.sum()
    cut = _holding(counts, kept * np.arange(1, num_bins) / num_bins)
    cut[border] = True
    return sums.of(above & ~cut), cut


def _holding(counts: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """`(cells,)` bool, in which cells the rows of these ranks are."""
    cut = np.zeros(len(counts), bool)
    cut[np.minimum(np.searchsorted(np.cumsum(counts), ranks), len(counts) - 1)] = True
    return cut


def _with_others(known: BinStatistics, counts: np.ndarray, sums: np.ndarray, present: np.ndarray) -> BinStatistics:
    """Bins of all classes, those that no row has included, whose sums are spread over their bins."""
    size = known.counts.shape[1]
    every = [np.repeat(part[:, None] / size, size, axis=1) for part in (counts, sums, np.zeros(len(sums)))]
    for part, of_present in zip(every, vars(known).values(), strict=True):
        part[present] = of_present
    return BinStatistics(*every)


def stacked(parts: Sequence[BinStatistics]) -> BinStatistics:
    """Statistics of several columns along a new first axis."""
    return BinStatistics(*map(np.stack, zip(*(vars(part).values() for part in parts), strict=True)))
