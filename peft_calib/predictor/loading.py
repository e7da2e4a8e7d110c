"""A predictor from a folder or the Hub: the adapter, its base model, tokenizer, classes and recalibrations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from ..artefact import (
    ARTEFACT_FILE,
    HERE,
    Artefact,
    is_earlier_run,
    place_of,
    read_artefact,
)
from ..artefact import KINDS as HEAD_KINDS
from ..base_models import able_to_pad, base_fingerprint, is_other_base, position_limit, seeded_base
from ..calibration.recalibrate import load_state
from ..classes import class_options
from ..console import own_random_state
from ..fetching import local_folder
from ..identity import open_weights, read_config
from ..prediction.heads import check_label_tokens
from ..provenance.companions import attach_file
from ..provenance.run_temperatures import check_temperatures, run_of
from .decisions import Decisions, decisions_beside
from .error_head import ErrorHead, head_beside
from .inputs import letter_tokens, with_limits
from .kinds import KINDS
from .kinds.entities import Entities, check_entity_tags
from .predictor import Predictor

#: How the base model of a task is loaded.
AUTO_MODELS = {
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.TOKEN_CLS: AutoModelForTokenClassification,
}
#: What is fetched from the Hub: neither checkpoints' optimisers nor pickles.
FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
#: The folder of a run that holds its adapter.
OF_A_RUN = "adapter"
#: Names of the last layer of a classification head, which has a row for each class.
HEADS = ("classifier", "score", "out_proj")


def load(
    adapter: str | Path,
    *,
    device: str | torch.device | None = None,
    base_model: str | Path | None = None,
    recalibrate: bool = True,
    decisions: bool = True,
    kind: str | None = None,
    label_names: Sequence[str] | None = None,
    label_tokens: Sequence[int | str] | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    subfolder: str | None = None,
    **model_options: Any,
) -> Predictor:
    """Load an adapter as a predictor: texts in, calibrated probabilities out.

    What `peft-calib train`, `RecalibrationCallback` and `save_pretrained` leave is complete by itself. An adapter that
    brings no `predictor.json`, such as a LoRA of any other tool, is loaded too: it has no temperature, which is said.

    Args:
        adapter: Folder of an adapter or of a run, or a Hub id.
        device: Where to; an accelerator if there is one.
        base_model: The base model, where it is not to be found under the name that the adapter was trained with.
        recalibrate: False applies no stored recalibration, uncertainty head and decision rule; weights or a base
            model other than those that they were fitted for are then a warning.
        decisions: False applies no stored decision rule, whatever it was fitted for.
        kind: What an adapter that does not say it answers with: `"classes"`, `"labels"` (a sigmoid each; one for a
            reranker's single logit) or `"numbers"`.
        label_names: Names of the classes, where they are not stored or others are wanted.
        label_tokens: Tokens that stand for the classes of a language model, ids or texts of one token each.
        max_length: Tokens that texts are cut to; as in training, or what the base model takes.
        batch_size: Rows of a forward; as in training.
        revision: Of the adapter on the Hub.
        token: For the Hub.
        cache_dir: For the Hub.
        subfolder: Where in the folder or the Hub's repository the adapter lies.
        model_options: For the base model's `from_pretrained`: `dtype`, `quantization_config`, ...

    Returns:
        The predictor.

    Raises:
        FileNotFoundError: If there is no adapter, or its base model is not found.
        ValueError: If the adapter was edited, or is on another base model, since its temperature was fitted; if it is
            for a task that has no texts with classes; or if its answer tokens are not known.

    Example:
        >>> load("no such adapter")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no such adapter is no folder here and no Hub id, so there is no adapter to load.
    """
    folder = folder_of(adapter, subfolder, revision=revision, token=token, cache_dir=cache_dir)
    stored = read_artefact(folder)
    artefact = stored or Artefact()
    artefact = replace(artefact, inputs=with_limits(artefact.inputs, max_length, batch_size))
    if kind is not None:
        artefact = _of_kind(artefact, kind, folder)
    if label_names is not None:
        artefact = replace(artefact, classes=_different(label_names, f"label_names={list(label_names)!r}"))
    _check_adapters(artefact, folder, recalibrate)
    run = run_of(folder)
    if recalibrate and run is not None:
        check_temperatures(run)
    if not recalibrate:
        artefact = replace(artefact, ways={})
    found = _assembled(folder, artefact, device, base_model, label_tokens, model_options, recalibrate, decisions)
    if not found.artefact.ways and recalibrate:
        warnings.warn(
            f"{adapter} has no temperature: its probabilities are as the model gives them, calibrated or not. Train "
            "with peft-calib train or a RecalibrationCallback, which store one.",
            UserWarning,
            stacklevel=2,
        )
    return found


def _assembled(
    folder: Path,
    artefact: Artefact,
    device: str | torch.device | None,
    base_model: str | Path | None,
    label_tokens: Sequence[int | str] | None,
    model_options: dict[str, Any],
    recalibrate: bool,
    decide: bool,
) -> Predictor:
    """A predictor of the adapters that an artefact names, which lie in a folder."""
    places = {_name_of(name): place_of(folder, name) for name in artefact.names}
    config = read_config(next(iter(places.values())))
    auto = auto_model(config, folder)
    name = str(base_model or config.base_model_name_or_path or "")
    revision = None if base_model else config.revision
    with own_random_state():
        tokenizer = base_tokenizer(next(iter(places.values())), name, revision)
        tokens = label_tokens if label_tokens is not None else artefact.label_tokens
        if auto is AutoModelForCausalLM:
            artefact = with_tokens(artefact, tokens, tokenizer, folder)
        else:
            artefact = _with_classes(artefact, next(iter(places.values())), name, revision)
        assert artefact.classes is not None
        options = {"revision": revision, **model_options}
        if auto is not AutoModelForCausalLM:
            options |= class_options(artefact.classes, artefact.kind)
        base = seeded_base(lambda: auto.from_pretrained(name, **options), tokenizer, artefact.seed)
        model = _with_adapters(base, places, name)
    _check_base(model, artefact, folder, name, recalibrate)
    if artefact.ways and len(places) == 1:
        # where it lies in a run is not where it will be saved
        alone = dict(zip([HERE], artefact.adapters.values(), strict=False))
        attach_file(model, ARTEFACT_FILE, replace(artefact, adapters=alone).text())  # who saves the model saves all
    if artefact.inputs.max_length is None:
        limit = position_limit(base.config, tokenizer, 10**6)
        artefact = replace(artefact, inputs=with_limits(artefact.inputs, limit, None))
    chosen = torch.accelerator.current_accelerator() if device is None and torch.accelerator.is_available() else device
    if "device_map" not in model_options:
        model.to(chosen or "cpu")
    model.eval()
    names, head, decisions = tuple(places), ErrorHead(), Decisions()
    artefact = replace(artefact, kind=answered_kind(artefact, config))
    if KINDS[artefact.kind].of_words:
        check_entity_tags(artefact.classes, folder)
    if recalibrate:
        head = head_beside(folder, places, model)
    if recalibrate and decide:
        methods = {how: load_state(state) for how, state in artefact.ways.items()}
        decisions = decisions_beside(folder, places, model, methods, head.digest, len(artefact.classes))
    return Predictor(model, tokenizer, artefact, folder, artefact.classes, names, head, decisions)


def folder_of(adapter: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """Where the files of an adapter lie, fetched from the Hub if they are not here."""
    folder = local_folder(adapter, FETCHED, "adapter", **hub) / (subfolder or "")
    if any((folder / name).is_file() for name in (CONFIG_NAME, ARTEFACT_FILE)) or is_earlier_run(folder):
        return folder
    if (folder / OF_A_RUN / CONFIG_NAME).is_file():
        return folder / OF_A_RUN
    raise FileNotFoundError(f"{folder} holds no adapter: there is no {CONFIG_NAME} in it.")


def auto_model(config: PeftConfig, folder: Path) -> Any:
    """The class that loads the base model for an adapter's task."""
    auto = AUTO_MODELS.get(config.task_type)
    if auto is None:
        kinds = " and ".join(AUTO_MODELS)
        told = "does not say its task" if config.task_type is None else f"is for the task {config.task_type}"
        raise ValueError(
            f"The adapter in {folder} {told}; a predictor of texts takes {kinds} (task_type in {CONFIG_NAME}). Load "
            "others with PEFT, and predict with peft_calib.predict_dataset."
        )
    return auto


def answered_kind(artefact: Artefact, config: PeftConfig) -> str:
    """What a predictor answers with: of words that have classes entities, and else what the artefact says."""
    of_words = config.task_type == TaskType.TOKEN_CLS and artefact.kind == "classes"
    return Entities.name if of_words else artefact.kind


def base_tokenizer(place: Path, base: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter, or the base model's."""
    own = (place / "tokenizer_config.json").is_file()
    try:
        if own:
            return able_to_pad(AutoTokenizer.from_pretrained(place))
        AutoConfig.from_pretrained(base, revision=revision)  # a tokenizer's own message is about its files
        return able_to_pad(AutoTokenizer.from_pretrained(base, revision=revision))
    except OSError as error:
        raise _no_base(base, error) from error


def _no_base(base: str, error: Exception) -> FileNotFoundError:
    told = str(error).strip().partition("\n")[0]
    return FileNotFoundError(
        f"The base model {base!r}, which the adapter was trained on, is not found: {told} Say where it lies with "
        "base_model=."
    )


def _with_classes(artefact: Artefact, place: Path, base: str, revision: str | None) -> Artefact:
    """Names of the classes of a head: those stored, or those of the base model, as many as the head has rows."""
    try:
        config = AutoConfig.from_pretrained(base, revision=revision)
    except OSError as error:
        raise _no_base(base, error) from error
    count = _head_rows(place)
    names = artefact.classes
    if names is None:
        own = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
        fits = count in (None, len(own)) and len(set(own)) == len(own)
        names = own if fits else tuple(f"LABEL_{position}" for position in range(count or len(own)))
    if count is not None and count != len(names):
        raise ValueError(
            f"The adapter in {place} has a head of {count} classes, and {len(names)} are named: "
            f"{', '.join(names[:8])}. Give label_names= as many names as there are classes."
        )
    if len(names) < KINDS[artefact.kind].fewest:
        raise ValueError(
            f"The adapter in {place} has a head of one output, which is no distribution over classes. Say what it is: "
            "load(kind='labels') for the logit of one label, such as a reranker's, or kind='numbers' for a number."
        )
    return replace(artefact, classes=names)


def _head_rows(place: Path) -> int | None:
    """How many classes the head that an adapter brings has; None where it brings none."""
    with open_weights(place) as file:
        places = [name.split(".") for name in file.keys()]  # noqa: SIM118  (a handle, not a dict)
        # the whole word: DistilBERT's pre_classifier is another layer; the head lies highest: attention has out_proj
        heads = [parts for parts in places if parts[-1] == "weight" and parts[-2] in HEADS]
        return file.get_slice(".".join(min(heads, key=len))).get_shape()[0] if heads else None


def with_tokens(
    artefact: Artefact, tokens: Sequence[int | str] | None, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Artefact:
    """Answer tokens as ids, and names of their classes: those stored, or the tokens themselves."""
    if tokens is None and artefact.inputs.choices_columns and artefact.classes:
        tokens = letter_tokens(artefact.classes, tokenizer)
    if tokens is None:
        raise ValueError(
            f"{folder} does not say which tokens of the language model stand for the classes. Name them: "
            "label_tokens=[' yes', ' no'], texts of one token each."
        )
    ids = check_label_tokens(tokens, tokenizer, len(tokenizer))
    names = artefact.classes or _different([tokenizer.decode([token]).strip() for token in ids], "The label_tokens")
    if len(names) != len(ids):
        raise ValueError(f"{len(ids)} label_tokens were given for {len(names)} classes ({', '.join(names[:8])}).")
    return replace(artefact, label_tokens=tuple(ids), classes=names)


def _with_adapters(base: nn.Module, places: dict[str, Path], name: str) -> PeftModel:
    """The adapters on their base model; one that does not fit says so."""
    try:
        first, *others = places
        model = PeftModel.from_pretrained(base, places[first], adapter_name=first)
        for other in others:
            model.load_adapter(places[other], adapter_name=other)
    except (RuntimeError, KeyError) as error:
        told = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"The adapter in {next(iter(places.values()))} does not fit the base model {name}: {told} Load the base "
            "model that it was trained on, with base_model= if it lies elsewhere."
        ) from error
    return model


def _check_adapters(artefact: Artefact, folder: Path, refuse: bool) -> None:
    """Refuse adapters that are not those that the artefact was written for, or warn of them."""
    try:
        artefact.check_belongs(folder)
    except ValueError as error:
        if refuse:
            raise
        warnings.warn(f"{error} It is loaded without a temperature.", UserWarning, stacklevel=3)


def _check_base(model: PeftModel, artefact: Artefact, folder: Path, name: str, refuse: bool) -> None:
    """The same for the base model."""
    if not is_other_base(artefact.base, base_fingerprint(model)):
        return
    told = (
        f"The base model {name} is not the one that the adapter in {folder} was trained on"
        f"{' and its temperature fitted with' if artefact.ways else ''}: it has other weights, or a part that its "
        "checkpoint lacks and is made fresh at loading. Say with base_model= where that one lies"
    )
    if refuse:
        raise ValueError(f"{told}; recalibrate=False loads the adapter without a temperature.")
    warnings.warn(f"{told}.", UserWarning, stacklevel=4)


def _of_kind(artefact: Artefact, kind: str, folder: Path) -> Artefact:
    """The same with what a caller says it answers with, where nothing says otherwise."""
    if kind not in HEAD_KINDS:
        raise ValueError(f"kind must be one of {', '.join(HEAD_KINDS)}, got {kind!r}.")
    if artefact.kind != kind and (artefact.ways or artefact.kind != "classes"):
        raise ValueError(f"{folder} says that it answers with {artefact.kind}, so kind={kind!r} cannot be.")
    target = (0.0, 1.0) if kind == "numbers" and artefact.target is None else artefact.target
    return replace(artefact, kind=kind, target=target)


def _different(names: Sequence[str], source: str) -> tuple[str, ...]:
    """Names of classes, each another one: the answers could not be told apart, nor the file be read again."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(
            f"{source} give the name {twice[0]!r} to more than one class; give label_names= a different one to each."
        )
    return tuple(map(str, names))


def _name_of(place: str) -> str:
    return "default" if place == HERE else place.replace("/", "-").replace(".", "-")
