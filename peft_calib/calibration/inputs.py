"""What may enter the calibration toolkit: arrays of any kind, checked once, turned into float64 rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ..whole_numbers import check_whole
from .answers import log_probabilities, refuse_class_ids, unwrapped

INPUT_KINDS = ("probabilities", "logits")
SUM_TOLERANCE = 1e-3
_HALF = (torch.float16, torch.bfloat16)
MOST_BINS = 10_000
#: Sums of squares of weights up to two to this power are float64 numbers, for any number of rows.
MOST_EXPONENT = 200
#: What weights beside much larger ones are rounded up to: every row keeps one above 0.
SMALLEST_WEIGHT = float(np.finfo(np.float64).tiny)


class Rows(NamedTuple):
    """Checked rows, the only thing the kernel ever sees."""

    probabilities: np.ndarray  # `(N, C)` float64, non-negative, rows summing to one up to storage rounding
    labels: np.ndarray  # `(N,)` int64 in `[0, C)`
    binary: bool = False  # True when the caller gave one number per row, the probability of class 1
    dtype: np.dtype = np.dtype(np.float64)  # Numpy dtype the predictions came in (float32 for bfloat16)
    kept: np.ndarray | None = None  # `(M,)` bool, which of the rows that were given these are; None if all
    # True where class 1 stands against the rest, so that its probability is the confidence, above 1/2 or below
    against_rest: bool = False
    weights: np.ndarray | None = None  # `(N,)` float64 above 0, what each row counts; None where all count the same

    @property
    def num_classes(self) -> int:
        return self.probabilities.shape[1]


def as_rows(
    predictions: Any,
    labels: Any,
    *,
    input: str = "probabilities",
    mask: Any = None,
    ignore_index: int | None = -100,
    sample_weight: Any = None,
) -> Rows:
    """Checks what `calibration_report` takes, and returns it as flat float64 rows; `input` is never guessed."""
    weights, mask = checked_weights(sample_weight, labels, mask)
    taken = _take(predictions, labels, input, mask, ignore_index)
    if input == "logits":
        probabilities = softmax(_checked_logits(taken.values, taken.binary, may_mask=False))
    else:
        probabilities = _checked_probabilities(taken.values, taken.binary, SUM_TOLERANCE + taken.resolution)
    _check_label_range(taken.labels, probabilities.shape[1])
    of_rows = weights if weights is None or taken.kept is None else weights[taken.kept]
    of_rows = None if of_rows is None else _manageable(of_rows)
    return Rows(probabilities, taken.labels, taken.binary, taken.dtype, taken.kept, weights=of_rows)


class LogitRows(NamedTuple):
    """Checked rows of logits, what recalibration is fitted on."""

    logits: np.ndarray  # `(N, C)` float64; -inf where a class is masked, at least one finite number a row
    labels: np.ndarray  # `(N,)` int64 in `[0, C)`
    # `(N,)` int64 place on the first axis of what was given: rows of one sequence are not independent
    sequences: np.ndarray
    kept: np.ndarray | None = None  # As in `Rows`
    weights: np.ndarray | None = None  # As in `Rows`


def as_logit_rows(
    answer: Any,
    labels: Any,
    *,
    input: str = "logits",
    mask: Any = None,
    ignore_index: int | None = -100,
    sample_weight: Any = None,
) -> LogitRows:
    """Checks a model's answer and labels as `as_rows` does; flat float64 logits, in which -inf masks a class."""
    weights, mask = checked_weights(sample_weight, labels, mask)
    taken = _take(answer, labels, input, mask, ignore_index)
    logits = _logits_of(taken.values, taken.binary, input, taken.resolution)
    _check_label_range(taken.labels, logits.shape[1])
    of_rows = weights if weights is None or taken.kept is None else weights[taken.kept]
    of_rows = None if of_rows is None else _of_largest_one(of_rows)
    return LogitRows(logits, taken.labels, taken.sequences, taken.kept, of_rows)


def checked_weights(sample_weight: Any, labels: Any, mask: Any) -> tuple[np.ndarray | None, Any]:
    """The weights of rows, flat float64, and the mask with rows of weight 0 left out.

    Raises:
        ValueError, TypeError: For another shape than the labels', or weights that are negative, not finite or all 0.
    """
    if sample_weight is None:
        return None, mask
    shape = as_numpy(labels, "labels").shape
    given = as_numpy(sample_weight, "sample_weight")
    weights, _ = as_float64(given, sample_weight, "sample_weight")
    if weights.shape == shape[:1]:  # one for all tokens of a sequence
        weights = np.repeat(weights, int(np.prod(shape[1:])))
    elif weights.shape != shape:
        raise ValueError(f"sample_weight has shape {weights.shape}, but the labels have shape {shape}.")
    weights = weights.reshape(-1)
    if not (np.isfinite(weights).all() and (weights >= 0.0).all() and weights.any()):
        raise ValueError(
            "sample_weight must hold finite numbers of at least 0, some of them above it: how often each row counts."
        )
    if (weights == 0.0).any():
        counts = (weights > 0.0).reshape(shape)
        if mask is None:
            return weights, counts
        given_mask = as_numpy(mask, "mask")
        if given_mask.shape == shape:  # of another shape is said by whoever takes it
            mask = counts & given_mask.astype(bool)
    return weights, mask


def _of_largest_one(weights: np.ndarray) -> np.ndarray:
    """Weights up to 1, for what does not hang on their unit: no sum or square of any size leaves float64."""
    return np.maximum(weights / weights.max(), SMALLEST_WEIGHT)


def _manageable(weights: np.ndarray) -> np.ndarray:
    """Weights as they are, or where the largest is beyond `2^+-200` all times the power of two that brings it there.

    Some scores of a report count rows, and so hang on the unit; beyond it they have long reached their limits.
    """
    exponent = int(np.frexp(weights.max())[1])
    if abs(exponent) <= MOST_EXPONENT:
        return weights
    return np.maximum(np.ldexp(weights, int(np.sign(exponent)) * MOST_EXPONENT - exponent), SMALLEST_WEIGHT)


def effective_rows(weights: np.ndarray) -> float:
    """How many rows of equal weight say as much about a mean: `(sum w)^2 / sum w^2` (Kish, 1965)."""
    return float(weights.sum() ** 2 / (weights @ weights)) if len(weights) else 0.0


def as_logits(answer: Any, *, input: str = "logits") -> np.ndarray:
    """Checks a model's answer without labels; its `(..., C)` logits in float64, `(N, 2)` for the logit of class 1."""
    check_kind(input)
    answer = unwrapped(answer)
    given = as_numpy(answer, "logits")
    refuse_class_ids(given, "logits")
    values, resolution = as_float64(given, answer, "logits")
    if values.ndim == 0 or values.shape[-1:] == (1,):
        raise ValueError(f"logits must have shape (..., C) with C >= 2, or (N,), got {values.shape}.")
    if values.size == 0:
        raise ValueError("logits has no row.")
    binary = values.ndim == 1
    flat = values if binary else values.reshape(-1, values.shape[-1])
    logits = _logits_of(flat, binary, input, resolution)
    return logits if binary else logits.reshape(values.shape)


def _logits_of(values: np.ndarray, binary: bool, input: str, resolution: float) -> np.ndarray:
    if input == "logits":
        return _checked_logits(values, binary, may_mask=True)
    return log_probabilities(_checked_probabilities(values, binary, SUM_TOLERANCE + resolution))


class NoRowsError(ValueError):
    """No row is left; `num_classes` is what its shape says, 0 where that says nothing."""

    def __init__(self, num_classes: int) -> None:
        super().__init__("There is no row to measure: the input has no row, or every row is masked or ignored.")
        self.num_classes = num_classes


class _Taken(NamedTuple):
    """Rows that are paired with labels, of the right type, and not yet known to be probabilities or logits."""

    values: np.ndarray
    labels: np.ndarray
    binary: bool
    dtype: np.dtype
    resolution: float
    sequences: np.ndarray
    kept: np.ndarray | None


def _take(predictions: Any, labels: Any, input: str, mask: Any, ignore_index: int | None) -> _Taken:
    check_kind(input)
    predictions = unwrapped(predictions)
    given = as_numpy(predictions)
    refuse_class_ids(given)
    values, resolution = as_float64(given, predictions)
    target = as_numpy(labels, "labels")
    if target.size and target.dtype.kind not in "iub":
        raise TypeError(
            f"labels must be integer class ids, got dtype {target.dtype}; cast them, or take argmax of one-hot."
        )
    shape, row_length = target.shape, max(1, int(np.prod(target.shape[1:])))
    values, target, binary = _flatten(values, target.astype(np.int64, copy=False))
    keep = _kept(target, mask, shape, ignore_index)
    sequences = np.arange(len(target)) // row_length
    if keep is not None:
        values, target, sequences = values[keep], target[keep], sequences[keep]
    if len(target) == 0:
        raise NoRowsError(0 if binary else values.shape[1])
    dtype = given.dtype if given.dtype.kind == "f" else np.dtype(np.float64)
    return _Taken(values, target, binary, dtype, resolution, sequences, keep)


def check_kind(input: str) -> None:
    """Raises ValueError for what is neither probabilities nor logits."""
    if input not in INPUT_KINDS:
        raise ValueError(f"`input` must be one of {INPUT_KINDS}, got {input!r}.")


def check_seed(seed: Any) -> int:
    """Returns a whole number of at least 0, and raises ValueError for anything else."""
    return check_whole(seed, "`seed`", 0)


def check_num_bins(num_bins: int) -> int:
    """Returns `num_bins` if it is an integer from 1 to `MOST_BINS`, and raises ValueError otherwise."""
    num_bins = check_whole(num_bins, "`num_bins`", 1)
    if num_bins > MOST_BINS:
        raise ValueError(
            f"`num_bins` must be at most {MOST_BINS:,}, got {num_bins:,}: bins of a row each measure noise, and every "
            "resample keeps all of them."
        )
    return num_bins


def check_confidence_level(level: float) -> float:
    """Returns the level if it lies strictly between 0 and 1, and raises ValueError otherwise."""
    if not isinstance(level, (float, int)) or not 0.0 < float(level) < 1.0:
        raise ValueError(f"`confidence_level` must lie strictly between 0 and 1 (0.95, say), got {level!r}.")
    return float(level)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise softmax in float64, shifted by the row's maximum so that no logit overflows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def as_numpy(value: Any, name: str = "predictions") -> np.ndarray:
    """Any array as numpy; bfloat16, which numpy lacks, goes through float32 (exactly)."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.dtype == torch.bfloat16:
            value = value.float()
        return value.cpu().numpy()
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        value = [as_numpy(item, name) for item in value]
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} are ragged: every row must have the same number of entries.") from error


def as_float64(array: np.ndarray, given: Any, name: str = "predictions") -> tuple[np.ndarray, float]:
    """An array in float64, and the resolution its values were `given` in if that was half precision."""
    if array.dtype == object or array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be numbers, got dtype {array.dtype}.")
    parts = given if isinstance(given, (list, tuple)) else [given]
    half = [part.dtype for part in parts if isinstance(part, torch.Tensor) and part.dtype in _HALF]
    if half:
        resolution = max(float(torch.finfo(dtype).eps) for dtype in half)
    else:
        resolution = float(np.finfo(np.float16).eps) if array.dtype == np.float16 else 0.0
    return array.astype(np.float64, copy=False), resolution


def _flatten(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    if values.ndim == 0:
        raise ValueError("predictions must be an array of rows, got a single number.")
    binary = values.ndim == 1 and labels.ndim == 1
    if not binary and (values.ndim != labels.ndim + 1 or (values.ndim > 2 and values.shape[:-1] != labels.shape)):
        raise ValueError(
            f"predictions of shape {values.shape} do not go with labels of shape {labels.shape}: expected (N, C) with "
            "(N,), (N,) with (N,) for binary, or (..., C) with (...)."
        )
    if len(values) != len(labels):
        raise ValueError(
            f"predictions have {len(values)} rows but there are {len(labels)} labels; they must be paired one to one."
        )
    if binary:
        return values, labels, True
    if values.shape[-1] < 2 and values.size:
        raise ValueError(
            f"predictions have {values.shape[-1]} column(s); give at least two classes, or a 1-D array for the "
            "probability of class 1."
        )
    return values.reshape(-1, values.shape[-1]), labels.reshape(-1), False


def _kept(labels: np.ndarray, mask: Any, shape: tuple[int, ...], ignore_index: int | None) -> np.ndarray | None:
    keep = None
    if ignore_index is not None and (labels == ignore_index).any():
        keep = labels != ignore_index
    if mask is not None:
        array = as_numpy(mask, "mask")
        if array.shape != tuple(shape):
            raise ValueError(f"mask has shape {array.shape}, but the labels have shape {tuple(shape)}.")
        if array.dtype.kind not in "biu" or (array.dtype.kind != "b" and not np.isin(array, (0, 1)).all()):
            raise ValueError("mask must hold booleans (or zeros and ones).")
        chosen = array.reshape(-1).astype(bool)
        keep = chosen if keep is None else keep & chosen
    return keep


def _checked_probabilities(values: np.ndarray, binary: bool, tolerance: float) -> np.ndarray:
    lowest, highest = values.min(), values.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        row = int(np.flatnonzero(~np.isfinite(values if binary else values.sum(axis=1)))[0])
        raise ValueError(
            f"probabilities hold NaN or infinity, first in row {row}: {values[row]}. Drop or mend such rows."
        )
    if lowest < 0.0 or highest > 1.0 + tolerance:
        raise ValueError(
            f"probabilities must lie in [0, 1], got values from {lowest:.6g} to {highest:.6g}. If these are logits, "
            'pass input="logits".'
        )
    if binary:
        clipped = np.minimum(values, 1.0)
        return np.stack([1.0 - clipped, clipped], axis=1)
    error = np.abs(values @ np.ones(values.shape[1]) - 1.0)
    worst = int(error.argmax())
    if error[worst] > tolerance:
        raise ValueError(
            f"each row of probabilities must sum to 1 within {tolerance:.2g}; row {worst} sums to "
            f"{values[worst].sum():.6g}. "
            'If these are logits, pass input="logits".'
        )
    return np.minimum(values, 1.0) if highest > 1.0 else values


def _checked_logits(values: np.ndarray, binary: bool, *, may_mask: bool) -> np.ndarray:
    """`(N, C)` logits that are finite and no probabilities by mistake; -inf, if allowed, masks classes of a row."""
    logits = np.stack([np.zeros_like(values), values], axis=1) if binary else values
    lowest, highest = logits.min(), logits.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):  # a NaN anywhere makes both ends NaN
        largest = logits.max(axis=1)
        wrong = ~np.isfinite(largest if may_mask else largest + logits.min(axis=1))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"logits hold NaN or infinity, first in row {row}: {logits[row][:8]}. Drop or mend such rows."
            )
    if not binary and lowest >= 0.0 and np.abs(values @ np.ones(values.shape[1]) - 1.0).max() < 1e-6:
        raise ValueError(
            'input="logits", but every row is non-negative and sums to 1, as probabilities do. If they are, pass '
            'input="probabilities": a second softmax makes any model look under-confident. If they really are logits, '
            "add any constant to a row: softmax does not see it."
        )
    return logits


def _check_label_range(labels: np.ndarray, num_classes: int) -> None:
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"labels must lie in [0, {num_classes - 1}] for {num_classes} classes, got {wrong}.")
