"""LoRA's own factors: its start (A uniform, B zero: the base model's function), and those of a saved adapter."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from .config import CalibLoraConfig, check_adapter_file
from .factors import Pair
from .lora_options import more_than_factors
from .seeding import keyed_generator, uniform
from .slots import ShapeGroup, Slot, SlotTable

#: Names of the factors in the file of a LoRA.
FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight$")


def plain_start(config: CalibLoraConfig, slots: SlotTable) -> dict[ShapeGroup, Pair]:
    """Initial factors of all slots, keyed by the configuration's seed.

    Args:
        config: Of the method; with `init_weights=False` B is drawn as well.
        slots: The slots.

    Returns:
        For each shape group A (n, r, d_in) and B (n, d_out, r).
    """
    generator = keyed_generator(config.init_seed, 0)
    return {g: plain_factors(g, len(indices), config.init_weights, generator) for g, indices in slots.groups.items()}


def plain_factors(group: ShapeGroup, count: int, zero_b: bool, generator: torch.Generator) -> Pair:
    """A (count, r, d_in) and B (count, d_out, r) of slots of one shape."""
    bound = group.in_features**-0.5
    A = uniform((count, group.r, group.in_features), bound, generator)
    B = torch.zeros(count, group.out_features, group.r)
    return A, B if zero_b else B.uniform_(-bound, bound, generator=generator)


def read_lora_factors(folder: str | Path, slots: SlotTable) -> list[Pair]:
    """Float32 A (r, d_in) and B (d_out, r) of a saved plain LoRA for each of the given slots.

    The LoRA's scaling is folded into B relative to the slot's, so that `slot.scaling * B @ A` is the LoRA's update,
    and smaller ranks are padded with zeros.
    """
    folder = Path(folder)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).exists():
        raise ValueError(
            f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}. Give the folder of a LoRA adapter saved by PEFT."
        )
    check_adapter_file(folder)
    config = LoraConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} is not a plain LoRA adapter (peft_type {config.peft_type}).")
    if (more := more_than_factors(vars(config))) is not None:
        raise ValueError(f"{folder} is not a plain LoRA adapter ({more}).")
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    found = [_read_slot(slot, tensors, config, folder) for slot in slots]
    matches = map(FACTOR.match, tensors)
    extra = sorted({match["module"] for match in matches if match} - {slot.name for slot in slots})
    if extra:
        raise ValueError(
            f"The LoRA adapter in {folder} also adapts {extra[:4]}, which are left out here, so its function would "
            "change. Take its target_modules."
        )
    return found


def _read_slot(slot: Slot, tensors: dict, config: LoraConfig, folder: Path) -> Pair:
    name = f"base_model.model.{slot.name}"
    try:
        A, B = (tensors[f"{name}.lora_{side}.weight"].float() for side in "AB")
    except KeyError as error:
        raise ValueError(
            f"The LoRA adapter in {folder} has no factors for {slot.name}: adapt the same modules with both."
        ) from error
    scaled_by = A.shape[0]
    if scaled_by > slot.r and not A[slot.r :].any() and not B[:, slot.r :].any():
        A, B = A[: slot.r], B[:, : slot.r]  # an export fills smaller ranks up with nothing
    r = A.shape[0]
    if A.shape[1] != slot.in_features or B.shape[0] != slot.out_features or r > slot.r:
        raise ValueError(
            f"The LoRA adapter in {folder} has A {tuple(A.shape)} and B {tuple(B.shape)} for {slot.name}, which does "
            f"not fit a map of {slot.in_features} to {slot.out_features} at rank {slot.r}. Use the same base model "
            "and a rank not below the adapter's."
        )
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), slot.name), config.lora_alpha)
    scaling = alpha / (scaled_by**0.5 if config.use_rslora else scaled_by)
    pad = slot.r - r
    return (
        torch.nn.functional.pad(A, (0, 0, 0, pad)),
        torch.nn.functional.pad(B * (scaling / slot.scaling), (0, pad)),
    )
