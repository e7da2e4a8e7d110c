"""Mutations of a saved adapter: of its configuration and of its tensors, drawn from a seed.

Each is what a tired hand, a careless script or a bad disk does to a folder. A legitimate edit is none of them: that
one is followed by `accept_edits`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What a field may turn into.
VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e30, 10**9, float("nan"), float("inf")]
VALUES += ["", "x", "false", "none", [], ["query"], {}, {"query": 2}, {"query": float("nan")}, {"query": 3.5}]
#: Fields that carry no function and no record of it: whatever they say, the adapter is the same.
SILENT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}


@dataclass(frozen=True)
class Mutation:
    """One change of a folder.

    Attributes:
        kind: `"config"` (of a field), `"text"` (of the JSON text), `"tensor"` or `"bytes"` (of the weights file).
        what: In words.
        apply: Makes it, in a copy of the folder.
    """

    kind: str
    what: str
    apply: Callable[[Path], None]


def mutations(folder: Path, count: int, seed: int) -> list[Mutation]:
    """Draw mutations of a saved adapter, two of five of its configuration, the others of its weights.

    Args:
        folder: Of the adapter, as it was saved.
        count: How many.
        seed: Of the draws.
    """
    rng = random.Random(seed)
    fields = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    makers = [_field, _field, _field, _text, _tensor, _tensor, _tensor, _tensor, _bytes, _bytes]
    return [makers[index % len(makers)](rng, fields, tensors) for index in range(count)]


def _field(rng: random.Random, fields: dict, tensors: dict) -> Mutation:
    name = rng.choice(sorted(set(fields) - SILENT))
    how = rng.choice(["value", "value", "value", "missing", "scaled", "inside"])
    value = fields[name]
    if how == "missing":
        return Mutation("config", f"{name} missing", lambda folder: _write(folder, {**fields, name: _GONE}))
    if how == "scaled" and isinstance(value, (int, float)) and not isinstance(value, bool):
        changed = value * rng.choice([2, 3, 0.5]) + rng.choice([0, 1])
    elif how == "inside" and isinstance(value, (list, dict)) and value:
        changed = _changed_inside(rng, value)
    else:
        changed = rng.choice(VALUES)
    return Mutation("config", f"{name} = {changed!r:.60}", lambda folder: _write(folder, {**fields, name: changed}))


def _changed_inside(rng: random.Random, value: list | dict) -> list | dict:
    copy = json.loads(json.dumps(value))
    if isinstance(copy, dict):
        key = rng.choice(sorted(copy))
        copy[key] = (
            rng.choice(VALUES)
            if not isinstance(copy[key], (list, dict))
            else _changed_inside(rng, copy[key] or {"x": 0})
        )
        return copy
    place = rng.randrange(len(copy))
    action = rng.choice(["drop", "double", "value", "swap"])
    if action == "drop":
        del copy[place]
    elif action == "double":
        copy.insert(place, copy[place])
    elif action == "swap":
        other = rng.randrange(len(copy))
        copy[place], copy[other] = copy[other], copy[place]
    elif isinstance(copy[place], (list, dict)) and copy[place]:
        copy[place] = _changed_inside(rng, copy[place])
    else:
        copy[place] = rng.choice(VALUES)
    return copy


_GONE = object()


def _write(folder: Path, fields: dict) -> None:
    kept = {name: value for name, value in fields.items() if value is not _GONE}
    (folder / CONFIG).write_text(json.dumps(kept, indent=2, sort_keys=True))


def _text(rng: random.Random, fields: dict, tensors: dict) -> Mutation:
    text = json.dumps(fields, indent=2, sort_keys=True)
    place, how = rng.randrange(1, len(text)), rng.choice(["cut", "drop", "put", "empty", "list", "twice"])
    changed = {
        "cut": text[:place],
        "drop": text[:place] + text[place + 1 :],
        "put": text[:place] + rng.choice('0129-"x,{') + text[place:],
        "empty": "",
        "list": f"[{text}]",
        "twice": text.rstrip("} \n") + ',\n  "lora_alpha": 99\n}',
    }[how]
    return Mutation("text", f"{how} at {place}", lambda folder: (folder / CONFIG).write_text(changed) and None)


def _tensor(rng: random.Random, fields: dict, tensors: dict) -> Mutation:
    name, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    value = tensors[name]
    changes: dict[str, Callable[[], dict]] = {
        "dropped": lambda: {k: v for k, v in tensors.items() if k != name},
        "renamed": lambda: {(k + "x" if k == name else k): v for k, v in tensors.items()},
        "added": lambda: {**tensors, f"{name}.more": value.clone()},
        "swapped": lambda: {**tensors, name: tensors[other].clone(), other: value.clone()},
        "transposed": lambda: (
            {**tensors, name: value.T.contiguous() if value.dim() == 2 else value.flip(0)}
            if value.dim()
            else {**tensors, name: value + 1}
        ),
        "cut": lambda: {
            **tensors,
            name: value[:-1].clone() if value.dim() and len(value) > 1 else value.reshape(1, -1),
        },
        "scaled": lambda: {**tensors, name: value * 2 if value.any() else value + 1},
        "one entry": lambda: {**tensors, name: _one_entry(rng, value)},
        "NaN": lambda: {**tensors, name: _filled(value, float("nan"))},
        "infinity": lambda: {**tensors, name: _filled(value, float("inf"))},
        "float16": lambda: {**tensors, name: value.to(torch.float16)},
        "bfloat16": lambda: {**tensors, name: value.to(torch.bfloat16)},
        "float64": lambda: {**tensors, name: value.to(torch.float64)},
        "int32": lambda: {**tensors, name: value.to(torch.int32)},
        "bool": lambda: {**tensors, name: value.to(torch.bool)},
        "complex": lambda: {**tensors, name: value.to(torch.complex64)},
        "float8": lambda: {**tensors, name: value.to(torch.float8_e4m3fn)},
        "of the base": lambda: {**tensors, _base_name(rng): torch.zeros(16, 16)},
    }
    how = rng.choice(sorted(changes))
    changed = changes[how]()
    return Mutation("tensor", f"{name} {how}", lambda folder: save_file(changed, folder / WEIGHTS, {"format": "pt"}))


def _one_entry(rng: random.Random, value: torch.Tensor) -> torch.Tensor:
    changed = value.clone().reshape(-1)
    changed[rng.randrange(len(changed))] += 1
    return changed.reshape(value.shape)


def _transposed(value: torch.Tensor) -> torch.Tensor:
    if not value.dim():
        return value + 1
    return value.T.contiguous() if value.dim() == 2 else value.flip(0)


def _cut(value: torch.Tensor) -> torch.Tensor:
    return value[:-1].clone() if value.dim() and len(value) > 1 else value.reshape(1, 1, -1)


def _filled(value: torch.Tensor, number: float) -> torch.Tensor:
    changed = value.to(torch.float32).clone()
    changed.reshape(-1)[:1] = number
    return changed


def _base_name(rng: random.Random) -> str:
    layer = f"bert.encoder.layer.{rng.randrange(2)}.attention"
    names = [f"{layer}.self.query.base_layer.weight", f"{layer}.self.key.weight", f"{layer}.output.dense.weight"]
    return f"base_model.model.{rng.choice(names)}"


def _bytes(rng: random.Random, fields: dict, tensors: dict) -> Mutation:
    how = rng.choice(["bit of the header", "bit of the payload", "bit of the payload", "cut", "longer"])
    share, bit = rng.random(), rng.randrange(8)

    def apply(folder: Path) -> None:
        file = folder / WEIGHTS
        content = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        if how == "cut":
            content = content[: int(share * len(content))]
        elif how == "longer":
            content += b"\0" * (1 + bit)
        else:
            first, end = (0, header) if "header" in how else (header, len(content))
            content[first + int(share * (end - first))] ^= 1 << bit
        file.write_bytes(bytes(content))

    return Mutation("bytes", f"{how} at {share:.4f}", apply)
