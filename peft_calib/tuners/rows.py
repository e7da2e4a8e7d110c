"""Rows of a batch: how many there are, how to repeat them for K draws, and how to pick some."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

#: Inputs that say how many rows a batch has, in order of preference.
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "decoder_input_ids")
#: Inputs that hold positions of the sequence and no rows.
_WITHOUT_ROWS = ("cache_position", "logits_to_keep")
#: Inputs of images, videos and sounds: beside text their first size counts these, whatever the rows they stand in.
_MEDIA = re.compile(
    r"pixel|image|video|audio|grid|input_features|feature_attention|patch|frame|aspect_ratio|second_per"
)
#: Where the sequences of packed rows end, counted over all rows one after the other.
_ENDS = re.compile(r"cu_?seq_?lens")
#: Text, of which a batch has one entry a row.
_TEXT = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class SharedRowsError(ValueError):
    """An adapted map was applied to rows that are not those of all functions."""

    def __init__(self, rows: int, num_samples: int) -> None:
        super().__init__(
            f"An adapted map received {rows} rows, no multiple of the {num_samples} functions that are in place. "
            "Pass the batch through the whole model, which repeats it for them, or use one function: "
            "draws(model, 1, first=k)."
        )


def check_divides(x: torch.Tensor, functions: int) -> None:
    """Raise `SharedRowsError` where a module's rows cannot be those of all functions."""
    if x.shape[0] % functions:
        raise SharedRowsError(x.shape[0], functions)


def count_rows(inputs: Mapping[str, Any], main_input: str | None = None) -> int:
    """Number of rows of a batch: the first size of its main input, or of the first tensor there is."""
    media = main_input is not None and _MEDIA.search(main_input) is not None
    preferred = (*_MAIN_INPUTS, main_input) if media and "input_ids" in inputs else (main_input, *_MAIN_INPUTS)
    names = [name for name in preferred if name is not None and name in inputs]
    names += [name for name in inputs if name not in (*names, *_WITHOUT_ROWS)]
    for name in names:
        value = inputs[name]
        if isinstance(value, torch.Tensor) and value.dim():
            if len(value) == 0:
                raise ValueError(f"The batch has no rows: {name} has shape {tuple(value.shape)}.")
            return len(value)
    raise ValueError(
        f"The batch holds no tensor with rows; it has {sorted(inputs)}. Pass what the model takes, for example "
        "input_ids and attention_mask as tensors with one row an example."
    )


def repeat_rows(inputs: Mapping[str, Any], num_samples: int, rows: int) -> dict[str, Any]:
    """Repeat a batch for K draws, draw-major: row `b` of draw `k` becomes row `k * B + b`.

    Tensors that broadcast over the rows (first size 1) and those that hold positions only stay as they are. Images,
    videos and sounds beside text are laid out one after the other in the order of their rows, so that all of them are
    repeated as one, however many there are; a list of them likewise. Ends of packed sequences go on counting. A
    key-value cache cannot be repeated from outside.
    """
    media = _media_beside_text(inputs)

    def repeat(name: str, value: Any) -> Any:
        if name in media:
            return _tile_media(value, num_samples)
        if isinstance(value, torch.Tensor) and _ENDS.match(name):
            return torch.cat([value[:1], *(value[1:] + k * value[-1] for k in range(num_samples))])
        return _on_rows(value, rows, lambda tensor, dim: tile(tensor, num_samples, dim), name)

    repeated = {name: repeat(name, value) for name, value in inputs.items()}
    cache = inputs.get("past_key_values")
    if cache is not None:
        raise ValueError(
            "The batch carries a key-value cache (model.generate passes one), whose rows belong to one draw each. "
            "Pass the whole sequence without past_key_values, or let draws write with peft_calib.sample_generate."
        )
    return repeated


def repeat_training_rows(inputs: Mapping[str, Any], num_samples: int, main_input: str | None) -> dict[str, Any]:
    """Repeat a training batch for K functions, and the number of items that a summed loss is divided by with it."""
    repeated = repeat_rows(inputs, num_samples, count_rows(inputs, main_input))
    if repeated.get("num_items_in_batch") is not None:
        repeated["num_items_in_batch"] = repeated["num_items_in_batch"] * num_samples
    return repeated


def check_packed(model: nn.Module, inputs: Mapping[str, Any], rows: int) -> None:
    """Refuse one packed row for K functions where attention would read it as one sequence.

    transformers looks for sequences in the positions of a batch of one row only, where flash attention is to keep them
    apart. K functions make it K rows.
    """
    positions = inputs.get("position_ids")
    kind = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    if rows > 1 or "flash" not in kind or inputs.get("attention_mask") is not None or any(map(_ENDS.match, inputs)):
        return
    if isinstance(positions, torch.Tensor) and positions.dim() == 2 and bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError(
            f"{kind} reads the sequences of a packed row as one where several functions are applied to it. Give it "
            "their ends (DataCollatorWithFlattening(return_flash_attn_kwargs=True)), load the base model with "
            'attn_implementation="sdpa", or do not pack.'
        )


def first_rows(
    outputs: Any, num_samples: int, rows: int, on_gradient: Callable[[torch.Tensor], None] | None = None
) -> Any:
    """What a model answered for the first of K functions, of K * B draw-major rows; scalars and caches stay.

    `on_gradient` is called with the gradient that comes back to such an answer.
    """
    if isinstance(outputs, torch.Tensor):
        if not outputs.dim() or len(outputs) != rows:
            return outputs
        first = outputs[: rows // num_samples]
        if on_gradient is not None and first.requires_grad:
            first.register_hook(on_gradient)
        return first
    if isinstance(outputs, dict):
        for name, value in list(outputs.items()):
            outputs[name] = first_rows(value, num_samples, rows, on_gradient)
        return outputs
    if isinstance(outputs, (tuple, list)) and not hasattr(outputs, "_fields"):
        return type(outputs)(first_rows(value, num_samples, rows, on_gradient) for value in outputs)
    return outputs


def _media_beside_text(inputs: Mapping[str, Any]) -> set[str]:
    """Names of inputs whose first size counts images, videos or sounds."""
    if not any(inputs.get(name) is not None for name in _TEXT):
        return set()
    return {name for name in inputs if name not in _TEXT and _MEDIA.search(name)}


def _tile_media(value: Any, count: int) -> Any:
    if isinstance(value, torch.Tensor):
        return tile(value, count, 0) if value.dim() else value
    if isinstance(value, Mapping):
        return {name: _tile_media(part, count) for name, part in value.items()}
    return value * count if isinstance(value, (list, tuple)) else value


def select_rows(
    inputs: Mapping[str, Any], rows: int, index: torch.Tensor, media_tokens: Sequence[int] = ()
) -> dict[str, Any]:
    """The batch restricted to some of its rows, in the order of `index`.

    `media_tokens` are those that stand for images, videos and sounds in a text. Where a row has more or fewer
    images beside its text than others, rows cannot be told apart, and the batch is refused.
    """

    def select(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        if tensor.shape[dim] != rows:
            raise ValueError(
                f"An input of shape {tuple(tensor.shape)} has not one entry for each of the {rows} rows, so rows "
                "cannot be picked from the batch. Use a fixed num_samples, and smaller batches if memory is short."
            )
        return tensor.index_select(dim, index.to(tensor.device))

    media = {name for name in _media_beside_text(inputs) if inputs[name] is not None}
    if media and not _one_each(inputs, rows, media_tokens):
        raise ValueError(
            f"{', '.join(sorted(media))} do not tell which row they belong to unless every row has as many, so rows "
            "cannot be picked from the batch. Use a fixed num_samples, and smaller batches if memory is short."
        )
    picked = {name: value for name, value in inputs.items() if name not in media}
    return _on_rows(picked, rows, select) | {name: _pick_media(inputs[name], rows, index) for name in media}


def _one_each(inputs: Mapping[str, Any], rows: int, media_tokens: Sequence[int]) -> bool:
    """Whether every row of text has as many places for images, videos and sounds, and some."""
    kinds, ids = inputs.get("mm_token_type_ids"), inputs.get("input_ids")
    if isinstance(kinds, torch.Tensor):
        places = kinds != 0
    elif isinstance(ids, torch.Tensor) and media_tokens:
        places = torch.isin(ids, torch.tensor(list(media_tokens), device=ids.device))
    else:
        return False
    counts = places.sum(1)
    return len(counts) == rows and bool((counts == counts[0]).all()) and int(counts[0]) > 0


def _pick_media(value: Any, rows: int, index: torch.Tensor) -> Any:
    """Some rows' share of images, where every row has as many of them, one after the other."""
    if isinstance(value, torch.Tensor):
        if value.dim() and len(value) % rows == 0:
            return value.unflatten(0, (rows, -1)).index_select(0, index.to(value.device)).flatten(0, 1)
    elif isinstance(value, (list, tuple)) and len(value) % rows == 0:
        each = len(value) // rows
        return type(value)(part for row in index.tolist() for part in value[row * each : (row + 1) * each])
    raise ValueError(
        "Images, videos or sounds of the batch do not divide into its rows, so rows cannot be picked from it. Use a "
        "fixed num_samples, and smaller batches if memory is short."
    )


def _on_rows(value: Any, rows: int, change: Callable[[torch.Tensor, int], torch.Tensor], name: str = "") -> Any:
    if isinstance(value, torch.Tensor):
        if name in _WITHOUT_ROWS or value.dim() == 0:
            return value
        dim = 1 if name == "position_ids" and value.dim() == 3 else 0  # (3, B, T): time, height, width
        return value if value.shape[dim] == 1 and rows != 1 else change(value, dim)
    if isinstance(value, Mapping):
        changed = {key: _on_rows(part, rows, change, key) for key, part in value.items()}
        return changed if not name else type(value)(**changed)
    if isinstance(value, (list, tuple)):
        parts = [_on_rows(part, rows, change, name) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tile(tensor: torch.Tensor, count: int, dim: int = 0) -> torch.Tensor:
    """Repeat a tensor along one dimension as a whole: all entries, then all once more."""
    return tensor.repeat(*[count if d == dim else 1 for d in range(tensor.dim())])


def main_input_name(model: nn.Module) -> str | None:
    """The name under which a model takes its rows."""
    return getattr(model, "main_input_name", None)
