"""What a model answers, in whatever wrapping: the one door through which predictions enter the toolkit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch

# The smallest normal float32. Draws are averaged in float32, whose smaller numbers are rounded, or zero: below this a
# probability says nothing but "very little". Its logarithm, -87.3, is the lowest logit such a probability can get.
SMALLEST_MEAN_PROBABILITY = float(np.finfo(np.float32).tiny)

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def log_probabilities(probabilities: Array) -> Array:
    """Logarithms of probabilities, to be used as logits: exact zeros and anything below 1.2e-38 count as 1.2e-38.

    A softmax of the result gives the probabilities back, so a temperature can be fitted to the mean of several draws,
    which has no logits of its own. Everyone who takes such a logarithm takes it here: with different floors two tools
    would fit different temperatures to the same saturated draws.

    Args:
        probabilities: Of any shape; numpy or torch, on any device.

    Returns:
        Logarithms of the same kind and dtype; float16, which cannot hold the floor, becomes float32.

    Example:
        >>> log_probabilities(np.array([1.0, 0.0])).round(2)
        array([  0.  , -87.34])
    """
    if isinstance(probabilities, torch.Tensor):
        wide = probabilities.float() if probabilities.dtype == torch.float16 else probabilities
        return wide.clamp_min(SMALLEST_MEAN_PROBABILITY).log()
    values = np.asarray(probabilities)
    values = values.astype(np.float32) if values.dtype == np.float16 else values
    return np.log(np.maximum(values, values.dtype.type(SMALLEST_MEAN_PROBABILITY)))


def unwrapped(answer: Any) -> Any:
    """The predictions in a model's answer: its `logits` by name, the first array of rows in a tuple, or itself."""
    if isinstance(answer, Mapping):
        if "logits" not in answer:
            raise ValueError(
                f"The model's answer has {sorted(map(str, answer))} but no logits; pass the array of logits itself."
            )
        return answer["logits"]
    if isinstance(answer, (np.ndarray, torch.Tensor)):
        return answer
    named = getattr(answer, "logits", None)
    if named is not None:
        return named
    if isinstance(answer, tuple):
        # A tuple may also be rows. Rows have one axis; the loss, which may come first, has none.
        arrays = [part for part in answer if isinstance(part, (np.ndarray, torch.Tensor))]
        if not any(part.ndim == 1 for part in arrays):
            return next((part for part in arrays if part.ndim >= 2), answer)
    return answer


def as_given(values: np.ndarray, answer: Any) -> Any:
    """A torch tensor where the answer came in one, on its device; the array itself otherwise."""
    given = unwrapped(answer)
    return torch.as_tensor(values, device=given.device) if isinstance(given, torch.Tensor) else values


def without_masks(logits: np.ndarray) -> np.ndarray:
    """`(N, C)` logits in which -inf has become the logit of the smallest probability, below the largest of its row."""
    masked = np.isneginf(logits)
    if not masked.any():
        return logits
    return np.where(masked, logits.max(axis=1, keepdims=True) + np.log(SMALLEST_MEAN_PROBABILITY), logits)


def refuse_class_ids(values: np.ndarray, name: str = "predictions") -> None:
    """Refuses class ids or class names where probabilities are needed, before any cast.

    The 0s and 1s of two classes would pass for probabilities of class 1, and the error rate for the calibration error.
    """
    is_text = values.dtype.kind in "US" or (values.dtype == object and any(isinstance(v, str) for v in values.flat))
    is_whole = values.dtype.kind in "iu" and values.size > 0
    one_axis = values.ndim <= 1 or values.shape[-1] == 1
    one_hot = not one_axis and is_whole and values.min() >= 0 and (values.sum(axis=-1) == 1).all()
    if not (is_text or (is_whole and (one_axis or one_hot))):
        return
    what = "class names or text" if is_text else ("one-hot class ids" if one_hot else "class ids")
    shown = np.array2string(values.reshape(-1)[:4], separator=", ")
    error = TypeError if is_text else ValueError
    raise error(
        f"{name} must be numbers for every class, but they are {what} ({shown} ... of type {values.dtype}). "
        "Calibration needs the probabilities (or logits) of every class: pass the model's outputs before argmax, an "
        "(N, C) array of floating point numbers; a pipeline gives all of them with top_k=None. Probabilities that "
        "happen to be certain are floats, 0.0 and 1.0."
    )
