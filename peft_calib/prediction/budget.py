"""How many rows fit into one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Bytes for activations of one forward on a CPU where no budget is given. Larger batches gain nothing there.
CPU_BUDGET = 2 * 2**30
#: Part of the free memory of an accelerator that one forward may use.
FREE_SHARE = 0.5


def draws_per_pass(
    root: nn.Module, inputs: dict[str, Any], rows: int, num_samples: int, budget: int | None = None
) -> int:
    """Draws of one forward, in passes of about equal size, by the bytes a row needs, estimated generously."""
    if budget is None:
        budget = _free_bytes(root)
    fitting = max(1, int(budget // max(1, rows * _bytes_per_row(root, inputs))))
    passes = -(-num_samples // min(fitting, num_samples))
    return -(-num_samples // passes)


def _free_bytes(root: nn.Module) -> int:
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return CPU_BUDGET
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((torch.cuda.mem_get_info(device)[0] + reusable) * FREE_SHARE)


def _bytes_per_row(root: nn.Module, inputs: dict[str, Any]) -> int:
    config: Any = getattr(root, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(config, "hidden_size", None) or 1024
    inner = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", None) or 4 * hidden
    heads = getattr(config, "num_attention_heads", None) or 16
    tokens = sum(t.shape[1] for name, t in inputs.items() if name.endswith(("input_ids", "inputs_embeds")))
    if not tokens:  # an image: one token for each patch
        size = next((t[0].numel() for t in inputs.values() if isinstance(t, torch.Tensor) and t.dim() > 2), 3 * 224**2)
        patch = getattr(config, "patch_size", None)
        tokens = 1 + size // (3 * (patch if isinstance(patch, int) else 16) ** 2)
    width = next((p.element_size() for p in root.parameters() if p.is_floating_point()), 4)
    return int(tokens * (10 * hidden + 3 * inner + 2 * heads * tokens) * width)
