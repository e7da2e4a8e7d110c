"""A mergeable histogram fine enough to stand in for sorted rows: two merge by adding, over batches and over ranks.

Cells are equal steps of `u(v) = v + ln((v + d) / (1 - v + d)) / 20`: about 0.003 wide in the middle, and narrowing
towards both ends, where saturated models keep their rows. Each lies within one uniform bin and on one side of the TACE
threshold, so scores over those are exact; only where rows are put in order does a cell stand for its rows.
"""

from __future__ import annotations

import numpy as np

from ..bins import BinStatistics, Groups, uniform_edges, uniform_index

STEEPNESS = 0.05
SOFTENING = 1e-7
TOP_CELLS = 512
CLASS_CELLS = 192


class Grid:
    """The cells of a sketch, equal steps of the warped axis; none straddles a uniform bin's edge or the threshold."""

    def __init__(self, num_cells: int, num_bins: int, threshold: float) -> None:
        self.num_bins, self.threshold = num_bins, threshold
        self._steps = num_cells
        self._low = float(_warp(np.zeros(1))[0])
        self._scale = num_cells / -(2.0 * self._low - 1.0)
        self.size = num_cells + num_bins
        edges = uniform_edges(num_bins)
        # A bin begins just above its lower edge, where the index of the bin has already moved on.
        self.starts = self.index(np.nextafter(edges[:-1], 1.0))
        self.starts[0] = 0
        self.above_threshold = int(self.index(np.array([np.nextafter(threshold, 1.0)]))[0])

    def index(self, values: np.ndarray) -> np.ndarray:
        """`(N,)` int64 cell of each value in [0, 1]: three non-decreasing step functions, whose sum is a fourth."""
        step = _warp(values)
        step -= self._low
        step *= self._scale
        index = step.astype(np.int64)
        np.minimum(index, self._steps - 1, out=index)
        index += uniform_index(values, self.num_bins)
        index += values > self.threshold
        return index

    def uniform(self, cells: np.ndarray) -> np.ndarray:
        """Sums `(..., size)` cells within each uniform bin: `(..., num_bins)`."""
        return np.add.reduceat(cells, self.starts, axis=-1)


class Sketch:
    """Counts, value sums and outcome counts in the cells of a grid, for one or several columns."""

    def __init__(self, grid: Grid, num_columns: int = 1) -> None:
        self.grid = grid
        # Rows without and with the outcome; exact integers.
        self.counts: np.ndarray = np.zeros((num_columns, grid.size, 2), np.int64)
        self.sums: np.ndarray = np.zeros((num_columns, grid.size))

    def add(self, values: np.ndarray, outcomes: np.ndarray) -> None:
        """Adds `(columns, n)` values with boolean outcomes."""
        columns, size = len(values), self.grid.size
        index = self.grid.index(values.reshape(-1)).reshape(values.shape)
        index += np.arange(columns)[:, None] * size
        cells = index.reshape(-1)
        self.sums += np.bincount(cells, weights=values.reshape(-1), minlength=columns * size).reshape(columns, size)
        cells *= 2
        cells += outcomes.reshape(-1)
        self.counts += np.bincount(cells, minlength=2 * columns * size).reshape(columns, size, 2)

    def bins(self) -> BinStatistics:
        """`(columns, num_bins)` uniform bins, exact."""
        counts = self.grid.uniform(self.counts[..., 0] + self.counts[..., 1])
        hits = self.grid.uniform(self.counts[..., 1]).astype(np.float64)
        return BinStatistics(counts, self.grid.uniform(self.sums), hits)

    def groups(self, column: int | None = 0, above_threshold: bool = False) -> Groups:
        """One column (or, with None, all of them pooled) as rows in ascending order, one group a cell."""
        chosen = slice(None) if column is None else slice(column, column + 1)
        counts, sums = self.counts[chosen].sum(axis=0), self.sums[chosen].sum(axis=0)
        start = self.grid.above_threshold if above_threshold else 0
        total = counts[start:].sum(axis=-1)
        filled = total > 0
        return Groups(total[filled], sums[start:][filled], counts[start:, 1][filled].astype(np.float64))

    def boundary_mass(self, column: int, num_bins: int) -> float:
        """Share of the rows in the cells that boundaries of equal-mass bins fall into."""
        counts = self.counts[column].sum(axis=-1)
        ends = np.cumsum(counts)
        if ends[-1] == 0:
            return 0.0
        cut = np.searchsorted(ends, ends[-1] * np.arange(1, num_bins) / num_bins)
        return float(counts[cut].sum() / ends[-1])


def _warp(values: np.ndarray) -> np.ndarray:
    odds = values + SOFTENING
    odds /= (1.0 + SOFTENING) - values
    np.log(odds, out=odds)
    odds *= STEEPNESS
    odds += values
    return odds
