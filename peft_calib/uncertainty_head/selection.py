"""Which trial answers best on rows it was not fitted on; the first candidate is the frozen model's own score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata

from ..calibration.scores.selective import auroc_of_pairs
from ..tuners.seeding import keyed_generator
from .copied import CopiedHead, squared_distances
from .copies import row_groups
from .features import FeatureSet
from .grid import HeadSettings, Trial
from .training import Deltas, Scorer, anchors_of, training

# Numbers that stacked trials may have, of which training holds about six copies.
_ENTRIES = 1 << 24
_FOLDS = 3  # purpose of a seed


@dataclass(frozen=True, eq=False)
class Candidates:
    """What each trial says of held-out items.

    Attributes:
        trials: One setting of the grid each.
        held: Items that no score here was fitted on.
        base: `(N,)` float64, the frozen model's own score of them.
        scores: `(T, N)` float32, each trial's, after the epochs it is kept at.
        all_scores: `(M, N)` float32, of every epoch that a trial could have been kept at.
        aurocs: `(T,)`, error AUROC of `scores`.
        epochs: `(T,)`, the epochs they were trained for.
        distances: `(T,)`, squared distance of the parameters from their start; of the mean over folds.
        deltas: Each trained tensor stacked, `(T, ...)`; None where the chosen one is still to be fitted on all rows.
    """

    trials: tuple[Trial, ...]
    held: FeatureSet
    base: np.ndarray
    scores: np.ndarray
    all_scores: np.ndarray
    aurocs: np.ndarray
    epochs: np.ndarray
    distances: np.ndarray
    deltas: Deltas | None

    @property
    def base_auroc(self) -> float:
        """Error AUROC of the frozen model's own score."""
        return float(aurocs(self.base[None], self.held.errors.numpy())[0])

    def best(self, keep_base: bool) -> int | None:
        """The trial of the largest AUROC, of equal ones the nearest to the start; None: the base is as good."""
        place = int(np.lexsort((self.distances, -self.aurocs))[0])
        return None if keep_base and not self.aurocs[place] > self.base_auroc else place


def aurocs(scores: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """`(T,)` error AUROC of `(T, N)` scores; ties count half."""
    surer = (rankdata(scores, axis=1)[:, errors] - 0.5).sum(1)
    return auroc_of_pairs(surer, len(errors), np.full(len(scores), float(errors.sum())))


def on_held_rows(head: CopiedHead, fitted: FeatureSet, held: FeatureSet, settings: HeadSettings) -> Candidates:
    """Fit every trial on some rows, and keep it as it does best on others."""
    trials = settings.trials
    errors, best = held.errors.numpy(), _Best(len(trials), settings.patience)
    scorer, scores = Scorer(head, held, settings), np.empty((len(trials), len(held)), np.float32)
    deltas = [torch.empty(len(trials), *delta.shape) for delta in head.delta]
    seen: list[np.ndarray] = []
    for places in _together(trials, head):
        for epoch, found in enumerate(training(head, fitted, [trials[i] for i in places], settings), 1):
            if settings.patience is None and epoch < trials[places[0]].epochs:
                continue  # the last one is kept whatever it is
            said = scorer.all(found).numpy()
            seen.append(said)
            improved = best.update(places, epoch, aurocs(said, errors))
            scores[places[improved]] = said[improved]
            for kept, delta in zip(deltas, found, strict=True):
                kept[places[improved]] = delta[improved]
            if not best.going[places].any():
                break
    return _candidates(held, settings, scores, seen, best, _squared(deltas), deltas)


def over_folds(head: CopiedHead, rows: FeatureSet, settings: HeadSettings) -> Candidates:
    """Fit every trial on all folds but one, and let it say what it thinks of that one."""
    trials, folds = settings.trials, folds_of(rows, settings)
    errors, best = rows.errors.numpy(), _Best(len(trials), settings.patience)
    scores, distances = np.empty((len(trials), len(rows)), np.float32), np.zeros(len(trials))
    all_scores: list[np.ndarray] = []
    for places in _together(trials, head):
        these = [trials[i] for i in places]
        said = np.empty((these[0].epochs, len(these), len(rows)), np.float32)
        moved = np.zeros((these[0].epochs, len(these)))
        for fold in range(settings.folds):
            seen, unseen = (torch.from_numpy(np.flatnonzero(part)) for part in (folds != fold, folds == fold))
            scorer = Scorer(head, rows.select(unseen), settings)
            for epoch, found in enumerate(training(head, rows.select(seen), these, settings, key=fold + 1)):
                said[epoch][:, unseen.numpy()] = scorer.all(found).numpy()
                moved[epoch] += _squared(found) / settings.folds
        all_scores += list(said if settings.patience else said[-1:])
        for epoch in range(len(said)):
            improved = best.update(places, epoch + 1, aurocs(said[epoch], errors))
            scores[places[improved]] = said[epoch][improved]
            distances[places[improved]] = moved[epoch][improved]
    return _candidates(rows, settings, scores, all_scores, best, distances, None)


def refit(head: CopiedHead, rows: FeatureSet, trial: Trial, epochs: int, settings: HeadSettings) -> Deltas:
    """One trial on all rows, for as many epochs of its schedule as served it best."""
    steps = training(head, rows, [trial], settings)
    for _ in range(epochs):
        deltas = next(steps)
    return [delta[0] for delta in deltas]


def folds_of(rows: FeatureSet, settings: HeadSettings) -> np.ndarray:
    """`(N,)` fold of each item, errors spread evenly; the tokens of a row, and its copies, stay together."""
    return _spread(rows, settings.seed) % settings.folds


def held_part(rows: FeatureSet, settings: HeadSettings) -> torch.Tensor:
    """`(N,)` bool, the share of the items that is not fitted on, with its share of the errors."""
    place = _spread(rows, settings.seed)
    return torch.from_numpy(np.floor((place + 1) * settings.held_out) > np.floor(place * settings.held_out))


def _spread(rows: FeatureSet, seed: int) -> np.ndarray:
    """`(N,)` place of each item's row, and of its copies, in a shuffled order that has the rows with errors last."""
    group = row_groups(rows)
    wrong = np.bincount(group, weights=rows.errors.numpy()) > 0
    order = torch.randperm(len(wrong), generator=keyed_generator(seed, _FOLDS)).numpy()
    place = np.empty(len(wrong), np.int64)
    place[order[np.argsort(wrong[order], kind="stable")]] = np.arange(len(wrong))
    return place[group]


class _Best:
    """The best epoch of each trial, and whether it still goes on."""

    def __init__(self, count: int, patience: int | None) -> None:
        self.patience, self.aurocs, self.epochs = patience, np.full(count, -np.inf), np.zeros(count, np.int64)
        self.going, self.waited = np.ones(count, bool), np.zeros(count, np.int64)

    def update(self, places: np.ndarray, epoch: int, found: np.ndarray) -> np.ndarray:
        """`(M,)` bool, which of the trials at `places` are to be kept as they are after this epoch."""
        better = (found > self.aurocs[places]) & self.going[places] if self.patience else np.ones(len(places), bool)
        self.aurocs[places] = np.where(better, found, self.aurocs[places])
        self.epochs[places] = np.where(better, epoch, self.epochs[places])
        self.waited[places] = np.where(better, 0, self.waited[places] + 1)
        if self.patience:
            self.going[places] &= self.waited[places] < self.patience
        return better


def _candidates(
    held: FeatureSet, settings: HeadSettings, scores: np.ndarray, seen: list[np.ndarray], best: _Best,
    distances: np.ndarray, deltas: Deltas | None,
) -> Candidates:  # fmt: skip
    base = anchors_of(held, settings).numpy()
    all_scores = np.concatenate(seen)
    return Candidates(settings.trials, held, base, scores, all_scores, best.aurocs, best.epochs, distances, deltas)


def _together(trials: Sequence[Trial], head: CopiedHead) -> Iterator[np.ndarray]:
    """Places of trials that are trained side by side: of equal epochs, and not more than fit into memory."""
    size = sum(delta.numel() for delta in head.delta)
    epochs = np.array([trial.epochs for trial in trials])
    for value in dict.fromkeys(epochs):
        places = np.flatnonzero(epochs == value)
        yield from np.array_split(places, -(-len(places) * size // _ENTRIES))


def _squared(deltas: Deltas) -> np.ndarray:
    return squared_distances(deltas).numpy().astype(np.float64)
