"""Does the head help? A paired bootstrap of its error AUROC against the base score's, the choice of a trial in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..json_files import Fields
from .selection import aurocs

#: Resamples; an interval of 95 % needs some hundreds.
NUM_RESAMPLES = 500
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
        """Whether the whole interval is below 0."""
        return self.high < 0

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
    errors: np.ndarray, base: np.ndarray, chosen: np.ndarray, candidates: np.ndarray | None = None, seed: int = 0
) -> Verdict:
    """Hold a chosen score against the base score on the same items.

    Of items that also chose it the gain is too large by what choosing adds. That is estimated by choosing anew in each
    resample: what is chosen there gains more there than on all items, on average by the optimism (Efron, 1983; Harrell
    et al., 1996), which is taken off the difference and its interval.

    Args:
        errors: `(N,)` bool.
        base: `(N,)`, the base score.
        chosen: `(N,)`, the head's.
        candidates: `(T, N)` scores among which `chosen` was chosen on these items, the base score among them where it
            could have been; None where other items chose.
        seed: Of the resamples.
    """
    both = np.stack([base, chosen]) if candidates is None else np.concatenate([[base, chosen], candidates])
    whole, drawn = aurocs(both, errors), resampled_aurocs(both, errors, seed)
    gains = drawn[:, 1] - drawn[:, 0]
    optimism = 0.0
    if candidates is not None:
        best = 2 + drawn[:, 2:].argmax(1)
        there = np.take_along_axis(drawn, best[:, None], axis=1)[:, 0] - drawn[:, 0]
        optimism = max(0.0, float((there - (whole[best] - whole[0])).mean()))
    low, high = np.quantile(gains, (0.025, 0.975)) - optimism
    difference = float(whole[1] - whole[0]) - optimism
    return Verdict(
        float(whole[0]), float(whole[1]), difference, float(low), float(high), optimism, len(errors), int(errors.sum())
    )


def resampled_aurocs(scores: np.ndarray, errors: np.ndarray, seed: int) -> np.ndarray:
    """`(R, T)` error AUROC of `(T, N)` scores on the same resampled items; errors and the rest are resampled apart.

    Apart, since an AUROC is that of given numbers of both, and every resample then has it.
    """
    generator, (count, size) = np.random.default_rng([seed, 4]), scores.shape
    wrong = int(errors.sum())
    weights = np.zeros((NUM_RESAMPLES, size), np.float32)
    for of in (errors, ~errors):
        weights[:, of] = generator.multinomial(of.sum(), np.full(of.sum(), 1 / of.sum()), NUM_RESAMPLES)
    found, rows = np.empty((NUM_RESAMPLES, count)), max(1, _ENTRIES // size)
    for place, values in enumerate(scores):
        order = np.argsort(values, kind="stable")
        starts = np.flatnonzero(np.append(True, np.diff(values[order]) != 0))
        mistaken = errors[order].astype(np.float32)
        for begin in range(0, NUM_RESAMPLES, rows):
            part = weights[begin : begin + rows, order]
            bad = np.add.reduceat(part * mistaken, starts, axis=1)
            good = np.add.reduceat(part * (1 - mistaken), starts, axis=1)
            surer = np.cumsum(good, axis=1, dtype=np.float64) - 0.5 * good
            found[begin : begin + rows, place] = (bad * surer).sum(1) / (wrong * (size - wrong))
    return found
