"""Rows of several yes-or-no labels: checked once, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from ..answers import unwrapped
from ..fingerprint import row_hashes
from ..inputs import Rows, as_float64, as_numpy, check_kind

#: A probability nearer to 0 or 1 counts as this: float32 tells none nearer to 1, and the two ends are treated alike.
LEAST = 2.0**-24


class LabelRows(NamedTuple):
    """Rows with a probability for each of some labels, of which any number may hold."""

    probabilities: np.ndarray  # `(N, L)` float64 in [0, 1]
    labels: np.ndarray  # `(N, L)` int64, 1 where the row has the label

    @property
    def num_labels(self) -> int:
        return self.probabilities.shape[1]

    @property
    def hashes(self) -> np.ndarray:
        """`(N,)` uint64, of probabilities and labels."""
        columns = np.concatenate([self.probabilities, self.labels], axis=1)
        return row_hashes(columns, np.zeros(len(columns), np.int64))

    def of_label(self, k: int) -> Rows:
        """One label as two classes, the confidence being its probability."""
        p = self.probabilities[:, k]
        return Rows(np.stack([1.0 - p, p], axis=1), self.labels[:, k], against_rest=True)


def as_label_rows(predictions: Any, labels: Any, *, input: str = "probabilities") -> LabelRows:
    """Check what a report or a rule over labels takes.

    Args:
        predictions: `(N, L)`, or `(N,)` for one label, each in [0, 1]; logits of the labels if `input="logits"`.
        labels: Of the same shape, 1 where a row has the label and 0 where not.
        input: `"probabilities"` or `"logits"`.

    Raises:
        ValueError, TypeError: If they are not paired, not in range, not finite, or there is no row.
    """
    values = as_label_probabilities(predictions, input=input)
    target = as_numpy(labels, "labels")
    if target.ndim == 1 and values.shape[1] == 1:
        target = target[:, None]
    if target.shape != values.shape:
        raise ValueError(
            f"labels have shape {target.shape} and predictions {values.shape}: give a 0 or a 1 for every label of "
            "every row, (N, L)."
        )
    if target.dtype.kind not in "iubf" or not np.isin(target, (0, 1)).all():
        raise ValueError("labels must be zeros and ones: 1 where a row has the label, 0 where it has not.")
    return LabelRows(values, target.astype(np.int64))


def as_label_probabilities(predictions: Any, *, input: str = "probabilities") -> np.ndarray:
    """`(N, L)` checked probabilities of labels, float64."""
    check_kind(input)
    given = as_numpy(unwrapped(predictions))
    values, _ = as_float64(given, predictions)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.size:
        raise ValueError(f"predictions must have shape (N, L), a number for every label, got {given.shape}.")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise ValueError(f"predictions hold NaN or infinity, first in row {row}. Drop or mend such rows.")
    if input == "logits":
        return expit(values)
    if values.min() < 0.0 or values.max() > 1.0:
        raise ValueError(
            f"probabilities must lie in [0, 1], got {values.min():.6g} to {values.max():.6g}. If these are logits, "
            'pass input="logits".'
        )
    return values


def label_logits(probabilities: np.ndarray) -> np.ndarray:
    """Log-odds `(N, L)` of probabilities, at most those of 1 - 2^-24 either way: the mean of draws has no logits."""
    p = np.clip(probabilities, LEAST, 1.0 - LEAST)
    return np.log(p) - np.log1p(-p)


def checked_label_names(names: Sequence[str] | None, num_labels: int) -> tuple[str, ...]:
    """As many different names as there are labels; their numbers where none are given."""
    if names is None:
        return tuple(map(str, range(num_labels)))
    if isinstance(names, str) or len(names) != num_labels or len(set(names)) < num_labels:
        raise ValueError(f"There are {num_labels} labels, but label_names is {names!r}: give each a name of its own.")
    return tuple(map(str, names))
