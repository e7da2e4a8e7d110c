"""Row-wise and binned scores of many replicates; every sum over rows is one matrix product.

Blocks' counts are exact in float32, added up in float64; other sums are good to 1e-6, far below Monte-Carlo error.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..bins import BinStatistics, uniform_index
from ..scores.binned import brier_of_sums, calibration_error, loss_of_label, scores_of_bins, scores_of_columns
from ..scores.columns import ColumnBins
from ..scores.panel import row_entropy
from ..scores.smooth import SMALLEST_BANDWIDTH, cosine_series, smooth_error_of_grid, smoothed
from ..scores.table import keys_from
from .folded import Folded, Score, absolute, over_cells, squares, widened
from .replicates import Batch, Design

GRID = 512


class RowSums:
    """Means over rows: accuracy, NLL, Brier score, confidence, entropy."""

    keys: ClassVar[tuple[str, ...]] = keys_from("rows")

    def __init__(self, design: Design, total: np.ndarray) -> None:
        self.design, self.total = design, total
        self.correct, self.nll, self.of_label = np.zeros((3, len(total)))
        self.shared = np.zeros((3, len(total)))

    def add(self, batch: Batch) -> None:
        p = self.design.probabilities[batch.rows]
        features = np.stack([self.design.confidence[batch.rows], row_entropy(p), np.einsum("nk,nk->n", p, p)])
        self.shared += features.astype(np.float32) @ batch.weights
        self.correct += batch.correct.sum(axis=0)
        # Only of labels: a row may have more classes than replicates.
        if batch.labels is None:
            of_label = p[np.arange(len(p)), self.design.labels[batch.rows]]
            sums = np.stack([loss_of_label(of_label), of_label]).astype(np.float32) @ batch.weights
        else:
            of_label = np.take_along_axis(p, batch.labels, axis=1)
            losses = loss_of_label(of_label)
            sums = np.stack([(part * batch.weights).sum(axis=0) for part in (losses, of_label)])
        self.nll += sums[0]
        self.of_label += sums[1]

    def scores(self) -> dict[str, np.ndarray]:
        confidence, entropy, squares = self.shared / self.total
        return {
            "accuracy": self.correct / self.total,
            "nll": self.nll / self.total,
            "brier": brier_of_sums(squares, self.of_label / self.total),
            "mean_confidence": confidence,
            "mean_entropy": entropy,
        }


class TopSums:
    """Scores over the top label's uniform and equal-mass bins."""

    keys: ClassVar[tuple[str, ...]] = keys_from("top")

    def __init__(self, design: Design, total: np.ndarray) -> None:
        self.design, self.total = design, total
        self.counts = np.zeros((design.num_bins, len(total)))
        self.confidence, self.hits = np.zeros((2, 2 * design.num_bins, len(total)))
        self.variance = np.zeros(2 * design.num_bins)

    def add(self, batch: Batch) -> None:
        bins = self.design.num_bins
        shares = self.design.top_shares(batch.rows)
        self.variance += self.design.squared(batch.rows, bernoulli(self.design.confidence[batch.rows])) @ shares
        weighted = shares * self.design.confidence[batch.rows, None].astype(np.float32)
        sums = np.concatenate([shares[:, :bins], weighted], axis=1).T @ batch.weights
        self.counts += sums[:bins]
        self.confidence += sums[bins:]
        self.hits += shares.T @ batch.correct

    def scores(self) -> dict[str, np.ndarray]:
        bins = self.design.num_bins
        top = _replicates_first(self.counts, self.confidence[:bins], self.hits[:bins])
        mass = _replicates_first(self.total / bins, self.confidence[bins:], self.hits[bins:])
        return {**scores_of_bins(top), "ace": calibration_error(mass)}

    def folded(self) -> dict[str, Folded]:
        """The scores that fold at zero; the last replicate is the rows at hand."""
        bins, gap = self.design.num_bins, (self.confidence - self.hits) / self.total
        moved, errors = widened(gap[:, :-1] - gap[:, -1:], np.sqrt(self.variance) / self.total[-1])
        share = self.counts[:, -1] / self.total[-1]
        inverse = np.divide(1.0, share, out=np.zeros(bins), where=share > 1e-12)
        filled = inverse > 0.0
        frequency = ratio(self.hits[:bins, -1], self.counts[:, -1])
        counts = self.counts[:, -1]
        noise = np.where(counts >= 2, share * frequency * (1.0 - frequency) / np.maximum(counts - 1.0, 1.0), 0.0).sum()
        # A row alone in its bin has no part in the debiased score.
        several, mean = np.where(counts >= 2, inverse, 0.0), inverse[:, None] / filled.sum()

        def of(cells: slice, score: Score, truth: Score | None = None, side: int = 0) -> Folded:
            point = gap[cells, -1]
            observed = float(score(point[:, None])[0])
            return Folded(point, errors[cells], moved[cells], score, observed, truth or score, side=side)

        uniform, mass = slice(0, bins), slice(bins, None)
        return {
            "ece": of(uniform, absolute()),
            "ace": of(mass, absolute()),
            "mce": of(uniform, lambda gaps: (np.abs(gaps) * inverse[:, None]).max(axis=0)),
            "average_gap": of(uniform, lambda gaps: (np.abs(gaps) * mean).sum(axis=0)),
            "rmsce": of(uniform, lambda gaps: np.sqrt(squares(inverse)(gaps))),
            "rmsce_debiased": of(
                uniform,
                lambda gaps: np.sqrt(np.maximum(squares(several)(gaps) - noise, 0.0)),
                lambda gaps: np.sqrt(squares(inverse)(gaps)),
            ),
            "overconfidence": of(uniform, lambda gaps: np.maximum(gaps, 0.0).sum(axis=0), side=1),
            "underconfidence": of(uniform, lambda gaps: np.maximum(-gaps, 0.0).sum(axis=0), side=-1),
        }


class SmoothSums:
    """Smooth ECE, over a grid of residuals; rows come in order of confidence, so each cell is a run of them."""

    keys: ClassVar[tuple[str, ...]] = keys_from("smooth")

    def __init__(self, design: Design, total: np.ndarray) -> None:
        self.design, self.total = design, total
        self.index = np.minimum((design.confidence * GRID).astype(np.int64), GRID - 1)
        self.grid = np.zeros((GRID, len(total)))
        self.mass, self.variance = np.zeros((2, GRID))

    def add(self, batch: Batch) -> None:
        index = self.index[batch.rows]
        self.mass += np.bincount(index, weights=self.design.of_rows(batch.rows), minlength=GRID)
        spread = self.design.squared(batch.rows, bernoulli(self.design.confidence[batch.rows]))
        self.variance += np.bincount(index, weights=spread, minlength=GRID)
        residuals = batch.correct - batch.weights * self.design.confidence[batch.rows, None].astype(np.float32)
        cells = np.arange(index.min(), index.max() + 1)
        self.grid[cells] += (cells[:, None] == index).astype(np.float32) @ residuals

    def scores(self) -> dict[str, np.ndarray]:
        return {"smooth_ece": smooth_error_of_grid((self.grid / self.total).T, iterations=10)}

    def folded(self) -> dict[str, Folded]:
        """Smooth ECE: a truth has one gap a uniform bin, spread over its cells.

        The score of a sample is at most `s` exactly if the error smoothed with bandwidth `s` is: samples are compared
        at the observed bandwidth alone, where smoothing is linear.
        """
        grid = self.grid / self.total
        observed = float(smooth_error_of_grid(grid[:, -1:].T, iterations=14)[0])
        bins = uniform_index((np.arange(GRID) + 0.5) / GRID, self.design.num_bins)
        bandwidth = max(observed, SMALLEST_BANDWIDTH)

        def smooth(values: np.ndarray) -> np.ndarray:
            return smoothed(cosine_series(values.T), np.full(values.shape[1], bandwidth)).T

        def truth(gaps: np.ndarray) -> np.ndarray:
            return smooth_error_of_grid(gaps.T, iterations=14)

        errors = self.variance, self.total[-1]
        return {"smooth_ece": over_cells(grid, bins, self.mass, errors, absolute(), truth, smooth)}


class ClassSums:
    """Scores over the bins of every class column, and Murphy's decomposition of the Brier score."""

    keys: ClassVar[tuple[str, ...]] = keys_from("classes")

    def __init__(self, design: Design, total: np.ndarray) -> None:
        self.design, self.total = design, total
        classes, bins, size = design.num_classes, design.num_bins, len(total)
        self.counts = np.zeros((classes, bins, size))
        self.values, self.hits = np.zeros((2, classes, 3 * bins, size))
        self.pooled = np.zeros((bins, size))
        self.kept = np.zeros((classes, size))
        self.squares, self.of_label = np.zeros((2, size))
        self.variance, self.pooled_variance = np.zeros((classes, 3 * bins)), np.zeros(bins)

    def add(self, batch: Batch) -> None:
        bins, p = self.design.num_bins, self.design.probabilities[batch.rows].astype(np.float32)
        pooled = np.zeros((len(p), bins), np.float32)
        for k in range(self.design.num_classes):
            shares = self.design.class_shares(batch.rows, k)
            column = p[:, k, None]
            variance = self.design.squared(batch.rows, bernoulli(p[:, k])) @ shares
            self.variance[k] += variance[: 3 * bins]
            self.pooled_variance += variance[3 * bins :]
            kept = shares[:, 2 * bins : 3 * bins].sum(axis=1, keepdims=True)
            features = np.concatenate([shares[:, :bins], shares[:, : 3 * bins] * column, kept], axis=1)
            sums = features.T @ batch.weights
            self.counts[k] += sums[:bins]
            self.values[k] += sums[bins:-1]
            self.kept[k] += sums[-1]
            pooled += shares[:, 3 * bins :] * column
            hits, select = batch.class_hits(self.design, k)
            sums = np.concatenate([shares, column], axis=1)[select].T @ hits
            self.hits[k] += sums[: 3 * bins]
            self.pooled -= sums[3 * bins : -1]
            self.of_label += sums[-1]
        self.pooled += pooled.T @ batch.weights
        self.squares += np.einsum("nk,nk->n", p, p) @ batch.weights

    def scores(self) -> dict[str, np.ndarray]:
        bins = self.design.num_bins
        parts = [slice(i * bins, (i + 1) * bins) for i in range(3)]
        counts = (self.counts, self.total[None, None] / bins, self.kept[:, None] / bins)
        uniform, mass, kept = (
            _replicates_first(count, self.values[:, part], self.hits[:, part])
            for count, part in zip(counts, parts, strict=True)
        )
        # of the pooled bins the gap is at hand, which is all that an error needs
        pooled = _replicates_first(self.kept.sum(axis=0) / bins, self.pooled, np.zeros(1))
        brier = brier_of_sums(self.squares / self.total, self.of_label / self.total)
        return scores_of_columns(ColumnBins(uniform, mass, kept, pooled), brier)

    def folded(self) -> dict[str, Folded]:
        """The scores that fold at zero; the last replicate is the rows at hand."""
        bins, classes, total = self.design.num_bins, self.design.num_classes, self.total
        gap, least = (self.values - self.hits) / total, np.sqrt(self.variance) / total[-1]
        kept = np.maximum(self.kept[:, -1], 1e-9) / total[-1]
        share = self.counts[..., -1] / total[-1]
        inverse = np.divide(1.0, share, out=np.zeros(share.shape), where=share > 1e-12).reshape(-1)
        base = self.hits[:, :bins].sum(axis=1) / total
        # By the shares and base rates of the rows at hand: their noise, ten times that of a few errors, cancels in the
        # resolution to first order, and would hide from `widened` how little those errors vary in resamples.
        frequency = ratio(self.hits[:, :bins], self.counts)
        frequency = np.where(self.counts > 1e-9, frequency, frequency[..., -1:])
        above = share[..., None] * (frequency - base[:, None, -1:])
        parts = [slice(i * bins, (i + 1) * bins) for i in range(3)]

        def of(values: np.ndarray, score: Score, noise: np.ndarray) -> Folded:
            flat = values.reshape(-1, values.shape[-1])
            moved, errors = widened(flat[:, :-1] - flat[:, -1:], noise.reshape(-1), normals[: len(flat)])
            return Folded(flat[:, -1], errors, moved, score, float(score(flat[:, -1:])[0]), score)

        normals = np.random.default_rng(1).normal(size=(classes, bins, gap.shape[-1] - 1))
        if classes == 2:  # one column is the mirror image of the other
            normals[1] = -normals[0, ::-1]
        normals = normals.reshape(classes * bins, -1)
        each = np.full(classes * bins, 1.0 / classes)
        pooled = self.pooled / np.maximum(self.kept[:, -1].sum(), 1e-9)
        pooled_noise = np.sqrt(self.pooled_variance) / np.maximum(self.kept[:, -1].sum(), 1e-9)
        return {
            "classwise_ece": of(gap[:, parts[0]], absolute(each), least[:, parts[0]]),
            "ace_classwise": of(gap[:, parts[1]], absolute(each), least[:, parts[1]]),
            "tace_classwise": of(gap[:, parts[2]], absolute(each / np.repeat(kept, bins)), least[:, parts[2]]),
            "tace": of(pooled, absolute(), pooled_noise),
            "brier_reliability": of(gap[:, parts[0]], squares(inverse), least[:, parts[0]]),
            "brier_resolution": of(above, squares(inverse), least[:, parts[0]]),
            # Of the distance from equal frequencies, by which it falls short of 1 - 1/C. A class that no row has is
            # as uncertain as one of a single row: resamples do not know that it might have been seen.
            "brier_uncertainty": of(
                base - 1.0 / classes, squares(np.ones(classes)), np.full(classes, 1.0 / total[-1])
            ),
        }


def _replicates_first(*parts: np.ndarray) -> BinStatistics:
    """Statistics of many sets of rows from sums whose last axis is the replicate."""
    return BinStatistics(*(np.moveaxis(part, -1, 0) for part in np.broadcast_arrays(*parts)))


def bernoulli(probabilities: np.ndarray) -> np.ndarray:
    """Variance of an outcome with these probabilities."""
    return probabilities * (1.0 - probabilities)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient that is zero where nothing was counted."""
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 1e-9)
