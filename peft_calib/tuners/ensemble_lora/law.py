"""The law of EnsembleLoRA: draw k is member k, or lies around it where moments were kept."""

from __future__ import annotations

import torch
from torch import nn

from ..factors import Draw, Factors, Law, Mean, Sample, Train
from ..heads import HeadStacks, HeadTensors, head_key, members_of
from ..lora_factors import plain_factors
from ..moments import Moments
from ..seeding import Normals, keyed_generator, sources_of_draws
from ..slots import SlotTable
from .config import EnsembleLoraConfig

#: Purposes of a member's draws, the second part of their key.
_FACTORS, _HEAD = 0, 1
#: Purpose of the normals of draws around members.
_AROUND = 2
#: Draws of a prediction around members that names no number, at least.
_DRAWS = 8


class EnsembleLaw(Law):
    """Factors and heads of all members, stacked: A (K, n, r, d_in) and B (K, n, d_out, r) by shape group.

    `Mean` is the first member, an ordinary LoRA. It is not the average of the factors: members are minima of their
    own, and what lies between two minima need not be one. `Train` is all of them on the same rows, `Sample` those it
    numbers. `heads` are the tensors of modules trained whole, as they are in the base model.

    With `moments` a `Sample` is of Gaussians around the members, as wide as their last steps lay apart: draw k around
    member k mod K. `Mean` and `Train` are as without.
    """

    method = "EnsembleLoRA"
    trains_members = True

    def __init__(self, config: EnsembleLoraConfig, slots: SlotTable, heads: HeadTensors | None = None) -> None:
        super().__init__(slots)
        self.config = config
        # all members in each training forward, whose loss is the mean of theirs
        self.train_samples = config.num_members
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for number, (group, indices) in enumerate(slots.groups.items()):
            members = [
                plain_factors(group, len(indices), config.init_weights, self._generator(k, _FACTORS, number))
                for k in range(config.num_members)
            ]
            for stacks, factors in zip((self.A, self.B), zip(*members, strict=True), strict=True):
                stacks[group.key] = nn.Parameter(torch.stack(factors))
        self.heads = HeadStacks(self._head_starts(heads)) if heads else None
        self.moments = Moments(self._followed(), config.moments) if config.moments else None

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
        """Factors and heads of the members asked for, or of draws around them."""
        if isinstance(draw, Sample) and self._around:
            return self._draws(draw)
        members = self._members(draw)
        groups = {g: tuple(members_of(side[g.key], members) for side in (self.A, self.B)) for g in self.slots.groups}
        return Factors(groups, heads={} if self.heads is None else self.heads.at(members))

    def _members(self, draw: Draw) -> slice:
        count = self.config.num_members
        first = draw.first if isinstance(draw, Sample) else 0
        if isinstance(draw, (Mean, Train, Sample)) and draw.num_samples >= 1 and first + draw.num_samples <= count:
            return slice(first, first + draw.num_samples)
        raise ValueError(f"{draw} asks for members that are not there; there are {count}.")

    # ----------------------------------------------------------------- draws around members

    @property
    def _around(self) -> bool:
        """Whether draws lie around members, and are not the members themselves."""
        return self.moments is not None and self.config.posterior_scale > 0 and self.moments.kept() > 1

    def _draws(self, draw: Sample) -> Factors:
        """Draw k around member k mod K, all of its parameters moved together."""
        assert self.moments is not None
        indices = range(draw.first, draw.first + draw.num_samples)
        members = [k % self.config.num_members for k in indices]
        normals = Normals(sources_of_draws(draw, _AROUND), self.config.posterior_scale)
        shared = normals.of((self.moments.rank,), torch.float32, torch.device("cpu"))
        found = {
            name: self.moments.drawn(name, parameter, members, normals, shared)
            for name, parameter in self._followed().items()
        }
        groups = {g: (found[f"A.{g.key}"], found[f"B.{g.key}"]) for g in self.slots.groups}
        heads: HeadTensors = {}
        for module, name in [] if self.heads is None else self.heads.names:
            heads.setdefault(module, {})[name] = found[f"heads.stacks.{head_key(module, name)}"]
        return Factors(groups, heads=heads)

    def _followed(self) -> dict[str, nn.Parameter]:
        """What moments are kept of: factors and heads, members in front."""
        return dict(self.named_parameters())

    def set_progress(self, step: int, total_steps: int, accumulation_steps: int = 1) -> None:
        """Keep the moments of the last part of the training, one step after the other."""
        if self.moments is None:
            return
        before = int(self.config.moments_start * total_steps)
        if total_steps - before < 2:
            raise ValueError(
                f"moments={self.config.moments} needs two steps at least in the last part of the training "
                f"(moments_start={self.config.moments_start:g}), and there are {total_steps - before} of "
                f"{total_steps}: train longer, or set moments=0."
            )
        if step == 0:  # of a training that begins; one that is resumed has kept what came before
            self.moments.reset()
        elif step - before == self.moments.kept() + 1:
            self.moments.keep(self._followed(), total_steps - step, total_steps - before)

    @property
    def num_draws(self) -> int | None:
        """The members; no end of draws around them."""
        return None if self._around else self.config.num_members

    @property
    def varies(self) -> bool:
        return True

    @property
    def default_num_samples(self) -> int:  # type: ignore[override]
        """All members, or as many draws around each that they are eight at least."""
        count = self.config.num_members
        return count * -(-_DRAWS // count) if self._around else count

    @property
    def has_scale(self) -> bool:
        """Where moments were kept."""
        return self.moments is not None and self.moments.kept() > 1
