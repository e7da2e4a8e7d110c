"""What calibration needs of a batch of logits and labels, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import pad_across_processes

from .outputs import labels_among, logits_among

IGNORE_INDEX = -100
# A token classifier has a tag set; more outputs than this a position is a vocabulary.
MAX_TOKEN_CLASSES = 1024


def preprocess_logits_for_calibration(
    logits: torch.Tensor | tuple[torch.Tensor, ...],
    labels: torch.Tensor | tuple[torch.Tensor, ...] | None,
    answer_token_ids: Sequence[int] | None = None,
) -> torch.Tensor:
    """Keeps what calibration needs of a batch, for `Trainer(preprocess_logits_for_metrics=...)`.

    Classifiers keep their logits in float32. Token classifiers keep the positions up to the last one with a label, or
    all where there is no label. A causal language model that answers with one of a few tokens keeps the logits of
    those tokens at the position before the first label: `(B, T, V)` becomes `(B, C)`. Logits that are shorter than the
    labels (`logits_to_keep`) or longer (prompt tuning) are aligned at the end.

    A `CalibrationCallback` has a method of this kind that knows more: the names of the outputs, whether the model
    shifts its labels, and where a row ends.

    Args:
        logits: `(B, C)`, `(B, T, C)`, or a tuple with one such tensor that goes with the labels.
        labels: `(B,)`, or `(B, T)` with -100 where there is no label; None for rows without labels.
        answer_token_ids: The token of each class, for multiple choice by a causal language model; give it with
            `functools.partial`, or use the callback's own `preprocess_logits_for_metrics`.

    Returns:
        `(B, C)` or `(B, L, C)` float32, with L at most T and the same in every process.

    Raises:
        ValueError: For a whole vocabulary without `answer_token_ids`, logits that are not those of a classifier,
            outputs of which none or several could be the logits, or answers without labels, whose place is not known.

    Example:
        >>> logits = (torch.zeros(2, 3, dtype=torch.bfloat16), None)
        >>> preprocess_logits_for_calibration(logits, torch.tensor([0, 1])).dtype
        torch.float32
        >>> tags = torch.tensor([[-100, 2, -100, -100], [-100, 1, 0, -100]])
        >>> preprocess_logits_for_calibration(torch.zeros(2, 4, 3), tags).shape
        torch.Size([2, 3, 3])
    """
    labels = labels_among(labels)
    return keep_for_calibration(logits_among(logits, labels), labels, answer_token_ids)


def keep_for_calibration(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    answer_token_ids: Sequence[int] | None = None,
    *,
    shifted: bool | None = None,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """`preprocess_logits_for_calibration` of logits that have been recognised.

    `shifted`: whether position i answers for label i + 1; unknown, an answer at the first position is a decoder's.
    `ends`: where each row's last token stands in the logits, for answers of rows without labels.
    """
    if answer_token_ids is not None:
        return _answer_logits(logits, labels, answer_token_ids, shifted, ends)
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
    if logits.dim() == 3 and (labels is None or labels.shape == logits.shape[:2]):
        length = logits.shape[1]
        if labels is not None:
            labelled = (labels != IGNORE_INDEX).any(dim=0).nonzero()
            length = int(labelled.max()) + 1 if len(labelled) else 1
        # what the processes gather must have one shape
        return pad_across_processes(logits[:, :length].float().contiguous(), dim=1, pad_index=IGNORE_INDEX)
    return logits.float()


def labelled_rows(
    logits: np.ndarray, labels: np.ndarray, answer_token_ids: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and classes (N,) of the rows with a label, of (B, C) or (B, L, C) and labels (B,) or (B, T)."""
    if answer_token_ids is not None and labels.ndim == 2:
        labels = _answer_classes(labels, answer_token_ids)
    if logits.ndim == 2 and labels.shape == (len(logits), 1):
        labels = labels[:, 0]
    if logits.ndim == 3 and labels.ndim == 2 and len(logits) == len(labels):
        logits = logits[:, max(logits.shape[1] - labels.shape[1], 0) :]  # virtual tokens come first
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


def _answer_positions(logits: torch.Tensor, labels: torch.Tensor, shifted: bool | None) -> torch.Tensor:
    """Where the logits of each row's first label stand."""
    if logits.dim() != 3 or labels.dim() != 2:
        raise ValueError(
            f"answer_token_ids are for language models with logits (B, T, V) and labels (B, T), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    labelled = labels != IGNORE_INDEX
    # the logits at a position predict the token after it
    before = labelled.int().argmax(dim=1) - (0 if shifted is False else 1) + logits.shape[1] - labels.shape[1]
    outside = (before < 0) & labelled.any(dim=1)
    if bool(outside.any()) and logits.shape[1] < labels.shape[1]:
        raise ValueError(
            f"The logits cover the last {logits.shape[1]} of {labels.shape[1]} positions, but an answer comes before "
            "those. Keep more of them (logits_to_keep)."
        )
    if shifted and bool(outside.any()):
        raise ValueError(
            "The first labelled token of a row is its very first token, which a causal language model has no logits "
            "for. Mask the prompt with -100, so that the answer's token comes first among the labels."
        )
    return before.clamp(min=0)


def _answer_logits(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    answer_token_ids: Sequence[int],
    shifted: bool | None,
    ends: torch.Tensor | None,
) -> torch.Tensor:
    """`(B, C)` logits of the answers' tokens before each row's first label or, without labels, at its end."""
    if labels is not None:
        at = _answer_positions(logits, labels, shifted)
    elif ends is not None and logits.dim() == 3:
        at = ends
    else:
        raise ValueError(
            "Without labels the place of an answer is the last token of its row, which is not known here. Give the "
            "Trainer preprocess_logits_for_metrics=callback.preprocess_logits_for_metrics of a CalibrationCallback in "
            "callbacks=[...], which sees the attention mask; or give the rows labels."
        )
    if max(answer_token_ids) >= logits.shape[-1]:
        raise ValueError(
            f"answer_token_ids holds {max(answer_token_ids)}, but the vocabulary has {logits.shape[-1]} tokens."
        )
    rows = torch.arange(len(logits), device=logits.device)
    tokens = torch.as_tensor(list(answer_token_ids), device=logits.device)
    return logits[rows, at.to(logits.device)][:, tokens].float()


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
