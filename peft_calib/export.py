"""Any adapter of this package as an ordinary LoRA folder, for software that has never heard of us."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .tuners.factors import Draw, Slot
from .tuners.layer import FactorLinear
from .tuners.model import FactorModel

#: Index of a folder of draws: which seed they come from, and where they are.
DRAWS_INDEX = "draws.json"


def export_lora(
    model: nn.Module,
    path: str | Path,
    *,
    adapter_name: str = "default",
    t: float | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    antithetic: bool = False,
) -> Path:
    """Write an adapter as a plain LoRA that stock PEFT and inference servers load: its mean, or draws.

    The mean is the adapter's deterministic function in evaluation. Factors are copied, not approximated: `lora_A`,
    `lora_B` are the law's, bit by bit, and rank and scaling go to the configuration. Modules trained whole
    (`modules_to_save`) are written along.

    Args:
        model: A `PeftModel` with an adapter of this package.
        path: Folder to write; made if missing. It appears complete or not at all.
        adapter_name: Which adapter.
        t: The point of a CurveLoRA to write; its point of evaluation when `None`.
        num_samples: Number of draws K (for a curve, of equispaced points). The folder then holds one LoRA a draw
            in `draw-0 ... draw-(K-1)`, the deterministic one in `mean` if there is one, and an index `draws.json`.
        seed: Key of the draws: `draw-k` is draw k of `predict(model, batch, seed=seed)`.
        antithetic: Whether they are those of `predict(..., antithetic=True)` and of `num_samples="auto"`.

    Returns:
        The folder.

    Raises:
        TypeError: If the model carries no adapter of this package.
        ValueError: If there is no such adapter, `t` is given for another law or lies off the curve, its draws have no
            mirror image but `antithetic` is set, it trains biases, it has no single pair of factors and no draws are
            asked for, `num_samples` is below 1, or `path` already holds something else than an export.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, FactorModel):
        raise TypeError(
            f"export_lora takes a PeftModel with a peft_calib adapter, got {type(model).__name__}. A stock LoRA is "
            "already what it would write: use save_pretrained."
        )
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}; the model has {sorted(tuner.peft_config)}.")
    config: Any = tuner.peft_config[adapter_name]
    if config.bias != "none":
        raise ValueError(f"The adapter trains biases (bias={config.bias!r}), which a plain LoRA export cannot carry.")
    wrong = not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1
    if num_samples is not None and wrong:
        raise ValueError(f"num_samples must be an integer of at least 1, or None for the mean; got {num_samples!r}.")
    law = tuner.get_law(adapter_name)
    if antithetic and not law.mirrors:
        raise ValueError(
            f"antithetic=True mirrors draws from a posterior; those of {law.method} have no mirror image."
        )
    if num_samples is not None and law.num_draws is not None and num_samples > law.num_draws:
        raise ValueError(f"{num_samples} draws were asked for, but {law.method} has {law.num_draws}.")
    if t is not None and num_samples is not None:
        raise ValueError("t= writes one point of the curve, num_samples= several; give one of them.")
    layers = {name: m for name, m in tuner.model.named_modules() if isinstance(m, FactorLinear)}
    slots = list(tuner.get_law(adapter_name).slots)
    lora_config = _lora_config(config, slots, {s.name: layers[s.name].lora_alpha[adapter_name] for s in slots})
    others = _other_tensors(model, tuner, adapter_name)
    if num_samples is None:
        tensors = _drawn_tensors(tuner, adapter_name, _single_draw(tuner, adapter_name, t)) | others
        return _replace(Path(path), CONFIG_NAME, lambda folder: _write(folder, lora_config, tensors))

    def write_draws(folder: Path) -> None:
        names = [f"draw-{k}" for k in range(num_samples)]
        for k, name in enumerate(names):
            draw = Draw("sample", seed=seed, first=k, total=num_samples, antithetic=antithetic)
            _write(folder / name, lora_config, _drawn_tensors(tuner, adapter_name, draw) | others)
        mean = _mean_or_none(tuner, adapter_name)
        if mean is not None:
            _write(folder / "mean", lora_config, mean | others)
        index = {"num_samples": num_samples, "seed": seed, "draws": names, "mean": None if mean is None else "mean"}
        index |= {"antithetic": True} if antithetic else {}
        (folder / DRAWS_INDEX).write_text(json.dumps(index, indent=2) + "\n")

    return _replace(Path(path), DRAWS_INDEX, write_draws)


def _single_draw(tuner: FactorModel, adapter_name: str, t: float | None) -> Draw:
    """The one function to write: the point asked for, the point a context has chosen, or the mean."""
    holder = tuner.get_holder(tuner.model)
    if t is None:
        holder.check_exportable(adapter_name)
        return holder.draw or Draw("mean")
    if not tuner.get_law(adapter_name).has_points:
        raise ValueError(f"t= chooses a point of a CurveLoRA; {adapter_name!r} is a {type(tuner).__name__} adapter.")
    return Draw("points", points=(t,))


def _drawn_tensors(tuner: FactorModel, adapter_name: str, draw: Draw) -> dict[str, torch.Tensor]:
    law = tuner.get_law(adapter_name)
    with torch.no_grad():
        factors = law(draw)
    tensors = {}
    for slot, (A, B) in zip(law.slots, factors.per_slot(law.slots), strict=True):
        tensors[f"base_model.model.{slot.name}.lora_A.weight"] = A
        tensors[f"base_model.model.{slot.name}.lora_B.weight"] = B
    for module, head in factors.heads.items():
        tensors |= {f"base_model.model.{module}.{name}": tensor[0] for name, tensor in head.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _mean_or_none(tuner: FactorModel, adapter_name: str) -> dict[str, torch.Tensor] | None:
    try:
        tuner.get_law(adapter_name).check_exportable()
    except ValueError:
        return None
    return _drawn_tensors(tuner, adapter_name, Draw("mean"))


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
        target_modules=sorted(names),
        rank_pattern={f"^{slot.name}": slot.r for slot in slots if slot.r != config.r},
        alpha_pattern={f"^{name}": alphas[name] for name in names if alphas[name] != config.lora_alpha},
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=config.fan_in_fan_out,
        inference_mode=True,
    )


def _write(folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _replace(path: Path, marker: str, write: Callable[[Path], None]) -> Path:
    """Write a folder beside `path` and put it in its place; only an earlier export, told by its marker, gives way."""
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists())):
        what = "adapter folder" if marker == CONFIG_NAME else "folder of exported draws"
        raise ValueError(f"{path} exists and is no {what}. Choose another path, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()
        write(folder)
        if path.exists():
            path.rename(Path(scratch) / "replaced")
        shutil.move(folder, path)
    return path
