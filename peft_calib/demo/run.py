"""From text to a calibrated number: plain LoRA and HyperLoRA, trained and measured alike, side by side."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForSequenceClassification, TrainerCallback

from peft_calib import HyperLoraConfig, export_lora
from peft_calib.trainer_callbacks import CalibrationCallback

from .data import TextData
from .measure import Logits, MethodResult, measure, reliability_grid, result_table
from .training import FittedAdapter, TrainingSettings, embedded_model, predict_logits, train_adapter

__all__ = ["FINISHED", "check_output_dir", "run_demo"]

FINISHED = "report.json"  # written last: a folder that has it holds a finished run
METHODS: dict[str, type[LoraConfig] | type[HyperLoraConfig]] = {"LoRA": LoraConfig, "HyperLoRA": HyperLoraConfig}


def check_output_dir(output_dir: str | Path, overwrite: bool = False) -> Path:
    """The output folder, which must not hold a finished run unless that may be overwritten; nothing is touched.

    Raises:
        FileExistsError: if the folder holds a finished run and `overwrite` is false, or is a file.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder")
    if (path / FINISHED).exists() and not overwrite:
        raise FileExistsError(f"{path} holds a finished run; name another folder, or pass --overwrite to replace it")
    return path


def run_demo(
    data: TextData,
    settings: TrainingSettings,
    output_dir: str | Path,
    *,
    rank: int = 8,
    target_modules: str | list[str] = "all-linear",
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train plain LoRA and HyperLoRA alike and report how calibrated each is.

    Every method gets the same rows, the same head, the same optimiser and learning rate. A temperature is fitted for
    each on the calibration rows; all numbers are of the test rows. Written to the folder: both adapters, HyperLoRA
    also as a plain LoRA, `reliability.png`, and `report.json`, last.

    Args:
        data: what `load_text_data` gives.
        settings: shared by both methods.
        output_dir: folder of the results.
        rank: of both adapters; `lora_alpha` is twice that.
        target_modules: of both adapters, as PEFT takes them.
        overwrite: replace a finished run.
        console: where progress and the table are shown.

    Returns:
        The content of `report.json`.

    Raises:
        FileExistsError: if the folder holds a finished run.
    """
    folder = check_output_dir(output_dir, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).unlink(missing_ok=True)  # from here on the old run counts as replaced
    console = console or Console()
    results: list[MethodResult] = []
    report: dict[str, Any] = {"methods": {}}
    with _quiet(), _progress(console) as progress:
        for name, config_class in METHODS.items():
            config = config_class(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=target_modules)
            place = folder / name.lower()
            callbacks = [_StepProgress(progress, f"train {name}"), CalibrationCallback()]
            fitted = train_adapter(config, data, settings, place, callbacks)
            fitted.model.save_pretrained(str(place))
            logits = _logits(fitted, data, settings, progress, name)
            result = measure(name, logits, _labels(data.calibration), _labels(data.test), settings.seed)
            results.append(result)
            report["methods"][name] = {
                "trainable_parameters": fitted.trainable_parameters,
                "training_seconds": round(fitted.seconds, 1),
                **result.to_dict(),
            }
            if config_class is HyperLoraConfig:
                report["export"] = _export(fitted, data, settings, folder / "hyperlora-as-lora", logits)
    report |= {"data": _describe(data), "settings": asdict(settings), "rank": rank, "environment": _environment()}
    reliability_grid(results).savefig(folder / "reliability.png", dpi=120)
    _write_json(folder / FINISHED, report)
    console.print(result_table(results, _title(data, settings)))
    console.print(
        f"Written to {folder}: {FINISHED}, reliability.png, and the adapters lora, hyperlora, hyperlora-as-lora."
    )
    return report


def _logits(
    fitted: FittedAdapter, data: TextData, settings: TrainingSettings, progress: Progress, name: str
) -> Logits:
    splits = [data.calibration, data.test, *([] if data.outside is None else [data.outside])]
    task = progress.add_task(f"predict with {name}", total=sum(map(len, splits)))
    return Logits(
        *(
            predict_logits(fitted.model, fitted.tokenizer, rows, settings, lambda done: progress.advance(task, done))
            for rows in splits
        )
    )


def _export(
    fitted: FittedAdapter, data: TextData, settings: TrainingSettings, path: Path, logits: Logits
) -> dict[str, Any]:
    """Export as plain LoRA, load that with stock PEFT onto a fresh base model, and compare logits."""
    export_lora(fitted.model, path)
    base = AutoModelForSequenceClassification.from_pretrained(
        settings.model or embedded_model(), num_labels=len(data.label_names), ignore_mismatched_sizes=True
    )
    base.config.pad_token_id = fitted.tokenizer.pad_token_id
    reloaded = PeftModel.from_pretrained(base, path)
    again = predict_logits(reloaded, fitted.tokenizer, data.calibration, settings)
    difference = float(np.abs(again - logits.calibration).max())
    return {"folder": path.name, "max_abs_logit_difference": difference}


def _describe(data: TextData) -> dict[str, Any]:
    rows = {name: len(getattr(data, name)) for name in ("train", "calibration", "test")}
    rows["outside"] = 0 if data.outside is None else len(data.outside)
    return {"name": data.name, "rows": rows, "label_names": list(data.label_names)}


def _environment() -> dict[str, Any]:
    packages = ("peft-calib", "torch", "transformers", "peft", "datasets", "numpy")
    return {"python": platform.python_version(), "cores": os.cpu_count()} | {name: version(name) for name in packages}


def _title(data: TextData, settings: TrainingSettings) -> str:
    model = "all-MiniLM-L6-v2" if settings.model is None else settings.model
    return f"{model} on {data.name}: {len(data.test)} test rows, {len(data.label_names)} classes"


def _labels(rows: datasets.Dataset) -> np.ndarray:
    return np.asarray(rows["label"][:])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
    os.replace(temporary, path)


class _StepProgress(TrainerCallback):
    """Optimiser steps of one training run as a bar, or, where bars cannot be drawn, as a few lines."""

    def __init__(self, progress: Progress, description: str) -> None:
        self.progress, self.description = progress, description

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.task = self.progress.add_task(self.description, total=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(self.task, completed=state.global_step)
        quarter = max(1, state.max_steps // 4)
        if not self.progress.console.is_terminal and state.global_step % quarter == 0:
            self.progress.console.print(f"{self.description}: step {state.global_step} of {state.max_steps}")


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


@contextmanager
def _quiet() -> Iterator[None]:
    """Our own bars and table instead of the libraries'; their settings are put back afterwards."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars[0]:
            transformers.logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()
