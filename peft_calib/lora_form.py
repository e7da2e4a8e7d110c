"""LoRA factors in the form that every reader understands: one rank and one scale for all modules.

Servers read `r` and `lora_alpha` of an adapter, some also `use_rslora`, few `rank_pattern` and `alpha_pattern`. So the
scale that most modules share becomes `lora_alpha / r`, what others have more or less of it goes into their B, and
smaller ranks are filled up with zeros.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .tuners.slots import Slot


@dataclass(frozen=True)
class CommonForm:
    """The rank and scale of a written LoRA."""

    r: int
    lora_alpha: float

    @classmethod
    def of(cls, slots: Sequence[Slot], r: int, lora_alpha: float) -> CommonForm:
        """The form for some slots; another scale than the configuration's only if `lora_alpha` stays whole, else 1."""
        rank = max(slot.r for slot in slots)
        scale, _ = Counter(slot.scaling for slot in slots).most_common(1)[0]
        if rank == r and scale == lora_alpha / r:
            return cls(r, lora_alpha)
        alpha = scale * rank
        whole = alpha == math.floor(alpha) and 0 < alpha < 2**31 and alpha / rank == scale
        return cls(rank, int(alpha) if whole else rank)

    def factors(self, slot: Slot, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors with `lora_alpha / r * B' A' = scaling * B A`: bit by bit, or B' rounded once in 32 bits or more."""
        ratio = slot.scaling / (self.lora_alpha / self.r)
        if ratio != 1:
            exact = math.frexp(ratio)[0] == 0.5  # a power of two changes the exponent only
            wide = B.dtype if exact or B.dtype.itemsize >= 4 else torch.float32
            A, B = A.to(wide), B.to(wide) * ratio
        if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError(
                f"The factors of {slot.name} hold NaN or infinity, so there is no LoRA to write. The adapter is "
                "broken: train it again, with a smaller learning rate if it diverged."
            )
        pad = self.r - slot.r
        return F.pad(A, (0, 0, 0, pad)), F.pad(B, (0, pad))
