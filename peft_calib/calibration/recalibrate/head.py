"""Finding the linear layer whose output is a classifier's logits."""

from __future__ import annotations

from torch import nn

HEAD_NAMES = ("classifier", "score", "classification_head", "qa_outputs", "head")


def final_linear(model: nn.Module, num_classes: int) -> nn.Linear:
    """The last linear layer of a classification head, under one of `HEAD_NAMES`; of a PEFT model its trained copy."""
    found = None
    for name, module in model.named_modules():
        parts = name.split(".")
        is_stale_copy = "original_module" in parts
        if isinstance(module, nn.Linear) and not is_stale_copy and any(part in HEAD_NAMES for part in parts):
            found = (name, module) if _is_active(model, parts) else found
    if found is None:
        raise ValueError(f"No linear layer found in a classification head; looked for modules named {HEAD_NAMES}.")
    name, layer = found
    if layer.out_features != num_classes:
        raise ValueError(
            f"The head {name!r} has {layer.out_features} outputs, but the temperature is for {num_classes}."
        )
    if not layer.weight.is_floating_point():
        raise ValueError(f"The head {name!r} is quantised ({layer.weight.dtype}); dequantise it before folding.")
    return layer


def _is_active(model: nn.Module, parts: list[str]) -> bool:
    """Whether a layer inside a PEFT `modules_to_save` wrapper belongs to the active adapter."""
    if "modules_to_save" not in parts:
        return True
    position = parts.index("modules_to_save")
    wrapper = model.get_submodule(".".join(parts[:position]))
    active = getattr(wrapper, "active_adapters", None) or [getattr(wrapper, "active_adapter", None)]
    return parts[position + 1] in active
