"""Which items stand or fall together: those of one row, and those of its copies elsewhere among the rows."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .features import FeatureSet

# Features of copies differ by rounding, of about 1e-6 of their length, where a batch is padded to another width. They
# are looked at along so many random directions, in cells this wide, on so many grids that are shifted against each
# other: an edge comes to lie between two copies on all of them in one case of 1e8.
_DIRECTIONS, _CELL, _GRIDS = 6, 2e-4, 6


def row_groups(rows: FeatureSet) -> np.ndarray:
    """`(N,)` int64, the number of what each item belongs to: its row, together with all rows of equal features.

    Labels do not matter, so that a row that was labelled twice, and differently, is one. Numbered as they first occur:
    `0 ... N - 1` where every item is a row of its own and no two are alike.
    """
    row = np.arange(len(rows)) if rows.items is None else np.unique(rows.items[:, 0].numpy(), return_inverse=True)[1]
    return _numbered(_alike(_positions(rows, row))[row])


def num_different(groups: np.ndarray, rows: FeatureSet, of: np.ndarray) -> int:
    """How many of the items that `of` marks are different ones: copies count once, each of a row's tokens does."""
    if rows.items is None:
        return len(np.unique(groups[of]))
    return len(np.unique(np.stack([groups, rows.items[:, 1].numpy()])[:, of], axis=1).T)


def share_of_copies(known: FeatureSet, rows: FeatureSet) -> float:
    """Share of items that are copies of known ones; 0 where their features cannot be compared."""
    if known.features.shape[::2] != rows.features.shape[::2] or (known.items is None) != (rows.items is None):
        return 0.0
    items = None
    if known.items is not None and rows.items is not None:
        after = int(known.items[:, 0].max()) + 1 - int(rows.items[:, 0].min())
        items = torch.cat([known.items, rows.items + torch.tensor([after, 0])])
    both = (torch.cat([getattr(part, name) for part in (known, rows)], 1) for name in ("features", "logits"))
    groups = row_groups(FeatureSet(*both, items=items))
    return float(np.isin(groups[len(known) :], groups[: len(known)]).mean())


def _positions(rows: FeatureSet, row: np.ndarray) -> np.ndarray:
    """`(R, P)` places of rows (the mean of their items) along random directions, in widths of a cell."""
    functions, _, width = rows.features.shape
    towards = np.random.default_rng(0).standard_normal((functions, width, _DIRECTIONS), np.float32)
    features = [one.detach().numpy() for one in rows.features]
    along = np.stack([one @ to for one, to in zip(features, towards, strict=True)]).sum(0)
    squared = np.stack([np.einsum("nd,nd->n", one, one) for one in features]).sum(0)
    mean = np.stack([np.bincount(row, weights=column) for column in along.T], axis=1) / np.bincount(row)[:, None]
    return mean / (_CELL * (np.sqrt(squared.mean(dtype=np.float64)) or 1.0))


def _alike(positions: np.ndarray) -> np.ndarray:
    """`(R,)` number of the group of each row: rows that share a cell of any grid, and what they share cells with."""
    count, first = len(positions), len(positions)
    shared = []
    for shift in np.random.default_rng(1).random((_GRIDS, positions.shape[1])):
        cells = np.unique(np.floor(positions + shift), axis=0, return_inverse=True)[1].reshape(-1)
        shared.append(first + cells)
        first += int(cells.max()) + 1
    pairs = (np.tile(np.arange(count), _GRIDS), np.concatenate(shared))
    graph = coo_array((np.ones(len(pairs[0]), bool), pairs), shape=(first, first))
    return connected_components(graph, directed=False)[1][:count]


def _numbered(groups: np.ndarray) -> np.ndarray:
    """The same groups, numbered as they first occur."""
    _, first, place = np.unique(groups, return_index=True, return_inverse=True)
    return first.argsort().argsort()[place]
