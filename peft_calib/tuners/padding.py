"""What padding does to a row: heads that refuse rows without a padding token, and positions behind padding.

Classification heads of decoders refuse more than one row where no padding token is defined: they look for the last
token of a row that is not padding. The K copies of one row have no padding, so the refusal does not concern them: for
the duration of such a forward the configuration names a padding token that no text holds.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

#: An id that no token has.
_NO_TOKEN = -1

_LOCK = threading.Lock()
#: How many forwards have a padding token on loan, by the configuration's id; the configuration is kept alive by them.
_LENT: dict[int, int] = {}


def takes_one_row(root: nn.Module) -> bool:
    """Whether a base model's head refuses more than one row."""
    config = _text_config(root)
    if config is None or getattr(config, "pad_token_id", 0) not in (None, _NO_TOKEN):
        return False
    return _looks_for_padding(type(root))


def check_one_row(rows: int) -> None:
    """Refuse what the head refuses: it cannot be relied on while another thread has a padding token on loan."""
    if rows > 1:
        raise ValueError(
            f"Cannot handle batch sizes > 1 (here {rows}) if no padding token is defined. Set "
            "model.config.pad_token_id (to that of the tokenizer), or pass one row at a time."
        )


@lru_cache(maxsize=256)
def _looks_for_padding(model_class: type[nn.Module]) -> bool:
    try:
        return "no padding token is defined" in inspect.getsource(inspect.unwrap(model_class.forward))
    except (OSError, TypeError):
        return False


def lend(root: nn.Module) -> Any:
    """Let a head take the copies of one row; what is returned is to be given back when the forward is over."""
    config = _text_config(root)
    with _LOCK:
        _LENT[id(config)] = _LENT.get(id(config), 0) + 1
        config.pad_token_id = _NO_TOKEN
    return config


def give_back(config: Any) -> None:
    """Put the configuration right again, when no forward needs it any more."""
    with _LOCK:
        _LENT[id(config)] -= 1
        if not _LENT[id(config)]:
            del _LENT[id(config)]
            config.pad_token_id = None


def numbers_places(root: nn.Module) -> bool:
    """Whether a base model looks positions up in a table by a token's place in the batch, if it is told no other.

    Those that count from behind a padding token, which the table names, or that have more rows than positions (OPT),
    number the tokens of a row by themselves.
    """
    positions = getattr(_text_config(root), "max_position_embeddings", None)
    if not isinstance(positions, int) or "position_ids" not in inspect.signature(root.forward).parameters:
        return False
    tables = (module for module in root.modules() if isinstance(module, nn.Embedding))
    return any(table.num_embeddings == positions and table.padding_idx is None for table in tables)


def numbered(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of such a model, with tokens behind padding numbered from 0, as `generate` does.

    A token's place hangs on the longest row beside it, and so would the answer.
    """
    mask = inputs.get("attention_mask")
    padded = isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all())
    if not padded or inputs.get("position_ids") is not None:
        return dict(inputs)
    return {**inputs, "position_ids": (mask.long().cumsum(-1) - 1).clamp_min(0)}


def _text_config(root: nn.Module) -> Any:
    config = getattr(root, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
