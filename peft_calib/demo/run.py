"""From text to a calibrated number: LoRA, HyperLoRA and BayesianLoRA, trained and measured alike, side by side."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForSequenceClassification

from peft_calib import BayesianLoraConfig, HyperLoraConfig, export_lora
from peft_calib.calibration import calibration_report, log_probabilities
from peft_calib.prediction import Prediction
from peft_calib.runs.baseline import MostFrequent
from peft_calib.runs.folder import without_nan
from peft_calib.runs.methods import HEADS
from peft_calib.trainer_callbacks import CalibrationCallback, RegularizerScheduleCallback

from ..console import StepProgress, progress_bars, quiet
from ..files import fill_folder, folder_lock, write_atomically
from .data import TextData
from .measure import Logits, MethodResult, draws_report, measure, reliability_grid, result_table
from .training import FittedAdapter, TrainingSettings, embedded_model, predict_draws, predict_logits, train_adapter

__all__ = ["FINISHED", "check_output_dir", "run_demo"]

FINISHED = "report.json"  # written last: a folder that has it holds a finished run
METHODS: dict[str, Any] = {"LoRA": LoraConfig, "HyperLoRA": HyperLoraConfig, "BayesianLoRA": BayesianLoraConfig}
NUM_DRAWS = 8


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
    """Train LoRA, HyperLoRA and BayesianLoRA alike and report how calibrated each is.

    Every method gets the same rows, the same head, the same optimiser and learning rate. A temperature is fitted for
    each on the calibration rows; all numbers are of the test rows. BayesianLoRA is measured twice: its mean, which
    costs what LoRA costs, and the mean of the probabilities of 8 draws. Written to the folder: the adapters, HyperLoRA
    also as a plain LoRA, `reliability.png`, and `report.json`, last.

    Args:
        data: what `load_text_data` gives.
        settings: shared by all methods.
        output_dir: folder of the results.
        rank: of all adapters; `lora_alpha` is twice that.
        target_modules: of all adapters, as PEFT takes them.
        overwrite: replace a finished run.
        console: where progress and the table are shown.

    Returns:
        The content of `report.json`.

    Raises:
        FileExistsError: if the folder holds a finished run.
    """
    place, report = check_output_dir(output_dir, overwrite), {}
    console = console or Console()

    def write(folder: Path) -> None:
        report.update(_made(data, settings, folder, rank, target_modules, console))

    with folder_lock(place):
        fill_folder(place, write, FINISHED)
    adapters = ", ".join([*map(str.lower, METHODS), "hyperlora-as-lora"])
    console.print(f"Written to {place}: {FINISHED}, reliability.png, and the adapters {adapters}.")
    return report


def _made(
    data: TextData,
    settings: TrainingSettings,
    folder: Path,
    rank: int,
    target_modules: str | list[str],
    console: Console,
) -> dict[str, Any]:
    """Train and measure every method into a folder; the content of the report."""
    results: list[MethodResult] = []
    report: dict[str, Any] = {"methods": {}}
    with quiet(), progress_bars(console) as progress:
        for name, config_class in METHODS.items():
            config = config_class(
                task_type="SEQ_CLS",
                r=rank,
                lora_alpha=2 * rank,
                target_modules=target_modules,
                exclude_modules=HEADS if target_modules == "all-linear" else None,
            )
            callbacks = [
                StepProgress(progress, f"train {name}"),
                CalibrationCallback(),
                RegularizerScheduleCallback(),
            ]
            fitted = train_adapter(config, data, settings, folder / name.lower(), callbacks)
            fitted.model.save_pretrained(str(folder / name.lower()))
            logits = _logits(fitted, data, settings, progress, name)
            results.append(_measure(name, logits, data, settings))
            report["methods"][name] = {
                "trainable_parameters": fitted.trainable_parameters,
                "training_seconds": round(fitted.seconds, 1),
                **results[-1].to_dict(),
            }
            if config_class is HyperLoraConfig:
                report["export"] = _export(fitted, data, settings, folder / "hyperlora-as-lora", logits)
            if config_class is BayesianLoraConfig:
                predictions = _draws(fitted, data, settings, progress, name)
                results.append(_measure(f"{NUM_DRAWS} draws of it", _as_logits(predictions), data, settings))
                report["draws"] = {**draws_report(predictions), **_spread(fitted), **results[-1].to_dict()}
    report |= {"data": _describe(data), "settings": asdict(settings), "rank": rank, "environment": _environment()}
    known = MostFrequent.of(data.label_names, data.train["label"][:])
    labels = _labels(data.test)
    baseline = calibration_report(known.probabilities(len(labels)), labels, confidence_level=None)
    verdicts = [
        known.verdict(found.name, found.before["accuracy"], (found.before.intervals or {}).get("accuracy"), labels)
        for found in results
    ]
    report["most_frequent_class"] = {"answer": known.answer, **baseline.to_dict()}
    reliability_grid(results).savefig(folder / "reliability.png", dpi=120)
    report = without_nan(report)
    write_atomically(folder / FINISHED, json.dumps(report, indent=2, allow_nan=False))
    console.print(result_table(results, _title(data, settings), baseline))
    for verdict in filter(None, verdicts):
        console.print(verdict, markup=False, highlight=False)
    console.print(_about_draws(report["draws"]))
    return report


def _measure(name: str, logits: Logits, data: TextData, settings: TrainingSettings) -> MethodResult:
    return measure(name, logits, _labels(data.calibration), _labels(data.test), settings.seed)


def _logits(
    fitted: FittedAdapter, data: TextData, settings: TrainingSettings, progress: Progress, name: str
) -> Logits:
    splits = _splits(data)
    task = progress.add_task(f"predict with {name}", total=sum(map(len, splits)))
    return Logits(
        *(
            predict_logits(fitted.model, fitted.tokenizer, rows, settings, lambda done: progress.advance(task, done))
            for rows in splits
        )
    )


def _draws(
    fitted: FittedAdapter, data: TextData, settings: TrainingSettings, progress: Progress, name: str
) -> list[Prediction]:
    """What the draws say on the calibration, the test and the outside rows."""
    splits, (model, tokenizer) = _splits(data), (fitted.model, fitted.tokenizer)
    task = progress.add_task(f"{NUM_DRAWS} draws of {name}", total=sum(map(len, splits)))

    def advance(done: int) -> None:
        progress.advance(task, done)

    return [predict_draws(model, tokenizer, rows, settings, NUM_DRAWS, advance) for rows in splits]


def _splits(data: TextData) -> list[datasets.Dataset]:
    return [data.calibration, data.test, *([] if data.outside is None else [data.outside])]


def _as_logits(predictions: list[Prediction]) -> Logits:
    """Logarithms of the mean probabilities, so that a temperature can be fitted for the draws, too."""
    return Logits(*(log_probabilities(p.probabilities.double().numpy()) for p in predictions))


def _spread(fitted: FittedAdapter) -> dict[str, Any]:
    """How far training has moved the posterior's standard deviations, in units of the prior's."""
    tuner: Any = fitted.model.base_model
    law = tuner.get_law()
    return {"initial_sd": law.config.init_sd, "median_sd": float(law.core_sd().median())}


def _about_draws(draws: dict[str, Any]) -> str:
    disagreement = ", ".join(f"{name} {value:.3f}" for name, value in draws["mutual_information"].items())
    return (
        f"{draws['num_samples']} draws cost {draws['num_forwards']:.1f} forwards a row. Mutual information, what they "
        f"disagree on, nats: {disagreement}.\nMedian posterior standard deviation, the prior's being 1: "
        f"{draws['median_sd']:.2f}, at the start {draws['initial_sd']:.2f}."
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
