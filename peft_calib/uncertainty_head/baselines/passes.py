"""Feature sets of predictions: dropout passes and other draws, of which scores read probabilities alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...calibration.answers import log_probabilities
from ...prediction import Prediction, predict_dataset
from ..features import FeatureSet


def dropout_passes(
    model: nn.Module, data: Any, *, num_passes: int = 8, dropout: float = 0.1, seed: int = 0, **options: Any
) -> FeatureSet:
    """The answers of a stock LoRA under dropout, pass by pass (Gal & Ghahramani, 2016).

    A pass masks the same inputs of the adapted layers for every row and token, so it is one function.

    Args:
        model: With an active stock LoRA.
        data: Rows, as for `predict_dataset`.
        num_passes: K, two or more.
        dropout: Probability that an input is masked.
        seed: Key of the masks.
        **options: Of `predict_dataset`: `batch_size`, `processing_class`, `collate_fn`, `task`, `label_tokens`.

    Returns:
        K functions without features, `(K, N, 0)`.

    Raises:
        TypeError: If the model has no active stock LoRA.
        ValueError: For a probability that is none, or data that cannot be predicted.
    """
    found = predict_dataset(
        model, data, how="sample", num_samples=num_passes, dropout=dropout, seed=seed, progress=False, **options
    )
    assert isinstance(found, Prediction)
    return of_prediction(found)


def of_prediction(prediction: Prediction) -> FeatureSet:
    """The draws of a prediction as a feature set without features, for scores that read probabilities alone.

    Args:
        prediction: With a fixed number of draws of equal weight.

    Returns:
        K functions, `(K, N, 0)` features and log-probabilities for logits.

    Raises:
        ValueError: If rows have different numbers of draws, or draws have weights.

    Example:
        >>> two = Prediction(sample_probabilities=torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]), num_forwards=2)
        >>> of_prediction(two).probabilities
        tensor([[0.7000, 0.3000]], dtype=torch.float64)
    """
    if prediction.draws_per_row is not None or prediction.weights is not None:
        raise ValueError(
            "A feature set has the same functions for all items and weighs them equally; predict with a fixed "
            "num_samples and without weights."
        )
    p = prediction.sample_probabilities
    return FeatureSet(
        features=torch.zeros(*p.shape[:2], 0),
        logits=log_probabilities(p.float()),
        labels=prediction.labels,
        items=prediction.positions,
    )
