"""Logits in evaluation: of one batch with K draws, or of a whole set of rows without a data loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from peft_calib.calibration.answers import log_probabilities
from peft_calib.calibration.inputs import as_numpy
from peft_calib.prediction.draws import count_draws, evaluating
from peft_calib.prediction.sources import LawDraws
from peft_calib.provenance.row_tables import as_rows

from .outputs import answers_before_labels, label_names_of, labels_among, logits_among, output_names, without_labels
from .preprocess import IGNORE_INDEX, keep_for_calibration, labelled_rows


def sampled_logits(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    answer_token_ids: Sequence[int] | None,
    num_samples: int,
    seed: int,
) -> torch.Tensor:
    """Logarithm of the mean probabilities of K draws, float32; one draw at a time takes the memory of a forward."""
    source = LawDraws(model, seed)
    count_draws(source, num_samples)  # of a curve draw k is one of K points: which, hangs on all of them
    total: torch.Tensor | float = 0.0
    with torch.no_grad(), evaluating(model):
        for k in range(num_samples):
            with source.use(k, 1):
                outputs = model(**inputs)
            total = total + kept_logits(model, outputs, labels, answer_token_ids).double().softmax(-1)
    return log_probabilities(total / num_samples).float()


def kept_logits(
    model: torch.nn.Module, outputs: Any, labels: torch.Tensor, answer_token_ids: Sequence[int] | None
) -> torch.Tensor:
    """What calibration needs of a model's outputs for labelled rows."""
    logits = logits_among(outputs, labels, output_names(outputs, model))
    return keep_for_calibration(logits, labels, answer_token_ids, shifted=answers_before_labels(model))


def logits_of_rows(
    model: torch.nn.Module,
    rows: Any,
    collate: Callable[[list], Mapping[str, Any]],
    *,
    batch_size: int,
    num_samples: int | None = None,
    seed: int = 0,
    answer_token_ids: list[int] | None = None,
    label_names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and classes (N,) of all labelled rows, in order; of the mean adapter, or of K draws.

    For token classification (N, T, C) and (N, T), -100 where there is no label. Every process does all rows, so that
    sharded models take part in step. The global random state stays as it is, which a data loader would change.
    """
    device = next(model.parameters()).device
    rows, names = as_rows(rows), label_names_of(model, label_names)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            batch = send_to_device(dict(batch), device, non_blocking=True)
            labels = labels_of_batch(batch, names)
            inputs = without_labels(model, batch, names)
            if num_samples is None:
                logits = kept_logits(model, model(**inputs), labels, answer_token_ids)
            else:
                logits = sampled_logits(model, inputs, labels, answer_token_ids, num_samples, seed)
            of_batch = as_numpy(logits), as_numpy(labels if labels.dim() == 2 else labels.reshape(-1))
            rows_of_batch = labelled_rows(*of_batch, answer_token_ids)  # refuses shapes that do not go together
            if logits.dim() == 3 and labels.dim() == 2:
                length = min(logits.shape[1], labels.shape[1])  # virtual tokens come first
                rows_of_batch = of_batch[0][:, logits.shape[1] - length :], of_batch[1][:, :length]
            found.append(rows_of_batch)
    return _together(found)


def _together(batches: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All batches in one; shorter rows of tokens are filled up with positions that have no label."""
    if batches[0][0].ndim == 3:
        longest = max(labels.shape[1] for _, labels in batches)
        batches = [
            (
                np.pad(logits, ((0, 0), (0, longest - logits.shape[1]), (0, 0))),
                np.pad(labels, ((0, 0), (0, longest - labels.shape[1])), constant_values=IGNORE_INDEX),
            )
            for logits, labels in batches
        ]
    logits, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return logits, labels


def labels_of_batch(batch: Mapping[str, Any], names: Sequence[str]) -> torch.Tensor:
    """The classes of a batch; one that has none, or numbers instead of classes, is refused."""
    found = {name: batch[name] for name in dict.fromkeys((*names, "labels")) if batch.get(name) is not None}
    labels = labels_among(tuple(found.values()), list(found)) if found else None
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"The rows to calibrate on have no labels; a batch has {', '.join(batch)}.")
    if labels.is_floating_point():
        raise ValueError(f"The rows to calibrate on have labels of type {labels.dtype}; classes are integers.")
    return labels
