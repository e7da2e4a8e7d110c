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
        """The form for some slots: that of the configuration, if all of them have it.

        A scale other than the configuration's own is taken if it makes `lora_alpha` a whole number, so that no reader
        rounds it; else the scale is 1 and B carries all of it.
        """
        rank = max(slot.r for slot in slots)
        scale, _ = Counter(slot.scaling for slot in slots).most_common(1)[0]
        if rank == r and scale == lora_alpha / r:
            return cls(r, lora_alpha)
        alpha = scale * rank
        whole = alpha == math.floor(alpha) and 0 < alpha < 2**31 and alpha / rank == scale
        return cls(rank, int(alpha) if whole else rank)

    def factors(self, slot: Slot, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of a slot in this form: `lora_alpha / r * B' A'` is its update `scaling * B A`.

        They are A and B bit by bit where rank and scale are the common ones, and exact where the ratio of the scales
        is a power of two; else B' is rounded once, in at least 32 bits.
        """
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
