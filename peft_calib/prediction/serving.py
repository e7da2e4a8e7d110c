"""Prediction from a server that knows LoRA and nothing of us: one request a draw, averaged here.

The server is any with the OpenAI completions interface and one model name for each LoRA, such as vLLM with
`--enable-lora --lora-modules draw-0=... draw-1=...`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from .answers import draw_names, label_log_probabilities
from .result import Prediction
from .transport import Server, check_timeout


def list_draws(base_url: str, prefix: str = "draw-", api_key: str | None = None, timeout: float = 30.0) -> list[str]:
    """Names of the draws that a server offers, in order; no redirect to another origin is followed."""
    server = Server(base_url, api_key)
    return draw_names(server.ask("models", None, timeout), prefix, server.shown)


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
        api_key: Sent as a bearer token, to this server only: a redirect to another origin is not followed.
        timeout: Seconds for the whole of one request.

    Returns:
        The prediction over the labels; sample k is the k-th draw.

    Raises:
        ValueError: If there is no prompt, fewer than two labels, or a label is not among the tokens listed.
        ConnectionError: If the server cannot be reached, or does not answer as it should. Nothing it answers reaches
            the prediction unchecked.
    """
    server = Server(base_url, api_key)
    check_timeout(timeout)
    if not prompts or isinstance(prompts, str):
        raise ValueError("prompts must be a list of at least one text.")
    if len(set(labels)) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be at least two different texts, got {list(labels)!r}.")
    for field, value in (("top_logprobs", top_logprobs), ("concurrency", concurrency)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{field} must be an integer of at least 1, got {value!r}.")
    names = list_draws(base_url, api_key=api_key, timeout=timeout) if draws is None else list(draws)
    if not names or isinstance(draws, str) or len(set(names)) < len(names):
        raise ValueError(f"draws must be a list of at least one model name, each once; got {draws!r}.")

    def ask(name: str, prompt: str) -> list[float]:
        request = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": top_logprobs}
        answer = server.ask("completions", request, timeout)
        return _label_probabilities(label_log_probabilities(answer, labels, name, top_logprobs, server.shown))

    with ThreadPoolExecutor(concurrency) as pool:
        pending = [[pool.submit(ask, name, prompt) for prompt in prompts] for name in names]
        try:
            probabilities = [[future.result() for future in row] for row in pending]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the first error is enough
            raise
    return Prediction(
        sample_probabilities=torch.tensor(probabilities), num_forwards=float(len(names)), how="served", seed=None
    )


def _label_probabilities(log_probabilities: list[float]) -> list[float]:
    weights = [math.exp(value - max(log_probabilities)) for value in log_probabilities]
    return [weight / sum(weights) for weight in weights]
