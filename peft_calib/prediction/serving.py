"""Prediction from a server that knows LoRA and nothing of us: lists of prompts to each draw, averaged here.

The server is any with the OpenAI completions interface and one model name for each LoRA, such as vLLM with
`--enable-lora --lora-modules draw-0=... draw-1=...`. Of vLLM's own interface `/classify`, `/tokenize` and
`logprob_token_ids` are used where they are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..whole_numbers import check_whole
from .answers import check_models, class_probabilities, draw_names, label_log_probabilities, token_ids
from .result import Prediction
from .transport import Refused, Server, check_timeout

#: A prompt as text, or as the ids of its tokens.
Prompt = str | Sequence[int]
#: Tokens whose log-probabilities vLLM gives in one request.
MOST_IDS = 128


@dataclass(frozen=True)
class Limits:
    """How a server is asked: prompts and seconds of one request, and how many are under way."""

    prompts_per_request: int = 64
    concurrency: int = 8
    timeout: float = 120.0

    def __post_init__(self) -> None:
        check_timeout(self.timeout)
        for name in ("prompts_per_request", "concurrency"):
            object.__setattr__(self, name, check_whole(getattr(self, name), name, 1))


def list_draws(base_url: str, prefix: str = "draw-", api_key: str | None = None, timeout: float = 30.0) -> list[str]:
    """Names of the draws that a server offers, in order; no redirect to another origin is followed."""
    server = Server(base_url, api_key)
    return draw_names(server.ask("models", None, timeout), prefix, server.shown)


def predict_served(
    base_url: str,
    prompts: Sequence[Prompt],
    labels: Sequence[str | int] | None = None,
    *,
    draws: Sequence[str] | None = None,
    top_logprobs: int = 20,
    concurrency: int = 8,
    prompts_per_request: int = 64,
    api_key: str | None = None,
    timeout: float = 120.0,
) -> Prediction:
    """Ask every draw about each prompt and average the probabilities, as the server gives them.

    `peft_calib.predict_served` does the same, and with an adapter's folder applies its temperature.

    Args:
        base_url: For example `"http://localhost:8000/v1"`.
        prompts: Texts, or ids of their tokens. Of a language model they end where the answer begins.
        labels: Answers of a language model, one token each: texts as its tokenizer writes them (often with a leading
            space, like `" A"`), or ids. `None` asks a classifier for its classes (vLLM with `--runner pooling`).
        draws: Model names; `None` asks the server for all named `draw-<number>`.
        top_logprobs: How many tokens a server lists that cannot be asked for certain ones; 20 is what vLLM allows.
        concurrency: Requests under way at a time.
        prompts_per_request: Prompts of one request.
        api_key: Sent as a bearer token, to this server only: a redirect to another origin is not followed.
        timeout: Seconds for the whole of one request.

    Returns:
        The prediction over the labels or classes; sample k is the k-th draw.

    Raises:
        ValueError: If there is no prompt, fewer than two labels, a label is not one token, or not among the tokens
            listed, or a prompt is too long for the server.
        ConnectionError: If the server cannot be reached, or does not answer as it should. Nothing it answers reaches
            the prediction unchecked.
    """
    server, limits = Server(base_url, api_key), Limits(prompts_per_request, concurrency, timeout)
    top_logprobs = check_whole(top_logprobs, "top_logprobs", 1)
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError("prompts must be a list of at least one text.")
    if labels is not None and (len(set(labels)) < 2 or len(set(labels)) < len(labels)):
        raise ValueError(f"labels must be at least two different texts, got {list(labels)!r}.")
    names = served_draws(server, draws, limits.timeout)
    if labels is None:
        return ask_classes(server, names, prompts, limits)
    return ask_labels(server, names, prompts, labels, limits, top_logprobs)


def served_draws(server: Server, draws: Sequence[str] | None, timeout: float) -> list[str]:
    """The draws to ask: those named, or all that the server offers."""
    if draws is None:
        return draw_names(server.ask("models", None, timeout), "draw-", server.shown)
    names = list(draws)
    if not names or isinstance(draws, str) or len(set(names)) < len(names):
        raise ValueError(f"draws must be a list of at least one model name, each once; got {draws!r}.")
    return names


def check_base(server: Server, names: Sequence[str], expected: str, timeout: float) -> None:
    """Raise `ValueError` where draws are missing, or are served on another base model, as far as the server says."""
    check_models(server.ask("models", None, timeout), names, expected, server.shown)


def ask_labels(
    server: Server,
    names: Sequence[str],
    prompts: Sequence[Prompt],
    labels: Sequence[str | int],
    limits: Limits,
    top_logprobs: int = 20,
) -> Prediction:
    """Every draw's distribution over the next tokens that are labels."""
    ids = _label_ids(server, names[0], labels, limits.timeout)

    def ask(name: str, part: Sequence[Prompt]) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in part]
        for first in range(0, len(labels), MOST_IDS):
            request = {"model": name, "prompt": _sent(part), "max_tokens": 1, "temperature": 0}
            request["logprobs"] = top_logprobs
            wanted = [str(label) for label in labels]
            if ids is not None:
                chunk = ids[first : first + MOST_IDS]
                request |= {"logprob_token_ids": chunk, "return_tokens_as_token_ids": True}
                wanted = [f"token_id:{number}" for number in chunk]
            answer = _ask_at(server, "completions", request, limits.timeout, "a classifier is asked without labels")
            listed = label_log_probabilities(answer, wanted, name, len(part), top_logprobs, server.shown)
            found = [row + more for row, more in zip(found, listed, strict=True)]
            if ids is None:
                break
        return [_normalised(row) for row in found]

    return _gathered(ask, names, prompts, limits)


def ask_classes(server: Server, names: Sequence[str], prompts: Sequence[Prompt], limits: Limits) -> Prediction:
    """Every draw's distribution over the classes of a classifier, by vLLM's `/classify`."""

    def ask(name: str, part: Sequence[Prompt]) -> list[list[float]]:
        request = {"model": name, "input": _sent(part)}
        mend = "start vLLM with --runner pooling, or name the labels of a language model"
        answer = _ask_at(server, "/classify", request, limits.timeout, mend)
        return class_probabilities(answer, name, len(part), server.root)

    return _gathered(ask, names, prompts, limits)


def _ask_at(server: Server, path: str, request: dict[str, Any], timeout: float, mend: str) -> Any:
    """An answer; a server without such a path is told from one without such a draw."""
    try:
        return server.ask(path, request, timeout)
    except Refused as error:
        if error.code in (404, 405) and "does not exist" not in error.said:
            raise ValueError(f"{server.shown} has no {path.strip('/')} ({error.said}): {mend}.") from None
        raise


def _label_ids(server: Server, name: str, labels: Sequence[str | int], timeout: float) -> list[int] | None:
    """Ids of the labels; `None` where they are texts and the server cannot say."""
    found = []
    for label in labels:
        if isinstance(label, str):
            request = {"model": name, "prompt": label, "add_special_tokens": False}
            try:
                ids = token_ids(server.ask("/tokenize", request, timeout), server.root)
            except Refused as error:
                if error.code in (404, 405, 501) and "does not exist" not in error.said:
                    return None
                raise
            if len(ids) != 1:
                raise ValueError(
                    f"The label {label!r} is {len(ids)} tokens of the model at {server.shown}, and an answer is one. "
                    "Write labels as its tokenizer does, mind the leading space, or have letters stand for them."
                )
            found += ids
        else:
            found.append(int(label))
    if len(set(found)) < len(found):
        raise ValueError(f"The labels {list(labels)!r} are the tokens {found}: two of them are one token.")
    return found


def _gathered(ask: Any, names: Sequence[str], prompts: Sequence[Prompt], limits: Limits) -> Prediction:
    """All draws' answers to all prompts, asked in parts."""
    size = limits.prompts_per_request
    starts = range(0, len(prompts), size)
    with ThreadPoolExecutor(limits.concurrency) as pool:
        # the parts of a prompt lie side by side, so that a server computes all draws of it together
        pending = {
            (name, start): pool.submit(_asked, ask, name, prompts[start : start + size], start)
            for start in starts
            for name in names
        }
        try:
            parts = {key: future.result() for key, future in pending.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the first error is enough
            raise
    rows = [[row for start in starts for row in parts[name, start]] for name in names]
    if len({len(row) for draw in rows for row in draw}) != 1:
        raise ConnectionError("The draws answered with different numbers of classes; they are not of one adapter.")
    return Prediction(sample_probabilities=torch.tensor(rows), num_forwards=float(len(names)), how="served", seed=None)


def _asked(ask: Any, name: str, part: Sequence[Prompt], start: int) -> list[list[float]]:
    """The answers to a part; of one that is too long for the server the prompt is named."""
    try:
        return ask(name, part)
    except Refused as error:
        if error.code != 400 or "maximum context length" not in error.said:
            raise
        if len(part) == 1:
            raise ValueError(f"Text {start} is too long for the server: {error.said}") from None
        half = len(part) // 2
        return _asked(ask, name, part[:half], start) + _asked(ask, name, part[half:], start + half)


def _sent(part: Sequence[Prompt]) -> list[Any]:
    return [prompt if isinstance(prompt, str) else [int(token) for token in prompt] for prompt in part]


def _normalised(log_probabilities: list[float]) -> list[float]:
    weights = [math.exp(value - max(log_probabilities)) for value in log_probabilities]
    return [weight / sum(weights) for weight in weights]
