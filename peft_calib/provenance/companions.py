"""Small files that belong to an adapter and are saved beside it, whoever saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from ..files import write_atomically
from ..identity import active_adapter

#: The recalibration that goes with an adapter.
RECALIBRATION_FILE = "recalibration.json"


def recalibration_text(state: dict[str, Any], digest: str, num_samples: int | None, seed: int, **more: Any) -> str:
    """What `recalibration.json` says: a fitted method, the adapter it was fitted for, and how that predicted.

    Args:
        state: Of the fitted method.
        digest: Of the adapter.
        num_samples: Draws whose averaged probabilities it was fitted to; None for the mean.
        seed: Of the draws.
        more: What else was chosen with it.
    """
    how = {"how": "mean" if num_samples is None else "sample", "num_samples": num_samples, "seed": seed}
    return json.dumps({**state, "adapter": digest, **how, **more}, indent=1) + "\n"


def attach_file(model: nn.Module, name: str, text: str, adapter_name: str | None = None) -> None:
    """Have a text file written beside an adapter of any PEFT method every time the adapter is saved.

    `save_pretrained`, `push_to_hub` and the Trainer's checkpoints all write the adapter's configuration; the file
    travels with that. A later call with the same name replaces it; it is not read back on loading.
    """
    taken = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if not isinstance(name, str) or name in ("", ".", "..", *taken) or any(part in name for part in "/\\\0"):
        raise ValueError(
            f"{name!r} cannot be written beside an adapter: give the name of a file, without a folder, that is none "
            f"of {', '.join(taken)}."
        )
    _files(model, adapter_name)[name] = text


def attached_file(model: nn.Module, name: str, adapter_name: str | None = None) -> str | None:
    """The text attached to an adapter under a name, or `None`."""
    adapter = active_adapter(model, adapter_name)  # says so where there is no adapter
    saver = model.peft_config[adapter].__dict__.get("save_pretrained")
    return saver.files.get(name) if isinstance(saver, _SaveWithFiles) else None  # looking changes no configuration


def detach_file(model: nn.Module, name: str, adapter_name: str | None = None) -> None:
    """Stop writing a file beside an adapter; files already written stay."""
    _files(model, adapter_name).pop(name, None)


class _SaveWithFiles:
    """`save_pretrained` of one configuration object, then the files attached to it."""

    def __init__(self, config: PeftConfig) -> None:
        self.config = config
        self.files: dict[str, str] = {}

    def __call__(self, save_directory: str, **kwargs: Any) -> None:
        type(self.config).save_pretrained(self.config, save_directory, **kwargs)
        for name, text in self.files.items():
            write_atomically(Path(save_directory) / name, text)


def _files(model: nn.Module, adapter_name: str | None) -> dict[str, str]:
    """Texts by the name of their file, which the adapter's configuration writes whenever it is saved."""
    name = active_adapter(model, adapter_name)  # says so where there is no adapter
    config = model.peft_config[name]
    saver = config.__dict__.get("save_pretrained")
    if not isinstance(saver, _SaveWithFiles):
        saver = config.save_pretrained = _SaveWithFiles(config)  # on the instance: its fields and JSON do not see it
    return saver.files
