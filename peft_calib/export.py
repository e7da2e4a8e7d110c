"""Any adapter of this package as an ordinary LoRA folder, for software that has never heard of us."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .tuners.factors import Slot
from .tuners.layer import FactorLinear
from .tuners.model import FactorModel


def export_lora(model: nn.Module, path: str | Path, *, adapter_name: str = "default") -> Path:
    """Write an adapter's deterministic factors as a plain LoRA that stock PEFT and inference servers load.

    The factors are copied, not approximated: `lora_A`, `lora_B` are the generated ones bit by bit, and rank and
    scaling go to the configuration. Modules trained whole (`modules_to_save`) are written along.

    Args:
        model: A `PeftModel` with an adapter of this package.
        path: Folder to write; made if missing. It appears complete or not at all.
        adapter_name: Which adapter.

    Returns:
        The folder.

    Raises:
        TypeError: If the model carries no adapter of this package.
        ValueError: If there is no such adapter, it trains biases, it has no single pair of factors, or `path` already
            holds something else than an adapter.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, FactorModel):
        raise TypeError(
            f"export_lora takes a PeftModel with a peft_calib adapter, got {type(model).__name__}. A stock LoRA is "
            "already what it would write: use save_pretrained."
        )
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}; the model has {sorted(tuner.peft_config)}.")
    config = tuner.peft_config[adapter_name]
    if config.bias != "none":
        raise ValueError(f"The adapter trains biases (bias={config.bias!r}), which a plain LoRA export cannot carry.")
    tensors = _lora_tensors(tuner, adapter_name)
    tensors.update(_other_tensors(model, tuner, adapter_name))
    layers = {name: m for name, m in tuner.model.named_modules() if isinstance(m, FactorLinear)}
    slots = list(tuner.get_law(adapter_name).slots)
    lora_config = _lora_config(config, slots, {name: layers[name].lora_alpha[adapter_name] for name in layers})
    return _write(Path(path), lora_config, tensors)


def _lora_tensors(tuner: FactorModel, adapter_name: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for slot, A, B in tuner.get_factors(adapter_name):
        tensors[f"base_model.model.{slot.name}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{slot.name}.lora_B.weight"] = B.cpu().contiguous()
    return tensors


def _other_tensors(model: nn.Module, tuner: FactorModel, adapter_name: str) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    marker = f".{tuner.holder_name}."
    return {key: value.cpu().contiguous() for key, value in state.items() if marker not in key}


def _lora_config(config, slots: list[Slot], alphas: dict[str, float]) -> LoraConfig:
    """A LoRA configuration that names every slot, with patterns where rank or alpha differ from the default."""
    names = {slot.name for slot in slots}
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=names,
        rank_pattern={f"^{slot.name}": slot.r for slot in slots if slot.r != config.r},
        alpha_pattern={f"^{name}": alphas[name] for name in names if alphas[name] != config.lora_alpha},
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=config.fan_in_fan_out,
        inference_mode=True,
    )


def _write(path: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> Path:
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / CONFIG_NAME).exists())):
        raise ValueError(f"{path} exists and is no adapter folder. Choose another path, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        folder = Path(scratch) / path.name
        config.save_pretrained(str(folder))
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if path.exists():
            path.rename(Path(scratch) / "replaced")
        shutil.move(folder, path)
    return path
