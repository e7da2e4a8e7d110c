"""Prediction from a server that knows LoRA and nothing of us: one request a draw, averaged here.

The server is any with the OpenAI completions interface and one model name for each LoRA, such as vLLM with
`--enable-lora --lora-modules draw-0=... draw-1=...`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from .result import Prediction


def list_draws(base_url: str, prefix: str = "draw-", api_key: str | None = None) -> list[str]:
    """Names of the draws that a server offers, in order.

    Args:
        base_url: For example `"http://localhost:8000/v1"`.
        prefix: What their names begin with; a number follows.
        api_key: Sent as a bearer token.

    Returns:
        The names.

    Raises:
        ValueError: If the server offers none.
        ConnectionError: If it cannot be reached or answers with an error.
    """
    offered = [model["id"] for model in _call(base_url, "models", None, api_key, 30.0)["data"]]
    names = [name for name in offered if name.startswith(prefix) and name[len(prefix) :].isdigit()]
    if not names:
        raise ValueError(f"{base_url} serves {offered}, and none is named {prefix}<number>. Serve the exported draws.")
    return sorted(names, key=lambda name: int(name[len(prefix) :]))


def predict_served(
    base_url: str,
    prompts: Sequence[str],
    labels: Sequence[str],
    *,
    draws: Sequence[str] | None = None,
    top_logprobs: int = 20,
    concurrency: int = 8,
    api_key: str | None = None,
    timeout: float = 60.0,
) -> Prediction:
    """Ask every draw for the next token of each prompt and average the probabilities of the labels.

    Args:
        base_url: For example `"http://localhost:8000/v1"`.
        prompts: Texts that end where the answer begins.
        labels: Texts of the answers as the server's tokenizer writes them, one token each (often with a leading
            space, like `" A"`).
        draws: Model names; `None` asks the server for all named `draw-<number>`.
        top_logprobs: How many tokens the server lists; vLLM allows 20 unless started with `--max-logprobs`.
        concurrency: Requests under way at a time.
        api_key: Sent as a bearer token.
        timeout: Seconds to wait for an answer.

    Returns:
        The prediction over the labels; sample k is the k-th draw.

    Raises:
        ValueError: If there is no prompt, fewer than two labels, or a label is not among the tokens listed.
        ConnectionError: If the server cannot be reached or answers with an error.
    """
    if not prompts or isinstance(prompts, str):
        raise ValueError("prompts must be a list of at least one text.")
    if len(set(labels)) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be at least two different texts, got {list(labels)!r}.")
    names = list_draws(base_url, api_key=api_key) if draws is None else list(draws)

    def ask(name: str, prompt: str) -> list[float]:
        request = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": top_logprobs}
        answer = _call(base_url, "completions", request, api_key, timeout)
        return _label_probabilities(answer, labels, name, top_logprobs)

    with ThreadPoolExecutor(concurrency) as pool:
        pending = [[pool.submit(ask, name, prompt) for prompt in prompts] for name in names]
        probabilities = [[future.result() for future in row] for row in pending]
    return Prediction(
        sample_probabilities=torch.tensor(probabilities), num_forwards=float(len(names)), how="served", seed=None
    )


def _label_probabilities(answer: dict[str, Any], labels: Sequence[str], name: str, listed: int) -> list[float]:
    found = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    missing = [label for label in labels if label not in found]
    if missing:
        raise ValueError(
            f"{name} does not list {missing} among its {listed} most probable next tokens (it lists {list(found)[:5]} "
            "...). Write labels as the tokenizer does, mind the leading space, or raise top_logprobs."
        )
    weights = [math.exp(found[label] - max(found[other] for other in labels)) for label in labels]
    return [weight / sum(weights) for weight in weights]


def _call(base_url: str, path: str, body: dict | None, api_key: str | None, timeout: float) -> dict[str, Any]:
    url = f"{base_url.rstrip('/')}/{path}"
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}.")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers), timeout=timeout) as response:
            return json.load(response)
    except HTTPError as error:
        raise ConnectionError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from error
    except (URLError, TimeoutError) as error:
        raise ConnectionError(f"{url} cannot be reached: {error}") from error
