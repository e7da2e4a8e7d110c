"""Does the head help? A paired bootstrap of its error AUROC against the base score's, the choice of a trial in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

from ..json_files import Fields
from .selection import aurocs

#: Resamples; an interval of 95 % needs some hundreds.
NUM_RESAMPLES = 500
#: Of fewer rows with an error, or without one, resamples know too little: by three errors a head was said to help in
#: 13 of 100 cases where it does not.
FEWEST = 20
#: Resamples in which is chosen anew: their mean is taken, which needs fewer.
NUM_CHOICES = 100
# Numbers of resampled items held at a time.
_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a head against the frozen model's own score.

    Attributes:
        base: Error AUROC of the base score.
        head: That of the head on the same items; of items that also chose it, flattered by `optimism`.
        difference: `head - base - optimism`.
        low, high: 95 % interval of the difference.
        optimism: By how much choosing among trials on the items flatters the head; 0 where others chose.
        num_items, num_errors: What it rests on.
    """

    base: float
    head: float
    difference: float
    low: float
    high: float
    optimism: float
    num_items: int
    num_errors: int

    @property
    def helps(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    @property
    def harms(self) -> bool:
        """Whether the interval is below 0 even where no optimism is taken off, which is against the head, too."""
        return self.high + self.optimism < 0

    def __str__(self) -> str:
        told = "The head helps" if self.helps else "The head does harm" if self.harms else "It cannot be told to help"
        return (
            f"{told}: error AUROC {self.base:.4f} without it, {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}] with it, by {self.num_items:,} items with "
            f"{self.num_errors:,} errors."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(vars(self))

    @classmethod
    def from_fields(cls, fields: Fields) -> Verdict:
        """The inverse of `to_dict`, checked."""
        numbers = {name: fields.number(name) for name in ("base", "head", "difference", "low", "high", "optimism")}
        return cls(**numbers, num_items=fields.integer("num_items"), num_errors=fields.integer("num_errors"))


def judge(
    errors: np.ndarray,
    base: np.ndarray,
    chosen: np.ndarray,
    candidates: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    folds: int | None = None,
    seed: int = 0,
) -> Verdict:
    """Hold a chosen score against the base score on the same items.

    Of items that also chose it the gain is too large by what choosing adds. That is estimated by choosing anew in each
    resample: what is chosen there gains more there than on all items, on average by the optimism (Efron, 1983; Harrell
    et al., 1996), which is taken off the difference and its interval.

    Args:
        errors: `(N,)` bool.
        base: `(N,)`, the base score.
        chosen: `(N,)`, the head's.
        candidates: `(M, N)` scores among which `chosen` was chosen on these items, the base score among them where it
            could have been; None where other items chose.
        groups: `(N,)` the row of each item, where a row has several or occurs several times (`row_groups`): rows are
            resampled whole.
        folds: Number K of folds, where the scores of each were fitted on the others. A bootstrap does not see that
            these share most of their rows; the interval is widened by `sqrt(1 + K / (K - 1))` (Nadeau & Bengio, 2003).
        seed: Of the resamples.

    Where fewer than 20 rows have an error, or have none, the interval is as much wider as Student's is for so many.
    """
    drawn = Resamples.of(errors, groups, seed)
    pair = np.stack([base, chosen])
    whole, gains = aurocs(pair, errors), np.diff(drawn.aurocs(pair), axis=1)[:, 0]
    optimism = 0.0
    if candidates is not None:
        few = drawn.first(NUM_CHOICES)
        there, here = few.aurocs(candidates), aurocs(candidates, errors)
        best = np.nan_to_num(there, nan=-1.0).argmax(1)
        ahead = np.take_along_axis(there, best[:, None], axis=1) - few.aurocs(base[None])
        optimism = max(0.0, float(np.nanmean(ahead[:, 0] - (here[best] - whole[0]))))
    gain = float(whole[1] - whole[0])
    wider = 1.0 if folds is None else (1 + folds / (folds - 1)) ** 0.5
    ends = np.nanquantile(gains, (0.025, 0.975))
    few = _stretch(errors, groups)
    low, high = (-1.0, 1.0) if few is None else (gain - optimism + few * wider * (end - gain) for end in ends)
    return Verdict(
        base=float(whole[0]),
        head=float(whole[1]),
        difference=gain - optimism,
        low=float(low),
        high=float(high),
        optimism=optimism,
        num_items=len(errors),
        num_errors=int(errors.sum()),
    )


def _stretch(errors: np.ndarray, groups: np.ndarray | None) -> float | None:
    """By how much Student's quantile of the rarer rows is wider than a normal one; None of a single such row."""
    group = np.arange(len(errors)) if groups is None else groups
    rarer = min(len(np.unique(group[errors])), len(np.unique(group[~errors])))
    if not 0 < rarer < FEWEST:
        return 1.0
    return None if rarer == 1 else float(stdtrit(rarer - 1, 0.975) / ndtri(0.975) * np.sqrt(rarer / (rarer - 1)))


@dataclass(frozen=True)
class Resamples:
    """Resampled items: how often each occurs in each of R resamples.

    Attributes:
        errors: `(N,)` bool.
        weights: `(R, N)` float32.
    """

    errors: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, errors: np.ndarray, groups: np.ndarray | None, seed: int) -> Resamples:
        """Rows drawn with replacement, each with all its items."""
        group = np.arange(len(errors)) if groups is None else np.unique(groups, return_inverse=True)[1]
        count = int(group.max()) + 1
        drawn = np.random.default_rng([seed, 4]).multinomial(count, np.full(count, 1 / count), NUM_RESAMPLES)
        return cls(errors, drawn.astype(np.float32)[:, group])

    def first(self, count: int) -> Resamples:
        """Some of them."""
        return Resamples(self.errors, self.weights[:count])

    def aurocs(self, scores: np.ndarray) -> np.ndarray:
        """`(R, M)` error AUROC of `(M, N)` scores in each resample; NaN where it has no error, or nothing else."""
        count, size = self.weights.shape
        wrong = self.weights @ self.errors.astype(np.float32)
        right = self.weights.sum(1) - wrong
        pairs = np.where(wrong * right > 0, wrong * right, np.nan)
        found, block = np.empty((count, len(scores))), max(1, _ENTRIES // size)
        for place, values in enumerate(scores):
            order = np.argsort(values, kind="stable")
            starts = np.flatnonzero(np.append(True, np.diff(values[order]) != 0))
            mistaken = self.errors[order].astype(np.float32)
            for begin in range(0, count, block):
                part = self.weights[begin : begin + block, order]
                bad = part * mistaken
                good = part - bad
                if len(starts) < size:
                    bad, good = (np.add.reduceat(side, starts, axis=1) for side in (bad, good))
                surer = np.cumsum(good, axis=1, dtype=np.float64) - 0.5 * good
                found[begin : begin + block, place] = (bad * surer).sum(1)
        return found / pairs[:, None]
