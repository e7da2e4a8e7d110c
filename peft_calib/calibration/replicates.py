# SPDX-License-Identifier: Apache-2.0
"""Every score of many replicated data sets at once: resampled rows (bootstrap) or redrawn labels (perfect
calibration).

A replicate is a column: `weights` `(n, R)` says how often each row counts in each replicate, `labels` `(n, R)` what
its label is there. Rows come in blocks, surest first, so memory is `O(block x R)` whatever N, and every binned sum is
one matrix product. Sums of counts are exact in float32; the others are good to 1e-6, far below the Monte-Carlo error
they are used for. Bin edges, equal-mass ones included, stay those of the full data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from peft_calib.calibration.bins import tie_key, top_label, uniform_index
from peft_calib.calibration.inputs import Rows
from peft_calib.calibration.panel import TACE_THRESHOLD, row_entropy
from peft_calib.calibration.scores import SMALLEST_PROBABILITY

BLOCK = 512
GRID = 512


class Mass(NamedTuple):
    """Where each value lies on the axis of cumulative mass, its ties included: `[low, high)` out of `total`."""

    low: np.ndarray
    high: np.ndarray
    total: float

    def shares(self, rows: slice, num_bins: int) -> np.ndarray:
        """`(n, B)` float32 share of each row that falls into each equal-mass bin; zero rows where `high == low`."""
        edges = self.total * np.arange(num_bins + 1) / num_bins
        low, high = self.low[rows, None], self.high[rows, None]
        overlap = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
        width = np.where(high > low, high - low, 1.0)
        return (np.maximum(overlap, 0.0) / width).astype(np.float32)


def mass_of(values: np.ndarray, keep: np.ndarray | None = None) -> Mass:
    """Mass intervals of `(N,)` values; entries left out by `keep` get an empty interval."""
    chosen = np.arange(len(values)) if keep is None else np.flatnonzero(keep)
    low, high = np.zeros(len(values)), np.zeros(len(values))
    if len(chosen):
        _, inverse, counts = np.unique(tie_key(values[chosen]), return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        high[chosen] = ends[inverse.reshape(-1)]
        low[chosen] = (ends - counts)[inverse.reshape(-1)]
    return Mass(low, high, float(len(chosen)))


class Design:
    """One set of rows, sorted by confidence (surest first), with all that replicates have in common.

    Args:
        rows: checked rows.
        num_bins: bins of every binned score.
    """

    def __init__(self, rows: Rows, num_bins: int) -> None:
        confidence, predicted = top_label(rows.probabilities)
        order = np.argsort(-tie_key(confidence), kind="stable")
        self.num_bins = num_bins
        self.confidence, self.predicted = confidence[order], predicted[order]
        self.probabilities, self.labels = rows.probabilities[order], rows.labels[order]
        self.top_index = uniform_index(self.confidence, num_bins)
        self.grid_index = np.minimum((self.confidence * GRID).astype(np.int64), GRID - 1)
        keys = tie_key(self.confidence)
        self.last_of_group = np.append(keys[1:] != keys[:-1], True)
        columns = self.probabilities.T
        self.top_mass = mass_of(self.confidence)
        self.class_mass = [mass_of(column) for column in columns]
        self.kept_mass = [mass_of(column, column > TACE_THRESHOLD) for column in columns]
        flat = self.probabilities.reshape(-1)
        pooled = mass_of(flat, flat > TACE_THRESHOLD)
        shape = self.probabilities.shape
        low, high = pooled.low.reshape(shape), pooled.high.reshape(shape)
        self.pooled_mass = [Mass(low[:, k], high[:, k], pooled.total) for k in range(shape[1])]

    @property
    def num_rows(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return self.probabilities.shape[1]

    def blocks(self) -> list[slice]:
        return [slice(i, min(i + BLOCK, self.num_rows)) for i in range(0, self.num_rows, BLOCK)]

    def class_features(self, rows: slice, k: int) -> np.ndarray:
        """`(n, 4B)` shares of a class column's entries: uniform bins, ACE bins, TACE bins, pooled TACE bins."""
        masses = (self.class_mass[k], self.kept_mass[k], self.pooled_mass[k])
        index = uniform_index(self.probabilities[rows, k], self.num_bins)
        return np.concatenate(
            [one_hot(index, self.num_bins), *(m.shares(rows, self.num_bins) for m in masses)], axis=1
        )

    def top_features(self, rows: slice) -> np.ndarray:
        """`(n, 2B)` shares of the top label: uniform bins, ACE bins."""
        return np.concatenate(
            [one_hot(self.top_index[rows], self.num_bins), self.top_mass.shares(rows, self.num_bins)], axis=1
        )

    def row_features(self, rows: slice) -> np.ndarray:
        """`(n, 3)` confidence, entropy and `sum_k p_k^2`."""
        p = self.probabilities[rows]
        return np.stack([self.confidence[rows], row_entropy(p), np.einsum("nk,nk->n", p, p)], axis=1).astype(
            np.float32
        )


def one_hot(index: np.ndarray, size: int) -> np.ndarray:
    """`(n, size)` float32 indicator of each index."""
    return (index[:, None] == np.arange(size)).astype(np.float32)


class Sums:
    """Sufficient statistics of `R` replicates of one design, summed block by block in float64.

    Attributes:
        mass: `(R,)` rows counted. top, top_confidence, top_hits: `(2B, R)` over uniform and equal-mass bins.
        column, column_value, column_hits: `(C, 4B, R)` over the bins of `Design.class_features`.
        row: `(3, R)` sums of `Design.row_features`. nll, of_label: `(R,)`. grid: `(GRID, R)` residuals.
    """

    def __init__(self, design: Design, num_replicates: int) -> None:
        bins, classes = design.num_bins, design.num_classes
        self.design = design
        self.mass = np.zeros(num_replicates)
        self.top, self.top_confidence, self.top_hits = np.zeros((3, 2 * bins, num_replicates))
        self.column, self.column_value, self.column_hits = np.zeros((3, classes, 4 * bins, num_replicates))
        self.row = np.zeros((3, num_replicates))
        self.nll, self.of_label = np.zeros((2, num_replicates))
        self.grid = np.zeros((GRID, num_replicates))

    def add_weights(self, rows: slice, weights: np.ndarray) -> None:
        """Adds what does not depend on labels; `weights` is `(n, R)` float32, or `(n, 1)` to be shared by all."""
        design = self.design
        self.mass += weights.sum(axis=0, dtype=np.float64)
        top, confidence = design.top_features(rows), design.confidence[rows, None].astype(np.float32)
        self.top += top.T @ weights
        self.top_confidence += (top * confidence).T @ weights
        self.row += design.row_features(rows).T @ weights
        for k in range(design.num_classes):
            features = design.class_features(rows, k)
            self.column[k] += features.T @ weights
            self.column_value[k] += (features * design.probabilities[rows, k, None].astype(np.float32)).T @ weights

    def add_class_hits(self, rows: slice, k: int, hits: np.ndarray, select: np.ndarray | None = None) -> None:
        """Adds the rows labelled `k`: `hits` is `(n, R)`, or the rows of it that `select` keeps."""
        p = self.design.probabilities[rows, k]
        features = self.design.class_features(rows, k)
        extra = np.stack([-np.log(np.maximum(p, SMALLEST_PROBABILITY)), p], axis=1).astype(np.float32)
        if select is not None:
            features, extra = features[select], extra[select]
        self.column_hits[k] += features.T @ hits
        nll, of_label = extra.T @ hits
        self.nll += nll
        self.of_label += of_label

    def add_correct(self, rows: slice, weights: np.ndarray, correct: np.ndarray) -> None:
        """Adds correct rows, `(n, R)` float32 counts, and the residuals of the smoothing grid."""
        design = self.design
        self.top_hits += design.top_features(rows).T @ correct
        index = design.grid_index[rows]
        residuals = correct - weights * design.confidence[rows, None].astype(np.float32)
        starts = np.flatnonzero(np.append(True, index[1:] != index[:-1]))
        self.grid[index[starts]] += np.add.reduceat(residuals, starts, axis=0)
