"""The predictor of an adapter whose draws are served elsewhere: the same tokens there, the same temperature here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import TaskType
from transformers import PreTrainedTokenizerBase

from ..artefact import Artefact, place_of, read_artefact
from ..base_models import is_other_base
from ..calibration.recalibrate import TemperatureScaling, load_state
from ..draws_index import DRAWS_INDEX, read_draws_index
from ..identity import read_config
from ..json_files import Fields
from ..prediction import Prediction
from ..prediction import serving as raw
from ..prediction.transport import Server
from ..provenance.stored_decision import read_decisions
from .answer import CalibratedPrediction
from .decisions import Decisions
from .inputs import Encoded, encode, with_limits
from .loading import answered_kind, auto_model, base_tokenizer, folder_of, with_tokens


def predict_served(
    base_url: str,
    texts: Any,
    labels: Sequence[str | int] | None = None,
    *,
    adapter: str | Path | None = None,
    draws: Sequence[str] | None = None,
    base_model: str | Path | None = None,
    top_logprobs: int = 20,
    concurrency: int = 8,
    prompts_per_request: int = 64,
    api_key: str | None = None,
    timeout: float = 120.0,
) -> Prediction | CalibratedPrediction:
    """Ask every draw that a server offers about each text, and average the probabilities.

    With an adapter's folder the answer is that of `peft_calib.load(adapter).predict(texts)`: texts become the same
    tokens, cut as in training, classes have their names, and the stored temperature is applied to the mean of the
    draws. With the folder of exported draws their decision rules are applied, too. Without a folder probabilities are
    as the server gives them. What the server answers is checked, read up to 16 MiB a request and waited for up to
    `timeout`.

    Args:
        base_url: For example `"http://localhost:8000/v1"`.
        texts: A list of texts, or with an adapter what its predictor takes. Of a language model they are prompts that
            end where the answer begins.
        labels: Without an adapter, the answers of a language model, one token each: texts as its tokenizer writes
            them (often with a leading space, like `" A"`), or ids. `None` asks a classifier for its classes.
        adapter: Folder or Hub id of the adapter, or of its exported draws: what `predictor.json` says there holds.
        draws: Model names; `None` asks the server for all named `draw-<number>`.
        base_model: How the server calls the base model, or where it lies here, if not as the adapter does.
        top_logprobs: How many tokens a server lists that cannot be asked for certain ones; 20 is what vLLM allows.
        concurrency: Requests under way at a time.
        prompts_per_request: Prompts of one request.
        api_key: Sent as a bearer token, to this server only: a redirect to another origin is not followed.
        timeout: Seconds for the whole of one request.

    Returns:
        The prediction; sample k is the k-th draw. Calibrated with an adapter.

    Raises:
        ValueError: If there is no text, fewer than two labels, a label is not one token, or not among the tokens
            listed, a text is too long for the server, or it serves other draws or another base model.
        ConnectionError: If the server cannot be reached, or does not answer as it should.

    Example:
        >>> predict_served("http://127.0.0.1:9/v1", ["Is the sky blue?"], [" yes", " no"])
        Traceback (most recent call last):
        ...
        ConnectionError: http://127.0.0.1:9/v1/models cannot be reached: [Errno 111] Connection refused
    """
    shared = {"draws": draws, "api_key": api_key, "timeout": timeout, "concurrency": concurrency}
    shared |= {"prompts_per_request": prompts_per_request, "top_logprobs": top_logprobs}
    if adapter is None:
        if base_model is not None:
            raise ValueError("base_model= is held against an adapter's; give adapter=, its folder.")
        return raw.predict_served(base_url, texts, labels, **shared)
    if labels is not None:
        raise ValueError("The classes are those of the adapter; leave labels out, or adapter= to ask for other ones.")
    limits = raw.Limits(prompts_per_request, concurrency, timeout)
    server = Server(base_url, api_key)
    known = _Known.of(adapter, base_model)
    rows = _sendable(encode(texts, known.artefact, known.tokenizer))
    names = list(draws) if draws is not None else known.draws or raw.served_draws(server, None, timeout)
    raw.check_base(server, names, known.base, timeout)
    ids = rows.columns["input_ids"]
    if known.artefact.label_tokens is None:
        made = raw.ask_classes(server, names, ids, limits)
    else:
        made = raw.ask_labels(server, names, ids, known.artefact.label_tokens, limits, top_logprobs)
    return known.calibrated(made, rows, names)


class _Known:
    """What lies beside an adapter: how texts are read, and what its answers are taken to."""

    def __init__(
        self,
        artefact: Artefact,
        tokenizer: PreTrainedTokenizerBase,
        base: str,
        draws: list[str] | None,
        decisions: Decisions,
    ) -> None:
        self.artefact, self.tokenizer, self.base, self.draws = artefact, tokenizer, base, draws
        self.decisions = decisions

    @classmethod
    def of(cls, adapter: str | Path, base_model: str | Path | None) -> _Known:
        folder = folder_of(adapter)
        artefact = read_artefact(folder)
        if artefact is None:
            raise ValueError(
                f"{folder} has no predictor.json: there is no temperature and there are no classes in it."
            )
        place = place_of(folder, artefact.names[0])
        config = read_config(place)
        kind = answered_kind(artefact, config)
        if kind != "classes":
            raise ValueError(f"{folder} answers with {kind}, and draws on a server are asked for classes: use load().")
        artefact.check_belongs(folder)
        base = str(base_model or config.base_model_name_or_path or "")
        try:
            tokenizer = base_tokenizer(place, str(config.base_model_name_or_path or ""), config.revision)
        except FileNotFoundError:
            if base_model is None:
                raise
            tokenizer = base_tokenizer(place, base, None)
        auto_model(config, folder)  # says so where a predictor has nothing to do with the task
        if config.task_type == TaskType.CAUSAL_LM:
            artefact = with_tokens(artefact, artefact.label_tokens, tokenizer, folder)
        elif artefact.classes is None:
            raise ValueError(f"{folder} does not name the classes.")
        draws = read_draws_index(folder)[0] if (folder / DRAWS_INDEX).is_file() else None
        limit = tokenizer.model_max_length if artefact.inputs.max_length is None else None
        if limit is not None and limit < 10**6:
            artefact = replace(artefact, inputs=with_limits(artefact.inputs, limit, None))
        return cls(artefact, tokenizer, base, draws, _decisions(folder, artefact))

    def calibrated(self, made: Prediction, rows: Encoded, asked: Sequence[str]) -> CalibratedPrediction:
        """The answers of the draws that were asked, at the stored temperature, with what the rules say of them."""
        names = self.artefact.classes or ()
        if made.sample_probabilities.shape[-1] != len(names):
            raise ValueError(
                f"The server answers with {made.sample_probabilities.shape[-1]} classes, and the adapter has "
                f"{len(names)}: {', '.join(names[:8])}. Another adapter is served there."
            )
        way = self.artefact.ways.get("sample" if made.num_samples > 1 else "mean")
        method = None if way is None else load_state(way)
        found = CalibratedPrediction.of(
            made, method, label_names=names, recalibration=_told(way, method, made.num_samples), num_cut=rows.num_cut
        )
        return self._decided(found, asked)

    def _decided(self, found: CalibratedPrediction, asked: Sequence[str]) -> CalibratedPrediction:
        if not self.decisions.stored:
            return found
        others = self.draws is not None and sorted(asked) != sorted(self.draws)
        of_a_seed = any(one.to.seed is not None for one in self.decisions.stored.values())
        if others or (of_a_seed and found.num_samples > 1):
            why = "other draws are asked" if others else "a server does not say of which seed its draws are"
            mend = "Name the folder that export_lora wrote them to, with their rules, as adapter=."
            return replace(found, decision=f"No decision rule is applied: {why}. {mend}")
        how = "sample" if found.num_samples > 1 else "mean"
        return self.decisions.applied(found, how, found.num_samples, 0, self.artefact)


def _decisions(folder: Path, artefact: Artefact) -> Decisions:
    """The rules in a folder, each held to be for what lies there."""
    stored = read_decisions(folder)
    places = [place_of(folder, name) for name in artefact.names]
    for one in stored.values():
        way = artefact.ways.get(one.to.how)
        method = None if way is None else load_state(way)
        other = one.unlike(places, method, one.to.head)
        if other is None and is_other_base(one.base, artefact.base):
            other = "another base model"
        if other is not None:
            raise ValueError(one.refused(folder, other))
    return Decisions(stored)


def _told(way: Fields | None, method: Any, count: int) -> str:
    if way is None:
        return "no temperature is stored for this way of predicting"
    told = f"T = {method.temperature:.4g}" if isinstance(method, TemperatureScaling) else type(method).__name__
    fitted = way.integer("fitted_num_samples", default=way.integer("num_samples", least=1))
    return told if count in (1, fitted) else f"{told}, fitted with {fitted} draws"


def _sendable(rows: Encoded) -> Encoded:
    if any(any(row) for row in rows.columns.get("token_type_ids", [])):
        raise ValueError(
            "The model tells the texts of a pair apart by token types, which cannot be sent to a server. Predict with "
            "peft_calib.load."
        )
    if rows.num_cut:
        warnings.warn(f"{rows.num_cut} of {len(rows)} texts were cut, as in training.", UserWarning, stacklevel=3)
    return rows
