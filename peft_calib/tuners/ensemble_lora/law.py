"""The law of EnsembleLoRA: draw k is member k."""

from __future__ import annotations

import torch
from torch import nn

from ..factors import Draw, Factors, Law, Mean, Sample, Train
from ..heads import HeadStacks, HeadTensors, members_of
from ..lora_factors import plain_factors
from ..seeding import keyed_generator
from ..slots import SlotTable
from .config import EnsembleLoraConfig

#: Purposes of a member's draws, the second part of their key.
_FACTORS, _HEAD = 0, 1


class EnsembleLaw(Law):
    """Factors and heads of all members, stacked: A (K, n, r, d_in) and B (K, n, d_out, r) by shape group.

    `Mean` is the first member, an ordinary LoRA. It is not the average of the factors: members are minima of their
    own, and what lies between two minima need not be one. `Train` is all of them on the same rows, `Sample` those it
    numbers. `heads` are the tensors of modules trained whole, as they are in the base model.
    """

    method = "EnsembleLoRA"

    def __init__(self, config: EnsembleLoraConfig, slots: SlotTable, heads: HeadTensors | None = None) -> None:
        super().__init__(slots)
        self.config = config
        # all members in each training forward, whose loss is the mean of theirs, and in each prediction
        self.train_samples = self.default_num_samples = config.num_members
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for number, (group, indices) in enumerate(slots.groups.items()):
            members = [
                plain_factors(group, len(indices), config.init_weights, self._generator(k, _FACTORS, number))
                for k in range(config.num_members)
            ]
            for stacks, factors in zip((self.A, self.B), zip(*members, strict=True), strict=True):
                stacks[group.key] = nn.Parameter(torch.stack(factors))
        self.heads = HeadStacks(self._head_starts(heads)) if heads else None

    def _generator(self, member: int, *purpose: int) -> torch.Generator:
        return keyed_generator(self.config.init_seed, member, *purpose)

    def _head_starts(self, heads: HeadTensors) -> HeadTensors:
        """The base model's tensors for the first member, and for the others, (K, ...)."""
        starts: HeadTensors = {}
        for number, (module, tensors) in enumerate(heads.items()):
            for position, (name, tensor) in enumerate(tensors.items()):
                start = tensor.detach().float()
                members = [start.clone() for _ in range(self.config.num_members)]
                # weights only: biases and the scales of norms start at constants, in separate trainings as well
                if self.config.fresh_heads and start.dim() > 1 and not start.is_meta:
                    for k in range(1, len(members)):
                        generator = self._generator(k, _HEAD, number, position)
                        members[k] = torch.randn(start.shape, generator=generator).to(start.device) * start.std()
                starts.setdefault(module, {})[name] = torch.stack(members)
        return starts

    def forward(self, draw: Draw) -> Factors:
        """Factors and heads of the members asked for."""
        members = self._members(draw)
        groups = {g: tuple(members_of(side[g.key], members) for side in (self.A, self.B)) for g in self.slots.groups}
        return Factors(groups, heads={} if self.heads is None else self.heads.at(members))

    def _members(self, draw: Draw) -> slice:
        count = self.config.num_members
        first = draw.first if isinstance(draw, Sample) else 0
        if isinstance(draw, (Mean, Train, Sample)) and draw.num_samples >= 1 and first + draw.num_samples <= count:
            return slice(first, first + draw.num_samples)
        raise ValueError(f"{draw} asks for members that are not there; there are {count}.")

    @property
    def num_draws(self) -> int:
        """The members."""
        return self.config.num_members
