"""Exported draws in stock PEFT: load K plain LoRA folders and predict with all of them in one mixed batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..draws_index import DRAWS_INDEX, read_draws_index
from .baselines import AdapterDraws
from .engine import BatchPredictor, How
from .labels import LabelsPrediction
from .result import Prediction, RegressionPrediction


def load_frozen(base: nn.Module, path: str | Path) -> PeftModel:
    """Load every draw of a folder written by `export_lora(..., num_samples=K)` as an adapter of its own.

    Args:
        base: The base model; its adapted layers are wrapped in place.
        path: The folder.

    Returns:
        A `PeftModel` with adapters `draw-0 ... draw-(K-1)`, and `mean` if it was exported.

    Raises:
        FileNotFoundError: If a draw is missing.
        ValueError: If the folder holds no exported draws, or not those that were written.

    Example:
        >>> load_frozen(nn.Linear(2, 2), "nowhere")
        Traceback (most recent call last):
        ...
        ValueError: nowhere holds no exported draws (draws.json). Write them with export_lora(..., num_samples=K).
    """
    folder = Path(path)
    if not (folder / DRAWS_INDEX).is_file():
        raise ValueError(
            f"{path} holds no exported draws ({DRAWS_INDEX}). Write them with export_lora(..., num_samples=K)."
        )
    draws, mean = read_draws_index(folder)
    names = [*draws, *([mean] if mean is not None else [])]
    model = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return model


def predict_frozen(
    model: PeftModel,
    batch: Mapping[str, Any],
    adapter_names: Sequence[str] | None = None,
    *,
    how: How = "sample",
    task: str = "auto",
    label_tokens: Sequence[int | str] | None = None,
    tokenizer: Any = None,
    memory_budget: int | None = None,
) -> Prediction | LabelsPrediction | RegressionPrediction:
    """Predict with several adapters of one model, each a draw: exported draws, or the members of a deep ensemble.

    Args:
        model: A `PeftModel` that holds the adapters, such as `load_frozen` gives.
        batch: What the model takes, by name.
        adapter_names: The adapters; `None` takes all whose name begins with `draw-`.
        how: `"sample"`, or `"late"`.
        task: See `predict`.
        label_tokens: See `predict`.
        tokenizer: See `predict`.
        memory_budget: See `predict`.

    Returns:
        The prediction; sample k is the k-th adapter.

    Raises:
        ValueError: If there is no such adapter, or one is disabled or merged.
    """
    if adapter_names is None:
        adapter_names = sorted((n for n in model.peft_config if n.startswith("draw-")), key=lambda n: (len(n), n))
    source = AdapterDraws(model, adapter_names)
    options = {"task": task, "label_tokens": label_tokens, "tokenizer": tokenizer, "budget": memory_budget}
    return BatchPredictor(source, how, len(source.names), None, **options)(batch)
