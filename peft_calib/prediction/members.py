"""Several adapters of one model as the draws of a prediction: a deep ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from .dataset import predict_dataset
from .result import Prediction


def predict_members(model: PeftModel, data: Any, adapter_names: Sequence[str], **options: Any) -> Prediction:
    """Predict a data set with each of some adapters, in mixed batches.

    Args:
        model: With the adapters.
        data: As for `predict_dataset`.
        adapter_names: The members.
        options: Further arguments of `predict_dataset`.
    """
    names = list(adapter_names)
    found = predict_dataset(model, data, num_samples=len(names), adapter_names=names, **options)
    if not isinstance(found, Prediction):
        raise ValueError("The model answers with numbers; an ensemble of classes is expected.")
    return found
