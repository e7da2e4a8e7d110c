"""`POST /v1/uncertainty` inside vLLM: one request in, the calibrated answer of all draws out.

An endpoint plugin (entry point `vllm.endpoint_plugins`). It lies beside the package and imports nothing of it: vLLM's
environment holds other versions of torch and transformers than ours, and needs no PEFT. Install it there with
`pip install --no-deps peft-calib`, and start the server of the exported draws with `VLLM_PLUGINS=peft_calib`.

Asked with `{"texts": [...]}` it answers, for each text, with the probabilities of the classes averaged over all draws
and taken to the stored temperature, their entropy, the mutual information of the draws, and what the decision rules
that lie beside the draws say.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peft_calib_vllm_rules import OTHER_TOKENS, Rules, is_changed, tempered

#: Texts of one request; each asks every draw.
MOST_TEXTS = 1024
#: Tokens whose log-probabilities vLLM gives at a time.
MOST_IDS = 128
PATH = "/v1/uncertainty"


@dataclass(frozen=True)
class Served:
    """The draws of a server, and what `predictor.json` in their folder says of their answers.

    Attributes:
        names: Of the draws, in order.
        labels: Names of the classes; None where nothing is stored.
        label_tokens: Ids of the tokens that stand for them; None for a classifier.
        temperature: T; None where nothing is stored.
        max_length: Tokens that texts are cut to, as in training.
        folder: Where that lies.
        rules: The decision rules that lie there.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    label_tokens: tuple[int, ...] | None = None
    temperature: float | None = None
    max_length: int | None = None
    folder: Path | None = None
    rules: Rules = field(default_factory=Rules)

    @classmethod
    def of(cls, paths: dict[str, str]) -> Served:
        """Find the draws among the LoRAs of a server, and read what lies beside them.

        Args:
            paths: Folder of each LoRA, by its name.

        Raises:
            ValueError: If there is no draw, one is missing, or what lies there cannot be applied.
        """
        numbers = sorted(int(match[1]) for name in paths if (match := re.fullmatch(r"draw-([0-9]{1,9})", name)))
        if not numbers or numbers != list(range(len(numbers))):
            raise ValueError(
                f"This server has the LoRAs {sorted(paths)[:20]}; {PATH} needs draw-0, draw-1 ... without a gap. "
                "Serve all that export_lora(model, folder, num_samples=K) wrote."
            )
        names = tuple(f"draw-{number}" for number in numbers)
        folders = {Path(paths[name]).resolve().parent for name in names}
        if len(folders) > 1:
            raise ValueError(f"The draws lie in several folders: {', '.join(sorted(map(str, folders)))}.")
        (folder,) = folders
        index = _read(folder / "draws.json")
        if index is not None and index.get("draws") != list(names):
            raise ValueError(f"{folder / 'draws.json'} names {index.get('draws')}, and {list(names)} are served.")
        _hold_weights(folder, index or {}, names)
        stored = _read(folder / "predictor.json")
        return cls(names) if stored is None else cls._stored(names, folder, stored, index or {})

    @classmethod
    def _stored(cls, names: tuple[str, ...], folder: Path, stored: dict[str, Any], index: dict[str, Any]) -> Served:
        place = folder / "predictor.json"
        if stored.get("kind", "classes") != "classes":
            raise ValueError(f"{place} answers with {stored['kind']}; {PATH} answers with one of some classes.")
        if stored.get("format_version") != 1:
            raise ValueError(f"{place} has the format {stored.get('format_version')!r}; this plugin reads 1.")
        if is_changed(stored):
            raise ValueError(f"{place} was changed after it was written. Restore it, or export the draws again.")
        way, temperature = (stored.get("ways") or {}).get("sample"), None
        if way is not None:
            if way.get("method") != "TemperatureScaling":
                raise ValueError(
                    f"{place} stores a {way.get('method')}; {PATH} applies a temperature. Ask with "
                    "peft_calib.predict_served(url, texts, adapter=folder), which applies any."
                )
            temperature = way["parameters"]["temperature"]
            if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
                raise ValueError(f"{place} holds the temperature {temperature!r}; a positive number is expected.")
        labels, tokens = stored.get("classes"), stored.get("label_tokens")
        digests = index.get("digests") or {}
        adapters = [digests[name] for name in names if name in digests]
        return cls(
            names,
            labels=None if labels is None else tuple(labels),
            label_tokens=None if tokens is None else tuple(tokens),
            temperature=temperature,
            max_length=(stored.get("inputs") or {}).get("max_length"),
            folder=folder,
            rules=Rules.beside(folder, _read, adapters, way, tokens),
        )


def _hold_weights(folder: Path, index: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse draws whose files are not those that the index was written for; earlier exports say nothing of them."""
    for name, expected in (index.get("weights") or {}).items():
        file = folder / name / "adapter_model.safetensors"
        if name in names and (not file.is_file() or _hash(file) != expected):
            raise ValueError(
                f"{file} is not the draw that was written there: it has changed, or its hash in draws.json. Write the "
                "folder again with export_lora(..., num_samples=K)."
            )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping.")
    return content


def combined(draws: np.ndarray, temperature: float | None) -> dict[str, np.ndarray]:
    """What K draws say together, as a predictor of peft_calib does.

    Args:
        draws: Probabilities (K, N, C).
        temperature: T, which acts on the mean of the draws: softmax(log(mean_k p_k) / T), and on each draw for the
            mutual information; None for none.

    Returns:
        `probabilities` (N, C), `entropy` (N,) and `mutual_information` (N,) in nats, float64.
    """
    draws = draws.astype(np.float64)
    mean = tempered(draws.mean(0), temperature)
    apart = tempered(draws, temperature)
    together = apart.mean(0)
    spread = (_x_log_y(apart, apart) - _x_log_y(apart, together)).sum(-1).mean(0)
    entropy = -_x_log_y(mean, mean).sum(-1)
    return {"probabilities": mean, "entropy": entropy, "mutual_information": np.maximum(spread, 0.0)}


def _x_log_y(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x * np.log(np.where(x > 0, y, 1.0)), 0.0)


class Asked:
    """One request, checked."""

    def __init__(self, body: Any, served: Served) -> None:
        if not isinstance(body, dict):
            raise ValueError('The body must be an object, such as {"texts": ["..."]}.')
        unknown = sorted(set(body) - {"texts", "prompts", "label_tokens", "labels"})
        if unknown or ("texts" in body) == ("prompts" in body):
            raise ValueError(
                "The body must hold texts (or prompts), and may hold label_tokens and labels; it holds "
                f"{sorted(body)}."
            )
        self.texts: list[Any] = body.get("texts", body.get("prompts"))
        if not isinstance(self.texts, list) or not 1 <= len(self.texts) <= MOST_TEXTS:
            raise ValueError(f"texts must be a list of 1 to {MOST_TEXTS} texts.")
        for place, text in enumerate(self.texts):
            if not (isinstance(text, str) and text) and not (_ids(text) and text):
                raise ValueError(f"Text {place} must be a text that is not empty, or a list of ids of tokens.")
        self.tokens = body.get("label_tokens", served.label_tokens)
        if self.tokens is not None and (not _ids(self.tokens) or len(set(self.tokens)) < max(2, len(self.tokens))):
            raise ValueError("label_tokens must be a list of at least two different ids of tokens.")
        own = "label_tokens" in body and tuple(body["label_tokens"]) != served.label_tokens
        # other answers than the temperature was fitted to
        self.temperature = None if own else served.temperature
        self.rules = Rules(told=OTHER_TOKENS) if own else served.rules
        self.labels = body.get("labels", None if own else served.labels)
        if self.labels is not None and (
            isinstance(self.labels, str) or not all(isinstance(n, str) for n in self.labels)
        ):
            raise ValueError("labels must be a list of names.")


def _ids(value: Any) -> bool:
    whole = isinstance(value, (list, tuple))
    return whole and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


class Engine:
    """Asks vLLM's engine: every draw about every text, all at once, so that it computes them together."""

    def __init__(self, client: Any, loras: Callable[[], dict[str, Any]], tokenizer: Any) -> None:
        self.client, self.loras, self.tokenizer = client, loras, tokenizer
        self.own_side = tokenizer.truncation_side

    def tokens(self, text: Any, served: Served, is_prompt: bool) -> list[int]:
        """Ids of a text as the predictor makes them: a long prompt loses its beginning, and none has an end mark."""
        if not isinstance(text, str):
            return list(text)
        limits = {} if served.max_length is None else {"truncation": True, "max_length": served.max_length}
        self.tokenizer.truncation_side = "left" if is_prompt else self.own_side
        ids = list(self.tokenizer(text, **limits)["input_ids"])
        return ids[:-1] if is_prompt and ids and ids[-1] == self.tokenizer.eos_token_id else ids

    async def draws(self, asked: Asked, served: Served) -> np.ndarray:
        """Probabilities (K, N, C)."""
        is_prompt = asked.tokens is not None
        prompts = [self.tokens(text, served, is_prompt) for text in asked.texts]
        empty = next((place for place, ids in enumerate(prompts) if not ids), None)
        if empty is not None:
            raise ValueError(f"Text {empty} holds no token.")
        ask = self._answers(asked.tokens) if asked.tokens is not None else self._classes
        known = self.loras()
        missing = [name for name in served.names if name not in known]
        if missing:
            raise ValueError(f"{', '.join(missing[:4])} left the server; serve all draws.")
        # draws of a text side by side: the engine batches requests in their order
        pairs = [(ids, known[name]) for ids in prompts for name in served.names]
        found = await _all([ask(*pair) for pair in pairs])
        return np.array(found, dtype=np.float64).reshape(len(prompts), len(served.names), -1).swapaxes(0, 1)

    def _answers(self, tokens: Sequence[int]) -> Callable[[list[int], Any], Coroutine[Any, Any, list[float]]]:
        from vllm import SamplingParams

        chunks = [list(tokens[first : first + MOST_IDS]) for first in range(0, len(tokens), MOST_IDS)]

        async def ask(ids: list[int], lora: Any) -> list[float]:
            found: list[float] = []
            for chunk in chunks:
                params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=chunk)
                made = self.client.generate({"prompt_token_ids": ids}, params, _name(), lora_request=lora)
                listed = (await _last(made)).outputs[0].logprobs[0]
                found += [listed[token].logprob for token in chunk]
            weights = np.exp(np.array(found) - max(found))
            return list(weights / weights.sum())

        return ask

    async def _classes(self, ids: list[int], lora: Any) -> list[float]:
        from vllm import PoolingParams

        made = self.client.encode(
            {"prompt_token_ids": ids}, PoolingParams(task="classify"), _name(), lora_request=lora
        )
        weights = np.array((await _last(made)).outputs.data.tolist())
        return list(weights / weights.sum())


async def _last(answers: Any) -> Any:
    found = None
    async for answer in answers:
        found = answer
    return found


async def _all(calls: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All answers in order; the first error ends the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _name() -> str:
    return f"uncertainty-{uuid.uuid4().hex}"


def answer(asked: Asked, served: Served, draws: np.ndarray) -> dict[str, Any]:
    """The content of the answer."""
    count = draws.shape[-1]
    labels = list(asked.labels) if asked.labels is not None else [f"LABEL_{place}" for place in range(count)]
    if len(labels) != count:
        raise ValueError(f"The draws answer with {count} classes, and {len(labels)} are named: {labels[:8]}.")
    found = combined(draws, asked.temperature)
    decided = asked.rules.rows(found["probabilities"], labels)
    rows = zip(found["probabilities"], found["entropy"], found["mutual_information"], decided, strict=True)
    data = [
        {
            "index": place,
            "label": labels[int(p.argmax())],
            "probabilities": p.tolist(),
            "entropy": float(entropy),
            "mutual_information": float(spread),
            **said,
        }
        for place, (p, entropy, spread, said) in enumerate(rows)
    ]
    about = {"labels": labels, "temperature": asked.temperature, "draws": len(draws), "decision": asked.rules.told}
    return {"object": "list", **about, "data": data}


async def respond(engine: Engine, asked: Asked, served: Served) -> dict[str, Any]:
    """Ask all draws, and put their answers together; answers without names are called by their tokens."""
    draws = await engine.draws(asked, served)
    if asked.labels is None and asked.tokens is not None:
        asked.labels = [engine.tokenizer.decode([token]).strip() for token in asked.tokens]
    return answer(asked, served, draws)


class Counts:
    """What was answered, for Prometheus, among vLLM's own figures at `/metrics`."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Summary

        self.prompts = Counter("peft_calib_prompts", f"Texts answered at {PATH}")
        self.decided = Counter("peft_calib_decided", "Texts that a decision rule answered or passed on", ["decision"])
        self.entropy = Summary("peft_calib_entropy_nats", "Entropy of the calibrated probabilities")
        self.spread = Summary("peft_calib_mutual_information_nats", "Mutual information of the draws")

    def add(self, content: dict[str, Any]) -> None:
        """Count one answer."""
        for row in content["data"]:
            self.prompts.inc()
            self.entropy.observe(row["entropy"])
            self.spread.observe(row["mutual_information"])
            if "answered" in row:
                self.decided.labels("answered" if row["answered"] else "passed_on").inc()


class UncertaintyPlugin:
    """The plugin; vLLM makes one when it is named in `VLLM_PLUGINS`."""

    name = "peft_calib"
    required_tasks = ("generate", "classify")

    def attach_router(self, app: Any) -> None:
        """Register the route."""
        from fastapi.responses import JSONResponse
        from starlette.requests import Request

        async def uncertainty(request):  # type: ignore[no-untyped-def]
            try:
                state = app.state
                asked = Asked(await _body(request), state.peft_calib_served)
                content = await respond(state.peft_calib_engine, asked, state.peft_calib_served)
                state.peft_calib_counts.add(content)
                return JSONResponse(content)
            except ValueError as error:  # of the request, or vLLM's own: a text that is too long
                message = " ".join(str(error).split())
                content = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
                return JSONResponse(content, status_code=400)

        # FastAPI goes by the annotation, and could not find a name that is imported here
        uncertainty.__annotations__ = {"request": Request}
        app.add_api_route(PATH, uncertainty, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Find the draws; what does not fit ends the start of the server."""
        from transformers import AutoTokenizer

        models = state.openai_serving_models
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, revision=args.tokenizer_revision)
        state.peft_calib_served = Served.of({name: lora.lora_path for name, lora in models.lora_requests.items()})
        state.peft_calib_counts = Counts()
        state.peft_calib_engine = Engine(engine_client, lambda: models.lora_requests, tokenizer)


async def _body(request: Any) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ValueError("The body is no JSON.") from None
