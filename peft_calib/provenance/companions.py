"""Small files that belong to an adapter and are saved beside it, whoever saves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from ..artefact import ARTEFACT_FILE, DECISION_FILES, HERE, Artefact
from ..base_models import base_fingerprint
from ..files import write_atomically
from ..identity import active_adapter, adapter_digest, unwrapped
from ..json_files import parse_json


def attach_recalibration(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    num_samples: int | None,
    seed: int,
    label_tokens: Sequence[int] | None = None,
    **more: Any,
) -> Artefact:
    """Have the active adapter saved with a recalibration of one way of predicting, and what else a prediction needs.

    What was attached for another way, or for the same adapter before, stays; every process of a sharded model has to
    call it.

    Args:
        model: With the adapter it was fitted for.
        state: Of the fitted method.
        num_samples: Draws whose averaged probabilities it was fitted to; None for the mean.
        seed: Of the draws.
        label_tokens: Ids of the tokens that stand for the classes, where a language model answers.
        more: What else was chosen with it.

    Returns:
        What is written beside the adapter.
    """
    how = "mean" if num_samples is None else "sample"
    described = _described(model, label_tokens)
    found = described.with_way(how, num_samples or 1, seed, state, **more)
    attach_file(model, ARTEFACT_FILE, found.text())
    for name in DECISION_FILES.values():  # a rule that was fitted to probabilities before it is none of these
        detach_file(model, name)
    return found


def _described(model: nn.Module, label_tokens: Sequence[int] | None) -> Artefact:
    """What a prediction needs of a model: what was attached to it and still holds, or what it says itself."""
    digest, base = adapter_digest(model), base_fingerprint(model)
    text = attached_file(model, ARTEFACT_FILE)
    known = Artefact() if text is None else Artefact.from_fields(parse_json(text, ARTEFACT_FILE))
    if dict(known.adapters) != {HERE: digest}:
        known = replace(known, ways={}, adapters={HERE: digest})
    inner = unwrapped(model)
    labels = getattr(getattr(inner, "config", None), "id2label", None) or {}
    task = inner.peft_config[active_adapter(model)].task_type
    if known.classes is None and task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) and len(labels) > 1:
        names = tuple(str(name) for _, name in sorted(labels.items()))
        known = replace(known, classes=names if len(set(names)) == len(names) else None)
    tokens = known.label_tokens if label_tokens is None else tuple(map(int, label_tokens))
    return replace(known, label_tokens=tokens, base=base)


def attach_file(model: nn.Module, name: str, content: str | bytes, adapter_name: str | None = None) -> None:
    """Have a file written beside an adapter of any PEFT method every time the adapter is saved.

    `save_pretrained`, `push_to_hub` and the Trainer's checkpoints all write the adapter's configuration; the file
    travels with that. A later call with the same name replaces it; it is not read back on loading. A folder would not
    travel: transformers' `push_to_hub` fails at one that lies in another.
    """
    taken = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if not isinstance(name, str) or name in ("", ".", "..", *taken) or any(part in name for part in "/\\\0"):
        raise ValueError(
            f"{name!r} cannot be written beside an adapter: give the name of a file, without a folder, that is none "
            f"of {', '.join(taken)}."
        )
    _files(model, adapter_name)[name] = content


def attached_file(model: nn.Module, name: str, adapter_name: str | None = None) -> str | None:
    """The text attached to an adapter under a name, or `None`."""
    adapter = active_adapter(model, adapter_name)  # says so where there is no adapter
    saver = model.peft_config[adapter].__dict__.get("save_pretrained")
    if not isinstance(saver, _SaveWithFiles):  # looking changes no configuration
        return None
    content = saver.files.get(name)
    return content if content is None or isinstance(content, str) else content.decode()


def detach_file(model: nn.Module, name: str, adapter_name: str | None = None) -> None:
    """Stop writing a file beside an adapter; files already written stay."""
    _files(model, adapter_name).pop(name, None)


class _SaveWithFiles:
    """`save_pretrained` of one configuration object, then the files attached to it."""

    def __init__(self, config: PeftConfig) -> None:
        self.config = config
        self.files: dict[str, str | bytes] = {}

    def __call__(self, save_directory: str, **kwargs: Any) -> None:
        type(self.config).save_pretrained(self.config, save_directory, **kwargs)
        for name, content in self.files.items():
            write_atomically(Path(save_directory) / name, content)


def _files(model: nn.Module, adapter_name: str | None) -> dict[str, str | bytes]:
    """Contents by the name of their file, which the adapter's configuration writes whenever it is saved."""
    name = active_adapter(model, adapter_name)  # says so where there is no adapter
    config = model.peft_config[name]
    saver = config.__dict__.get("save_pretrained")
    if not isinstance(saver, _SaveWithFiles):
        saver = config.save_pretrained = _SaveWithFiles(config)  # on the instance: its fields and JSON do not see it
    return saver.files
