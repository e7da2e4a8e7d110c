# SPDX-License-Identifier: Apache-2.0
"""Calibration at every evaluation of the stock Trainer, without a subclass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_calib.calibration import CalibrationReport
from peft_calib.calibration.inputs import as_numpy, check_num_bins
from peft_calib.calibration.panel import KEYS
from peft_calib.calibration.plots import reliability_figure
from peft_calib.files import write_atomically
from peft_calib.prediction.draws import check_num_samples

from .choice import check_metric_for_best_model
from .forwards import sampled_logits
from .preprocess import labelled_rows, preprocess_logits_for_calibration
from .reporting import LateLog, metric_prefix
from .stream import MAX_KEPT_ROWS, RowStream
from .watcher import Forward, ForwardWatcher, gather_rows

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
#: Scores whose intervals are logged; the JSON file has those of all.
INTERVALS = ("accuracy", "nll", "brier", "ece")


class CalibrationCallback(TrainerCallback):
    """Adds calibration numbers to the metrics of every evaluation, and saves a report and a reliability diagram.

    Alone, in `callbacks=[...]`, it watches the logits and labels of the evaluation loop, on one process or many. Given
    to the Trainer as its `compute_metrics` too, it sees what the Trainer gathers, which is the way for loggers that
    come before user callbacks:

        callback = CalibrationCallback()
        Trainer(..., callbacks=[callback], compute_metrics=callback.compute_metrics,
                preprocess_logits_for_metrics=preprocess_logits_for_calibration)

    Its own memory does not grow with the number of rows; with `batch_eval_metrics=True` the Trainer's does not either.
    For every evaluation the output folder gets `reliability_<split>_step_<n>.png` and
    `calibration_<split>_step_<n>.json`, written by the main process, and TensorBoard the picture.

    Args:
        num_bins: bins of every binned score.
        scores: which scores of the report to log; the JSON file has them all. `accuracy_se`, the standard error of the
            accuracy, comes with the accuracy.
        confidence_level: of the intervals `<score>_low` and `<score>_high` of accuracy, NLL, Brier score and ECE, and
            of the noise band whose upper end is `ece_floor`; None computes none.
        num_samples: if given, each batch is evaluated with this many draws of the adapter as well, and the scores of
            their mean probabilities are logged as `sample_<score>`, at the cost of as many further forwards.
        seed: of the draws.
        max_rows: evaluations of more rows are summed up in bins, without intervals.
        answer_token_ids: token of each class, for multiple choice by a causal language model.
        diagram: whether to draw.
        compute_metrics: a further function of the predictions, whose numbers are added to these.

    Raises:
        ValueError: for an unknown score, a bad number of bins or of draws.
    """

    def __init__(
        self,
        num_bins: int = 15,
        *,
        scores: Sequence[str] = DEFAULT_SCORES,
        confidence_level: float | None = 0.95,
        num_samples: int | None = None,
        seed: int = 0,
        max_rows: int = MAX_KEPT_ROWS,
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
        self.num_samples = None if num_samples is None else check_num_samples(num_samples)
        self.seed, self.max_rows = seed, max_rows
        self.answer_token_ids = None if answer_token_ids is None else list(answer_token_ids)
        self.diagram = diagram
        self.report: CalibrationReport | None = None
        self.sample_report: CalibrationReport | None = None
        self._other_metrics = compute_metrics
        self._watcher, self._log = ForwardWatcher(), LateLog()
        self._start()
        self._wired = False
        self._unsaved = False

    def _start(self) -> None:
        """Forget the rows of the last evaluation."""
        self._seen, self._gathered, self._drawn = (RowStream(self.num_bins, self.max_rows) for _ in range(3))

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
        self._wired = True
        logits, labels = prediction.predictions, prediction.label_ids
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        self._gathered.add(*labelled_rows(as_numpy(logits), as_numpy(labels), self.answer_token_ids))
        if not compute_result:
            return {}
        metrics = self._measure(self._gathered)
        self._start()
        if self._other_metrics is not None:
            metrics |= self._other_metrics(prediction)
        return metrics

    # ----------------------------------------------------------------- events

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to watch the model; refuses to choose the best one by a score that cannot tell."""
        check_metric_for_best_model(args)
        self._watcher.attach(kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watches the model that is trained, also when the callback was added later."""
        self._watcher.attach(kwargs.get("model"))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the logits and labels of the step that has just been evaluated."""
        forward = self._watcher.take()
        if forward is None:
            return
        try:
            if self.num_samples is not None:
                self._drawn.add(*self._rows(self._sampled_logits(forward), forward.labels))
            if not self._wired:
                self._seen.add(
                    *self._rows(self.preprocess_logits_for_metrics(forward.logits, forward.labels), forward.labels)
                )
        except ValueError as error:
            warnings.warn(f"CalibrationCallback skips a batch of this evaluation: {error}", UserWarning, stacklevel=2)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds the numbers to the logs of an evaluation, before later callbacks print them."""
        prefix = metric_prefix(logs or {})
        if prefix is not None:
            added = self._finish(args, state, prefix, logs)
            if added:
                self._log.add(args, state, logs, added)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Adds the numbers to the metrics of `Trainer.predict`."""
        metrics.update(self._finish(args, state, metric_prefix(metrics) or "test_", metrics))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes TensorBoard's file."""
        self._log.close()

    # ----------------------------------------------------------------- rows

    def _rows(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
        """Labelled rows of a step, of all processes."""
        labels = labels if labels.dim() == 2 else labels.reshape(-1)
        return labelled_rows(as_numpy(gather_rows(logits)), as_numpy(gather_rows(labels)), self.answer_token_ids)

    def _sampled_logits(self, forward: Forward) -> torch.Tensor:
        assert self.num_samples is not None
        with self._watcher.paused():
            return sampled_logits(
                self._watcher.model,
                forward.inputs,
                lambda logits: self.preprocess_logits_for_metrics(logits, forward.labels),
                self.num_samples,
                self.seed,
            )

    # ----------------------------------------------------------------- numbers

    def _finish(
        self, args: TrainingArguments, state: TrainerState, prefix: str, logs: dict[str, Any]
    ) -> dict[str, float]:
        added: dict[str, float] = {}
        if not self._unsaved and len(self._seen):
            metrics = self._measure(self._seen)
            added = {prefix + key: value for key, value in metrics.items() if prefix + key not in logs}
        self._start()
        if self._unsaved and args.process_index == 0:
            self._save(args, state, prefix.rstrip("_"))
        self._unsaved = False
        return added

    def _measure(self, stream: RowStream) -> dict[str, float]:
        self.report = stream.report(self.confidence_level)
        self._unsaved = True
        metrics = self._numbers(self.report)
        self.sample_report = self._drawn.report(self.confidence_level) if len(self._drawn) else None
        if self.sample_report is not None:
            metrics |= {f"sample_{key}": value for key, value in self._numbers(self.sample_report).items()}
        # A score that is not defined (AUROC without an error, say) is left out: loggers and JSON do not take NaN well.
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    def _numbers(self, report: CalibrationReport) -> dict[str, float]:
        numbers = {key: report[key] for key in self.scores if key in report}
        if "accuracy" in numbers:
            p = numbers["accuracy"]
            numbers["accuracy_se"] = math.sqrt(p * (1 - p) / report.settings["num_rows"])
        if report.intervals is not None and report.floor is not None:
            for key in INTERVALS:
                if key in numbers:
                    numbers[f"{key}_low"], numbers[f"{key}_high"] = report.intervals[key]
            numbers["ece_floor"] = report.floor["ece"].high
        return numbers

    def _save(self, args: TrainingArguments, state: TrainerState, split: str) -> None:
        folder = Path(args.output_dir or ".")
        reports = {split: self.report, f"{split}_sample": self.sample_report}
        for name, report in reports.items():
            if report is None:
                continue
            write_atomically(folder / f"calibration_{name}_step_{state.global_step}.json", report.to_json() + "\n")
            if self.diagram:
                title = f"{name}, step {state.global_step}"
                figure = reliability_figure(report.bins, confidence_level=self.confidence_level or 0.95, title=title)
                figure.savefig(folder / f"reliability_{name}_step_{state.global_step}.png", dpi=120)
                self._log.add_figure(args, state, f"reliability/{name}", figure)
