"""Tables of indices that a law looks things up with: known from its slots, hence no part of its state."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class IndexTable:
    """Integers as a tensor, made where it is needed.

    A buffer that is not saved would be lost when a model is moved to the meta device and materialised again
    (`to_empty`, FSDP and other sharded loaders): nothing could bring it back. Plain numbers cannot be lost.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self.rows = tuple(int(row) for row in rows)
        self._made: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def on(self, device: torch.device) -> torch.Tensor:
        """The indices as an int64 tensor on a device, where they are copied once."""
        found = self._made.get(device)
        if found is None:
            with torch.inference_mode(False):  # autograd saves indices, also those first used in inference mode
                found = torch.tensor(self.rows, dtype=torch.int64, device=device)
            if not torch.compiler.is_compiling() and device.type != "meta":
                self._made[device] = found  # a dictionary that fills up would have a graph built again
        return found

    def __getstate__(self) -> dict:
        return {"rows": self.rows, "_made": {}}
