"""Tiny models with curves, and LoRA adapters to join."""

from __future__ import annotations

import torch
from families import FAMILIES, Family, perturb
from peft import LoraConfig, PeftModel, get_peft_model

from peft_calib import CurveLoraConfig

BERT = FAMILIES["bert"]


def adapt(family: Family = BERT, moved: bool = True, **fields) -> PeftModel:
    """A model under a curve, moved off its start unless told otherwise."""
    config = CurveLoraConfig(**{"r": 4, "target_modules": list(family.targets), **fields})
    model = get_peft_model(family.build(), config)
    return perturb(model, scale=0.1) if moved else model


def save_loras(folder, count: int = 3, family: Family = BERT, one_head: bool = True, **fields) -> list[str]:
    """Save trained-looking LoRA adapters of one base model; returns their folders.

    With a head (`task_type`) either all adapters share it, or each has its own.
    """
    folders = []
    for i in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(10 + i)
            settings = {"r": 4, "lora_alpha": 16, "target_modules": list(family.targets), **fields}
            model = perturb(get_peft_model(family.build(), LoraConfig(**settings)), seed=20 + i, scale=0.1)
        if one_head:
            generator = torch.Generator().manual_seed(5)
            for name, parameter in model.named_parameters():
                if "modules_to_save.default" in name:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(folder / f"lora-{i}")
        folders.append(str(folder / f"lora-{i}"))
    return folders


def anchored(folders: list[str], family: Family = BERT, **fields) -> PeftModel:
    """A model under a curve through saved adapters."""
    settings = {"num_anchors": len(folders), "curve_mode": "anchored", "anchor_adapters": folders}
    return adapt(family, moved=False, **settings, **fields)
