# SPDX-License-Identifier: Apache-2.0
"""What calibration needs of a batch of logits and labels, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import pad_across_processes

IGNORE_INDEX = -100
# A token classifier has a tag set; more outputs than this a position is a vocabulary.
MAX_TOKEN_CLASSES = 1024


def preprocess_logits_for_calibration(
    logits: torch.Tensor | tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    answer_token_ids: Sequence[int] | None = None,
) -> torch.Tensor:
    """Keeps what calibration needs of a batch, for `Trainer(preprocess_logits_for_metrics=...)`.

    Classifiers keep their logits in float32. Token classifiers keep the positions up to the last one with a label. A
    causal language model that answers with one of a few tokens keeps the logits of those tokens at the position before
    the first label: `(B, T, V)` becomes `(B, C)`. Logits that are shorter than the labels (`logits_to_keep`) or longer
    (prompt tuning) are aligned at the end.

    Args:
        logits: `(B, C)`, `(B, T, C)`, or a tuple that begins with such a tensor.
        labels: `(B,)`, or `(B, T)` with -100 where there is no label.
        answer_token_ids: the token of each class, for multiple choice by a causal language model; give it with
            `functools.partial`, or use the callback's own `preprocess_logits_for_metrics`.

    Returns:
        `(B, C)` or `(B, L, C)` float32, with L at most T and the same in every process.

    Raises:
        ValueError: for a whole vocabulary without `answer_token_ids`, or logits that are not those of a classifier.

    Example:
        >>> logits = (torch.zeros(2, 3, dtype=torch.bfloat16), None)
        >>> preprocess_logits_for_calibration(logits, torch.tensor([0, 1])).dtype
        torch.float32
        >>> tags = torch.tensor([[-100, 2, -100, -100], [-100, 1, 0, -100]])
        >>> preprocess_logits_for_calibration(torch.zeros(2, 4, 3), tags).shape
        torch.Size([2, 3, 3])
    """
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    if answer_token_ids is not None:
        return _answer_logits(logits, labels, answer_token_ids)
    if logits.dim() not in (2, 3) or logits.shape[-1] < 2:
        raise ValueError(
            f"Calibration needs logits of shape (B, C) or (B, T, C) with C >= 2, got {tuple(logits.shape)}."
        )
    if logits.dim() == 3 and logits.shape[-1] > MAX_TOKEN_CLASSES:
        raise ValueError(
            f"These logits cover a vocabulary of {logits.shape[-1]}. Name the tokens that answer the question: "
            "functools.partial(preprocess_logits_for_calibration, answer_token_ids=[...]), or answer_token_ids of "
            "CalibrationCallback."
        )
    if logits.dim() == 3 and labels.shape == logits.shape[:2]:
        labelled = (labels != IGNORE_INDEX).any(dim=0).nonzero()
        length = int(labelled.max()) + 1 if len(labelled) else 1
        # what the processes gather must have one shape
        return pad_across_processes(logits[:, :length].float().contiguous(), dim=1, pad_index=IGNORE_INDEX)
    return logits.float()


def labelled_rows(
    logits: np.ndarray, labels: np.ndarray, answer_token_ids: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a label from what `preprocess_logits_for_calibration` left and the Trainer gathered.

    Args:
        logits: `(B, C)` or `(B, L, C)`.
        labels: `(B,)`, or `(B, T)` with T at least L.
        answer_token_ids: the token of each class, if the labels are tokens.

    Returns:
        `(N, C)` logits and `(N,)` classes.

    Raises:
        ValueError: if the shapes do not go together, or an answer is not among the tokens.
    """
    if answer_token_ids is not None and labels.ndim == 2:
        labels = _answer_classes(labels, answer_token_ids)
    if logits.ndim == 3 and labels.ndim == 2 and len(logits) == len(labels):
        length = min(logits.shape[1], labels.shape[1])
        if (labels[:, length:] == IGNORE_INDEX).all():
            logits, labels = logits[:, :length], labels[:, :length]
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Logits of shape {logits.shape} do not go with labels of shape {labels.shape}. Give the Trainer "
            "preprocess_logits_for_metrics=callback.preprocess_logits_for_metrics; for a causal language model give "
            "CalibrationCallback the answer_token_ids."
        )
    keep = labels.reshape(-1) != IGNORE_INDEX
    return logits.reshape(-1, logits.shape[-1])[keep], labels.reshape(-1)[keep]


def _answer_logits(logits: torch.Tensor, labels: torch.Tensor, answer_token_ids: Sequence[int]) -> torch.Tensor:
    if logits.dim() != 3 or labels.dim() != 2:
        raise ValueError(
            f"answer_token_ids are for causal language models with logits (B, T, V) and labels (B, T), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    if max(answer_token_ids) >= logits.shape[-1]:
        raise ValueError(
            f"answer_token_ids holds {max(answer_token_ids)}, but the vocabulary has {logits.shape[-1]} tokens."
        )
    first = (labels != IGNORE_INDEX).int().argmax(dim=1)
    # the logits at a position predict the token after it
    before = first - 1 + logits.shape[1] - labels.shape[1]
    if bool((before < 0).any() & (labels != IGNORE_INDEX).any()) and logits.shape[1] < labels.shape[1]:
        raise ValueError(
            f"The logits cover the last {logits.shape[1]} of {labels.shape[1]} positions, but an answer comes before "
            "those. Keep more of them (logits_to_keep)."
        )
    rows = torch.arange(len(logits), device=logits.device)
    tokens = torch.as_tensor(list(answer_token_ids), device=logits.device)
    return logits[rows, before.clamp(min=0).to(logits.device)][:, tokens].float()


def _answer_classes(labels: np.ndarray, answer_token_ids: Sequence[int]) -> np.ndarray:
    """`(B,)` class of each row's first labelled token; rows without one keep -100."""
    first = (labels != IGNORE_INDEX).argmax(axis=1)
    tokens = labels[np.arange(len(labels)), first]
    classes = np.full(len(labels), IGNORE_INDEX, np.int64)
    for k, token in enumerate(answer_token_ids):
        classes[tokens == token] = k
    strange = tokens[(classes == IGNORE_INDEX) & (tokens != IGNORE_INDEX)]
    if len(strange):
        raise ValueError(
            f"The first labelled token of a row is {strange[0]}, which is not one of answer_token_ids "
            f"{list(answer_token_ids)}. Mask the prompt with -100, so that the answer's token comes first."
        )
    return classes
