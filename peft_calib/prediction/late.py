"""How much of a prediction's work all draws share."""

from __future__ import annotations

from torch import nn

from ..tuners.late import Prefix
from ..tuners.laws import laws_of


def share_of(prefix: Prefix, root: nn.Module, read: float) -> float:
    """Part of the weights outside embeddings that lies in the blocks of a prefix: the work of a forward follows it.

    Args:
        prefix: What all draws share.
        root: The base model.
        read: Part of the positions that the output layer over a vocabulary is applied to.

    Returns:
        From 0 to 1.
    """
    tables = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    skip = tables | {id(p) for law in laws_of(root) for p in law.parameters()}
    output_layer = getattr(root, "get_output_embeddings", lambda: None)()
    output = {id(p): p.numel() for p in output_layer.parameters()} if output_layer is not None else {}
    skip |= output.keys()
    total = sum(p.numel() for p in root.parameters() if id(p) not in skip) + read * sum(output.values())
    inside = sum(p.numel() for block, _ in prefix.outputs for p in block.parameters() if id(p) not in skip)
    return inside / total if total else 0.0
