"""Laws that draw anew in every training forward, and draw the same again when a run is resumed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .factors import Law, SlotTable


class CountingLaw(Law):
    """A stochastic law that counts its training forwards: seed and count are the key of what it draws.

    Both are saved with the adapter, in the buffers `draw_seed` and `num_generations`, so that a resumed run goes on
    with the draws of the interrupted one whatever seed its process has, and so that processes which are given the
    tensors of the first one draw what it draws. A mirror of each is kept as a plain number, because reading a buffer
    would wait for the device.

    Args:
        slots: The slots it answers for.
        seed: Key of the draws, an integer of at most 64 bits.
        counts: Whether it draws at all: a method that draws in some of its settings only keeps no count in the others.
    """

    # adapters saved before seeds were saved draw by the seed of their configuration
    optional_tensors: ClassVar[tuple[str, ...]] = ("draw_seed",)

    def __init__(self, slots: SlotTable, seed: int = 0, counts: bool = True) -> None:
        super().__init__(slots)
        self._count: int | None = None
        self._seed: int | None = None
        if counts:
            self.register_buffer("num_generations", torch.zeros((), dtype=torch.int64))
            self.keep_seed(seed)

    def keep_seed(self, seed: int) -> None:
        """Save the seed with the adapter.

        Args:
            seed: An integer of at most 64 bits.
        """
        self.register_buffer("draw_seed", torch.tensor(seed, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_read_again)

    @property
    def stochastic(self) -> bool:
        """Whether training forwards draw, which is what is counted."""
        return hasattr(self, "num_generations")

    def seed(self) -> int:
        """The key of the draws as a number; for eager code."""
        # read at the first use: by then a process has the tensors of the first one, if it trains with others
        if self._seed is None:
            self._seed = int(self.draw_seed)
        return self._seed

    def generations(self) -> torch.Tensor:
        """Training forwards counted so far: an int64 scalar on the CPU, traced where the step is compiled."""
        if torch.compiler.is_compiling():
            return self.num_generations.cpu()
        if self._count is None:
            self._count = int(self.num_generations)
        return torch.tensor(self._count)

    def draw_key(self) -> torch.Tensor:
        """Seed and count: int64 (2,) on the CPU, traced where the step is compiled."""
        if torch.compiler.is_compiling():
            return torch.stack([self.draw_seed.cpu(), self.generations()])
        return torch.tensor([self.seed(), int(self.generations())])

    def count_generation(self) -> None:
        before = None if torch.compiler.is_compiling() else int(self.generations())
        self._count = None if before is None else before + 1
        self.num_generations += 1

    @torch.no_grad()
    def go_on_from(self, other: CountingLaw) -> None:
        """Take over the seed and the count of another law."""
        self.draw_seed.copy_(other.draw_seed)
        self.num_generations.copy_(other.num_generations)
        _read_again(self, None)


def _read_again(law: CountingLaw, _: Any) -> None:
    law._count = law._seed = None
