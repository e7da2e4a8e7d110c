"""Everything about the top label in one fused pass: checks, losses and uniform bins, without a copy of the data.

Chunks of rows stay in a core's own cache; the number of vectorised calls and the memory they touch are what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..bins import NEAR, SHRINK, BinStatistics, uniform_edges, uniform_index
from ..inputs import SUM_TOLERANCE
from ..scores.binned import LOG_GROUP, SMALLEST_PROBABILITY

# Rows of a chunk, and its entries when there are many classes.
CHUNK, CHUNK_ENTRIES = 12_288, 49_152
# Rows between two exact read-outs of the packed counts.
FOLD = 1 << 25
# What a row adds to a packed count: `ROW` for itself, 1 more if it is right.
ROW = float(1 << 26)
# Squares of float32 numbers summed in float32 before float64 takes over.
SEGMENT = 128


class TopLabelSums:
    """Additive sums over rows: top-label uniform bins, NLL and Brier score."""

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins
        self.counts = np.zeros(2 * num_bins, np.int64)  # wrong and right rows of each bin in turn
        self.confidence = np.zeros(num_bins)
        self.nll = self.brier = 0.0
        self.num_rows = self.num_impossible = 0  # those whose true class had a probability of (nearly) 0

    @property
    def bins(self) -> BinStatistics:
        """`(B,)` statistics so far."""
        pairs = self.counts.reshape(-1, 2)
        return BinStatistics(pairs.sum(axis=1), self.confidence, pairs[:, 1].astype(np.float64))

    def means(self) -> dict[str, float]:
        """The scores that are means over rows."""
        right, confidence = self.bins.outcome_sums.sum(), self.confidence.sum()
        sums = {"accuracy": right, "nll": self.nll, "brier": self.brier, "mean_confidence": confidence}
        return {key: float(value / self.num_rows) for key, value in sums.items()}

    def __iadd__(self, other: TopLabelSums) -> TopLabelSums:
        for name in ("counts", "confidence", "nll", "brier", "num_rows", "num_impossible"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def add(
        self, probabilities: np.ndarray, labels: np.ndarray, *, checked: bool, into: Sequence[np.ndarray] = ()
    ) -> bool:
        """Adds rows, checked on the way unless they are; `into` takes confidences and whether they are right.

        False if a row is no distribution or a label no class: the object, which has part of them, is of no more use.
        """
        size = max(LOG_GROUP, min(CHUNK, CHUNK_ENTRIES // probabilities.shape[1]))
        for first in range(0, len(labels), FOLD):
            last = min(first + FOLD, len(labels))
            # Per bin, the sum of confidences (real) and packed counts (imaginary), with room for confidences above 1.
            packed = torch.zeros(self.num_bins + int(2 * SUM_TOLERANCE * self.num_bins) + 2, dtype=torch.complex128)
            buffers = None
            for start in range(first, last, size):
                part = np.ascontiguousarray(probabilities[start : min(start + size, last)])
                if buffers is None or len(buffers.index) != len(part):
                    buffers = _Buffers(part.shape[1], len(part), part.dtype, self.num_bins)
                if not self._add_chunk(buffers, part, labels[start : start + len(part)], packed, checked):
                    return False
                for place, found in zip(into, (buffers.wide_best, buffers.correct), strict=False):
                    place[start : start + len(part)] = found
            if not self._unpack(packed.numpy()) and not checked:
                return False
        self.num_rows += len(labels)
        return True

    def _add_chunk(
        self, buffers: _Buffers, part: np.ndarray, labels: np.ndarray, packed: torch.Tensor, checked: bool
    ) -> bool:
        columns, best, of_label = buffers.columns, buffers.best, buffers.of_label
        # The sum of squares comes first: read in order, memory arrives fastest.
        squares = _sum_of_squares(part.reshape(-1))
        np.copyto(columns, part.T)
        if not (checked or _are_distributions(part, columns, labels, of_label)):
            return False
        np.maximum.reduce(columns, axis=0, out=best)
        np.add(buffers.first, labels, out=buffers.index)
        np.take(part.reshape(-1), buffers.index, out=of_label, mode="clip")
        np.equal(of_label, best, out=buffers.correct)
        np.equal(columns, best, out=buffers.equal)
        if np.count_nonzero(buffers.equal) != len(labels):
            # Ties for the top: the first class among them is the prediction.
            np.equal(buffers.equal.argmax(axis=0), labels, out=buffers.correct)
        buffers.widen()
        self.brier += squares - 2.0 * float(buffers.wide_of_label.sum()) + len(labels)
        self._add_log_loss(buffers)
        self._add_bins(buffers, packed)
        return True

    def _add_log_loss(self, buffers: _Buffers) -> None:
        """Logarithms of products of probabilities: as exact as those of each, and a sixteenth of the work."""
        if buffers.wide_of_label.min() < SMALLEST_PROBABILITY:
            self.num_impossible += int((buffers.wide_of_label < SMALLEST_PROBABILITY).sum())
            np.maximum(buffers.groups, SMALLEST_PROBABILITY, out=buffers.groups)
        product = np.multiply.reduce(buffers.groups, axis=0)
        np.log(product, out=product)
        self.nll -= float(product.sum())

    def _add_bins(self, buffers: _Buffers, packed: torch.Tensor) -> None:
        best, index, code, product = buffers.wide_best, buffers.index, buffers.code, buffers.wide_of_label
        np.copyto(code, buffers.correct)
        np.add(code, ROW, out=code)
        torch.complex(buffers.best_tensor, buffers.code_tensor, out=buffers.pairs)
        np.multiply(best, self.num_bins - SHRINK, out=product)
        np.copyto(index, product, casting="unsafe")
        if buffers.edges_need_a_look:
            np.ceil(product, out=code)
            np.subtract(code, product, out=product)
            if product.min() < NEAR:
                near = np.flatnonzero(product < NEAR)
                index[near] = uniform_index(best[near], self.num_bins)
        packed.scatter_add_(0, buffers.index_tensor, buffers.pairs)

    def _unpack(self, packed: np.ndarray) -> bool:
        """Adds the packed sums to the plain ones; False if a confidence exceeded 1."""
        last = self.num_bins - 1
        packed[last] += packed[last + 1 :].sum()
        inside = packed[: last + 1]
        rows = np.floor(inside.imag / ROW)
        right = inside.imag - ROW * rows
        self.counts += np.stack([rows - right, right], axis=1).astype(np.int64).reshape(-1)
        self.confidence += inside.real
        return not packed[last + 1 :].any()


class _Buffers:
    """Arrays of one chunk, kept from chunk to chunk; those named wide are float64."""

    def __init__(self, num_classes: int, size: int, dtype: np.dtype, num_bins: int) -> None:
        self.columns = np.empty((num_classes, size), dtype)
        self.equal = np.empty((num_classes, size), bool)
        self.first = np.arange(size) * num_classes
        self.index = np.empty(size, np.int64)
        self.correct = np.empty(size, bool)
        self.code = np.empty(size)
        self.wide_best = np.empty(size)
        padded = np.ones(-(-size // LOG_GROUP) * LOG_GROUP)
        self.groups, self.wide_of_label = padded.reshape(LOG_GROUP, -1), padded[:size]
        self.best, self.of_label = self.wide_best, self.wide_of_label
        self.edges_need_a_look = True
        if dtype != np.float64:
            self.best, self.of_label = np.empty((2, size), dtype)
            self.edges_need_a_look = _float32_may_miss_an_edge(num_bins)
        self.index_tensor, self.best_tensor, self.code_tensor, self.pairs = map(
            torch.from_numpy, (self.index, self.wide_best, self.code, np.empty(size, np.complex128))
        )

    def widen(self) -> None:
        """Confidence and probability of the label in float64."""
        if self.best is not self.wide_best:
            np.copyto(self.wide_best, self.best)
            np.copyto(self.wide_of_label, self.of_label)


def _are_distributions(part: np.ndarray, columns: np.ndarray, labels: np.ndarray, work: np.ndarray) -> bool:
    """Whether rows are non-negative and sum to 1, and labels name a class; NaN and infinity fail too."""
    np.matmul(np.ones(len(columns), columns.dtype), columns, out=work)
    return bool(
        part.min() >= 0.0
        and work.max() <= 1.0 + SUM_TOLERANCE
        and work.min() >= 1.0 - SUM_TOLERANCE
        and labels.view(np.uint64).max() < len(columns)
    )


def _sum_of_squares(values: np.ndarray) -> float:
    if values.dtype == np.float64:
        return float(values @ values)
    whole = len(values) // SEGMENT * SEGMENT
    segments, rest = values[:whole].reshape(-1, SEGMENT), values[whole:].astype(np.float64)
    return float(np.vecdot(segments, segments).sum(dtype=np.float64) + rest @ rest)


def _float32_may_miss_an_edge(num_bins: int) -> bool:
    """Whether a float32 number lies so little above an edge that `SHRINK` takes it below: an edge rounded down."""
    edges = uniform_edges(num_bins)
    distance = edges.astype(np.float32).astype(np.float64) - edges
    return bool(((distance > 0.0) & (distance < 2.0 * SHRINK / num_bins)).any())
