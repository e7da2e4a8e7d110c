"""Configuration of EnsembleLoRA: how many members, and in which layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from ..config import CalibLoraConfig

#: Part of a model's layers, counted from the last, by name.
SHARES = {"all": 1.0, "last_half": 1 / 2, "last_third": 1 / 3, "last_quarter": 1 / 4}


@dataclass
class EnsembleLoraConfig(CalibLoraConfig):
    """EnsembleLoRA: K LoRAs that are trained side by side in the last layers of one model.

    After a temperature, what improves the probabilities of a LoRA is disagreement between independently trained
    members. Each member here has factors and a head of its own, started from its own seed and trained on the same
    rows. The layers below the first adapted one are frozen, so the members share what these compute: a training step
    costs one pass through them without gradients, and K through the rest. A prediction averages the members'
    probabilities; fit the temperature after averaging (arXiv 2007.08792), not member by member.

    Args:
        num_members: Number of members K.
        layers: Which layers are adapted: `"all"`, `"last_half"`, `"last_third"`, `"last_quarter"`, or how many of the
            last. What comes behind the layers (a pooler) is adapted too, where `target_modules` names it.
        seed: Key of the initial values. `None` takes PyTorch's seed (`set_seed`) and the adapter's name.
        fresh_heads: Start the head of every member but the first anew, with the spread of the base model's, so that
            heads differ as those of separate trainings do. `False` starts all of them at the base model's head, for a
            head that is already trained.
        moments: Deviations R that are kept along the training for draws around every member (SWAG, arXiv 1902.02476);
            at least 2, or 0 for none. `RegularizerScheduleCallback` has them kept, `peft-calib train` by itself. An
            adapter's file is 3 + R times as large.
        moments_start: Part of the training after which they are kept, in [0, 1).
        posterior_scale: What a draw's distance from its member is multiplied by; at 0 the draws are the members.
            Chosen by `calibrate_posterior`.

    Raises:
        ValueError: For an unknown name, or a number out of its range.

    Example:
        >>> EnsembleLoraConfig(num_members=3, layers="last_third", target_modules=["query"]).first_layer(12)
        8
    """

    lora_alpha: int | float = field(default=16, metadata={"help": "Numerator of the scaling lora_alpha / r."})
    num_members: int = field(default=2, metadata={"help": "Number of members."})
    layers: int | str = field(default="last_half", metadata={"help": f"{', '.join(SHARES)}, or how many of the last."})
    seed: int | None = field(default=None, metadata={"help": "Key of the initial values; None follows PyTorch's."})
    fresh_heads: bool = field(default=True, metadata={"help": "Start the heads of further members anew."})

    moments: int = field(default=0, metadata={"help": "Deviations kept for draws around the members; 0: none."})
    moments_start: float = field(default=0.5, metadata={"help": "Part of the training after which they are kept."})
    posterior_scale: float = field(default=1.0, metadata={"help": "Scale of the draws around the members."})

    peft_name: ClassVar[str] = "ENSEMBLELORA"
    draws_differ: ClassVar[bool] = True
    training_fields: ClassVar[frozenset[str]] = CalibLoraConfig.training_fields | {
        *("layers", "seed", "fresh_heads", "moments_start")
    }

    def check_values(self) -> None:
        """Refuse numbers of members and layers that cannot be."""
        self.check_sizes({"num_members": 2**12})
        self.check_ranges({"moments": (0, 2**10), "posterior_scale": (0, None)})
        if self.moments == 1:
            raise ValueError("moments must be 0 or at least 2: one deviation says nothing of a spread.")
        if not 0 <= self.moments_start < 1:
            raise ValueError(f"moments_start is a part of the training in [0, 1), got {self.moments_start!r}.")
        named = isinstance(self.layers, str) and self.layers in SHARES
        counted = isinstance(self.layers, int) and not isinstance(self.layers, bool) and self.layers >= 1
        if not named and not counted:
            raise ValueError(f"layers must be one of {tuple(SHARES)} or a number of layers, got {self.layers!r}.")
        if self.layers != "all" and self.layers_to_transform is not None:
            raise ValueError(
                'layers_to_transform names layers one by one: set layers="all" beside it, or leave it out.'
            )

    def first_layer(self, num_layers: int) -> int:
        """Index of the first layer that is adapted.

        Args:
            num_layers: Number of layers of the model.

        Raises:
            ValueError: If there are fewer than are to be adapted.
        """
        if isinstance(self.layers, str):
            return num_layers - max(1, math.ceil(num_layers * SHARES[self.layers] - 1e-9)) if num_layers else 0
        if self.layers > num_layers:
            raise ValueError(f"layers={self.layers}, but the model has {num_layers}.")
        return num_layers - self.layers

    def sizes_in(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, set[int]]:
        """The number of members is the first size of every factor, that of deviations the first of theirs."""

        def first(*beginnings: str) -> set[int]:
            return {shape[0] for name, shape in shapes.items() if name.startswith(beginnings) and shape}

        return {"num_members": first("A.", "B."), "moments": first("moments.deviations/")}
