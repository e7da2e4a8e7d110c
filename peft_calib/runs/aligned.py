"""Predictions of several runs on the items that all of them have, in one order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .evaluation import Evaluation


@dataclass(frozen=True)
class Aligned:
    """What several runs say of the same items: rows, or labelled words."""

    predictions: dict[str, np.ndarray]  # (N, C) probabilities of each run
    labels: np.ndarray
    rows: int

    @classmethod
    def of(cls, evaluations: dict[str, Evaluation], stage: str) -> Aligned:
        """The items that all runs have, with their probabilities before or after the temperature.

        Raises:
            ValueError: If there are none, or the runs do not ask about the same items.
        """
        order = _common_order(evaluations)
        predictions = {n: found.probabilities(found.main_variant, stage)[order[n]] for n, found in evaluations.items()}
        first, found = next(iter(evaluations.items()))
        keys, labels = (found.items[part][order[first]] for part in ("keys", "labels"))
        return cls(predictions, labels, len(np.unique(keys)))


def _common_order(evaluations: dict[str, Evaluation]) -> dict[str, np.ndarray]:
    """For each run the items of the rows that all runs have, in one order."""
    items = {name: found.items for name, found in evaluations.items()}
    common = set.intersection(*({*found["keys"].tolist()} for found in items.values()))
    if not common:
        raise ValueError("the runs have no test row in common; name rows that none of them has seen, with --data")
    wanted = np.array(sorted(common), np.int64)
    order: dict[str, np.ndarray] = {}
    for name, found in items.items():
        kept = np.flatnonzero(np.isin(found["keys"], wanted))
        sequence = np.lexsort((found["positions"][kept], found["labels"][kept], found["keys"][kept]))
        order[name] = kept[sequence]
    first, *others = items
    for name in others:
        same = all(
            np.array_equal(items[first][part][order[first]], items[name][part][order[name]])
            for part in ("keys", "labels", "positions")
        )
        if not same:
            raise ValueError(
                f"{first} and {name} do not ask about the same items: their classes, their labels or the tokens of "
                "their words differ, so they cannot be paired"
            )
    return order
