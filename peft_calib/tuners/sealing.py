"""What is recorded with a saved adapter, and held against it before anything is built of it.

The record (`identity` in adapter_config.json) lists the configuration fields that enter the function and a hash of
each tensor; the digest of both stands in the metadata of the weights file, too. Folders without a record, saved by
earlier versions, load as they did.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..identity import (
    ADAPTER_MENDS,
    METADATA_KEY,
    ON_PURPOSE,
    Identity,
    difference,
    field_defaults,
    function_fields,
    is_own,
    open_weights,
    tensor_hash,
)
from ..json_files import Fields

_PREFIX = "base_model.model."
#: How numbers of an adapter may be stored; whole numbers are counts and seeds only.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = ("num_generations", "draw_seed", "num_steps", "num_columns")


def record_of(identity: Identity) -> dict[str, Any]:
    """What is written into the configuration; hashes of further tensors in its file come with the file."""
    return {"digest": identity.digest, "fields": identity.fields, "tensors": identity.tensors}


def recorded(config: PeftConfig) -> Identity | None:
    """The identity that a configuration was saved with; `ValueError` if the record itself was damaged."""
    if config.identity is None:
        return None
    record = Fields({"identity": config.identity}, CONFIG_NAME, ADAPTER_MENDS).mapping("identity")
    fields, tensors = record.mapping("fields"), record.mapping("tensors")
    hashes = {name: tensors.text(name) for name in tensors}
    identity = Identity(dict(fields.content), hashes)
    if record.text("digest") != identity.digest:
        raise record.wrong("digest", f"that of the fields and tensors recorded beside it, {identity.digest}")
    return identity


def check_fields_recorded(config: PeftConfig) -> None:
    """Refuse a configuration whose fields are not those it was saved with; the first that has changed is named."""
    saved = recorded(config)
    if saved is not None:
        _refuse(difference(saved, Identity(function_fields(config), saved.tensors), field_defaults(config)))


def check_tensors_recorded(config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors, under the names of their file, that are not those a configuration was saved with."""
    saved = recorded(config)
    if saved is not None:
        found = Identity.of(config, tensors)
        _refuse(difference(saved, Identity(saved.fields, found.tensors)))


def check_folder(config: PeftConfig, folder: Path) -> None:
    """Hold a configuration against the weights beside it, before anything is built; what differs is named."""
    with open_weights(folder) as file:
        names = list(file.keys())
        _check_sizes(config, {name: tuple(file.get_slice(name).get_shape()) for name in names})
        hashes, embeddings = _hashes(config, file, names, check=True)
        metadata = file.metadata() or {}
    found, saved = Identity(function_fields(config), hashes), recorded(config)
    if saved is not None:
        _refuse(difference(saved, found))
        _check_embeddings(config, embeddings)
    if metadata.get(METADATA_KEY) not in (None, found.digest):
        _refuse(
            f"{CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME} do not belong together, or one was changed: the weights "
            f"file was written with the digest {metadata[METADATA_KEY]}, what lies here has {found.digest}"
        )
    if saved is None and embeddings:
        warnings.warn(
            f"{folder} holds {sorted(embeddings)} beside the adapter, as PEFT writes it when a vocabulary was "
            "resized; loading puts it in place of the base model's.",
            UserWarning,
            stacklevel=3,
        )


def _hashes(config: PeftConfig, file: Any, names: list[str], check: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes of an adapter's own tensors in a weights file, and of the others."""
    own: dict[str, str] = {}
    others: dict[str, str] = {}
    for name in sorted(names):
        tensor = file.get_tensor(name)
        if check:
            check_values(name, tensor, SAFETENSORS_WEIGHTS_NAME, _expected_dtype(name, tensor))
        (own if is_own(name, config) else others)[name.removeprefix(_PREFIX)] = tensor_hash(tensor)
    return own, others


def _expected_dtype(name: str, tensor: torch.Tensor) -> torch.dtype:
    """What a tensor has to be, as far as its name tells."""
    if "_law." in name:
        return torch.int64 if name.endswith(_WHOLE) else torch.float32
    # counters of modules trained whole are held against the model's when they are loaded
    return torch.float32 if tensor.is_floating_point() or tensor.is_complex() else tensor.dtype


def _check_embeddings(config: PeftConfig, found: dict[str, str]) -> None:
    saved = config.identity.get("embeddings") if config.identity else None
    if saved is None:  # written by transformers, which saves the configuration before the weights
        return
    for name in sorted({*saved, *found}):
        if name not in saved:
            _refuse(f"{SAFETENSORS_WEIGHTS_NAME}: unexpected tensor {name}, which belongs to the base model")
        if found.get(name) != saved[name]:
            _refuse(f"{SAFETENSORS_WEIGHTS_NAME}: the tensor {name} is missing, or not the one that was saved")


def _check_sizes(config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse sizes in a configuration that are larger than its tensors: smaller ones cost nothing to build."""
    own = {name.partition("_law.")[2]: shape for name, shape in shapes.items() if "_law." in name}
    for field, allowed in config.sizes_in(own).items():
        value = getattr(config, field)
        if value is not None and value > max(allowed, default=0):
            raise ValueError(
                f"{CONFIG_NAME}: {field} is {value!r}, but the tensors in {SAFETENSORS_WEIGHTS_NAME} are made for "
                f"{max(allowed, default=0)} at most. {ADAPTER_MENDS}."
            )


def check_values(name: str, tensor: torch.Tensor, source: str, expected: torch.dtype) -> None:
    """Refuse a tensor with NaN, or of other numbers than the model's; floats of 16 to 64 bits stand for each other."""
    allowed = FLOATS if expected in FLOATS else (expected,)
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{source}: the tensor {name} holds {tensor.dtype}, but must hold {names}. {ADAPTER_MENDS}.")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{source}: the tensor {name} holds NaN or infinity. {ADAPTER_MENDS}.")


def embeddings_beside(config: PeftConfig, folder: Path) -> dict[str, str] | None:
    """Hashes of the tensors in a file that are not the adapter's own; `None` if the file is that of another save."""
    saved = recorded(config)
    if saved is None or not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return None
    with open_weights(folder) as file:
        own, others = _hashes(config, file, list(file.keys()), check=False)
    return others if own == saved.tensors else None


def _refuse(difference: str | None) -> None:
    if difference is not None:
        raise ValueError(f"{difference}. {ADAPTER_MENDS}. {ON_PURPOSE}.")
