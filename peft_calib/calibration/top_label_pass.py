# SPDX-License-Identifier: Apache-2.0
"""Everything about the top label in one fused pass: checks, losses and uniform bins, without a copy of the data."""

from __future__ import annotations

import numpy as np

from peft_calib.calibration.bins import BinStatistics, uniform_edges
from peft_calib.calibration.scores import SMALLEST_PROBABILITY

CHUNK = 1 << 14
# A product this near to a whole number may belong to either bin, and is looked up among the edges.
NEAR = 1e-9


class TopLabelSums:
    """Additive sums over rows: top-label uniform bins, NLL and Brier score, and the extremes that checks need.

    Args:
        num_bins: uniform bins.

    Attributes:
        bins: `(B,)` statistics so far.
        nll, brier: float64 sums.
        num_rows, num_impossible: rows seen, and those whose true class had a probability of (nearly) 0.
        lowest, sum_error: smallest probability, and largest distance of a row's sum from 1; not finite if any number
            is not, and then nothing else means anything.
    """

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.counts = np.zeros(2 * num_bins, np.int64)
        self.confidence = np.zeros(num_bins)
        self.nll = self.brier = 0.0
        self.num_rows = self.num_impossible = 0
        self.lowest, self.sum_error = 1.0, 0.0

    @property
    def bins(self) -> BinStatistics:
        """`(B,)` statistics so far."""
        pairs = self.counts.reshape(-1, 2)
        return BinStatistics(pairs.sum(axis=1), self.confidence, pairs[:, 1].astype(np.float64))

    def __iadd__(self, other: TopLabelSums) -> TopLabelSums:
        for name in ("counts", "confidence", "nll", "brier", "num_rows", "num_impossible"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def add(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        """Adds rows.

        Args:
            probabilities: `(N, C)` of any float dtype, not checked beforehand: look at `lowest` and `sum_error`.
            labels: `(N,)` int64, checked to lie in `[0, C)`.
        """
        size = min(CHUNK, len(labels))
        buffers = _Buffers(probabilities.shape[1], size)
        for start in range(0, len(labels), size):
            part = probabilities[start : start + size]
            if len(part) < size:
                buffers = _Buffers(probabilities.shape[1], len(part))
            np.copyto(buffers.columns, part.T)
            self._add_chunk(buffers, labels[start : start + size])
        self.num_rows += len(labels)

    def _add_chunk(self, buffers: _Buffers, labels: np.ndarray) -> None:
        columns, best, work, index = buffers.columns, buffers.best, buffers.work, buffers.index
        np.maximum(columns[0], columns[1], out=best)
        np.add(columns[0], columns[1], out=work)
        for column in columns[2:]:
            np.maximum(best, column, out=best)
            np.add(work, column, out=work)
        self.sum_error = float(np.maximum(self.sum_error, np.maximum(work.max() - 1.0, 1.0 - work.min())))
        self.lowest = float(np.minimum(self.lowest, columns.min()))
        if not np.isfinite(self.sum_error):
            return
        flat = columns.reshape(-1)
        np.multiply(labels, len(labels), out=index)
        np.add(index, buffers.row, out=index)
        np.take(flat, index, out=work, mode="clip")
        np.equal(work, best, out=buffers.correct)
        np.equal(columns, best, out=buffers.equal)
        if np.count_nonzero(buffers.equal) != len(labels):
            # Ties for the top: the first class among them is the prediction.
            np.equal(buffers.equal.argmax(axis=0), labels, out=buffers.correct)
        self.brier += float(flat @ flat) - 2.0 * float(work.sum()) + len(labels)
        if work.min() < SMALLEST_PROBABILITY:
            self.num_impossible += int((work < SMALLEST_PROBABILITY).sum())
            np.maximum(work, SMALLEST_PROBABILITY, out=work)
        np.log(work, out=work)
        self.nll -= float(work.sum())
        self._add_bins(buffers)

    def _add_bins(self, buffers: _Buffers) -> None:
        best, work, index, product = buffers.best, buffers.work, buffers.index, buffers.product
        np.multiply(best, self.num_bins, out=product)
        np.ceil(product, out=work)
        np.copyto(index, work, casting="unsafe")
        np.subtract(index, 1, out=index)
        np.rint(product, out=work)
        np.subtract(product, work, out=work)
        np.abs(work, out=work)
        if work.min() < NEAR:
            near = np.flatnonzero(work < NEAR)
            index[near] = np.searchsorted(uniform_edges(self.num_bins), best[near]) - 1
        np.clip(index, 0, self.num_bins - 1, out=index)
        self.confidence += np.bincount(index, best, self.num_bins)
        np.multiply(index, 2, out=index)
        np.add(index, buffers.correct, out=index)
        self.counts += np.bincount(index, minlength=2 * self.num_bins)


class _Buffers:
    """Arrays of one chunk, kept from chunk to chunk."""

    def __init__(self, num_classes: int, size: int) -> None:
        self.columns = np.empty((num_classes, size))
        self.equal = np.empty((num_classes, size), bool)
        self.best, self.work, self.product = np.empty((3, size))
        self.index = np.empty(size, np.int64)
        self.row = np.arange(size)
        self.correct = np.empty(size, bool)
