"""How badly a class fits a row: the scores of LAC, APS and RAPS, and where to cut them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import betainc

from ...json_files import Fields
from ..fingerprint import row_hashes
from .bounds import conformal_rank

KINDS = ("lac", "aps", "raps")


def class_scores(
    probabilities: np.ndarray, kind: str, u: np.ndarray | None, penalty: float = 0.0, free_ranks: int = 0
) -> np.ndarray:
    """`(N, C)` nonconformity scores, larger where a class fits worse.

    - LAC: `1 - p_c` (Sadinle, Lei & Wasserman, 2019).
    - APS: the probability of `c` and of all classes above it, less `u p_c` (Romano, Sesia & Candès, 2020).
    - RAPS: that, and `penalty` for each rank of `c` beyond `free_ranks` (Angelopoulos et al., 2021).

    Classes of equal probability are ranked by their number.

    Args:
        probabilities: `(N, C)`.
        kind: One of `KINDS`.
        u: `(N,)` numbers in [0, 1), or None: nothing is taken off. LAC takes no notice of it.
        penalty: Of RAPS.
        free_ranks: Of RAPS.

    Example:
        >>> class_scores(np.array([[0.2, 0.5, 0.3]]), "aps", None).round(2)
        array([[1. , 0.5, 0.8]])
    """
    if kind == "lac":
        return 1.0 - probabilities
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=1)
    scores = np.cumsum(ranked, axis=1)
    # All classes together are exactly 1 in every row: otherwise rounding would decide which rows have the last one.
    ranked /= scores[:, -1:]
    scores /= scores[:, -1:].copy()
    if u is not None:
        scores -= u[:, None] * ranked
    if kind == "raps":
        scores += penalty * np.maximum(np.arange(1, ranked.shape[1] + 1) - free_ranks, 0)
    found = np.empty_like(scores)
    np.put_along_axis(found, order, scores, axis=1)
    return found


def uniforms(probabilities: np.ndarray, seed: int) -> np.ndarray:
    """`(N,)` numbers in [0, 1), keyed by `seed`, by what the row is and by how many like it come before it.

    A row unlike all others of its batch has the same number in every batch, wherever it stands there. The first of
    equal rows has that number, the second another, and so on: which of them has which is their order in the batch, and
    numbers of one batch are independent. Equal rows that come in batches of their own all have the first: then chance
    does not average over them, but over seeds alone.
    """
    alike = row_hashes(probabilities, np.full(len(probabilities), seed, np.int64))
    order = np.argsort(alike, kind="stable")
    new = np.append(True, alike[order][1:] != alike[order][:-1])
    place = np.arange(len(alike))
    before = np.empty(len(alike))
    before[order] = place - np.maximum.accumulate(np.where(new, place, 0))
    return (row_hashes(before[:, None], alike) >> np.uint64(11)) * 2.0**-53


class Cut(NamedTuple):
    """With which chance a class of a given score is in the set.

    1 below `low`, `at_low` there, `between` up to `high`, `at_high` there, 0 above it. Without randomisation `low` is
    the quantile and everything else is 0 or 1.
    """

    low: float
    at_low: float = 1.0
    between: float = 0.0
    high: float = math.inf
    at_high: float = 0.0

    def chance(self, scores: np.ndarray) -> np.ndarray:
        """Chances in [0, 1] of scores of any shape."""
        above = np.where(scores < self.high, self.between, np.where(scores == self.high, self.at_high, 0.0))
        return np.where(scores < self.low, 1.0, np.where(scores == self.low, self.at_low, above))

    def to_list(self) -> list[float | None]:
        """Its fields, with null for an infinite `high`."""
        return [None if math.isinf(value) else value for value in self]

    @classmethod
    def from_fields(cls, fields: Fields, name: str) -> Cut:
        """The inverse of `to_list`."""
        values = fields.listing(name)
        numbers = [math.inf if value is None and k == 3 else value for k, value in enumerate(values)]
        fits = len(numbers) == 5 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers)
        if not fits or not all(0.0 <= numbers[k] <= 1.0 for k in (1, 2, 4)) or not numbers[0] <= numbers[3]:
            raise fields.wrong(name, "five numbers: two scores in order (the second may be null) and three chances")
        return cls(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4])


def rank_for(num_rows: int, alpha: float, confidence: float | None) -> int:
    """Which of n sorted scores to cut at; above n where n is too small.

    `ceil((n + 1) (1 - alpha))` covers a new row with probability `1 - alpha`, on average over calibration splits.
    With a `confidence` it is the least k whose coverage, which follows Beta(k, n + 1 - k), is at least `1 - alpha`
    with that probability over splits (Vovk, 2012).
    """
    if confidence is None:
        return conformal_rank(num_rows, alpha)
    ranks = np.arange(1, num_rows + 1)
    enough = betainc(ranks, num_rows + 1 - ranks, 1.0 - alpha) <= 1.0 - confidence
    return int(ranks[enough][0]) if enough.any() else num_rows + 1


def cut_at(scores: np.ndarray, rank: int) -> Cut:
    """The cut at the `rank`-th smallest of `(n,)` scores: scores up to it are in, ties included."""
    return Cut(float(np.partition(scores, rank - 1)[rank - 1]))


def smoothed_cut(scores: np.ndarray, alpha: float) -> Cut:
    """The cut of smoothed p-values, which covers with probability `1 - alpha` exactly, ties or not.

    With `g` scores above a score and `e` equal to it, it is in if `g + U (1 + e) > alpha (n + 1)`, U uniform (Vovk,
    Gammerman & Shafer, 2005). Only at two of the scores, and between them, is that left to chance.
    """
    allowed = alpha * (len(scores) + 1)
    values, counts = np.unique(scores, return_counts=True)
    above = len(scores) - np.cumsum(counts)
    k = int(np.flatnonzero(above + counts > allowed)[-1])

    def chance(greater: float, equal: float) -> float:
        return float(np.clip(1.0 - (allowed - greater) / (1.0 + equal), 0.0, 1.0))

    at_low, between = chance(above[k], counts[k]), chance(above[k], 0)
    if k + 1 == len(values):
        return Cut(float(values[k]), at_low, between)
    return Cut(float(values[k]), at_low, between, float(values[k + 1]), chance(above[k + 1], counts[k + 1]))


def check_kind_of_score(score: Any) -> str:
    """Returns the name if it is one of `KINDS`, and raises ValueError otherwise."""
    if score not in KINDS:
        raise ValueError(f"`score` must be one of {KINDS}, got {score!r}.")
    return str(score)
