"""The best checkpoint by a proper score, which can tell a good model from a useless one, where ECE cannot."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, SchedulerType

from peft_calib.calibration.scores.table import BLIND_SCORES, HIGHER_IS_BETTER, LOWER_IS_BETTER, PROPER_SCORES

from .adapter_state import WEIGHTS, barrier, check_readable, restore_adapter, write_adapter
from .stream import NOT_FINITE

PROPER = tuple(prefix + key for prefix in ("", "sample_") for key in PROPER_SCORES)
FOLDER = "best-calibration"

Point = dict[str, float]
WHY_NOT = (
    "A calibration error alone cannot choose a model: one that ignores its input and predicts the share of each class "
    "is perfectly calibrated. Use a proper score, 'nll' or 'brier'."
)


class BestCalibrationCallback(TrainerCallback, ExportableState):
    """Keeps the adapter of the best evaluation by a proper score, puts it back at the end, and can stop early.

    Best is the evaluation of least NLL (or Brier score) among those whose accuracy is at most `accuracy_tolerance`
    standard errors below the highest accuracy seen. A proper score alone may prefer a model that predicts the share of
    each class to an accurate but over-confident one; the second condition rules that out, and temperature scaling
    mends over-confidence afterwards.

    The adapters of evaluations that may still become the best are kept in `<output_dir>/best-calibration/step-<n>`,
    each a folder that `PeftModel.from_pretrained` loads. A resumed run goes on with what it knew. The numbers come
    from `CalibrationCallback`, or from a `compute_metrics` of your own with the same names.

    Args:
        metric: `"nll"` or `"brier"`; with K draws (`CalibrationCallback(num_samples=K)`) `"sample_nll"` or
            `"sample_brier"`.
        accuracy_tolerance: Standard errors of the accuracy by which an evaluation may fall short of the most accurate
            one; None compares the score alone.
        patience: Stop after this many evaluations without a new best; None never stops.
        restore: Whether to put the best adapter back into the model when training ends.
        prefix: Of the metrics, for one of several evaluation sets `"eval_<name>"`.

    Raises:
        ValueError: For a calibration error as metric, another unknown one, or bad numbers.

    Example:
        >>> from peft_calib.trainer_callbacks import CalibrationCallback
        >>> callbacks = [CalibrationCallback(), BestCalibrationCallback("nll", patience=3)]
        >>> BestCalibrationCallback("ece")
        Traceback (most recent call last):
        ...
        ValueError: metric='ece': A calibration error alone cannot choose a model: ...
    """

    def __init__(
        self,
        metric: str = "nll",
        accuracy_tolerance: float | None = 1.0,
        patience: int | None = None,
        restore: bool = True,
        prefix: str = "eval",
    ) -> None:
        if bare_name(metric) in BLIND_SCORES:
            raise ValueError(f"metric={metric!r}: {WHY_NOT}")
        metric = metric.removeprefix("eval_")
        if metric not in PROPER:
            raise ValueError(f"metric must be one of {', '.join(PROPER)}, got {metric!r}.")
        if accuracy_tolerance is not None and not 0 <= accuracy_tolerance < math.inf:
            raise ValueError(f"accuracy_tolerance must be a number of standard errors >= 0, got {accuracy_tolerance}.")
        if patience is not None and (not isinstance(patience, int) or patience < 1):
            raise ValueError(f"patience must be a number of evaluations >= 1, got {patience!r}.")
        self.metric, self.accuracy_tolerance, self.patience = metric, accuracy_tolerance, patience
        self.restore, self.prefix = restore, prefix.rstrip("_")
        self.points: list[Point] = []
        self._other_sets: set[str] = set()

    def state(self) -> dict[str, Any]:
        """Settings and evaluations so far, for the Trainer's checkpoints."""
        names = ("metric", "accuracy_tolerance", "patience", "restore", "prefix")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {"points": [dict(point) for point in self.points]},
        }

    @property
    def best(self) -> Point | None:
        """The best evaluation so far: `step`, `value`, and `accuracy` with `accuracy_se`."""
        return choose(self.points, self.accuracy_tolerance)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.load_best_model_at_end and self.restore:
            raise ValueError(
                "BestCalibrationCallback and load_best_model_at_end would both put a checkpoint back at the end. Set "
                "load_best_model_at_end=False, or BestCalibrationCallback(restore=False)."
            )
        check_readable(kwargs.get("model") or torch.nn.Module())
        name = type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, self.state())
        candidates = saved if isinstance(saved, list) else [saved]
        mine = next((each for each in candidates if each["args"] == self.state()["args"]), None)
        points = mine["attributes"]["points"] if mine is not None and state.global_step > 0 else []
        self.points = [point for point in points if (self._folder(args, point) / WEIGHTS).is_file()]
        if len(self.points) < len(points) and choose(points, self.accuracy_tolerance) not in self.points:
            warnings.warn(
                f"The adapter of the best evaluation so far is missing below {Path(args.output_dir) / FOLDER}; the "
                "best is chosen among what is left and what follows.",
                UserWarning,
                stacklevel=2,
            )
        self.points = [dict(point) for point in self.points]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Take the evaluation into account; every process sees the same numbers."""
        metrics = kwargs["metrics"]
        if f"{self.prefix}_runtime" not in metrics:
            self._other_sets |= {name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")}
            return
        point = self._point(state.global_step, metrics, kwargs.get("eval_dataloader"))
        if point is None:
            return
        before = self.best
        self.points = [each for each in self.points if each["step"] != point["step"]]
        self.points = front([*self.points, point])
        if point in self.points:
            write_adapter(kwargs["model"], self._folder(args, point))
        if args.save_strategy == SaveStrategy.NO:
            self._tidy(args)
        best = self.best
        assert best is not None
        if before is not None and best["step"] == before["step"]:
            best["stale"] = before.get("stale", 0) + 1
        if self.patience is not None and best.get("stale", 0) >= self.patience:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """The checkpoint knows the candidates now, so adapters of others can go."""
        self._tidy(args)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        best = self.best
        if best is None:
            others = ", ".join(repr(name) for name in sorted(self._other_sets))
            which, mend = "", "Set eval_strategy in TrainingArguments"
            if others:
                which, mend = f" of {self.prefix!r}", f"Choose one of those it saw: prefix= one of {others}"
            warnings.warn(
                f"BestCalibrationCallback saw no evaluation{which}, so the last adapter stays. {mend}.",
                UserWarning,
                stacklevel=2,
            )
        elif self.restore and best["step"] != state.global_step:
            barrier()
            restore_adapter(kwargs["model"], self._folder(args, best))

    def _point(self, step: int, metrics: Mapping[str, float], loader: Any) -> Point | None:
        sample, score = ("sample_", self.metric[7:]) if self.metric.startswith("sample_") else ("", self.metric)
        if f"{self.prefix}_{sample}{NOT_FINITE}" in metrics:
            return None  # CalibrationCallback has warned
        value = metrics.get(f"{self.prefix}_{sample}{score}")
        accuracy = metrics.get(f"{self.prefix}_{sample}accuracy")
        if value is None and accuracy is None:
            raise ValueError(
                f"The evaluation has no {self.prefix}_{self.metric}; it has {', '.join(metrics)}. Put a "
                f"CalibrationCallback{'(num_samples=...)' if sample else '()'} before BestCalibrationCallback in "
                "callbacks=[...], or return the score from compute_metrics."
            )
        if value is None or not math.isfinite(value):
            return None
        point = {"step": step, "value": float(value)}
        if self.accuracy_tolerance is None:
            return point
        if accuracy is None:
            raise ValueError(
                f"accuracy_tolerance needs {self.prefix}_{sample}accuracy, but the evaluation has none. Add it, or "
                "set accuracy_tolerance=None."
            )
        se = metrics.get(f"{self.prefix}_{sample}accuracy_se")
        if se is None:
            rows = len(loader.dataset) if hasattr(getattr(loader, "dataset", None), "__len__") else 1
            se = math.sqrt(accuracy * (1 - accuracy) / rows)
        return {**point, "accuracy": float(accuracy), "accuracy_se": float(se)}

    def _folder(self, args: TrainingArguments, point: Point) -> Path:
        return Path(args.output_dir) / FOLDER / f"step-{int(point['step'])}"

    def _tidy(self, args: TrainingArguments) -> None:
        """Delete adapters that cannot become the best any more."""
        if args.process_index == 0:
            wanted = {self._folder(args, point) for point in self.points}
            for folder in (Path(args.output_dir) / FOLDER).glob("step-*"):
                if folder not in wanted:
                    shutil.rmtree(folder, ignore_errors=True)


def choose(points: Sequence[Point], accuracy_tolerance: float | None) -> Point | None:
    """The point of least value among those accurate enough; of equal ones the first.

    Example:
        >>> collapsed = {"step": 1, "value": 0.6, "accuracy": 0.5, "accuracy_se": 0.05}
        >>> trained = {"step": 2, "value": 0.7, "accuracy": 0.9, "accuracy_se": 0.03}
        >>> choose([collapsed, trained], 1.0)["step"], choose([collapsed, trained], None)["step"]
        (2, 1)
    """
    if not points:
        return None
    if accuracy_tolerance is not None:
        top = max(points, key=lambda point: point["accuracy"])
        enough = top["accuracy"] - accuracy_tolerance * top["accuracy_se"]
        points = [point for point in points if point["accuracy"] >= enough]
    return min(points, key=lambda point: point["value"])


def front(points: Sequence[Point]) -> list[Point]:
    """The points that may yet be the best, as the highest accuracy rises: no other beats them in both."""
    # loss and error, both to be small; of equal points the first one stays
    marks = [(point["value"], -point.get("accuracy", 0.0)) for point in points]

    def beaten(i: int) -> bool:
        as_good = [j for j, (value, error) in enumerate(marks) if value <= marks[i][0] and error <= marks[i][1]]
        return any(marks[j] != marks[i] or j < i for j in as_good)

    return [point for i, point in enumerate(points) if not beaten(i)]


def bare_name(metric: str) -> str:
    """A metric's name without `eval_` and `sample_`."""
    return metric.removeprefix("eval_").removeprefix("sample_")


def check_metric_for_best_model(args: TrainingArguments, prefix: str = "eval_") -> None:
    """Refuse a Trainer that would take the worst checkpoint for its best, and warn of one that cannot tell.

    `prefix`: of an evaluation's metrics. That of one of several sets, `"eval_<name>_"`, is known when it is over.
    """
    chooses = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    chooses |= args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    if args.metric_for_best_model is None or not chooses:
        return
    asked = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    name = bare_name(asked.removeprefix(prefix)) if asked.startswith(prefix) else ""
    for scores, better in ((LOWER_IS_BETTER, False), (HIGHER_IS_BETTER, True)):
        if name in scores and args.greater_is_better is not better:
            raise ValueError(
                f"metric_for_best_model={args.metric_for_best_model!r} with greater_is_better="
                f"{args.greater_is_better} would keep the worst checkpoint; the Trainer guesses True for names that "
                f"do not end in 'loss'. Set greater_is_better={better} in TrainingArguments."
            )
    if name in BLIND_SCORES:
        warnings.warn(f"metric_for_best_model={args.metric_for_best_model!r}: {WHY_NOT}", UserWarning, stacklevel=2)
