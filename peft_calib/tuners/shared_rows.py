"""A map that is the same for all draws, given rows that stand K times in the batch: it answers them once.

Where the trunk below the draws has answered, its states are repeated for K draws and go to the first varying block.
The maps there that read them as they are (query, key and value, where no norm comes first) have a frozen weight of
their own, common to all draws, and only the update differs.
"""

from __future__ import annotations

import torch

from ..internals.torch import version_of


def mark_repeated(repeated: torch.Tensor, once: torch.Tensor) -> torch.Tensor:
    """Note on a tensor that its rows are those of `once`, K times one after the other; returned for convenience."""
    if len(repeated) == len(once) or repeated.is_inference():  # nobody counts writes to a tensor of inference mode
        return repeated
    repeated._peft_calib_once = (once, version_of(once), version_of(repeated))
    return repeated


def rows_once(x: torch.Tensor) -> torch.Tensor | None:
    """The rows that `x` repeats; None where it repeats none, was written to since, or has to pass a gradient on.

    Writes by `.data` or through numpy are not counted, and not seen.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.requires_grad:
        return None
    once, *versions = getattr(x, "_peft_calib_once", (None,))
    # a block may add to its input in place (`hidden += ...`); the mark is on the object, which stays the same
    return once if once is not None and versions == [version_of(once), version_of(x)] else None
