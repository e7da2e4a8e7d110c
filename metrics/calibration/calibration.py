"""Calibration of probabilistic classifiers, with intervals and noise floors, for `evaluate`."""

from typing import Any

import datasets
import evaluate

from peft_calib.calibration import calibration_report
from peft_calib.metrics import direct

_CITATION = """\
@inproceedings{guo2017calibration,
  title     = {On Calibration of Modern Neural Networks},
  author    = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year      = {2017}
}
@inproceedings{nixon2019measuring,
  title     = {Measuring Calibration in Deep Learning},
  author    = {Nixon, Jeremy and Dusenberry, Michael W. and Zhang, Linchuan and Jerfel, Ghassen and Tran, Dustin},
  booktitle = {CVPR Workshops},
  year      = {2019}
}
"""

_DESCRIPTION = """\
Do the probabilities of a classifier mean what they say? Accuracy, proper scores (NLL, Brier with its decomposition),
calibration errors (ECE, MCE, RMSCE, debiased, ACE, TACE, class-wise, smooth, Kolmogorov-Smirnov) and selective
prediction (AURC, AUROC of errors), each with a bootstrap interval and with the score that a perfectly calibrated model
would get on the same predictions.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: probabilities (or logits) of each class, one list of numbers a row; or one number a row, the
        probability of class 1.
    references: integer labels.
    input: "probabilities" (default) or "logits". Checked, never guessed.
    num_bins: number of bins, 15 by default.
    confidence_level: level of the intervals and of the noise band, 0.95 by default; None leaves both out and is fast.
    convention: "peft_calib" (default), "torchmetrics", "netcal", "sklearn", "nixon" or "hypelora": whose definitions
        to follow where they differ.
    num_resamples, interval_method, seed: of the bootstrap, see `peft_calib.calibration.calibration_report`.
    groups: one value a row; the result then has "groups", each with its scores and their distance from all rows.
    per_class, class_names: whether the result has "classes", a line for every class, and what to call them.
Returns:
    One number a score ("accuracy", "nll", "brier", "ece", "mce", "ace", "tace", "classwise_ece", "smooth_ece", "aurc",
    "error_auroc" and more), then "settings", "intervals" (score to [low, high]) and "noise_floor" (score to mean, low
    and high under perfect calibration); the last two are None without a confidence level.
Examples:
    >>> import evaluate, peft_calib
    >>> metric = evaluate.load(peft_calib.metric_path("calibration"))
    >>> result = metric.compute(predictions=[[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]], references=[0, 0, 1], num_bins=10)
    >>> round(result["ece"], 4)
    0.2667
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Calibration(direct.DirectMetric):
    """Shell over `peft_calib.calibration.calibration_report`."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        urls = ["https://arxiv.org/abs/1706.04599", "https://arxiv.org/abs/1904.01685"]
        return direct.info(_DESCRIPTION, _KWARGS_DESCRIPTION, _CITATION, urls, datasets.Sequence(number), number)

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        return calibration_report(predictions, references, **options).to_dict()
