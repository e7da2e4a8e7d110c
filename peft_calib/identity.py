"""Which adapter is this? One digest of what an adapter computes, the same for a live model and its saved folder.

It covers the adapter's own tensors and every configuration field that enters the function; neither what only steers
training nor embeddings of a resized vocabulary. It is held against an adapter when that is loaded, and stands in
everything that was measured or fitted with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from .files import replacing
from .internals.torch import compiled_inner
from .json_files import Fields, describe, read_json

#: Where the digest stands in the metadata of a safetensors file.
METADATA_KEY = "peft_calib_digest"
#: What a configuration of any method says that changes nothing in what its adapter computes, or that the names of its
#: tensors say, too (PEFT writes `modules_to_save` differently before and after loading).
BOOKKEEPING = frozenset(
    "modules_to_save "
    "base_model_name_or_path revision task_type inference_mode auto_mapping peft_version identity "
    "how_to_load lora_dropout init_lora_weights init_weights loftq_config eva_config corda_config lora_ga_config "
    "runtime_config megatron_config megatron_core exclude_modules ensure_weight_tying".split()
)
#: Starts of a LoRA that PEFT takes from the base model's weights whenever it loads the adapter, so that they enter its
#: function (`init_lora_weights`), and whether PEFT can convert such an adapter to a plain LoRA.
STARTS_FROM_BASE = {"pissa": True, "corda": True, "olora": True, "lora_ga": True, "loftq": False}
ADAPTER_MENDS = "Restore the folder as save_pretrained wrote it, or download it again"
ON_PURPOSE = "If this was edited on purpose, call peft_calib.edits.accept_edits(folder) once"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Identity:
    """What an adapter is: the fields of its configuration that enter the function, and a hash of each own tensor."""

    fields: dict[str, Any]
    tensors: dict[str, str] = field(repr=False)

    @property
    def digest(self) -> str:
        """One text for all of it."""
        content = json.dumps([self.fields, self.tensors], sort_keys=True, ensure_ascii=True)
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

    @classmethod
    def of(cls, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> Identity:
        """Of tensors under the names of their file, with a configuration; tensors not its own are passed over."""
        own = {name.removeprefix(_PREFIX): value for name, value in tensors.items() if is_own(name, config)}
        return cls(function_fields(config), {name: tensor_hash(own[name]) for name in sorted(own)})

    @classmethod
    def of_folder(cls, folder: str | Path, config: PeftConfig) -> Identity:
        """Of the tensors that lie in a folder, with a configuration; one tensor is in memory at a time."""
        with open_weights(folder) as file:
            names = [name for name in file.keys() if is_own(name, config)]  # noqa: SIM118  (a handle, not a dict)
            hashes = {name.removeprefix(_PREFIX): tensor_hash(file.get_tensor(name)) for name in names}
        return cls(function_fields(config), dict(sorted(hashes.items())))


def adapter_digest(model: nn.Module, adapter_name: str | None = None) -> str:
    """The digest of a live adapter: that of the folder which would be saved now.

    Args:
        model: A `PeftModel`, or a transformers model with an adapter; wrappers around it do not matter. Every process
            of a sharded model has to call it.
        adapter_name: The adapter; the active one when `None`.

    Returns:
        The digest.

    Raises:
        TypeError: If the model carries no adapter.
        ValueError: If it has no adapter of that name, or its weights are not loaded yet.

    Example:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        >>> folder = tempfile.mkdtemp()
        >>> model.save_pretrained(folder)
        >>> adapter_digest(model) == folder_digest(folder)
        True
    """
    return Identity.of(*_live(model, adapter_name)).digest


def adapter_form(model: nn.Module, adapter_name: str | None = None) -> str:
    """What a live adapter's digest would have in common with that of the same adapter in other data types.

    PEFT keeps `modules_to_save` in the base model's data type, so that an adapter on a base in half precision has
    another digest than its folder.

    Args:
        model: As for `adapter_digest`.
        adapter_name: As for `adapter_digest`.

    Returns:
        The data types of its own floating-point tensors, a colon, and a digest of its configuration and of the names
        and shapes of all its tensors.
    """
    config, state = _live(model, adapter_name)
    own = {name.removeprefix(_PREFIX): value for name, value in state.items() if is_own(name, config)}
    shapes = {name: list(own[name].shape) for name in sorted(own)}
    content = json.dumps([function_fields(config), shapes], sort_keys=True, ensure_ascii=True)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in own.values() if value.is_floating_point()})
    return f"{'+'.join(dtypes)}:{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def _live(model: nn.Module, adapter_name: str | None) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of a live adapter, as they would be saved."""
    model = unwrapped(model)
    name = active_adapter(model, adapter_name)
    return model.peft_config[name], get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def folder_digest(folder: str | Path) -> str:
    """The digest of a saved adapter, of any PEFT method.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The digest.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If one of them is damaged; the message names it.
    """
    return Identity.of_folder(folder, read_config(folder)).digest


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 of named tensors: what earlier versions knew an adapter by."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of_folder(folder: str | Path) -> str | None:
    """The digest of a saved adapter, tensors and configuration; None where there is no adapter file."""
    return folder_digest(folder) if (Path(folder) / SAFETENSORS_WEIGHTS_NAME).is_file() else None


def belongs_to_folder(digest: str | None, folder: str | Path) -> bool:
    """Whether a stored digest is that of a folder's adapter; earlier versions stored that of the tensors alone."""
    if digest is None or digest.startswith("sha256:"):
        return digest == folder_digest(folder)
    tensors, config = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME), read_config(folder)
    # embeddings that PEFT wrote along were in neither
    own = {name: tensor for name, tensor in tensors.items() if is_own(name, config)}
    return digest in (digest_of(tensors), digest_of(own))


def saved_alone(model: nn.Module, name: str, folder: Path) -> Path:
    """Save one adapter of a model, and say where in the folder PEFT puts it: at its top, or under its name."""
    model.save_pretrained(str(folder), selected_adapters=[name])
    return folder if name == "default" else folder / name


def unwrapped(model: nn.Module) -> nn.Module:
    """The model with adapters inside what compilers and data parallelism put around it."""
    while not hasattr(model, "peft_config"):
        inner = compiled_inner(model) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model.model if isinstance(model, BaseTuner) else model


def active_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """The name of an adapter of a model: the one that was asked for, or the active one."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        raise TypeError(
            f"{type(model).__name__} carries no adapter. Pass the PeftModel (or the transformers model with an "
            "adapter), or the folder of a saved adapter."
        )
    if adapter_name is None:
        active = getattr(model, "active_adapters", None)
        names = active() if callable(active) else active
        return names[0] if names else next(iter(configs))
    if adapter_name not in configs:
        raise ValueError(f"There is no adapter {adapter_name!r}; the model has {sorted(configs)}.")
    return adapter_name


def tensor_hash(tensor: torch.Tensor) -> str:
    """A hash of a tensor's dtype, shape and bytes, wherever it lies; of a sharded one all processes have to ask."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if tensor.is_meta:
        raise ValueError("The adapter's weights are not loaded yet (meta device), so it has no digest.")
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def is_own(name: str, config: PeftConfig) -> bool:
    """Whether a tensor belongs to the adapter, and is no embedding that PEFT writes along with a new vocabulary."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
    if not prefix or prefix in name:
        return True
    if name.endswith("bias") and getattr(config, "bias", "none") != "none":
        return True
    if "token_adapter" in name or "trainable_tokens" in name:
        return True
    parts = name.removeprefix(_PREFIX).split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    saved = getattr(config, "modules_to_save", None) or ()
    return any(module.endswith(wanted) for wanted in saved for module in modules)


def start_from_base(init_lora_weights: Any) -> str | None:
    """The one of `STARTS_FROM_BASE` that a LoRA's start is (`pissa_niter_4` is `pissa`); None of another start."""
    return next((name for name in STARTS_FROM_BASE if str(init_lora_weights).lower().startswith(name)), None)


def function_fields(config: PeftConfig) -> dict[str, Any]:
    """The fields of a configuration that enter the function and are not at their default, in one spelling."""
    passed_over = BOOKKEEPING | getattr(config, "training_fields", frozenset())
    if start_from_base(getattr(config, "init_lora_weights", None)) is not None:
        passed_over -= {"init_lora_weights"}
    defaults, kept = field_defaults(config), {}
    for name, value in config.to_dict().items():
        plain = _plain(value)
        empty = plain is None or plain is False or plain in ([], {})
        if name in passed_over or empty or plain == _plain(defaults.get(name)):
            continue
        kept[name] = plain
    return kept


def field_defaults(config: PeftConfig) -> dict[str, Any]:
    """What the fields of a configuration are where nothing is said."""
    return {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}


def _plain(value: Any) -> Any:
    """A value as JSON would give it back, with sets in order and whole floats as whole numbers."""
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(entry) for entry in value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return str(getattr(value, "value", value))
    return value if isinstance(value, (bool, int, float, type(None))) else repr(value)


def read_config(folder: str | Path) -> PeftConfig:
    """The configuration in a folder, by the class of its method."""
    place = Path(folder) / CONFIG_NAME
    return config_of(read_json(place, ADAPTER_MENDS))


def config_of(fields: Fields) -> PeftConfig:
    """The configuration that the fields of a file describe."""
    method = fields.text("peft_type", among=[str(name.value) for name in PEFT_TYPE_TO_CONFIG_MAPPING])
    # without what was recorded at saving: what is asked for here is the adapter as it is now
    content = {name: value for name, value in fields.content.items() if name not in ("identity", "runtime_config")}
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)].from_peft_type(**content)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{fields.source}: {error}") from error


def open_weights(folder: str | Path) -> Any:
    """The weights file of a folder, open for reading one tensor after the other."""
    place = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not place.is_file():
        if (Path(folder) / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds its weights in {WEIGHTS_NAME} only, a pickle, and only {SAFETENSORS_WEIGHTS_NAME} is "
                "read. Load the adapter with PEFT and save it again: "
                "model.save_pretrained(folder, safe_serialization=True)."
            )
        raise FileNotFoundError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}. {ADAPTER_MENDS}.")
    try:
        return safe_open(place, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{place} is truncated or damaged and cannot be read ({error}). Copy or download the adapter again."
        ) from error


def stamp_weights(path: str | Path, digest: str) -> None:
    """Write a digest into the metadata of a safetensors file; its tensors stay as they are, byte by byte."""
    path = Path(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        metadata = header.get("__metadata__", {})
        if metadata.get(METADATA_KEY) == digest:
            return
        header["__metadata__"] = {**metadata, METADATA_KEY: digest}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with replacing(path) as partial, open(partial, "wb") as changed:
            changed.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(file, changed)


def difference(recorded: Identity, found: Identity, defaults: Mapping[str, Any] | None = None) -> str | None:
    """The first difference between two identities in words that name the file and the field or tensor."""
    unlisted = defaults or {}
    for name in sorted({*recorded.fields, *found.fields}):
        if recorded.fields.get(name) != found.fields.get(name):
            values = [describe(x.fields.get(name, unlisted.get(name))) for x in (found, recorded)]
            return f"{CONFIG_NAME}: {name} is {values[0]}, but the adapter was saved with {values[1]}"
    for name in sorted({*recorded.tensors, *found.tensors}):
        if name not in found.tensors:
            return f"{SAFETENSORS_WEIGHTS_NAME}: the tensor {name} is missing"
        if name not in recorded.tensors:
            return f"{SAFETENSORS_WEIGHTS_NAME}: the tensor {name} was not saved with the adapter"
        if recorded.tensors[name] != found.tensors[name]:
            return f"{SAFETENSORS_WEIGHTS_NAME}: the tensor {name} is not the one that was saved"
    return None
