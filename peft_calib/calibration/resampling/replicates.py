"""What replicated data sets have in common: rows in order of confidence, and the bins they fall into.

A replicate is the same rows with other weights (bootstrap) or other labels (perfect calibration). Bin edges,
equal-mass ones included, stay those of the full data in each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..bins import tie_key, top_label, uniform_index
from ..inputs import Rows
from ..scores.table import TACE_THRESHOLD

BLOCK = 512


class Batch(NamedTuple):
    """One block of rows in R replicates at once; a column is a replicate."""

    rows: slice  # The block
    # `(n, R)` float32 times each row counts; `(n, 1)` ones where every replicate has each row once
    # where rows have weights of their own, float64 and these included
    weights: np.ndarray
    correct: np.ndarray  # `(n, R)` float32 times it counts as correct
    labels: np.ndarray | None  # `(n, R)` label of each row in each replicate; None where labels are the design's own

    def class_hits(self, design: Design, k: int) -> tuple[np.ndarray, np.ndarray | slice]:
        """`(m, R)` float32 times each selected row counts with label `k`, and which rows those are."""
        if self.labels is None:
            select = np.flatnonzero(design.labels[self.rows] == k)
            return self.weights[select], select
        return (self.labels == k).astype(self.weights.dtype) * self.weights, slice(None)


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


def mass_of(values: np.ndarray, keep: np.ndarray | None = None, weights: np.ndarray | None = None) -> Mass:
    """Mass intervals of `(N,)` values, which weigh 1 each by default; entries left out by `keep` get an empty one."""
    chosen = np.arange(len(values)) if keep is None else np.flatnonzero(keep)
    low, high = np.zeros(len(values)), np.zeros(len(values))
    if len(chosen):
        _, inverse, counts = np.unique(tie_key(values[chosen]), return_inverse=True, return_counts=True)
        if weights is not None:
            counts = np.bincount(inverse.reshape(-1), weights=weights[chosen])
        ends = np.cumsum(counts)
        high[chosen] = ends[inverse.reshape(-1)]
        low[chosen] = (ends - counts)[inverse.reshape(-1)]
    return Mass(low, high, float(len(chosen) if weights is None else weights[chosen].sum()))


class Design:
    """One set of rows, sorted by confidence (surest first), with all that replicates have in common."""

    def __init__(self, rows: Rows, num_bins: int, classwise: bool = True) -> None:
        if rows.against_rest:
            confidence, predicted = rows.probabilities[:, 1], np.ones(len(rows.labels), np.int64)
        else:
            confidence, predicted = top_label(rows.probabilities)
        order = np.argsort(-tie_key(confidence), kind="stable")
        self.order = order
        self.num_bins = num_bins
        self.confidence, self.predicted = confidence[order], predicted[order]
        self.probabilities, self.labels = rows.probabilities[order], rows.labels[order]
        self.top_index = uniform_index(self.confidence, num_bins)
        keys = tie_key(self.confidence)
        self.last_of_group = np.append(keys[1:] != keys[:-1], True)
        # of mean 1: a resample of rows is one of so many rows, however large their weights are
        self.weights = None if rows.weights is None else rows.weights[order] / rows.weights.mean()
        self.top_mass = mass_of(self.confidence, weights=self.weights)
        if not classwise:
            return
        columns = self.probabilities.T
        self.class_mass = [mass_of(column, weights=self.weights) for column in columns]
        self.kept_mass = [mass_of(column, column > TACE_THRESHOLD, self.weights) for column in columns]
        flat = self.probabilities.reshape(-1)
        of_entries = None if self.weights is None else np.repeat(self.weights, self.num_classes)
        pooled = mass_of(flat, flat > TACE_THRESHOLD, of_entries)
        shape = self.probabilities.shape
        low, high = pooled.low.reshape(shape), pooled.high.reshape(shape)
        self.pooled_mass = [Mass(low[:, k], high[:, k], pooled.total) for k in range(shape[1])]

    @property
    def num_rows(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return self.probabilities.shape[1]

    def of_rows(self, rows: slice) -> np.ndarray:
        """`(n,)` weight of each row: float32 ones, or float64 where rows have weights of their own."""
        return np.ones(len(self.labels[rows]), np.float32) if self.weights is None else self.weights[rows]

    def weigh(self, rows: slice, counts: np.ndarray) -> np.ndarray:
        """`(n, R)` what rows that count so often weigh, likewise."""
        return counts.astype(np.float32) if self.weights is None else counts * self.weights[rows, None]

    def squared(self, rows: slice, values: np.ndarray) -> np.ndarray:
        """`(n,)` variances of rows as they enter that of a weighted sum: times the square of the weight."""
        return values if self.weights is None else values * self.weights[rows] ** 2

    def totals(self, counts: np.ndarray) -> np.ndarray:
        """`(R,)` weight of all rows, given in their own order, that count `(N, R)` times."""
        if self.weights is None:
            return counts.sum(axis=0, dtype=np.int64)
        return self.weights @ counts[self.order]

    def blocks(self) -> list[slice]:
        return [slice(i, min(i + BLOCK, self.num_rows)) for i in range(0, self.num_rows, BLOCK)]

    def class_shares(self, rows: slice, k: int) -> np.ndarray:
        """`(n, 4B)` shares of a class column's entries: uniform bins, ACE bins, TACE bins, pooled TACE bins."""
        masses = (self.class_mass[k], self.kept_mass[k], self.pooled_mass[k])
        index = uniform_index(self.probabilities[rows, k], self.num_bins)
        return np.concatenate(
            [one_hot(index, self.num_bins), *(m.shares(rows, self.num_bins) for m in masses)], axis=1
        )

    def top_shares(self, rows: slice) -> np.ndarray:
        """`(n, 2B)` shares of the top label: uniform bins, ACE bins."""
        return np.concatenate(
            [one_hot(self.top_index[rows], self.num_bins), self.top_mass.shares(rows, self.num_bins)], axis=1
        )


def one_hot(index: np.ndarray, size: int) -> np.ndarray:
    """`(n, size)` float32 indicator of each index."""
    return (index[:, None] == np.arange(size)).astype(np.float32)
