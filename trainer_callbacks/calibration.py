# SPDX-License-Identifier: Apache-2.0
"""Calibration at every evaluation of the stock Trainer, without a subclass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_calib.calibration import CalibrationReport, calibration_report
from peft_calib.calibration.inputs import as_numpy, check_num_bins
from peft_calib.calibration.panel import KEYS
from peft_calib.calibration.plots import reliability_figure

from .watcher import ForwardWatcher

IGNORE_INDEX = -100
# A token classifier has a tag set; more outputs than this a position is a vocabulary.
MAX_TOKEN_CLASSES = 1024
DEFAULT_SCORES = (
    "accuracy",
    "nll",
    "brier",
    "ece",
    "mce",
    "ace",
    "classwise_ece",
    "smooth_ece",
    "aurc",
    "error_auroc",
    "mean_confidence",
)


def preprocess_logits_for_calibration(
    logits: torch.Tensor | tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    answer_token_ids: Sequence[int] | None = None,
) -> torch.Tensor:
    """Keeps what calibration needs of a batch, for `Trainer(preprocess_logits_for_metrics=...)`.

    Classifiers keep their logits in float32. A causal language model that answers with one of a few tokens keeps the
    logits of those tokens at the position before the first label: `(B, T, V)` becomes `(B, C)`.

    Args:
        logits: `(B, C)`, `(B, T, C)`, or a tuple that begins with such a tensor.
        labels: `(B,)`, or `(B, T)` with -100 where there is no label.
        answer_token_ids: the token of each class, for multiple choice by a causal language model; give it with
            `functools.partial`, or use the callback's own `preprocess_logits_for_metrics`.

    Returns:
        `(B, C)` or `(B, T, C)` float32.

    Raises:
        ValueError: for a whole vocabulary without `answer_token_ids`, or logits that are not those of a classifier.

    Example:
        >>> logits = (torch.zeros(2, 3, dtype=torch.bfloat16), None)
        >>> preprocess_logits_for_calibration(logits, torch.tensor([0, 1])).dtype
        torch.float32
    """
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    if answer_token_ids is not None:
        return _answer_logits(logits, labels, answer_token_ids)
    if logits.dim() not in (2, 3) or logits.shape[-1] < 2:
        raise ValueError(
            f"Calibration needs logits of shape (B, C) or (B, T, C) with C >= 2, got {tuple(logits.shape)}."
        )
    if logits.dim() == 3 and logits.shape[-1] > MAX_TOKEN_CLASSES:
        raise ValueError(
            f"These logits cover a vocabulary of {logits.shape[-1]}. Name the tokens that answer the question: "
            "functools.partial(preprocess_logits_for_calibration, answer_token_ids=[...]), or answer_token_ids of "
            "CalibrationCallback."
        )
    return logits.float()


class CalibrationCallback(TrainerCallback):
    """Adds calibration numbers to the metrics of every evaluation, and saves a report and a reliability diagram.

    Alone, in `callbacks=[...]`, it watches the logits and labels of the evaluation loop. Given to the Trainer as its
    `compute_metrics` too, it sees what the Trainer gathers, which is the way for several processes and for loggers
    that come before user callbacks:

        callback = CalibrationCallback()
        Trainer(..., callbacks=[callback], compute_metrics=callback.compute_metrics,
                preprocess_logits_for_metrics=preprocess_logits_for_calibration)

    For every evaluation the output folder gets `reliability_<split>_step_<n>.png` and
    `calibration_<split>_step_<n>.json`, written by the main process.

    Args:
        num_bins: bins of every binned score.
        scores: which scores of the report to log; the JSON file has them all.
        confidence_level: if given, intervals and noise floor are computed too, and `<score>_low`, `<score>_high` and
            `<score>_floor` (the upper end of the noise band) are logged for `ece`.
        answer_token_ids: token of each class, for multiple choice by a causal language model.
        diagram: whether to draw.
        compute_metrics: a further function of the predictions, whose numbers are added to these.

    Raises:
        ValueError: for an unknown score or a bad number of bins.
    """

    def __init__(
        self,
        num_bins: int = 15,
        *,
        scores: Sequence[str] = DEFAULT_SCORES,
        confidence_level: float | None = None,
        answer_token_ids: Sequence[int] | None = None,
        diagram: bool = True,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ) -> None:
        unknown = sorted(set(scores) - set(KEYS))
        if unknown:
            raise ValueError(f"Unknown scores {unknown}; a report has {', '.join(KEYS)}.")
        self.num_bins = check_num_bins(num_bins)
        self.scores = tuple(scores)
        self.confidence_level = confidence_level
        self.answer_token_ids = None if answer_token_ids is None else list(answer_token_ids)
        self.diagram = diagram
        self.report: CalibrationReport | None = None
        self._other_metrics = compute_metrics
        self._watcher = ForwardWatcher(self.preprocess_logits_for_metrics)
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._unsaved = False

    def preprocess_logits_for_metrics(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """`preprocess_logits_for_calibration` with this callback's answer tokens."""
        return preprocess_logits_for_calibration(logits, labels, self.answer_token_ids)

    def compute_metrics(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Scores of the gathered predictions; fits `batch_eval_metrics`, where batches come one at a time.

        Args:
            prediction: logits and labels from the Trainer.
            compute_result: False while further batches follow.

        Returns:
            Score to number; empty while batches follow.
        """
        logits, labels = prediction.predictions, prediction.label_ids
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        self._batches.append(self._flat(as_numpy(logits), as_numpy(labels)))
        if not compute_result:
            return {}
        self._watcher.clear()
        metrics = self._measure(self._batches)
        self._batches = []
        if self._other_metrics is not None:
            metrics |= self._other_metrics(prediction)
        return metrics

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to watch the model."""
        self._watcher.attach(kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watches the model that is trained, also when the callback was added later."""
        self._watcher.attach(kwargs.get("model"))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the logits and labels of the step that has just been evaluated."""
        self._watcher.keep()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds the numbers to the logs of an evaluation, before later callbacks print them."""
        prefix = _prefix(logs or {})
        if prefix is None or "train_runtime" in logs:
            return
        added = self._finish(args, state, prefix, logs)
        if added and state.log_history:
            state.log_history[-1].update(added)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Adds the numbers to the metrics of `Trainer.predict`."""
        self._finish(args, state, _prefix(metrics) or "test_", metrics)

    def _finish(
        self, args: TrainingArguments, state: TrainerState, prefix: str, logs: dict[str, Any]
    ) -> dict[str, float]:
        batches = self._watcher.take()
        added: dict[str, float] = {}
        if not self._unsaved and batches:
            if args.world_size > 1:
                warnings.warn(
                    "With several processes CalibrationCallback needs the Trainer to gather predictions: pass "
                    "compute_metrics=callback.compute_metrics as well. No calibration numbers were added.",
                    UserWarning,
                    stacklevel=2,
                )
                return {}
            flat = [self._flat(logits, labels) for logits, labels in batches]
            added = {prefix + key: value for key, value in self._measure(flat).items() if prefix + key not in logs}
            logs.update(added)
        if self._unsaved and args.process_index == 0:
            self._save(Path(args.output_dir or "."), prefix.rstrip("_"), state.global_step)
        self._unsaved = False
        return added

    def _measure(self, batches: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        logits = np.concatenate([batch[0] for batch in batches])
        labels = np.concatenate([batch[1] for batch in batches])
        self.report = calibration_report(
            logits, labels, input="logits", num_bins=self.num_bins, confidence_level=self.confidence_level
        )
        self._unsaved = True
        metrics = {key: self.report[key] for key in self.scores}
        if self.report.intervals is not None and self.report.floor is not None:
            low, high = self.report.intervals["ece"]
            metrics |= {"ece_low": low, "ece_high": high, "ece_floor": self.report.floor["ece"].high}
        # A score that is not defined (AUROC without an error, say) is left out: loggers and JSON do not take NaN well.
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    def _flat(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labelled rows of one batch."""
        if self.answer_token_ids is not None and labels.ndim == 2:
            labels = _answer_classes(labels, self.answer_token_ids)
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"Logits of shape {logits.shape} do not go with labels of shape {labels.shape}. Give the Trainer "
                "preprocess_logits_for_metrics=callback.preprocess_logits_for_metrics; for a causal language model "
                "give "
                "CalibrationCallback the answer_token_ids."
            )
        keep = labels.reshape(-1) != IGNORE_INDEX
        return logits.reshape(-1, logits.shape[-1])[keep], labels.reshape(-1)[keep]

    def _save(self, folder: Path, split: str, step: int) -> None:
        assert self.report is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"calibration_{split}_step_{step}.json").write_text(self.report.to_json() + "\n", encoding="utf-8")
        if self.diagram:
            title = f"{split}, step {step}"
            figure = reliability_figure(self.report.bins, confidence_level=self.confidence_level or 0.95, title=title)
            figure.savefig(folder / f"reliability_{split}_step_{step}.png", dpi=120)


def _prefix(metrics: Mapping[str, Any]) -> str | None:
    names = [key for key in metrics if key.endswith("_runtime")]
    return names[0].removesuffix("runtime") if names else None


def _answer_position(labels: torch.Tensor) -> torch.Tensor:
    """`(B,)` position of the first label of each row."""
    return (labels != IGNORE_INDEX).int().argmax(dim=1)


def _answer_logits(logits: torch.Tensor, labels: torch.Tensor, answer_token_ids: Sequence[int]) -> torch.Tensor:
    if logits.dim() != 3 or labels.dim() != 2:
        raise ValueError(
            f"answer_token_ids are for causal language models with logits (B, T, V) and labels (B, T), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    # The logits at a position predict the token after it.
    before = (_answer_position(labels) - 1).clamp(min=0)
    rows = torch.arange(len(logits), device=logits.device)
    tokens = torch.as_tensor(list(answer_token_ids), device=logits.device)
    return logits[rows, before.to(logits.device)][:, tokens].float()


def _answer_classes(labels: np.ndarray, answer_token_ids: Sequence[int]) -> np.ndarray:
    """`(B,)` class of each row's first labelled token; rows without one keep -100.

    Raises:
        ValueError: if that token is not among the answers.
    """
    first = (labels != IGNORE_INDEX).argmax(axis=1)
    tokens = labels[np.arange(len(labels)), first]
    classes = np.full(len(labels), IGNORE_INDEX, np.int64)
    for k, token in enumerate(answer_token_ids):
        classes[tokens == token] = k
    strange = tokens[(classes == IGNORE_INDEX) & (tokens != IGNORE_INDEX)]
    if len(strange):
        raise ValueError(
            f"The first labelled token of a row is {strange[0]}, which is not one of answer_token_ids "
            f"{list(answer_token_ids)}. "
            "Mask the prompt with -100, so that the answer's token comes first."
        )
    return classes
