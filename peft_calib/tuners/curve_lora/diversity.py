"""The diversity term: two opposite points of the curve are rewarded for disagreeing, up to a margin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..objective import shifts_labels


def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`[KL(p || m) + KL(q || m)] / 2` with `m = (p + q) / 2`, in nats: the mutual information of the two."""
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return ((log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2).sum(-1)


def diversity_term(logits: torch.Tensor, margin: float, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight max(margin - D, 0)` for class logits (2, N, C), and D, the mean divergence over the batch, detached."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if not logits.shape[1]:
        return logits.sum() * 0.0, logits.new_zeros(())  # a micro-batch without a single labelled token
    # masked classes have log-probability -inf, which times zero is no number
    log_p, log_q = logits.to(wide).log_softmax(-1).clamp_min(-1e4)
    divergence = jensen_shannon(log_p, log_q).mean()
    return weight * (margin - divergence).clamp_min(0), divergence.detach()


def class_logits(
    model: nn.Module, outputs: Any, inputs: Mapping[str, Any], label_tokens: list[int] | None
) -> torch.Tensor:
    """The logits (2, N, C) of the class distributions of a training forward at two points, of 2 B rows.

    Sequence classification: one distribution a row. Token classification: one for each labelled token. Language
    models: one for each labelled position, of the vocabulary or of `label_tokens`.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    labels = inputs.get("labels")
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            "jsd_weight > 0 compares class distributions, but the model's output has no logits (a plain encoder, or a "
            "loss head that never forms them). Set jsd_weight=0, or train with a head that returns logits."
        )
    if (isinstance(labels, torch.Tensor) and labels.is_floating_point()) or logits.shape[-1] < 2:
        raise ValueError("jsd_weight > 0 compares class distributions, which a regression has not. Set jsd_weight=0.")
    if logits.dim() == 2:
        return logits.view(2, -1, logits.shape[-1])
    if logits.dim() != 3 or not isinstance(labels, torch.Tensor) or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"jsd_weight > 0 needs logits of rows, or of every position of labels (-100 where there is none); got "
            f"logits of shape {tuple(logits.shape)} and labels of shape "
            f"{tuple(labels.shape) if isinstance(labels, torch.Tensor) else None}."
        )
    if shifts_labels(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows = len(labels) // 2
    chosen = labels[:rows] != -100
    if label_tokens is not None:
        logits = logits[..., torch.tensor(label_tokens, device=logits.device)]
    return torch.stack([half[chosen] for half in logits.split(rows)])
