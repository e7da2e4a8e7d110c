"""Anchors of a curve from saved LoRA adapters: checked, rescaled, padded, and remembered by their hashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from ...files import file_hash
from ..factors import Pair, SlotTable
from ..lora_factors import FACTOR, read_lora_factors
from .config import CurveLoraConfig
from .gauge import align


@dataclass(frozen=True)
class Anchors:
    """N adapters, ready to be laid into a curve.

    For each anchor: A (r, d_in) and B (d_out, r) of each slot, float32, scaled for the curve; the tensors of modules
    trained whole, by their names in the base model; and the SHA-256 of its weights file.
    """

    pairs: list[list[Pair]]
    heads: list[dict[str, torch.Tensor]]
    hashes: list[str]


def read_anchors(config: CurveLoraConfig, slots: SlotTable) -> Anchors:
    """Read and check the adapters that an anchored curve visits; those of a saved curve must have their old hashes."""
    folders = [Path(folder) for folder in config.anchor_adapters or ()]
    for folder in folders:
        if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"The anchor {folder} holds no {SAFETENSORS_WEIGHTS_NAME}. Give the folder of a LoRA adapter that "
                "PEFT saved, or of an adapter of this package written by peft_calib.export_lora."
            )
    hashes = [file_hash(folder / SAFETENSORS_WEIGHTS_NAME) for folder in folders]
    if config._slots_to_match is not None and not config.anchor_hashes:
        raise ValueError(
            "adapter_config.json: anchor_hashes is missing, so it cannot be told whether the anchors are those that "
            "the curve was trained on. Restore the file as save_pretrained wrote it."
        )
    if len(config.anchor_hashes or hashes) != len(hashes):
        raise ValueError(
            f"adapter_config.json: anchor_hashes has {len(config.anchor_hashes or ())} entries for {len(hashes)} "
            "anchors. Restore the file as save_pretrained wrote it."
        )
    for folder, found, recorded in zip(folders, hashes, config.anchor_hashes or hashes, strict=True):
        if found != recorded:
            raise ValueError(
                f"The anchor {folder} has changed since the curve was trained on it (SHA-256 {found[:12]}..., "
                f"recorded {recorded[:12]}...). Bring the old adapter back, or train the curve anew."
            )
    pairs = [read_lora_factors(folder, slots) for folder in folders]
    for folder in folders:
        _check_base_model(folder, config)
    heads = [_heads(folder) for folder in folders]
    if not config.curve_modules_to_save:
        _check_equal_heads(folders, heads)
    return Anchors(align(pairs) if config.gauge_align == "procrustes" else pairs, heads, hashes)


def _check_base_model(folder: Path, config: CurveLoraConfig) -> None:
    lora = LoraConfig.from_pretrained(str(folder))
    # one of two folders may have moved; a name that is not known is not judged
    ours, theirs = config.base_model_name_or_path, lora.base_model_name_or_path
    if ours and theirs and Path(ours).name != Path(theirs).name:
        raise ValueError(
            f"The anchor {folder} was trained on {theirs!r}, the curve is built on {ours!r}. Use adapters of one base "
            "model."
        )


def _heads(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    return {n.removeprefix("base_model.model."): t for n, t in tensors.items() if FACTOR.match(n) is None}


def _check_equal_heads(folders: list[Path], heads: list[dict[str, torch.Tensor]]) -> None:
    first = heads[0]
    for folder, head in zip(folders[1:], heads[1:], strict=True):
        same = first.keys() == head.keys() and all(torch.equal(first[name], head[name]) for name in first)
        if not same:
            raise ValueError(
                f"The anchors {folders[0]} and {folder} carry different heads ({sorted(first.keys() | head.keys())}), "
                "and one shared head would change what they compute. Set curve_modules_to_save=True, which makes the "
                "head a part of the curve, or train the anchors with one frozen head."
            )
