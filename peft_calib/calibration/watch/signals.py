"""What is watched: numbers on a fixed grid and predicted classes, and their conformal p-values.

The p-value of a row is its place among the rows of the reference and all that came before it, ties split by chance.
As long as all of them are exchangeable such p-values are independent and uniform, exactly, for any number of rows
(Vovk, Gammerman & Shafer, 2005), which places among the reference alone are not: they know how a finite reference
differs from its population, and a bet that is kept up for long enough finds that out. The grid is the same for every
model, so that the counts of its cells are all that has to be kept.
"""

from __future__ import annotations

import numpy as np

#: Cells of the grid of log-odds from `-REACH` to `REACH`.
CELLS, REACH = 400, 20.0
#: Rows that are ranked among each other at a time.
_CHUNK = 256


def cells_of(odds: np.ndarray) -> np.ndarray:
    """`(N,)` cells of nonnegative odds."""
    with np.errstate(divide="ignore"):
        place = (np.log(odds) + REACH) * (CELLS / (2.0 * REACH))
    return np.clip(np.floor(place), 0, CELLS - 1).astype(np.int64)


def odds_of(probabilities: np.ndarray) -> np.ndarray:
    """`(N,)` odds of probabilities; infinite for 1."""
    with np.errstate(divide="ignore"):
        return probabilities / (1.0 - probabilities)


def place_p_values(counts: np.ndarray, cells: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """`(N, 1)` smoothed p-values of the places of rows in cells; the rows are added to `counts` (int64)."""
    parts = [np.empty((0, 1))]
    for begin in range(0, len(cells), _CHUNK):
        now, u = cells[begin : begin + _CHUNK], chance[begin : begin + _CHUNK]
        above = counts[::-1].cumsum()[::-1] - counts
        earlier = np.tri(len(now), k=-1, dtype=bool)
        greater = above[now] + ((now[None, :] > now[:, None]) & earlier).sum(axis=1)
        equal = counts[now] + ((now[None, :] == now[:, None]) & earlier).sum(axis=1) + 1
        size = counts.sum() + 1 + np.arange(len(now))
        parts.append(((greater + u * equal) / size)[:, None])
        counts += np.bincount(now, minlength=len(counts))
    return np.concatenate(parts)


def class_p_values(counts: np.ndarray, classes: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """`(N, K)` smoothed p-values of "is this class", a column a class (one column for two classes)."""
    one_hot = classes[:, None] == np.arange(len(counts))
    ones = counts + np.cumsum(one_hot, axis=0) - one_hot
    size = (counts.sum() + np.arange(len(classes)))[:, None]
    u = chance[:, None]
    found = np.where(one_hot, u * (ones + 1), ones + u * (size - ones + 1)) / (size + 1)
    counts += one_hot.sum(axis=0)
    return found[:, 1:] if len(counts) == 2 else found


def class_processes(num_classes: int) -> int:
    """How many columns `class_p_values` has."""
    return 1 if num_classes == 2 else num_classes
