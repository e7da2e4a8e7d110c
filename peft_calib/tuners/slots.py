"""The adapted linear maps of a model in their order: what a law answers for, and what a loaded adapter must fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class ShapeGroup(NamedTuple):
    """Slots of equal shape and rank, which a law treats as one batch."""

    in_features: int
    out_features: int
    r: int

    @property
    def key(self) -> str:
        """Name of the group in a state dict, e.g. `"768x3072r8"`."""
        return f"{self.in_features}x{self.out_features}r{self.r}"


@dataclass(frozen=True)
class Slot:
    """One adapted linear map.

    Args:
        name: Module name inside the base model, e.g. `"encoder.layer.3.attention.self.query"`.
        in_features: Logical input width d_in.
        out_features: Logical output width d_out.
        r: Rank.
        scaling: The factor s of `s * B A` (`lora_alpha / r`, or `lora_alpha / sqrt(r)`).
    """

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: float

    @property
    def group(self) -> ShapeGroup:
        """The shape group the slot belongs to."""
        return ShapeGroup(self.in_features, self.out_features, self.r)

    @property
    def layer(self) -> int | None:
        """Index of the transformer layer, the first number in the module name; `None` outside any layer."""
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(match.group(1)) if match else None

    @property
    def module_type(self) -> str:
        """The name with its layer index removed: the same for the same module of every layer."""
        return re.sub(r"(^|\.)\d+(\.|$)", r"\1*\2", self.name, count=1)


class SlotTable:
    """The slots of one adapter in the order of the base model's modules, and their shape groups.

    The order gives a law's parameters their meaning, so it is saved with the adapter and compared on loading.

    Args:
        slots: The slots, in module order.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = tuple(slots)
        self.groups: dict[ShapeGroup, tuple[int, ...]] = {}
        for index, slot in enumerate(self.slots):
            self.groups[slot.group] = (*self.groups.get(slot.group, ()), index)

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def __getitem__(self, index: int) -> Slot:
        return self.slots[index]

    def to_json(self) -> list[list]:
        """Rows `[name, in_features, out_features, r, scaling]`, as stored in `adapter_config.json`."""
        return [[slot.name, *slot.group, slot.scaling] for slot in self.slots]

    def check(self, saved: list[list]) -> None:
        """Compare with the table an adapter was saved with.

        Args:
            saved: Rows as written by `to_json`, or by earlier versions, which left the scaling out.

        Raises:
            ValueError: If the rows are no slots, or a slot is missing, extra, moved, of another shape or scaled
                otherwise; the first difference is named.
        """
        saved = _checked_rows(saved)
        rows = self.to_json()
        if all(len(row) == 4 for row in saved):
            rows = [row[:4] for row in rows]
        if rows == saved:
            return
        position = next(
            (i for i, (a, b) in enumerate(zip(rows, saved, strict=False)) if a != b), min(len(rows), len(saved))
        )
        here = rows[position] if position < len(rows) else "no slot"
        there = saved[position] if position < len(saved) else "no slot"
        raise ValueError(
            f"The adapter does not fit this base model: its slot table has {len(saved)} slots, the model offers "
            f"{len(rows)}, and slot {position} is {there} in the adapter but {here} in the model (name, in_features, "
            "out_features, r, scaling). Load the adapter into the architecture it was trained on, with its own "
            "target_modules, r, rank_pattern, lora_alpha, alpha_pattern and use_rslora in adapter_config.json; for "
            "another model start from a new config."
        )


def _checked_rows(table: list) -> list[list]:
    """The rows of a saved slot table, each held to be one."""
    for position, row in enumerate(table):
        whole = isinstance(row, (list, tuple)) and len(row) in (4, 5) and isinstance(row[0], str)
        whole = whole and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in row[1:4])
        whole = whole and all(isinstance(s, (int, float)) and 0 < s < math.inf for s in row[4:])
        if not whole:
            raise ValueError(
                f"adapter_config.json: row {position} of slot_table is {row!r:.80}, but must be a name, two sizes, a "
                "rank and a scaling above 0. Restore the file as save_pretrained wrote it."
            )
    return [list(row) for row in table]
