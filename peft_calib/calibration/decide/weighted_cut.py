r"""The cut of rows that are weighed: another one for every weight of a new row.

Where rows to come are drawn otherwise than those of the fit, by a density ratio that is known and whose values are the
weights, a new row of weight `w` has a class in its set where the weight of the rows whose right class fits no better,
its own included, is more than `alpha` of all:

.. math:: \sum_{i: V_i \ge s} w_i + w > \alpha (\sum_i w_i + w).

Then the sets hold the label with probability `1 - alpha` for rows to come, on average over calibration splits
(Tibshirani, Foygel Barber, Candes & Ramdas, 2019, Corollary 1). With equal weights it is the plain cut.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ...json_files import Fields
from ..inputs import as_float64, as_numpy
from .bounds import NoGuaranteeError, percent

#: Weights are sums of floating-point numbers: what is more than a share by less than this is not more.
SLACK = 1e-9


class WeightedCut(NamedTuple):
    """With which chance a class of a given score is in the set of a row of a given weight."""

    scores: np.ndarray  # `(n,)` of right classes, ascending
    weights: np.ndarray  # `(n,)` of their rows
    above: np.ndarray  # `(n + 1,)` weight of the rows from each score on, and 0
    alpha: float
    smoothed: bool  # Whether chance decides among equal scores

    @classmethod
    def of(cls, scores: np.ndarray, weights: np.ndarray, alpha: float, smoothed: bool) -> WeightedCut:
        """Of `(n,)` scores of right classes.

        Raises:
            NoGuaranteeError: If one row weighs so much that a new one like it would have every class in its set.
            ValueError: For weights so large that their sum is no number.
        """
        with np.errstate(over="ignore"):
            heaviest, total = float(weights.max()), float(weights.sum())
        if not math.isfinite(total):
            raise ValueError(
                f"The sum of `sample_weight`, up to {heaviest:.4g}, is too large for a number: divide all weights, "
                "and those of new rows, by one number."
            )
        if heaviest > alpha * (total + heaviest) * (1.0 + SLACK):
            needed = math.ceil(heaviest * (1.0 / alpha - 1.0) / (total / len(weights)))
            raise NoGuaranteeError(
                f"A new row of the largest weight, {heaviest:.4g}, would be {percent(heaviest / (total + heaviest))} "
                f"of all weight, more than the {percent(alpha)} that may miss the label, and have every class in its "
                f"set: with such weights it takes some {needed} rows. Label more, or take a larger alpha.",
                len(scores), needed,
            )  # fmt: skip
        order = np.argsort(scores, kind="stable")
        scores, weights = scores[order], weights[order]
        above = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
        return cls(scores, weights, above, alpha, smoothed)

    def chance(self, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Chances in [0, 1] of `(N, C)` scores of rows with `(N,)` weights."""
        own = weights[:, None]
        at_least = self.above[np.searchsorted(self.scores, scores, side="left")]
        allowed = self.alpha * (self.above[0] + own)
        if not self.smoothed:
            return (at_least + own > allowed * (1.0 + SLACK)).astype(np.float64)
        more = self.above[np.searchsorted(self.scores, scores, side="right")]
        tied = at_least - more + own
        missing = np.divide(allowed - more, tied, out=np.full(tied.shape, np.inf), where=tied > 0.0)
        return np.clip(1.0 - np.where(tied > 0.0, missing, np.where(more > allowed, 0.0, 1.0)), 0.0, 1.0)

    def to_list(self) -> dict[str, Any]:
        """The scores and the weights of their rows."""
        return {"scores": self.scores.tolist(), "weights": self.weights.tolist()}

    @classmethod
    def from_fields(cls, fields: Fields, name: str, alpha: float, smoothed: bool) -> WeightedCut:
        """The inverse of `to_list`."""
        inner = fields.mapping(name)
        scores, weights = inner.array("scores", (None,)), inner.array("weights", (None,))
        # Earlier releases wrote 0 for a weight that is lost in the sum of the others.
        if len(scores) != len(weights) or not (weights >= 0.0).all() or not weights.any():
            raise fields.wrong(name, "scores, and as many weights of at least 0, some of them above it")
        return cls.of(scores, weights, alpha, smoothed)


def weights_of_new(sample_weight: Any, num_rows: int, is_weighted: bool) -> np.ndarray | None:
    """`(N,)` weights of new rows, given where the fit had weights and only there; a single number for all of them."""
    if not is_weighted:
        if sample_weight is not None:
            raise ValueError("These sets were fitted without weights; leave `sample_weight` out.")
        return None
    if sample_weight is None:
        raise ValueError(
            "These sets were fitted with weights, and their cut hangs on the weight of each new row, by the same "
            "density ratio: pass `sample_weight`."
        )
    weights, _ = as_float64(as_numpy(sample_weight, "sample_weight"), sample_weight, "sample_weight")
    weights = np.broadcast_to(weights, num_rows) if weights.ndim == 0 else weights
    if weights.shape != (num_rows,) or not (np.isfinite(weights).all() and (weights >= 0.0).all()):
        raise ValueError(f"sample_weight must hold {num_rows} finite numbers of at least 0, one for each row.")
    return weights
