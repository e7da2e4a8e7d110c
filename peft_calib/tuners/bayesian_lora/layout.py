"""Which slots have a posterior, where their factors lie in the stacks of bases and cores, and how these make them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch

from ..factors import Pair
from ..slots import ShapeGroup, Slot, SlotTable
from .config import BayesianLoraConfig
from .inducing import Whitened, combine
from .initial import core_shape

#: One factor of every slot of a group: the group and the side, "A" or "B".
Place = tuple[ShapeGroup, str]
#: One basis of every slot of a group: the group, the side, and "rows" or "columns".
BasisPlace = tuple[ShapeGroup, str, str]
Bases = Mapping[BasisPlace, Whitened]
#: Something with one entry a factor that broadcasts over (K, n, R, C).
PerFactor = Mapping[Place, torch.Tensor]


class Layout:
    """Bases of equal shape share a stack, and so do cores, whatever slots and sides they belong to."""

    def __init__(self, config: BayesianLoraConfig, slots: SlotTable) -> None:
        chosen = [is_bayesian(slot, config, slots) for slot in slots]
        if not any(chosen):
            raise ValueError(
                f"bayesian_modules={config.bayesian_modules!r} and bayesian_layers={config.bayesian_layers!r} leave "
                f"no target module with a posterior; the targets are {[slot.name for slot in slots][:8]} ..."
            )
        self.members = {g: [i for i in indices if chosen[i]] for g, indices in slots.groups.items()}
        self.plain = {g: [i for i in indices if not chosen[i]] for g, indices in slots.groups.items()}
        self.members = {g: indices for g, indices in self.members.items() if indices}
        self.shared = config.share_inducing
        for group, indices in self.members.items():
            _check_sizes(config, group, slots[indices[0]].name)
        #: Stack of bases, by shape: the places in it, in order.
        self.bases: dict[str, list[BasisPlace]] = {}
        #: Stack of cores, by shape: the places in it, in order.
        self.cores: dict[str, list[Place]] = {}
        for group in self.members:
            R, C = core_shape(config, group.r)
            for side, m, n in (("A", group.r, group.in_features), ("B", group.out_features, group.r)):
                self.bases.setdefault(f"{R}x{m}", []).append((group, side, "rows"))
                self.bases.setdefault(f"{C}x{n}", []).append((group, side, "columns"))
                if side == "A" or not self.shared:
                    self.cores.setdefault(f"{R}x{C}", []).append((group, side))

    @property
    def places(self) -> list[Place]:
        """Group by group, A before B: the order of tensors with one entry a factor."""
        return [(group, side) for group in self.members for side in "AB"]

    def numel(self) -> list[float]:
        """Number of entries of each factor, in the order of `places`."""
        sizes = [(g.r * (g.in_features if side == "A" else g.out_features), g) for g, side in self.places]
        return [float(size) for size, group in sizes for _ in self.members[group]]

    def split(self, per_factor: torch.Tensor) -> dict[Place, torch.Tensor]:
        """Cut a tensor with one entry a factor into pieces that broadcast over (K, n, m, n)."""
        parts = per_factor.view(-1, 1, 1).split([len(self.members[group]) for group, _ in self.places])
        return dict(zip(self.places, parts, strict=True))

    def split_bases(self, stacks: dict[str, Whitened]) -> dict[BasisPlace, Whitened]:
        """Cut stacks of whitened bases into one piece a place."""
        found = {}
        for key, places in self.bases.items():
            sizes = [len(self.members[group]) for group, _, _ in places]
            parts = zip(*(tensor.split(sizes) for tensor in stacks[key]), strict=True)
            found.update({place: Whitened(*part) for place, part in zip(places, parts, strict=True)})
        return found

    def split_cores(self, stacks: dict[str, torch.Tensor]) -> dict[Place, torch.Tensor]:
        """Cut stacks (K, count, R, C) of cores into one piece a place; a shared core serves both sides."""
        found = {}
        for key, places in self.cores.items():
            parts = stacks[key].split([len(self.members[group]) for group, _ in places], dim=1)
            found.update(zip(places, parts, strict=True))
        if self.shared:
            found.update({(group, "B"): found[group, "A"] for group in self.members})
        return found


def is_bayesian(slot: Slot, config: BayesianLoraConfig, slots: SlotTable) -> bool:
    """Whether `bayesian_layers` and `bayesian_modules` give a slot a posterior."""
    if config.bayesian_layers is not None:
        depth = 1 + max((s.layer for s in slots if s.layer is not None), default=-1)
        if slot.layer is None or slot.layer not in [i % depth if i < 0 else i for i in config.bayesian_layers]:
            return False
    names = config.bayesian_modules
    if names is None:
        return True
    if isinstance(names, str):
        return re.fullmatch(names, slot.name) is not None
    return any(slot.name == name or slot.name.endswith(f".{name}") for name in names)


def _check_sizes(config: BayesianLoraConfig, group: ShapeGroup, name: str) -> None:
    R, C = core_shape(config, group.r)
    if config.share_inducing and not R == C == group.r:
        raise ValueError(
            f"share_inducing needs inducing_rows = inducing_cols = r, so that the mean update is a LoRA of rank r; "
            f"{name} has r = {group.r}, R = {R}, C = {C}."
        )
    if min(R, C) < group.r:
        warnings.warn(
            f"inducing_rows = {R} and inducing_cols = {C} limit the update of {name} to rank {min(R, C)}, "
            f"below r = {group.r}; the extra rank only costs memory. Use sizes of at least r, or a smaller r.",
            stacklevel=2,
        )


def members_of(bases: Bases) -> list[ShapeGroup]:
    """The groups in `bases`, each once."""
    return list(dict.fromkeys(group for group, _, _ in bases))


def assemble(bases: Bases, cores: PerFactor, sigma: PerFactor | None) -> dict[ShapeGroup, Pair]:
    """A and B of every group, `W = sigma G_r^T V G_c`, of cores V (K, n, R, C); with sigma 1 where it is omitted."""

    def factor(group: ShapeGroup, side: str) -> torch.Tensor:
        V = cores[group, side] if sigma is None else cores[group, side] * sigma[group, side]
        return combine(bases[group, side, "rows"].G, V, bases[group, side, "columns"].G)

    return {group: (factor(group, "A"), factor(group, "B")) for group in members_of(bases)}


def middle(bases: Bases, group: ShapeGroup) -> torch.Tensor:
    """X = G_c^B G_r^A^T, (n, C, R): what stands between the two cores of a slot, `B A = P (V_B X V_A) Q`."""
    return bases[group, "B", "columns"].G @ bases[group, "A", "rows"].G.mT


def assemble_core_form(bases: Bases, cores: PerFactor, sigma: PerFactor) -> dict[ShapeGroup, Pair]:
    """A = Q, the same for every draw, and B = P M: the same product `B A = P M Q` as that of the factors.

    `P = sigma_B G_r^B^T` (n, d_out, R), `Q = sigma_A G_c^A` (n, C, d_in); M (K, n, R, C) stands under side `"A"`.
    """
    pairs = {}
    for group in members_of(bases):
        P = bases[group, "B", "rows"].G.mT * sigma[group, "B"]
        Q = bases[group, "A", "columns"].G * sigma[group, "A"]
        pairs[group] = Q.unsqueeze(0), P @ cores[group, "A"]
    return pairs
