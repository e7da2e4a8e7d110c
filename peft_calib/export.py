"""Any adapter of this package as an ordinary LoRA folder, for software that has never heard of us."""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .artefact import ARTEFACT_FILE, HERE, Artefact
from .draws_index import DRAWS_INDEX, write_draws_index
from .files import replace_folder
from .identity import adapter_digest, folder_digest
from .internals.torch import without_compiler
from .json_files import parse_json, read_json
from .provenance.companions import attached_file
from .provenance.exported_decisions import attached_decisions, export_decisions, export_decisions_of_draws
from .tuners.factors import Draw, Law, Mean, Points, Sample
from .tuners.holder import FactorHolder
from .tuners.layer import FactorLinear
from .tuners.slots import Slot
from .whole_numbers import check_whole

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Adapter:
    """An adapter on a model; `carrier` is what PEFT's functions take: the `PeftModel`, or transformers' model."""

    name: str
    carrier: nn.Module
    root: nn.Module
    holder: FactorHolder
    holder_name: str

    @property
    def config(self) -> Any:
        return self.carrier.peft_config[self.name]

    @property
    def law(self) -> Law:
        return self.holder.laws[self.name]

    @property
    def slots(self) -> list[Slot]:
        """The slots, each with the scale that its layer uses."""
        layers = {
            without_compiler(name): module
            for name, module in self.root.named_modules()
            if isinstance(module, FactorLinear) and module.holder is self.holder
        }
        return [replace(slot, scaling=layers[slot.name].scaling[self.name]) for slot in self.law.slots]


@dataclass(frozen=True)
class _CommonForm:
    """The rank and scale of a written LoRA, one for all modules.

    Servers read `r` and `lora_alpha` of an adapter, some also `use_rslora`, few `rank_pattern` and `alpha_pattern`.
    So the scale that most modules share becomes `lora_alpha / r`, what others have more or less of it goes into
    their B, and smaller ranks are filled up with zeros.
    """

    r: int
    lora_alpha: float

    @classmethod
    def of(cls, slots: Sequence[Slot], r: int, lora_alpha: float) -> _CommonForm:
        """The form for some slots; another scale than the configuration's only if `lora_alpha` stays whole, else 1."""
        rank = max(slot.r for slot in slots)
        scale, _ = Counter(slot.scaling for slot in slots).most_common(1)[0]
        if rank == r and scale == lora_alpha / r:
            return cls(r, lora_alpha)
        alpha = scale * rank
        whole = alpha == math.floor(alpha) and 0 < alpha < 2**31 and alpha / rank == scale
        return cls(rank, int(alpha) if whole else rank)

    def factors(self, slot: Slot, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors with `lora_alpha / r * B' A' = scaling * B A`: bit by bit, or B' rounded once in 32 bits or more."""
        ratio = slot.scaling / (self.lora_alpha / self.r)
        if ratio != 1:
            exact = math.frexp(ratio)[0] == 0.5  # a power of two changes the exponent only
            wide = B.dtype if exact or B.dtype.itemsize >= 4 else torch.float32
            A, B = A.to(wide), B.to(wide) * ratio
        if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError(
                f"The factors of {slot.name} hold NaN or infinity, so there is no LoRA to write. The adapter is "
                "broken: train it again, with a smaller learning rate if it diverged."
            )
        pad = self.r - slot.r
        return F.pad(A, (0, 0, 0, pad)), F.pad(B, (0, pad))


def _find(model: nn.Module, adapter_name: str | None) -> _Adapter:
    """The adapter anywhere inside a model: on a `PeftModel`, by transformers' `add_adapter`, or inside a wrapper."""
    found = []
    for root in model.modules():
        for holder_name, holder in root.named_children():
            if isinstance(holder, FactorHolder):
                around = [m for m in model.modules() if isinstance(m, PeftModel) and m.get_base_model() is root]
                carrier = around[0] if around else root
                found += [_Adapter(name, carrier, root, holder, holder_name) for name in holder.laws]
    if not found:
        raise TypeError(
            f"export_lora takes a model with a peft_calib adapter, got {type(model).__name__}, which has none. A "
            "stock LoRA is already what it would write: use save_pretrained."
        )
    wanted = adapter_name
    if wanted is None:
        active = [adapter.name for adapter in found if adapter.name in adapter.holder.active]
        wanted = next(iter(active), found[0].name)
    named = [adapter for adapter in found if adapter.name == wanted]
    if not named:
        raise ValueError(f"There is no adapter {wanted!r}; the model has {sorted(a.name for a in found)}.")
    return named[0]


def export_lora(
    model: nn.Module,
    path: str | Path,
    *,
    adapter_name: str | None = None,
    t: float | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    antithetic: bool = False,
) -> Path:
    """Write an adapter as a plain LoRA that stock PEFT and inference servers load: its mean, or draws.

    The mean is the adapter's deterministic function in evaluation. All modules get one rank and one scale, so that
    `r` and `lora_alpha` say everything, also to servers that know no patterns and no `use_rslora`. Where the modules
    have them in common, `lora_A` and `lora_B` are the law's, bit by bit; elsewhere B carries the rest of the scale
    (exact if that is a power of two, else rounded once to 32 bits: 6e-8 of each entry), and ranks are filled up with
    zeros. Modules trained whole (`modules_to_save`) are written along, and `predictor.json` with the classes and the
    temperature where the adapter has one: `peft_calib.load` takes the folder, and a server's client applies it. So do
    decision rules (`peft-calib decide`) of the way of predicting that is written: the mean, or these K draws.

    Args:
        model: A model with an adapter of this package: a `PeftModel`, a transformers model with `add_adapter`, or
            what contains one.
        path: Folder to write; made if missing. It appears complete or not at all.
        adapter_name: Which adapter; the active one when `None`.
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
            asked for, `num_samples` is below 1, or above 1 where all draws are the same, or `path` already holds
            something else than an export, such as the adapter itself.
    """
    adapter = _find(model, adapter_name)
    config = adapter.config
    if config.bias != "none":
        raise ValueError(f"The adapter trains biases (bias={config.bias!r}), which a plain LoRA export cannot carry.")
    seed = check_whole(seed, "seed")
    num_samples = _checked_draws(adapter.law, num_samples, t, antithetic)
    slots = adapter.slots
    form = _CommonForm.of(slots, config.r, config.lora_alpha)
    told, rules = _told(adapter), attached_decisions(adapter.carrier, adapter.name)
    lora_config = _lora_config(config, slots, form)
    others = _other_tensors(adapter)
    if num_samples is None:
        draw = _single_draw(adapter, t)
        tensors = _drawn_tensors(adapter, form, draw) | others

        def write_one(folder: Path) -> None:
            _write(folder, lora_config, tensors)
            if told is not None and draw == Mean():
                told.exported("mean", {HERE: folder_digest(folder)}).write(folder)
                export_decisions(rules, told, folder, None, None)

        return _replace(Path(path), CONFIG_NAME, tensors, 1, write_one)
    digest = adapter_digest(adapter.carrier, adapter.name)
    draws = (Sample(seed=seed, first=k, total=num_samples, antithetic=antithetic) for k in range(num_samples))
    first = _drawn_tensors(adapter, form, next(draws)) | others

    def write_draws(folder: Path) -> None:
        names = [f"draw-{k}" for k in range(num_samples)]
        _write(folder / names[0], lora_config, first)
        for name, draw in zip(names[1:], draws, strict=True):
            _write(folder / name, lora_config, _drawn_tensors(adapter, form, draw) | others)
        mean = None
        with contextlib.suppress(ValueError):  # a law without one deterministic function
            adapter.law.check_exportable()
            mean = "mean"
        if mean is not None:
            _write(folder / mean, lora_config, _drawn_tensors(adapter, form, Mean()) | others)
        facts = {"seed": seed, "adapter": digest, **({"antithetic": True} if antithetic else {})}
        write_draws_index(folder, names, mean, **facts)
        if told is not None:
            told.exported_draws(folder, names, mean)
            key = None if antithetic else seed
            left_out.extend(export_decisions_of_draws(rules, told, folder, names, mean, key))

    left_out: list[str] = []
    written = _replace(Path(path), DRAWS_INDEX, first, num_samples + 1, write_draws)
    for why in left_out:
        warnings.warn(f"{path} holds these draws without a decision: {why}.", UserWarning, stacklevel=2)
    return written


def _told(adapter: _Adapter) -> Artefact | None:
    """What is saved beside the adapter; without its recalibrations where it has been trained on since."""
    text = attached_file(adapter.carrier, ARTEFACT_FILE, adapter.name)
    if text is None:
        return None
    known = Artefact.from_fields(parse_json(text, ARTEFACT_FILE))
    fits = list(known.adapters.values()) == [adapter_digest(adapter.carrier, adapter.name)]
    return known if fits else replace(known, ways={})


def _checked_draws(law: Law, num_samples: int | None, t: float | None, antithetic: bool) -> int | None:
    """How many draws are asked for; raise `ValueError` unless the law has them."""
    if antithetic and not law.mirrors:
        raise ValueError(
            f"antithetic=True mirrors draws from a posterior; those of {law.method} have no mirror image."
        )
    if num_samples is None:
        return None
    num_samples = check_whole(num_samples, "num_samples", 1, told=", or None for the mean")
    if law.num_draws is not None and num_samples > law.num_draws:
        raise ValueError(f"{num_samples} draws were asked for, but {law.method} has {law.num_draws}.")
    if num_samples > 1 and not law.varies:
        raise ValueError(
            f"This {law.method} is one function, so {num_samples} draws of it would be {num_samples} equal folders. "
            "Leave num_samples out to write it."
        )
    if t is not None:
        raise ValueError("t= writes one point of the curve, num_samples= several; give one of them.")
    return num_samples


def _single_draw(adapter: _Adapter, t: float | None) -> Draw:
    """The one function to write: the point asked for, the point a context has chosen, or the mean."""
    if t is None:
        adapter.holder.check_exportable(adapter.name)
        return adapter.holder.draw or Mean()
    if not adapter.law.has_points:
        raise ValueError(
            f"t= chooses a point of a CurveLoRA; {adapter.name!r} is a {type(adapter.config).__name__} adapter."
        )
    return Points((t,))


def _drawn_tensors(adapter: _Adapter, form: _CommonForm, draw: Draw) -> dict[str, torch.Tensor]:
    law = adapter.law
    with torch.no_grad():
        factors = law(draw)
    tensors = {}
    for slot, pair in zip(adapter.slots, factors.per_slot(law.slots), strict=True):
        A, B = form.factors(slot, *pair)
        tensors[f"{_PREFIX}{slot.name}.lora_A.weight"] = A
        tensors[f"{_PREFIX}{slot.name}.lora_B.weight"] = B
    for module, head in factors.heads.items():
        tensors |= {f"{_PREFIX}{module}.{name}": tensor[0] for name, tensor in head.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _other_tensors(adapter: _Adapter) -> dict[str, torch.Tensor]:
    """Modules trained whole, and what PEFT saves along with a resized vocabulary."""
    state = get_peft_model_state_dict(adapter.carrier, adapter_name=adapter.name)
    named = {f"{_PREFIX}{key.removeprefix(_PREFIX)}": value for key, value in state.items()}
    marker = f".{adapter.holder_name}."
    return {key: value.cpu().contiguous() for key, value in named.items() if marker not in key}


def _lora_config(config: Any, slots: list[Slot], form: _CommonForm) -> LoraConfig:
    """A LoRA configuration that names every slot and holds no pattern."""
    return LoraConfig(
        r=form.r,
        lora_alpha=form.lora_alpha,  # type: ignore[arg-type]  (a number that is not whole will do)
        lora_dropout=config.lora_dropout,
        target_modules=sorted(slot.name for slot in slots),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
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


def _replace(
    path: Path, marker: str, tensors: dict[str, torch.Tensor], copies: int, write: Callable[[Path], None]
) -> Path:
    """Write a folder where only an earlier export, told by its marker, gives way, once the new one is complete."""
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists())):
        what = "adapter folder" if marker == CONFIG_NAME else "folder of exported draws"
        raise ValueError(f"{path} exists and is no {what}. Choose another path, or remove it.")
    if (path / CONFIG_NAME).is_file() and read_json(path / CONFIG_NAME).get("peft_type", None) != PeftType.LORA:
        raise ValueError(
            f"{path} holds an adapter that is no plain LoRA (the very one, perhaps, that is to be exported), which "
            "an export would replace. Choose another path, or remove it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = copies * sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"{copies} adapter(s) take {needed / 2**20:.0f} MiB, but the disk of {path} has {free / 2**20:.0f} MiB "
            "left. Make room, or write fewer draws."
        )
    return replace_folder(path, write)
