"""Any adapter of this package, or any plain LoRA, as the GGUF files that llama.cpp and what is built on it load."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from .draws_index import DRAWS_INDEX, copy_draws_index, read_draws_index
from .export import export_lora
from .files import replace_folder, replacing
from .json_files import read_json
from .tuners.lora_options import more_than_factors

SUFFIX = ".gguf"
#: llama.cpp's names of the architectures whose conversion is known here, by transformers' `model_type`.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: Those whose query and key rows llama.cpp keeps in the order of its rotary embedding: pairs side by side.
PAIRED = ("llama",)
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Base:
    """What llama.cpp has to know of the base model: its architecture, blocks and heads."""

    model_type: str
    num_blocks: int
    heads: Mapping[str, int]
    tied: bool

    @classmethod
    def of(cls, config: Any) -> _Base:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if text.model_type not in ARCHITECTURES:
            raise ValueError(
                f"export_gguf knows the models {', '.join(ARCHITECTURES)}, and this is one of {text.model_type!r}. "
                "Write a plain LoRA with export_lora, and convert it with llama.cpp's convert_lora_to_gguf.py."
            )
        queries = text.num_attention_heads
        heads = {"q_proj": queries, "k_proj": getattr(text, "num_key_value_heads", None) or queries}
        return cls(text.model_type, text.num_hidden_layers, heads, bool(text.tie_word_embeddings))

    def rows(self, module: str, B: torch.Tensor) -> torch.Tensor:
        """Rows of an output, in llama.cpp's order."""
        heads = self.heads.get(module.rpartition(".")[2])
        if heads is None or ARCHITECTURES[self.model_type] not in PAIRED:
            return B
        halves = B.reshape(heads, 2, B.shape[0] // heads // 2, B.shape[1])
        return halves.transpose(1, 2).reshape(B.shape)


def export_gguf(
    adapter: nn.Module | str | Path, path: str | Path, *, base_model: str | Path | None = None, **options: Any
) -> Path:
    """Write an adapter for llama.cpp: one GGUF file, or one for each draw.

    The factors are those of `export_lora`, in 32 bits; rows of queries and keys stand where llama.cpp's converter puts
    those of the base model. A server takes them with `--lora draw-0.gguf --lora draw-1.gguf ...` beside the base
    model's own GGUF, whatever its quantisation. Needs the package gguf (`pip install peft-calib[gguf]`).

    Args:
        adapter: A causal language model with an adapter of this package; or a folder of a plain LoRA, whatever
            trained it, or of exported draws.
        path: The file to write, which ends in `.gguf`; with draws, a folder.
        base_model: Of a folder, where it is not to be found under the name in its configuration.
        options: Those of `export_lora` for a model: `num_samples`, `seed`, `t`, `antithetic`, `adapter_name`.

    Returns:
        The file; or the folder, in which `draw-k.gguf` is draw k of `predict(model, batch, seed=seed)`, `mean.gguf`
        the deterministic adapter, and `draws.json` the index.

    Raises:
        ImportError: If gguf is not installed.
        FileNotFoundError: If there is no adapter, or its base model is not found.
        ValueError: If llama.cpp could not compute what the adapter does (a trained head, DoRA, scales of single
            modules, another kind of model), or `path` is in the way.

    Example:
        >>> export_gguf("no such adapter", "mean.gguf")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no such adapter holds no adapter: there is no adapter_config.json in it.
    """
    path = Path(path)
    if isinstance(adapter, nn.Module):
        if base_model is not None:
            raise ValueError("base_model= is for an adapter in a folder; this model is its own base model.")
        base = _Base.of(adapter.config)
        _check_place(path, options.get("num_samples") is not None)
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as place:
            return _convert(export_lora(adapter, Path(place) / "lora", **options), path, base)
    if options:
        raise ValueError(f"{', '.join(options)} are for a model; the folder holds what was exported.")
    folder = Path(adapter)
    several = (folder / DRAWS_INDEX).is_file()
    first = folder / read_draws_index(folder)[0][0] if several else folder
    if not (first / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{first} holds no adapter: there is no {CONFIG_NAME} in it.")
    _check_place(path, several)
    name = str(base_model or read_json(first / CONFIG_NAME).text("base_model_name_or_path"))
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        told = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"The base model {name!r} is not found: {told} Say where with base_model=.") from error
    return _convert(folder, path, _Base.of(config))


def _check_place(path: Path, several: bool) -> None:
    if not several and (path.suffix != SUFFIX or path.is_dir()):
        raise ValueError(f"{path} must be the name of a file that ends in {SUFFIX}; draws are written to a folder.")
    if several and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and draws are written to a folder. Choose another path.")
    content = list(path.iterdir()) if several and path.is_dir() else []
    if content and not ((path / DRAWS_INDEX).is_file() and all(map(_is_ours, content))):
        raise ValueError(f"{path} exists and is no folder of exported {SUFFIX} files. Choose another path.")


def _is_ours(file: Path) -> bool:
    return file.name == DRAWS_INDEX or file.suffix == SUFFIX


def _convert(folder: Path, path: Path, base: _Base) -> Path:
    """A folder of one plain LoRA, or of draws, as one file or a folder of files."""
    if not (folder / DRAWS_INDEX).is_file():
        with replacing(path) as partial:
            _write(folder, partial, base)
        return path
    draws, mean = read_draws_index(folder)
    names = [*draws, *([mean] if mean is not None else [])]

    def write(place: Path) -> None:
        for name in names:
            _write(folder / name, place / f"{name}{SUFFIX}", base)
        copy_draws_index(folder, place, SUFFIX)

    return replace_folder(path, write)


def _write(folder: Path, file: Path, base: _Base) -> None:
    """One plain LoRA as a GGUF file."""
    gguf = _library()
    alpha, pairs = _read(folder, base)
    architecture = ARCHITECTURES[base.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(number, base.num_blocks)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, (A, B) in sorted(pairs.items()):
        name = known.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"{folder} adapts {module}, which llama.cpp has no tensor for in a {base.model_type}.")
        writer.add_tensor(f"{name}.lora_a", _array(A))
        writer.add_tensor(f"{name}.lora_b", _array(base.rows(module, B)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(folder: Path, base: _Base) -> tuple[float, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Alpha, and the factors of each module, of a folder that llama.cpp can compute."""
    config = read_json(folder / CONFIG_NAME)
    if config.text("peft_type") != PeftType.LORA:
        raise ValueError(
            f"{folder} holds no plain LoRA (its peft_type is {config.text('peft_type')}). Load the model, and give "
            "that to export_gguf."
        )
    unlike = [name for name in ("alpha_pattern", "rank_pattern") if config.content.get(name)]
    more = more_than_factors(config.content) or ", ".join(unlike)
    if more:
        raise ValueError(f"{folder} has what a GGUF adapter cannot say ({more}).")
    rank, alpha = config.integer("r", least=1), config.number("lora_alpha")
    if config.flag("use_rslora", False):
        alpha *= math.sqrt(rank)
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    ends = {"lora_A.weight": 0, "lora_B.weight": 1}
    found: dict[str, dict[int, torch.Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        module, _, which = key.removeprefix(_PREFIX).rpartition(".lora_")
        place = ends.get(f"lora_{which}")
        if place is None or (base.tied and module == "lm_head"):
            others.append(key.removeprefix(_PREFIX))
        else:
            found.setdefault(module, {})[place] = tensor
    if others:
        raise ValueError(
            f"{folder} holds {', '.join(sorted(others)[:3])}, which llama.cpp's adapters cannot carry: they are "
            "low-rank updates of the base model's own layers, without a trained head and of no tied output layer."
        )
    return alpha, {module: (pair[0], pair[1]) for module, pair in found.items()}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().contiguous().numpy()


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("export_gguf needs the package gguf: pip install 'peft-calib[gguf]'.") from error
    return gguf
