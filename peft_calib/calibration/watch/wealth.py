"""Bets against "nothing has changed": test martingales on p-values that are uniform as long as it is true.

Each process starts with a wealth of 1 and bets on every p-value at fair odds, so it is a nonnegative martingale: the
probability that it ever reaches `1 / alpha` is at most `alpha` (Ville, 1939), however many rows come and however often
one looks. Its wealth is spread over a few ways of betting (p-values too small, too large, too far out, too close
together, and none), and a little of it is moved back to all of them at fixed rows, so that a change that comes late is
bet on as one that comes early (fixed share, Herbster & Warmuth, 1998, at a rate of one over the time that has passed).
On p-values of exchangeable rows these are conformal test martingales (Vovk, Petej, Nouretdinov, Ahlberg, Carlsson &
Gammerman, 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...json_files import Fields

#: Rows between two moves of wealth; they stand at fixed rows, so that no answer hangs on how rows are batched.
BLOCK = 16
#: Factors of the first and second Legendre polynomial in a bet, `1 + a (2p - 1) + b (6p^2 - 6p + 1)`; all positive.
_SLOPES = (0.0, 0.2, -0.2, 0.5, -0.5, 0.9, -0.9, 0.0, 0.0, 0.0, 0.0)
_BENDS = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4, -0.4, 0.9, -0.8)
_BETS = np.array([_SLOPES, _BENDS]).T
#: Half of the wealth begins where nothing is staked.
_START = np.array([0.5] + [0.5 / (len(_BETS) - 1)] * (len(_BETS) - 1))


class Wealth:
    """Processes side by side, each on p-values of its own.

    Attributes:
        rows: Rows that were bet on.
        base: `(K,)` logarithm of the wealth at the last move.
        weights: `(K, E)` how it is spread since, in units of that.
        log_wealth: `(K,)` natural logarithm of each one's wealth now.
        peak: `(K,)` the largest it has been.
        alarmed: `(K,)` row, counted from 1, at which it first reached what is needed; 0 where it has not.
    """

    def __init__(self, num_processes: int, needed: float) -> None:
        self.needed = needed
        self.rows = 0
        self.base = np.zeros(num_processes)
        self.weights = np.tile(_START, (num_processes, 1))
        self.peak = np.zeros(num_processes)
        self.alarmed = np.zeros(num_processes, np.int64)

    @property
    def log_wealth(self) -> np.ndarray:
        return self.base + np.log(_total(self.weights))

    def bet(self, p_values: np.ndarray) -> None:
        """Bet on `(M, K)` p-values in their order."""
        begin = 0
        while begin < len(p_values):
            if self.rows % BLOCK == 0:
                self._share()
            end = min(len(p_values), begin + BLOCK - self.rows % BLOCK)
            p = p_values[begin:end, :, None]
            factors = 1.0 + _BETS[:, 0] * (2.0 * p - 1.0) + _BETS[:, 1] * (6.0 * p * (p - 1.0) + 1.0)
            path = np.cumprod(np.concatenate([self.weights[None], factors]), axis=0)[1:]
            self.weights = path[-1]
            self._look(self.base + np.log(_total(path)))
            self.rows += end - begin
            begin = end

    def _share(self) -> None:
        """Move a part of the wealth, one over the number of blocks, back to where it began."""
        total = _total(self.weights)
        self.base = self.base + np.log(total)
        rate = 1.0 / (self.rows // BLOCK + 1)
        self.weights = (1.0 - rate) * self.weights / total[:, None] + rate * _START

    def _look(self, logs: np.ndarray) -> None:
        self.peak = np.maximum(self.peak, logs.max(axis=0))
        reached = logs >= self.needed
        first = self.rows + 1 + reached.argmax(axis=0)
        self.alarmed = np.where((self.alarmed == 0) & reached.any(axis=0), first, self.alarmed)

    def state(self) -> dict[str, Any]:
        """JSON-ready values, exact."""
        arrays = {"base": self.base, "weights": self.weights, "peak": self.peak, "alarmed": self.alarmed}
        return {"rows": self.rows, **{name: value.tolist() for name, value in arrays.items()}}

    @classmethod
    def from_state(cls, fields: Fields | Mapping[str, Any], num_processes: int, needed: float) -> Wealth:
        """The inverse of `state`; a ValueError names what cannot be."""
        fields = fields if isinstance(fields, Fields) else Fields(fields, "A saved Wealth")
        found = cls(num_processes, needed)
        found.rows = fields.integer("rows", least=0)
        found.base = fields.array("base", (num_processes,))
        found.weights = fields.array("weights", found.weights.shape)
        found.peak = fields.array("peak", (num_processes,))
        if not (found.weights > 0.0).all():
            raise fields.wrong("weights", "positive numbers")
        alarmed = fields.array("alarmed", (num_processes,))
        if (alarmed < 0).any() or (alarmed > found.rows).any() or (alarmed % 1 != 0).any():
            raise fields.wrong("alarmed", f"whole numbers from 0 to {found.rows}")
        found.alarmed = alarmed.astype(np.int64)
        return found


def _total(weights: np.ndarray) -> np.ndarray:
    """The sum over the last axis, in one order whatever the shape: rows must count alike in every batch."""
    total = weights[..., 0].copy()
    for k in range(1, weights.shape[-1]):
        total += weights[..., k]
    return total
