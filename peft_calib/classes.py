"""The names of an adapter's classes: PEFT's auto classes asked to read them beside it.

An adapter's own files do not say how many classes its head has, so PEFT builds a base model of two and cannot load a
head of five. A `config.json` would say it, but transformers takes a folder that holds one for a whole model, and no
longer finds the base model from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification

from .artefact import ARTEFACT_FILE, CLASSES_FILE, KINDS, MEND, Artefact, read_old_names
from .json_files import read_json


def read_class_names(adapter: str | Path, **hub: Any) -> list[str] | None:
    """The names of an adapter's classes, None where nothing names them; `hub` says where on the Hub it lies."""
    names = _described(adapter, hub).classes
    return None if names is None else list(names)


def _described(adapter: str | Path, hub: dict[str, Any]) -> Artefact:
    """What lies beside an adapter says of it; nothing where nothing lies there."""
    file = _file_beside(adapter, ARTEFACT_FILE, hub)
    if file is not None:
        return Artefact.from_fields(read_json(file, MEND))
    file = _file_beside(adapter, CLASSES_FILE, hub)  # of earlier versions
    return Artefact(classes=None if file is None else read_old_names(file))


def _file_beside(adapter: str | Path, name: str, hub: dict[str, Any]) -> Path | None:
    """A file of an adapter, here or of the Hub; None where there is none."""
    if Path(adapter).is_dir():
        file = Path(adapter) / (hub.get("subfolder") or "") / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(str(adapter), name, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None  # whether there is such an adapter at all, PEFT says better


def name_classes_of_adapters() -> None:
    """Have PEFT's auto classes of classifiers build the base model with the classes that a folder names.

    An adapter without such a file is loaded as before, as is one whose caller says `num_labels` or `id2label`.
    """
    for auto in (AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification):
        load = auto.from_pretrained.__func__
        if not getattr(load, "names_classes", False):
            auto.from_pretrained = classmethod(_naming_classes(load))


def _naming_classes(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def from_pretrained(cls: type, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        if not {"num_labels", "id2label"} & set(kwargs):
            hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in kwargs}
            found = _described(pretrained_model_name_or_path, hub)
            kwargs = ({} if found.classes is None else class_options(found.classes, found.kind)) | kwargs
        return load(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.names_classes = True  # type: ignore[attr-defined]
    return from_pretrained


def class_options(names: Sequence[str], kind: str = "classes") -> dict[str, Any]:
    """What transformers is to load a model with for a head of these classes, or of another kind of answer."""
    return {
        **({} if KINDS[kind] is None else {"problem_type": KINDS[kind]}),
        "id2label": dict(enumerate(names)),
        "label2id": {name: position for position, name in enumerate(names)},
        "ignore_mismatched_sizes": True,  # a head for another number of classes is replaced
    }
