"""Linear maps as `from_pretrained` leaves them with a quantisation configuration of bitsandbytes."""

from __future__ import annotations

import torch


def quantized(linear: torch.nn.Linear, kind: str) -> torch.nn.Linear:
    """The same map in `"8bit"` or `"4bit"`, on the CPU."""
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if kind == "8bit":
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False)
    else:
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return new.to("cpu")
