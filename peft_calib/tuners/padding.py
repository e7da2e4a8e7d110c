"""Classification heads of decoders that refuse more than one row where no padding token is defined.

They look for the last token of a row that is not padding. The K copies of one row have no padding, so the refusal does
not concern them: for the duration of such a forward the configuration names a padding token that no text holds.
"""

from __future__ import annotations

import inspect
import threading
from functools import lru_cache
from typing import Any

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


def _text_config(root: nn.Module) -> Any:
    config = getattr(root, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
