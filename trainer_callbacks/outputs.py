"""Which of a model's outputs are the logits, and which of its inputs the labels: told by name and shape, not place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.loss.loss_utils import LOSS_MAPPING, ForMaskedLMLoss
from transformers.utils import find_labels

#: Inputs of a forward that only its loss needs, whatever the label columns are called.
FOR_THE_LOSS = ("labels", "num_items_in_batch", "shift_labels", "fused_lm_head")


def base_model_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def label_names_of(model: Any, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The label columns, by the Trainer's rule: those of `TrainingArguments.label_names`, or the model's own."""
    return tuple(find_labels(type(base_model_of(model))) if given is None else given)


def labels_among(labels: Any, names: Sequence[str] = ()) -> Any:
    """The column of classes among label columns: the only one, `labels` or `label`, or the only one with classes."""
    if not isinstance(labels, (tuple, list)):
        return labels
    known = dict(zip(names, labels, strict=True)) if len(names) == len(labels) else {}
    for name in ("labels", "label"):
        if known.get(name) is not None:
            return known[name]
    classes = [column for column in labels if column is not None and _dims(column) and not _is_floating(column)]
    if len(classes) != 1:
        raise ValueError(
            f"There are {len(labels)} label columns{' (' + ', '.join(names) + ')' if known else ''}, and calibration "
            "measures one. Name it in TrainingArguments(label_names=[...]), or give the Trainer compute_metrics=... "
            "of your own that picks logits and labels and calls peft_calib.calibration.calibration_report."
        )
    return classes[0]


def logits_among(outputs: Any, labels: Any = None, names: Sequence[Sequence[str]] = ()) -> Any:
    """The logits among a model's outputs: a tensor, a mapping, or a tuple of entries that `names` may name.

    An output called `logits` is taken if it goes with the labels; else the only one of a fitting shape whose name ends
    in `logits`; else the only one of a fitting shape: float, one row a label, two classes at least. Otherwise, the
    outputs are refused.

    Example:
        >>> embedding, logits = torch.zeros(2, 8), torch.ones(2, 3)
        >>> logits_among({"embedding": embedding, "logits": logits}, torch.tensor([0, 1])) is logits
        True
        >>> logits_among((torch.tensor(0.5), torch.zeros(2, 5, 8), logits), torch.tensor([0, 1])) is logits
        True
    """
    if not isinstance(outputs, (tuple, list, Mapping)):
        return outputs
    if not isinstance(outputs, Mapping):
        keys = next((list(each) for each in names if len(each) == len(outputs)), range(len(outputs)))
        outputs = dict(zip(keys, outputs, strict=True))
    fitting = {str(name): value for name, value in outputs.items() if _fits(value, labels)}
    named = [name for name in fitting if name.endswith("logits")]
    if "logits" in fitting:
        return fitting["logits"]
    for choice in (named, list(fitting)):
        if len(choice) == 1:
            return fitting[choice[0]]
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in outputs.items() if _dims(value))
    which = f"of shape {tuple(labels.shape)}" if labels is not None else "unknown"
    problem = "Several outputs could be the logits" if fitting else "No output goes with the labels as their logits"
    raise ValueError(
        f"{problem}: labels {which}, outputs {shapes or 'without a tensor'}. Have the model call them `logits` and "
        "give the Trainer preprocess_logits_for_metrics=callback.preprocess_logits_for_metrics of a "
        "CalibrationCallback in callbacks=[...], which knows outputs by name; or compute_metrics=... of your own."
    )


def answers_before_labels(model: Any) -> bool:
    """Whether position i of the logits answers for label i + 1: not in an encoder-decoder, nor in a masked model."""
    masked = LOSS_MAPPING.get(getattr(base_model_of(model), "loss_type", None)) is ForMaskedLMLoss
    return not (masked or _of_config(model, "is_encoder_decoder"))


def last_positions(model: Any, inputs: Mapping[str, Any], length: int) -> torch.Tensor | None:
    """Position of each row's last token among `length` logits; None where the inputs do not tell."""
    prefix = "decoder_" if _of_config(model, "is_encoder_decoder") else ""
    mask, ids = (inputs.get(f"{prefix}{name}") for name in ("attention_mask", "input_ids"))
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return length - 1 - mask.flip(1).bool().int().argmax(dim=1)
    ids = inputs.get(f"{prefix}inputs_embeds") if ids is None else ids
    return torch.full((len(ids),), length - 1) if mask is None and isinstance(ids, torch.Tensor) else None


def output_names(outputs: Any, model: Any) -> list[list[str]]:
    """The lists of names that the Trainer's tuple of these outputs may stand for."""
    if not isinstance(outputs, Mapping):
        return []
    left_out = _of_config(model, "keys_to_ignore_at_inference") or []
    whole = [str(name) for name in outputs if name != "loss"]
    return [[name for name in whole if name not in left_out], whole, ["loss", *whole]]


def without_labels(model: Any, inputs: Mapping[str, Any], label_names: Sequence[str] = ()) -> dict[str, Any]:
    """The inputs of a forward for its logits alone; labels that an encoder-decoder feeds its decoder with stay."""
    kept = {name: value for name, value in inputs.items() if name not in (*FOR_THE_LOSS, *label_names)}
    decodes, labels = _of_config(model, "is_encoder_decoder"), inputs.get("labels")
    if decodes and isinstance(labels, torch.Tensor) and labels.dim() == 2 and "decoder_input_ids" not in kept:
        kept["labels"] = labels
    return kept


def _of_config(model: Any, name: str) -> Any:
    return getattr(getattr(base_model_of(model), "config", None), name, None)


def _fits(value: Any, labels: Any) -> bool:
    if _dims(value) < 2 or not _is_floating(value) or value.shape[-1] < 2:
        return False
    if labels is None:
        return _dims(value) in (2, 3)
    one_class_a_row = labels.ndim == 2 and labels.shape[1] == 1
    return len(value) == len(labels) and _dims(value) in (labels.ndim + 1, *((2,) if one_class_a_row else ()))


def _dims(value: Any) -> int:
    return value.ndim if isinstance(value, (torch.Tensor, np.ndarray)) else 0


def _is_floating(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, torch.Tensor) else value.dtype.kind == "f"
