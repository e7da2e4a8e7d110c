"""Predictions of any kind, as a watch sees them: how sure, of which class, and further scores of a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..inputs import as_float64, as_numpy, as_rows

#: Scores that may be watched beside the confidence, and the largest value of each.
FURTHER = {"mutual_information": np.inf, "error_probability": 1.0}


class Taken(NamedTuple):
    """Checked rows."""

    confidence: np.ndarray  # `(N,)` float64 in [0, 1], probability of the predicted class
    predicted: np.ndarray  # `(N,)` int64
    further: dict[str, np.ndarray]  # `(N,)` float64 each
    num_classes: int


def taken(
    predictions: Any, input: str, predicted: Any, further: dict[str, Any], num_classes: int | None = None
) -> Taken:
    """Checked rows, of probabilities or logits of every class, or of confidences with the predicted classes."""
    if input == "confidence":
        confidence = _numbers(predictions, "confidences", None, 1.0)
        classes = _classes(predicted, len(confidence), num_classes)
        count = int(classes.max(initial=0)) + 1 if num_classes is None else num_classes
    elif predicted is not None:
        raise ValueError('`predicted` goes with input="confidence"; of probabilities the largest says the class.')
    else:
        shape = as_numpy(predictions).shape
        if not shape or len(shape) > 2:
            raise ValueError(f"predictions of shape {shape} are no rows: expected (N, C), or (N,) for two classes.")
        if shape[0] == 0:
            found = np.empty((0, num_classes or 2))
        else:
            found = as_rows(predictions, np.zeros(shape[0], np.int64), input=input, ignore_index=None).probabilities
        count = found.shape[1]
        if num_classes is not None and count != num_classes:
            raise ValueError(f"the predictions have {count} classes, but the reference had {num_classes}.")
        classes = found.argmax(axis=1)
        confidence = found.max(axis=1)
    values = {
        name: _numbers(given, name, len(confidence), FURTHER[name])
        for name, given in further.items()
        if given is not None
    }
    return Taken(confidence, classes, values, max(count, 2))


def _numbers(given: Any, name: str, size: int | None, most: float) -> np.ndarray:
    values, _ = as_float64(as_numpy(given, name), given, name)
    if values.ndim != 1 or (size is not None and len(values) != size):
        wanted = "(N,)" if size is None else f"({size},)"
        raise ValueError(f"{name} must be one number a row, of shape {wanted}, got {values.shape}.")
    # what a mean of float32 numbers rounds to
    wrong = ~((values >= -1e-5) & (values <= most + 1e-5))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        top = "" if np.isinf(most) else f" and at most {most:g}"
        raise ValueError(f"{name} must be at least 0{top}, but row {row} has {values[row]}.")
    return np.clip(values, 0.0, most)


def _classes(given: Any, size: int, num_classes: int | None) -> np.ndarray:
    if given is None:
        raise ValueError('input="confidence" needs the predicted class of each row: pass predicted=.')
    classes = as_numpy(given, "predicted")
    most = np.inf if num_classes is None else num_classes
    whole = classes.dtype.kind in "iu" and classes.shape == (size,)
    if not whole or (size and not (classes.min() >= 0 and classes.max() < most)):
        below = "" if num_classes is None else f" below {num_classes}"
        raise ValueError(f"predicted must hold {size} class numbers from 0{below}, one for each row.")
    return classes.astype(np.int64)
