"""A head on the model that it was fitted for, held against it once, for any number of predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .answer import ErrorPrediction
from .asked import Belonging, check_belongs
from .copied import CopiedHead
from .features import FeatureSet, read_features
from .located import locate
from .mapping import probability_of_error, with_prior
from .reading import FeatureReader
from .stored import StoredHead
from .training import Scorer, anchors_of


class BoundHead:
    """A head and the model that it belongs to, as it is now: it must be neither trained on nor moved afterwards.

    Args:
        stored: The head.
        model: The model.
        allow_other: Whether another model than it was fitted for is a warning instead of an error.
        folders: Where each adapter of the model was just loaded from, to know it by: on a base in half precision its
            tensors are rounded.

    Raises:
        ValueError: If the head was fitted for another model, or to features.
    """

    def __init__(
        self,
        stored: StoredHead,
        model: nn.Module,
        allow_other: bool = False,
        folders: Mapping[str, Path] | None = None,
    ) -> None:
        if stored.asked is None:
            raise ValueError(
                "This head was fitted to features, so how the model was asked is not known. Use predict_features, or "
                "fit it with UncertaintyHead.fit(model, ...)."
            )
        self.stored, self.model, self.asked = stored, model, stored.asked
        self._readers: dict[int, FeatureReader] = {}
        self.head = self._copied(self.asked.seed)
        if stored.belongs is not None:
            check_belongs(stored.belongs, Belonging.of(model, self.asked, self.head, folders), allow_other)
        _check_shapes(stored, self.head)

    def read(self, rows: Any, seed: int | None = None, **how: Any) -> tuple[FeatureSet, ErrorPrediction]:
        """What the model says of rows, and how likely it is wrong, from one forward.

        Args:
            rows: What `extract_features` takes.
            seed: Key of the draws; that of the fit when None.
            how: Further arguments of `read_features`.
        """
        seed = self.asked.seed if seed is None else seed
        # what predicts uses no labels; rows without one often have -1 or -100 in its place
        features = read_features(self._reader(seed), rows, None, lenient=True, **how)
        return features, errors_of(self.stored, features, self._copied(seed))

    def _reader(self, seed: int) -> FeatureReader:
        """What reads the functions of a seed; set up once, with the copy of their heads."""
        if seed not in self._readers:
            located = locate(self.model, **replace(self.asked, seed=seed).words)
            self._readers = {seed: FeatureReader(located)}  # one is kept: another seed has other functions
        return self._readers[seed]

    def _copied(self, seed: int) -> CopiedHead:
        copy = self._reader(seed).copy
        assert copy is not None
        return copy


def errors_of(stored: StoredHead, features: FeatureSet, head: CopiedHead) -> ErrorPrediction:
    """How likely the predictions behind features are wrong."""
    base = anchors_of(features, stored.settings)
    score = base
    if stored.deltas is not None:
        deltas = [stored.deltas[name][None] for name in head.trained]
        score = Scorer(head, features, stored.settings).all(deltas, torch.float64)[0]
    corrected = with_prior(score.numpy(), stored.prior)
    found = probability_of_error(stored.calibration, corrected)
    return ErrorPrediction(
        torch.from_numpy(found), torch.from_numpy(corrected), base, features.probabilities, features.items
    )


def _check_shapes(stored: StoredHead, head: CopiedHead) -> None:
    if stored.deltas is None:
        return
    own = dict(zip(head.trained, (tuple(delta.shape) for delta in head.delta), strict=True))
    wanted = {name: tuple(delta.shape) for name, delta in stored.deltas.items()}
    if own != wanted:
        raise ValueError(
            f"The classification head of this model has the parameters {own}, and the uncertainty head was fitted for "
            f"{wanted}: it is that of another model."
        )
