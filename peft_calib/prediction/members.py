"""Several adapters of one model as the draws of a prediction: a deep ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from .dataset import predict_dataset
from .labels import LabelsPrediction
from .result import Prediction, RegressionPrediction


def predict_members(
    model: PeftModel, data: Any, adapter_names: Sequence[str], **options: Any
) -> Prediction | LabelsPrediction | RegressionPrediction:
    """Predict a data set with each of some adapters, in mixed batches.

    Args:
        model: With the adapters.
        data: As for `predict_dataset`.
        adapter_names: The members.
        options: Further arguments of `predict_dataset`.
    """
    names = list(adapter_names)
    return predict_dataset(model, data, num_samples=len(names), adapter_names=names, **options)
