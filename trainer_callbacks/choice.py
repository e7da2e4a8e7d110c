"""By which score a checkpoint may be chosen: proper scores can tell a good model from a useless one, ECE cannot."""

from __future__ import annotations

import warnings

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy, SchedulerType

from peft_calib.calibration.scores.table import BLIND_SCORES, HIGHER_IS_BETTER, LOWER_IS_BETTER

WHY_NOT = (
    "A calibration error alone cannot choose a model: one that ignores its input and predicts the share of each class "
    "is perfectly calibrated. Use a proper score, 'nll' or 'brier'."
)


def bare_name(metric: str) -> str:
    """A metric's name without `eval_` and `sample_`."""
    return metric.removeprefix("eval_").removeprefix("sample_")


def check_metric_for_best_model(args: TrainingArguments) -> None:
    """Refuse a Trainer that would take the worst checkpoint for its best, and warn of one that cannot tell.

    `greater_is_better` is True by default for every metric whose name does not end in "loss".
    """
    chooses = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    chooses |= args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    if args.metric_for_best_model is None or not chooses:
        return
    name = bare_name(args.metric_for_best_model)
    for scores, better in ((LOWER_IS_BETTER, False), (HIGHER_IS_BETTER, True)):
        if name in scores and args.greater_is_better is not better:
            raise ValueError(
                f"metric_for_best_model={args.metric_for_best_model!r} with greater_is_better="
                f"{args.greater_is_better} would keep the worst checkpoint; the Trainer guesses True for names that "
                f"do not end in 'loss'. Set greater_is_better={better} in TrainingArguments."
            )
    if name in BLIND_SCORES:
        warnings.warn(f"metric_for_best_model={args.metric_for_best_model!r}: {WHY_NOT}", UserWarning, stacklevel=2)
