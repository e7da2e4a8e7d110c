# SPDX-License-Identifier: Apache-2.0
"""Logits in evaluation: of one batch with K draws, or of a whole set of rows without a data loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from peft_calib.calibration.inputs import as_numpy
from peft_calib.prediction.draws import draws, evaluating
from peft_calib.tuners.rows import to_device

from .preprocess import labelled_rows, preprocess_logits_for_calibration

#: Arguments of a forward that only its loss needs.
FOR_THE_LOSS = ("labels", "num_items_in_batch")


def sampled_logits(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    preprocess: Callable[[torch.Tensor], torch.Tensor],
    num_samples: int,
    seed: int,
) -> torch.Tensor:
    """Logarithm of the mean probabilities of K draws: logits like those of one model.

    One draw at a time, so that the memory is that of a forward.

    Args:
        model: a model with an active adapter of this package.
        inputs: a batch.
        preprocess: picks what is kept of the logits.
        num_samples: number of draws K.
        seed: key of the draws.

    Returns:
        Float32, of the shape that `preprocess` gives.
    """
    inputs = {name: value for name, value in inputs.items() if name not in FOR_THE_LOSS}
    total: torch.Tensor | float = 0.0
    with torch.no_grad():
        for k in range(num_samples):
            with draws(model, num_samples=1, seed=seed, first=k):
                logits = model(**inputs)["logits"]
            total = total + preprocess(logits).double().softmax(-1)
    return (total / num_samples).clamp_min(torch.finfo(torch.float32).tiny).log().float()


def logits_of_rows(
    model: torch.nn.Module,
    rows: Any,
    collate: Callable[[list], Mapping[str, Any]],
    *,
    batch_size: int,
    num_samples: int | None = None,
    seed: int = 0,
    answer_token_ids: list[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and classes of all labelled rows, in order, in evaluation mode.

    Every process does all rows, so that sharded models take part in step. The global random state stays as it is,
    which a data loader would not leave alone.

    Returns:
        `(N, C)` float32 logits, of the mean adapter or of K draws, and `(N,)` classes.

    Raises:
        ValueError: if the rows have no labels.
    """
    device = next(model.parameters()).device
    found: list[tuple[np.ndarray, np.ndarray]] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            batch = {name: to_device(value, device) for name, value in batch.items()}
            labels = batch.get("labels")
            if not isinstance(labels, torch.Tensor):
                raise ValueError(f"The rows to calibrate on have no labels; a batch has {', '.join(batch)}.")

            def keep(logits: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
                return preprocess_logits_for_calibration(logits, labels, answer_token_ids)

            if num_samples is None:
                inputs = {name: value for name, value in batch.items() if name not in FOR_THE_LOSS}
                logits = keep(model(**inputs)["logits"])
            else:
                logits = sampled_logits(model, batch, keep, num_samples, seed)
            labels = labels if labels.dim() == 2 else labels.reshape(-1)
            found.append(labelled_rows(as_numpy(logits), as_numpy(labels), answer_token_ids))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]
