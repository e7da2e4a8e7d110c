"""What a server of draws may answer: everything it sends is checked here before a number is taken from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

#: How far rounding may put a log-probability above 0, and the sum of the listed probabilities above 1.
_ROUNDING = 1e-2


def draw_names(answer: Any, prefix: str, url: str, any_name: bool = False) -> list[str]:
    """Names of the draws, prefix and number (or all names), in what a server said to `GET models`, in order."""
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list):
        raise ConnectionError(f"{url}/models did not answer with a list of models under 'data', but {_shown(answer)}.")
    offered = [model.get("id") if isinstance(model, dict) else None for model in models]
    if not all(isinstance(name, str) for name in offered):
        raise ConnectionError(f"{url}/models lists a model without a text 'id': {_shown(answer)}.")
    if any_name:
        return offered
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


def check_models(answer: Any, names: Sequence[str], base: str, url: str) -> None:
    """Raise unless every draw is served, on the base model named so, or by a path that ends so; vLLM tells both."""
    draw_names(answer, "", url, any_name=True)
    models = {model["id"]: model for model in answer["data"]}
    missing = [name for name in names if name not in models]
    if missing:
        raise ValueError(f"{url} does not serve {', '.join(missing[:4])}, only {_shown(list(models))}.")
    for name in names:
        parent = models[name].get("parent")
        if not isinstance(parent, str):
            continue  # a server that does not say
        known = {parent, models.get(parent, {}).get("root")}
        if not any(isinstance(other, str) and _same_model(base, other) for other in known):
            raise ValueError(
                f"{url} serves {name} on {_shown(parent)}, and the adapter was trained on {base!r}: its answers would "
                "be another model's. Serve it on that, or say with base_model= how the server calls it."
            )


def _same_model(one: str, other: str) -> bool:
    return one == other or one.rstrip("/").rpartition("/")[2] == other.rstrip("/").rpartition("/")[2]


def token_ids(answer: Any, url: str) -> list[int]:
    """Ids in what a server said to `POST /tokenize`."""
    ids = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConnectionError(f"{url}/tokenize did not answer with ids under 'tokens', but {_shown(answer)}.")
    return ids


def class_probabilities(answer: Any, name: str, count: int, url: str) -> list[list[float]]:
    """Probabilities of the classes in what a server said to `POST /classify` for some texts, in their order."""

    def wrong(what: str) -> ConnectionError:
        return ConnectionError(f"{url}/classify answered for {name} with {what}: {_shown(answer)}.")

    rows = []
    for entry in _in_order(answer, "data", count, wrong):
        probabilities = entry.get("probs")
        if not isinstance(probabilities, list) or len(probabilities) < 2:
            raise wrong("an entry without a list of at least two probabilities under 'probs'")
        if not all(_is_number(value) and 0 <= value <= 1 + _ROUNDING for value in probabilities):
            raise wrong("what is no probability under 'probs'")
        total = sum(probabilities)
        if abs(total - 1) > _ROUNDING:
            raise wrong(f"probabilities that sum to {total:.3g}")
        rows.append([value / total for value in probabilities])
    return rows


def label_log_probabilities(
    answer: Any, labels: Sequence[str], name: str, count: int, listed: int, url: str
) -> list[list[float]]:
    """Log-probabilities of the labels in what a server said to `POST completions` for prompts and one token each."""

    def wrong(what: str) -> ConnectionError:
        return ConnectionError(f"{url}/completions answered for {name} with {what}: {_shown(answer)}.")

    return [_of_choice(choice, labels, name, listed, wrong) for choice in _in_order(answer, "choices", count, wrong)]


def _of_choice(choice: Any, labels: Sequence[str], name: str, listed: int, wrong: Any) -> list[float]:
    logprobs = choice.get("logprobs")
    if logprobs is None:
        raise wrong("no log-probabilities, which it must be able to list")
    positions = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(positions, list) or len(positions) != 1 or not isinstance(positions[0], dict):
        raise wrong("not the log-probabilities of exactly one token under top_logprobs")
    found = positions[0]
    for token, value in found.items():
        if not _is_number(value) or not -1e308 < value <= _ROUNDING:
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


def _in_order(answer: Any, field: str, count: int, wrong: Any) -> list[dict]:
    """The entries of an answer, each at the place that its index says."""
    entries = answer.get(field) if isinstance(answer, dict) else None
    if not isinstance(entries, list) or len(entries) != count or not all(isinstance(e, dict) for e in entries):
        raise wrong(f"not exactly {count} entr{'y' if count == 1 else 'ies'} under {field!r}")
    places = [entry.get("index", place) for place, entry in enumerate(entries)]
    if not all(isinstance(place, int) for place in places) or sorted(places) != list(range(count)):
        raise wrong(f"entries numbered {_shown(places)}")
    return [entries[places.index(place)] for place in range(count)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
