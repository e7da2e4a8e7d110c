# SPDX-License-Identifier: Apache-2.0
"""Error-ranking scores of many replicates, streamed over rows in order of falling confidence."""

from __future__ import annotations

import numpy as np

from peft_calib.calibration.selective import harmonic


class RankingSums:
    """AURC, AUROC, both average precisions and the KS drift of `R` replicates.

    Tied rows form one group, which may go on from one block of rows to the next, so the last group stays open.

    Args:
        total: `(R,)` rows counted in each replicate, known beforehand.
    """

    def __init__(self, total: np.ndarray) -> None:
        size = len(total)
        self.total = np.asarray(total, dtype=np.int64)
        self.harmonic = harmonic(np.arange(int(self.total.max()) + 1))
        self.seen, self.errors, self.drift = np.zeros((3, size))
        self.open = np.zeros((3, size))
        self.area, self.pairs, self.success_precision, self.error_first, self.error_second = np.zeros((5, size))
        self.highest, self.lowest = np.zeros((2, size))

    def add(self, counts: np.ndarray, errors: np.ndarray, residuals: np.ndarray, last_of_group: np.ndarray) -> None:
        """Adds a block of rows.

        Args:
            counts: `(n, R)` float32 times each row counts.
            errors: `(n, R)` float32 times it counts as an error.
            residuals: `(n, R)` float32 sums of `confidence - correct`.
            last_of_group: `(n,)` True where the next row has another confidence.

        The three arrays may be changed.
        """
        stacked = (counts, errors, residuals)
        starts = np.append(0, np.flatnonzero(last_of_group) + 1)
        unfinished = starts[-1] < len(counts)
        if len(starts) <= len(counts):
            cuts = starts if unfinished else starts[:-1]
            stacked = tuple(np.add.reduceat(values, cuts, axis=0) for values in stacked)
        closed = [values[:-1] if unfinished else values for values in stacked]
        rest = np.stack([values[-1] for values in stacked]) if unfinished else np.zeros_like(self.open)
        if len(closed[0]) == 0:
            self.open += rest
            return
        for values, opened in zip(closed, self.open, strict=True):
            values[0] += opened
        self._close(*closed)
        self.open = rest.astype(np.float64)

    def _close(self, counts: np.ndarray, errors: np.ndarray, residuals: np.ndarray) -> None:
        """Scores whole groups, `(g, R)` each."""
        ends = self.seen + np.cumsum(counts, axis=0, dtype=np.float64)
        starts = np.concatenate([self.seen[None], ends[:-1]])
        wrong = self.errors + np.cumsum(errors, axis=0, dtype=np.float64)
        right = ends - wrong
        share = np.divide(errors, counts, out=np.zeros(counts.shape), where=counts > 0)
        area = ends * (1.0 + self.harmonic[self.total] - self.harmonic[ends.astype(np.int64)])
        first = self.seen * (1.0 + self.harmonic[self.total] - self.harmonic[self.seen.astype(np.int64)])
        steps = area.copy()
        steps[1:] -= area[:-1]
        steps[0] -= first
        self.area += np.einsum("gr,gr->r", share, steps)
        correct = counts - errors
        self.pairs += np.einsum("gr,gr->r", errors, right - 0.5 * correct)
        self.success_precision += (correct * np.divide(right, ends, out=np.zeros(ends.shape), where=ends > 0)).sum(
            axis=0
        )
        left = np.divide(errors, self.total - starts, out=np.zeros(starts.shape), where=self.total > starts)
        self.error_first += left.sum(axis=0)
        self.error_second += np.einsum("gr,gr->r", left, wrong - errors)
        drift = self.drift + np.cumsum(residuals, axis=0, dtype=np.float64)
        self.highest, self.lowest = (
            np.maximum(self.highest, drift.max(axis=0)),
            np.minimum(self.lowest, drift.min(axis=0)),
        )
        self.seen, self.errors, self.drift = ends[-1], wrong[-1], drift[-1]

    def scores(self) -> dict[str, np.ndarray]:
        """`(R,)` arrays under the panel's keys; NaN where a replicate has no error, or nothing else."""
        total, wrong = self.total, self.errors
        right = total - wrong
        with np.errstate(divide="ignore", invalid="ignore"):
            auroc = self.pairs / (wrong * right)
            error_aupr = (self.error_first * wrong - self.error_second) / wrong
            success_aupr = self.success_precision / right
        rate = wrong / total
        best = right * (1.0 + self.harmonic[total] - self.harmonic[right.astype(np.int64)])
        oracle = np.where(wrong > 0, (total - best) / total, 0.0)
        aurc = self.area / total
        augrc = np.where((rate > 0) & (rate < 1), (1.0 - auroc) * rate * (1.0 - rate) + 0.5 * rate**2, 0.5 * rate)
        return {
            "error_auroc": np.where((wrong > 0) & (right > 0), auroc, np.nan),
            "error_aupr": np.where(wrong > 0, error_aupr, np.nan),
            "success_aupr": np.where(right > 0, success_aupr, np.nan),
            "aurc": aurc,
            "e_aurc": aurc - oracle,
            "augrc": augrc,
            # The drift is defined from the least confident row upwards; ours ran downwards.
            "ks_error": np.maximum(np.abs(self.drift - self.lowest), np.abs(self.drift - self.highest)) / total,
        }
