"""What a server of draws may answer: everything it sends is checked here before a number is taken from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

#: How far rounding may put a log-probability above 0, and the sum of the listed probabilities above 1.
_ROUNDING = 1e-2


def draw_names(answer: Any, prefix: str, url: str) -> list[str]:
    """Names of the draws, prefix and number, in what a server said to `GET models`, in order."""
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list):
        raise ConnectionError(f"{url}/models did not answer with a list of models under 'data', but {_shown(answer)}.")
    offered = [model.get("id") if isinstance(model, dict) else None for model in models]
    if not all(isinstance(name, str) for name in offered):
        raise ConnectionError(f"{url}/models lists a model without a text 'id': {_shown(answer)}.")
    matches = [re.fullmatch(re.escape(prefix) + r"([0-9]{1,9})", name) for name in offered]
    numbered = sorted((int(match.group(1)), match.string) for match in matches if match)
    found = [number for number, _ in numbered]
    if not found:
        raise ValueError(
            f"{url} serves {_shown(offered)}, and none is named {prefix}<number>. Serve the exported draws."
        )
    if found != list(range(len(found))):
        raise ValueError(
            f"{url} serves the draws {_shown(found)}: one of 0 ... {found[-1]} is missing, or there twice. Serve all "
            "that were exported, or name those to ask with draws=."
        )
    return [name for _, name in numbered]


def label_log_probabilities(answer: Any, labels: Sequence[str], name: str, listed: int, url: str) -> list[float]:
    """Log-probabilities of the labels in what a server said to `POST completions` for one prompt and one token."""

    def wrong(what: str) -> ConnectionError:
        return ConnectionError(f"{url}/completions answered for {name} with {what}: {_shown(answer)}.")

    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise wrong("not exactly one choice")
    logprobs = choices[0].get("logprobs")
    if logprobs is None:
        raise wrong("no log-probabilities, which it must be able to list")
    positions = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(positions, list) or len(positions) != 1 or not isinstance(positions[0], dict):
        raise wrong("not the log-probabilities of exactly one token under top_logprobs")
    found = positions[0]
    for token, value in found.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not -1e308 < value <= _ROUNDING:
            raise wrong(f"{_shown(value)} for {_shown(token)}, which is no log-probability (a finite number up to 0)")
    if sum(math.exp(value) for value in found.values()) > 1 + _ROUNDING:
        raise wrong("log-probabilities whose probabilities sum to more than 1")
    missing = [label for label in labels if label not in found]
    if missing:
        raise ValueError(
            f"{name} does not list {missing} among its {listed} most probable next tokens (it lists {list(found)[:5]} "
            "...). Write labels as the tokenizer does, mind the leading space, or raise top_logprobs."
        )
    return [float(found[label]) for label in labels]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
