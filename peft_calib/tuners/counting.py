"""Laws that draw anew in every training forward, and draw the same again when a run is resumed."""

from __future__ import annotations

from typing import Any

import torch

from .factors import Law, SlotTable


class CountingLaw(Law):
    """A stochastic law that counts its training forwards: the count is a part of the key of what it draws.

    The count is saved with the adapter, in the buffer `num_generations`. A mirror of it is kept as a plain number,
    because reading the buffer would wait for the device.

    Args:
        slots: The slots it answers for.
        counts: Whether it draws at all: a method that draws in some of its settings only keeps no count in the others.
    """

    def __init__(self, slots: SlotTable, counts: bool = True) -> None:
        super().__init__(slots)
        self._count: int | None = 0
        if counts:
            self.register_buffer("num_generations", torch.zeros((), dtype=torch.int64))
            self.register_load_state_dict_post_hook(_forget_count)

    @property
    def stochastic(self) -> bool:
        """Whether training forwards draw, which is what is counted."""
        return "num_generations" in self._buffers

    def generations(self) -> torch.Tensor:
        """Training forwards counted so far: an int64 scalar on the CPU, traced where the step is compiled."""
        if torch.compiler.is_compiling():
            return self.num_generations.cpu()
        if self._count is None:
            self._count = int(self.num_generations)
        return torch.tensor(self._count)

    def count_generation(self) -> None:
        """Count one more."""
        before = None if torch.compiler.is_compiling() else int(self.generations())
        self._count = None if before is None else before + 1
        self.num_generations += 1

    @torch.no_grad()
    def go_on_from(self, other: CountingLaw) -> None:
        """Take over the count of another law."""
        self.num_generations.copy_(other.num_generations)
        self._count = None


def _forget_count(law: CountingLaw, _: Any) -> None:
    law._count = None
