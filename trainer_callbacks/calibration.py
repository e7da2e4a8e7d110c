"""Calibration at every evaluation of the stock Trainer, without a subclass."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_calib.calibration import CalibrationReport
from peft_calib.calibration.inputs import as_numpy, check_num_bins
from peft_calib.calibration.report.plots import reliability_figure
from peft_calib.calibration.scores.table import HEADLINES, WATCHED, refuse_unknown
from peft_calib.files import write_atomically
from peft_calib.prediction.draws import check_num_samples

from .best import check_metric_for_best_model
from .forwards import kept_logits, sampled_logits
from .outputs import answers_before_labels, label_names_of, labels_among, last_positions, logits_among, without_labels
from .preprocess import keep_for_calibration, labelled_rows, preprocess_logits_for_calibration
from .reporting import WAY_OUT, LateLog, Tally, metric_prefix
from .stream import MAX_KEPT_ROWS, NOT_FINITE, RowStream
from .watcher import Forward, ForwardWatcher, gather_rows, labels_of_step


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
    `calibration_<split>_step_<n>.json`, written by the main process, and the trackers of `report_to` the picture.

    Args:
        num_bins: Bins of every binned score.
        scores: Which scores of the report to log; the JSON file has them all. `accuracy_se`, the standard error of the
            accuracy, comes with the accuracy.
        confidence_level: Of the intervals `<score>_low` and `<score>_high` of accuracy, NLL, Brier score and ECE, and
            of the noise band whose upper end is `ece_floor`; None computes none.
        num_samples: If given, each batch is evaluated with this many draws of the adapter as well, and the scores of
            their mean probabilities are logged as `sample_<score>`, at the cost of as many further forwards.
        seed: Of the draws.
        max_rows: Evaluations of more rows are summed up in bins, without intervals.
        answer_token_ids: Token of each class, for multiple choice by a causal language model.
        diagram: Whether to draw.
        compute_metrics: A further function of the predictions, whose numbers are added to these.

    Raises:
        ValueError: For an unknown score, a bad number of bins or of draws.
    """

    def __init__(
        self,
        num_bins: int = 15,
        *,
        scores: Sequence[str] = WATCHED,
        confidence_level: float | None = 0.95,
        num_samples: int | None = None,
        seed: int = 0,
        max_rows: int = MAX_KEPT_ROWS,
        answer_token_ids: Sequence[int] | None = None,
        diagram: bool = True,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ) -> None:
        refuse_unknown(scores)
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
        self._label_names: tuple[str, ...] = ()
        self._output_names: list[list[str]] = []
        self._prefixes = {"eval_"}
        self._tally, self._missing = Tally(), set[str]()
        self._loader: weakref.ref | None = None
        self._start()
        self._wired = self._unsaved = False

    def _start(self) -> None:
        """Forget the rows of the last evaluation."""
        self._seen, self._gathered, self._drawn = (RowStream(self.num_bins, self.max_rows) for _ in range(3))

    def _begin(self, loader: Any) -> None:
        """Forget an evaluation that was broken off, when another one begins."""
        if self._tally.steps and self._loader is not None and self._loader() is not loader:
            self._start()
            self._tally, self._missing, self._unsaved = Tally(), set(), False
        self._loader = None if loader is None else weakref.ref(loader)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": None}

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> torch.Tensor:
        """`preprocess_logits_for_calibration` with this callback's answer tokens and what it has seen of the model."""
        labels = labels_among(labels, self._label_names)
        forward = self._watcher.latest
        if forward is None:
            return preprocess_logits_for_calibration(logits, labels, self.answer_token_ids)
        logits, shifted = logits_among(logits, labels, forward.names), answers_before_labels(self._watcher.model)
        ends = None if labels is not None else self._ends(forward)
        return keep_for_calibration(logits, labels, self.answer_token_ids, shifted=shifted, ends=ends)

    def compute_metrics(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Scores of the gathered predictions; fits `batch_eval_metrics`, where batches come one at a time.

        Args:
            prediction: Logits and labels from the Trainer: arrays, or with `eval_do_concat_batches=False` lists of
                them.
            compute_result: False while further batches follow.

        Returns:
            Score to number; empty while batches follow.

        Raises:
            ValueError: For outputs or labels that cannot be told apart, and shapes that do not go together.
        """
        self._wired = True
        whole = prediction.predictions, prediction.label_ids
        # all rows, or batch by batch where the Trainer has not put them together
        apart = all(isinstance(part, list) for part in whole) and len(whole[0]) == len(whole[1])
        metrics: dict[str, float] = {}
        try:
            for outputs, columns in zip(*whole, strict=True) if apart else [whole]:
                labels = labels_among(columns, self._label_names)
                # several outputs, or logits that preprocess_logits_for_metrics has picked already
                logits = logits_among(outputs, labels, self._output_names)
                self._gathered.add(*labelled_rows(as_numpy(logits), as_numpy(labels), self.answer_token_ids))
            if compute_result:
                metrics = self._measure(self._gathered)
        except Exception:
            self._start()
            raise
        if not compute_result:
            return {}
        self._start()
        if self.num_samples is not None and self._watcher.model is None:
            warnings.warn(
                f"CalibrationCallback(num_samples={self.num_samples}) draws nothing: it is compute_metrics only. Give "
                "it to the Trainer in callbacks=[...] too.",
                UserWarning,
                stacklevel=2,
            )
        return metrics | (self._other_metrics(prediction) if self._other_metrics is not None else {})

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Starts to watch the model; refuses to choose the best one by a score that cannot tell."""
        check_metric_for_best_model(args)
        self._watch(args, kwargs.get("model"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Watches the model that is trained, also when the callback was added later."""
        self._watch(args, kwargs.get("model"))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the logits and labels of the step that has just been evaluated."""
        self._watch(args, kwargs.get("model"))
        self._begin(kwargs.get("eval_dataloader"))
        self._tally.steps += 1
        forward = self._watcher.take()
        if forward is None:
            self._tally.skip(f"no forward of the model was seen (its hooks are bypassed). {WAY_OUT}")
            return
        self._output_names = forward.names
        try:
            labels = labels_of_step(forward.inputs, self._label_names)
            if labels is None:
                self._tally.unlabelled += 1
                return
            if labels.is_floating_point():
                raise ValueError(
                    "the labels are real numbers (a regression, or several labels a row), and calibration needs one "
                    "class a row; take the callback out of callbacks=[...]"
                )
            model, answers = self._watcher.model, self.answer_token_ids
            inputs = without_labels(model, forward.inputs, self._label_names)
            if self.num_samples is not None:
                with self._watcher.paused():
                    drawn = sampled_logits(model, inputs, labels, answers, self.num_samples, self.seed)
                self._drawn.add(*self._rows(drawn, labels))
            if not self._wired:
                self._seen.add(*self._rows(self._logits(forward, inputs, labels), labels))
        except ValueError as error:
            self._tally.skip(str(error))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Adds the numbers to the logs of an evaluation, before later callbacks print them."""
        logs = kwargs.get("logs") or {}
        prefix = metric_prefix(logs)
        if prefix is not None:
            if prefix not in self._prefixes:  # the name of an evaluation set, which is not known before
                self._prefixes.add(prefix)
                check_metric_for_best_model(args, prefix)
            added = self._finish(args, state, prefix, logs)
            if added:
                self._log.add(args, state, logs, added)

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        metrics = kwargs["metrics"]
        metrics.update(self._finish(args, state, metric_prefix(metrics) or "test_", metrics, unlabelled=True))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._log.close()

    def _watch(self, args: TrainingArguments, model: Any) -> None:
        self._watcher.attach(model)
        if model is not None:
            self._label_names = label_names_of(model, args.label_names)

    def _rows(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
        """Labelled rows of a step, of all processes."""
        labels = labels if labels.dim() == 2 else labels.reshape(-1)
        return labelled_rows(as_numpy(gather_rows(logits)), as_numpy(gather_rows(labels)), self.answer_token_ids)

    def _logits(self, forward: Forward, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        model, outputs = self._watcher.model, forward.outputs
        if isinstance(outputs, dict) and "log_probs" in outputs and "logits" not in outputs:
            # TRL fuses the head with the loss where it needs no logits; calibration does
            with self._watcher.paused(), torch.no_grad():
                outputs = model(**inputs)
        return kept_logits(model, outputs, labels, self.answer_token_ids)

    def _ends(self, forward: Forward) -> torch.Tensor | None:
        """Where the rows of an unlabelled batch end, by the logits as they were before processes padded them."""
        try:
            logits = logits_among(forward.outputs, None, forward.names)
        except ValueError:
            return None
        return last_positions(self._watcher.model, forward.inputs, logits.shape[1]) if logits.dim() == 3 else None

    def _finish(
        self, args: TrainingArguments, state: TrainerState, prefix: str, logs: dict[str, Any], unlabelled: bool = False
    ) -> dict[str, float]:
        added: dict[str, float] = {}
        if not self._unsaved and len(self._seen):
            metrics = self._measure(self._seen)
            added = {prefix + key: value for key, value in metrics.items() if prefix + key not in logs}
        self._tell(prefix.rstrip("_"), unlabelled)
        self._start()
        if self._unsaved and args.process_index == 0:
            self._save(args, state, prefix.rstrip("_"))
        self._unsaved = False
        return added

    def _tell(self, split: str, unlabelled: bool) -> None:
        """Warn of what is missing from an evaluation that is over."""
        tally, measured = self._tally, self._unsaved
        if not measured and self._wired and not tally.skipped and tally.unlabelled < tally.steps:
            self._wired = False  # so that the next evaluation is watched
            tally.skip(
                "the Trainer did not call compute_metrics; it keeps no predictions with prediction_loss_only=True",
                tally.steps - tally.unlabelled,
            )
        if not measured and tally.steps and not tally.skipped and not tally.unlabelled:
            tally.skip("every label is -100", tally.steps)
        if tally.unlabelled and not unlabelled:
            tally.skip(f"the rows have no labels ({', '.join(self._label_names) or 'label_names is empty'})", 0)
            tally.skipped += tally.unlabelled
        problems = [tally.problem("draws" if measured and self._wired else "numbers"), *self._missing]
        for problem in filter(None, problems):
            warnings.warn(f"CalibrationCallback, {split}: {problem}.", UserWarning, stacklevel=3)
        self._tally, self._missing = Tally(), set()

    def _measure(self, stream: RowStream) -> dict[str, float]:
        self._unsaved = True
        self.report, metrics = self._measured(stream, "")
        self.sample_report = None
        if len(self._drawn):
            self.sample_report, sampled = self._measured(self._drawn, "sample_")
            metrics |= sampled
        # A score that is not defined (AUROC without an error, say) is left out: loggers and JSON do not take NaN well.
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    def _measured(self, stream: RowStream, name: str) -> tuple[CalibrationReport | None, dict[str, float]]:
        if not stream.num_not_finite:
            report = stream.report(self.confidence_level)
            return report, {name + key: value for key, value in self._numbers(report).items()}
        self._missing.add(
            f"the {'logits of the draws' if name else 'logits'} of {stream.num_not_finite} of {len(stream)} rows are "
            f"NaN or infinite, so there are no {name or 'calibration '}numbers; the training has probably diverged"
        )
        return None, {f"{name}{NOT_FINITE}": float(stream.num_not_finite)}

    def _numbers(self, report: CalibrationReport) -> dict[str, float]:
        numbers = {key: report[key] for key in self.scores if key in report}
        if "accuracy" in numbers:
            p = numbers["accuracy"]
            numbers["accuracy_se"] = math.sqrt(p * (1 - p) / report.settings["num_rows"])
        if report.intervals is not None and report.floor is not None:
            for key in HEADLINES:
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
