"""Error-ranking scores of many replicates, streamed over rows in order of falling confidence."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
from scipy.special import digamma

from ..bins import uniform_index
from ..scores.selective import augrc, auroc_of_pairs, oracle_aurc
from ..scores.table import keys_from
from .folded import Folded, over_cells
from .replicates import Batch, Design

# Runs of rows that the drift of replicates is kept at.
RUNS = 256


class Tied(NamedTuple):
    """Whole groups of tied rows: `(g, R)` float32 counts and errors; `(g, 1)` counts if all replicates agree."""

    counts: np.ndarray
    errors: np.ndarray


class RankedSums:
    """Sums over whole groups of ties; `_add` takes the counts, errors and ends of those that a block closes."""

    def __init__(self, design: Design, total: np.ndarray) -> None:
        self.total, self.last_of_group = total, design.last_of_group
        self.open: Tied | None = None
        self.seen = np.zeros(1, np.float32)

    def add(self, batch: Batch) -> None:
        groups = self._closed(batch)
        if groups is not None:
            ends = running(groups.counts, self.seen)
            self._add(*groups, ends)
            self.seen = ends[-1].copy()

    def _add(self, counts: np.ndarray, errors: np.ndarray, ends: np.ndarray) -> None:
        raise NotImplementedError

    def _closed(self, batch: Batch) -> Tied | None:
        """The groups of tied rows that end in this block, begun in an earlier one or not; None if none does."""
        last = self.last_of_group[batch.rows]
        values = Tied(batch.weights, batch.weights - batch.correct)
        if self.open is None and last.all():
            return values
        starts = np.append(0, np.flatnonzero(last) + 1)
        unfinished = starts[-1] < len(last)
        cuts = starts if unfinished else starts[:-1]
        values = Tied(*(np.add.reduceat(part, cuts, axis=0) for part in values))
        if self.open is not None:
            for part, opened in zip(values, self.open, strict=True):
                part[0] += opened
        self.open = Tied(*(part[-1] for part in values)) if unfinished else None
        closed = Tied(*(part[:-1] for part in values)) if unfinished else values
        return closed if len(closed.counts) else None


class AreaSums(RankedSums):
    """AUROC of errors, AURC and AUGRC; `auroc_of_pairs` needs no running count of errors."""

    keys: ClassVar[tuple[str, ...]] = keys_from("areas")

    def __init__(self, design: Design, total: np.ndarray) -> None:
        self.whole = design.weights is None
        super().__init__(design, np.asarray(total, dtype=np.int64 if self.whole else np.float64))
        if self.whole:
            rows = np.arange(int(self.total.max()) + 1)
            self.harmonic = harmonic(rows)
            self.table = rows * (1.0 - self.harmonic)
        self.wrong, self.weighted, self.area = np.zeros((3, len(total)))

    def _add(self, counts: np.ndarray, errors: np.ndarray, ends: np.ndarray) -> None:
        self.wrong += errors.sum(axis=0)
        self.weighted += np.einsum("gr,gr->r", *np.broadcast_arrays(errors, ends - 0.5 * counts), dtype=np.float64)
        # `share (A(end) - A(start))`, by parts: only ends where the share changes are looked up
        share = quotient(errors, counts)
        change = share.copy()
        change[:-1] -= share[1:]
        rows = np.flatnonzero(change.any(axis=1))
        change = change[rows]
        total = self.harmonic[self.total] if self.whole else harmonic(self.total)
        self.area += np.einsum("gr,gr->r", *np.broadcast_arrays(change, self._less(ends[rows])), dtype=np.float64)
        self.area += total * np.einsum("gr,gr->r", *np.broadcast_arrays(change, ends[rows]), dtype=np.float64)
        self.area -= share[0] * (self._less(self.seen) + total * self.seen)

    def _less(self, ends: np.ndarray) -> np.ndarray:
        """`c (1 - H_c)`: sum_{i <= c} (H_N - H_{i-1}) = c (1 + H_N - H_c), but for what is linear in H_N."""
        return np.take(self.table, ends.astype(np.int32)) if self.whole else ends * (1.0 - harmonic(ends))

    def scores(self) -> dict[str, np.ndarray]:
        total, wrong, area = self.total, self.wrong, self.area / self.total
        auroc = auroc_of_pairs(self.weighted, total, wrong)
        return {
            "error_auroc": auroc,
            "aurc": area,
            "e_aurc": area - oracle_aurc(total, wrong, whole=self.whole),
            "augrc": augrc(auroc, total, wrong),
        }


class PrecisionSums(RankedSums):
    """Average precision of errors, which runs from the least sure row, and of correct rows, from the surest."""

    keys: ClassVar[tuple[str, ...]] = keys_from("precisions")

    def __init__(self, design: Design, total: np.ndarray) -> None:
        super().__init__(design, np.asarray(total, dtype=np.float32 if design.weights is None else np.float64))
        self.wrong = np.zeros(len(total), np.float32)
        self.success, self.first, self.second = np.zeros((3, len(total)))

    def _add(self, counts: np.ndarray, errors: np.ndarray, ends: np.ndarray) -> None:
        wrong = running(errors, self.wrong)
        precision = quotient(ends - wrong, ends)
        self.success += ((counts - errors) * precision).sum(axis=0)
        # What is left of the errors and of the rows, this group included: (E - before) / (N - before), E not known
        # yet.
        left = quotient(errors, self.total - (ends - counts))
        self.first += left.sum(axis=0)
        self.second += (left * (wrong - errors)).sum(axis=0)
        self.wrong = wrong[-1].copy()

    def scores(self) -> dict[str, np.ndarray]:
        wrong = self.wrong.astype(np.float64)
        right = self.total - wrong
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "error_aupr": np.where(wrong > 0, (self.first * wrong - self.second) / wrong, np.nan),
                "success_aupr": np.where(right > 0, self.success / right, np.nan),
            }


class DriftSums:
    """Kolmogorov-Smirnov calibration error: the largest cumulative residual, at the end of a group."""

    keys: ClassVar[tuple[str, ...]] = keys_from("drift")

    def __init__(self, design: Design, total: np.ndarray) -> None:
        self.design, self.total = design, total
        self.drift = np.zeros(len(total), np.float32)
        self.highest, self.lowest = np.zeros((2, len(total)), np.float32)
        # Runs of rows, none of which splits a group of ties.
        ends = np.flatnonzero(design.last_of_group)
        run = np.minimum(np.arange(design.num_rows) * RUNS // design.num_rows, RUNS - 1)
        last = ends[np.searchsorted(ends, np.arange(design.num_rows))]
        self.run = run[last]
        self.gaps = np.zeros((RUNS, len(total)))

    def add(self, batch: Batch) -> None:
        confidence = self.design.confidence[batch.rows, None].astype(np.float32)
        gaps = batch.weights * confidence - batch.correct
        run = self.run[batch.rows]
        runs = np.arange(run[0], run[-1] + 1)
        self.gaps[runs] += (runs[:, None] == run).astype(np.float32) @ gaps
        drift = running(gaps, self.drift)
        self.drift = drift[-1].copy()
        ends = drift[self.design.last_of_group[batch.rows]]
        if len(ends):
            self.highest = np.maximum(self.highest, ends.max(axis=0))
            self.lowest = np.minimum(self.lowest, ends.min(axis=0))

    def scores(self) -> dict[str, np.ndarray]:
        # The drift is defined from the least confident row upwards; ours ran downwards.
        furthest = np.maximum(np.abs(self.drift - self.lowest), np.abs(self.drift - self.highest))
        return {"ks_error": furthest / self.total}

    def folded(self) -> dict[str, Folded]:
        """The Kolmogorov-Smirnov error over runs of rows; a truth has one gap a uniform bin."""
        used = np.unique(self.run)
        position = np.searchsorted(used, self.run)
        gap = (self.gaps[used] / self.total)[::-1]  # upwards from the least confident
        confidence, index = self.design.confidence, len(used) - 1 - position
        everywhere = slice(None)
        middle = np.bincount(index, weights=confidence) / np.bincount(index)
        mass = np.bincount(index, weights=self.design.of_rows(everywhere))
        variance = np.bincount(index, weights=self.design.squared(everywhere, confidence * (1.0 - confidence)))
        bins = uniform_index(np.minimum(middle, 1.0), self.design.num_bins)

        def furthest(gaps: np.ndarray) -> np.ndarray:
            return np.abs(gaps.cumsum(axis=0)).max(axis=0)

        return {"ks_error": over_cells(gap, bins, mass, (variance, self.total[-1]), furthest, furthest)}


def running(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Cumulative sums down the rows, from `start` on; whole numbers below 2^24 are exact in float32."""
    total = np.cumsum(values, axis=0, dtype=values.dtype)
    total = total + start if total.shape[-1] != start.shape[-1] else np.add(total, start, out=total)
    return total


def harmonic(rows: np.ndarray) -> np.ndarray:
    """Harmonic numbers, also between whole ones."""
    return digamma(rows + 1.0) + np.euler_gamma


def quotient(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`; 0 where there is no row, as in resamples that have left a group out."""
    if whole.dtype == np.float32:  # whole numbers
        return part / np.maximum(whole, 1.0)
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 1e-9)
