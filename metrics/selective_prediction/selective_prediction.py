"""Selective prediction and error detection for `evaluate`."""

from typing import Any

import datasets
import evaluate

from peft_calib.calibration.scores.selective import selective_scores
from peft_calib.metrics import direct

_CITATION = """\
@inproceedings{geifman2017selective,
  title     = {Selective Classification for Deep Neural Networks},
  author    = {Geifman, Yonatan and El-Yaniv, Ran},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2017}
}
@inproceedings{traub2024overcoming,
  title     = {Overcoming Common Flaws in the Evaluation of Selective Classification Systems},
  author    = {Traub, Jeremias and Bungert, Till J. and L{\\"u}th, Carsten T. and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}
"""

_DESCRIPTION = """\
Does the uncertainty know where the errors are? AUROC and average precision of error detection, AURC, its excess over
the oracle, AUGRC, the prediction rejection ratio, both readings of FPR@95, accuracy at coverage and coverage at risk.
Ties are handled exactly, so quantised scores and shuffled rows give the same numbers.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: probabilities (or logits) of each class, one list of numbers a row, with labels as references; or one
        uncertainty a row, larger where less sure, with errors (1 where the prediction is wrong) as references.
    references: integer labels, or zeros and ones.
    input: "probabilities" (default), "logits" or "uncertainty".
    coverages: coverages to give the accuracy at, (0.5, 0.8, 0.9, 0.95) by default.
    risks: error rates to give the coverage at, (0.01, 0.05, 0.1) by default.
Returns:
    One number a score.
Examples:
    >>> import evaluate, peft_calib
    >>> metric = evaluate.load(peft_calib.metric_path("selective_prediction"))
    >>> result = metric.compute(predictions=[0.1, 0.2, 0.8, 0.9], references=[0, 0, 1, 0], input="uncertainty")
    >>> round(result["error_auroc"], 4)
    0.6667
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SelectivePrediction(direct.DirectMetric):
    """Shell over `peft_calib.calibration.scores.selective.selective_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        urls = ["https://arxiv.org/abs/1705.08500", "https://arxiv.org/abs/2407.01032"]
        return direct.info(_DESCRIPTION, _KWARGS_DESCRIPTION, _CITATION, urls, datasets.Sequence(number), number)

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        return selective_scores(predictions, references, **options)
