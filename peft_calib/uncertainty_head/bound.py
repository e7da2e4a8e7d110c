"""A head on the model that it was fitted for, held against it once, for any number of predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .answer import ErrorPrediction
from .asked import Asked, Belonging, check_belongs
from .copied import CopiedHead, copy_head
from .features import FeatureSet, extract_features
from .mapping import probability_of_error, with_prior
from .stored import StoredHead
from .training import Scorer, anchors_of


class BoundHead:
    """A head and the model that it belongs to, as it is now.

    Args:
        stored: The head.
        model: The model.
        allow_other: Whether another model than it was fitted for is a warning instead of an error.

    Raises:
        ValueError: If the head was fitted for another model, or to features.
    """

    def __init__(self, stored: StoredHead, model: nn.Module, allow_other: bool = False) -> None:
        if stored.asked is None:
            raise ValueError(
                "This head was fitted to features, so how the model was asked is not known. Use predict_features, or "
                "fit it with UncertaintyHead.fit(model, ...)."
            )
        self.stored, self.model, self.asked = stored, model, stored.asked
        self.head = copy_head(model, **self.asked.words)
        if stored.belongs is not None:
            check_belongs(stored.belongs, Belonging.of(model, self.asked, self.head), allow_other)
        _check_shapes(stored, self.head)

    def read(self, rows: Any, seed: int | None = None, **how: Any) -> tuple[FeatureSet, ErrorPrediction]:
        """What the model says of rows, and how likely it is wrong, from one forward.

        Args:
            rows: What `extract_features` takes.
            seed: Key of the draws; that of the fit when None.
            how: Further arguments of `extract_features`.
        """
        asked: Asked = self.asked if seed is None else replace(self.asked, seed=seed)
        features = extract_features(self.model, rows, **asked.words, **how)
        shared = len(self.head.starts) == 1 or asked == self.asked
        head = self.head if shared else copy_head(self.model, **asked.words)  # other draws have other heads
        return features, errors_of(self.stored, features, head)


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
