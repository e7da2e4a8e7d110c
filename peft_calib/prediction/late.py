"""How much of a prediction's work all draws share."""

from __future__ import annotations

from torch import nn

from ..tuners.late import Prefix
from ..tuners.laws import laws_of


def share_of(prefix: Prefix, root: nn.Module, read: float) -> float:
    """Part of the weights that lies in a prefix; `read` is the share of positions the output layer sees."""
    tables = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    skip = tables | {id(p) for law in laws_of(root) for p in law.parameters()}
    output_layer = getattr(root, "get_output_embeddings", lambda: None)()
    output = {id(p): p.numel() for p in output_layer.parameters()} if output_layer is not None else {}
    skip |= output.keys()
    total = sum(p.numel() for p in root.parameters() if id(p) not in skip) + read * sum(output.values())
    inside = sum(p.numel() for block, _ in prefix.outputs for p in block.parameters() if id(p) not in skip)
    return inside / total if total else 0.0
