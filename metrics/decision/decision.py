"""What decision rules reach, for `evaluate`."""

from typing import Any

import datasets
import evaluate

from peft_calib.calibration.decide.stored import decision_scores
from peft_calib.metrics import direct

_CITATION = """\
@article{angelopoulos2021learn,
  title   = {Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control},
  author  = {Angelopoulos, Anastasios N. and Bates, Stephen and Cand{\\`e}s, Emmanuel J. and others},
  journal = {arXiv preprint arXiv:2110.01052},
  year    = {2021}
}
@inproceedings{romano2020classification,
  title     = {Classification with Valid and Adaptive Coverage},
  author    = {Romano, Yaniv and Sesia, Matteo and Cand{\\`e}s, Emmanuel J.},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}
"""

_DESCRIPTION = """\
What a decision rule reaches on rows it was not fitted on. Of a threshold: the share of wrong ones among what is
answered and the share answered, with exact intervals. Of conformal prediction sets: how many hold the label, with the
band that so many rows give, and how large they are. The rule is a saved one, or is fitted on calibration rows.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: probabilities (or logits) of each class, one list of numbers a row; with input="confidence" one number
        in [0, 1] a row, with references that are 1 where the answer is right.
    references: integer labels.
    rule: path of a rule that was saved; or instead
    calibration_predictions, calibration_references: rows to fit a rule on, and
    risk, target_coverage or costs: what a threshold shall keep; or
    alpha: highest share of sets that may miss the label; with score, groups and the like.
    input: "probabilities" (default), "logits" or "confidence".
    confidence_level: of the intervals, 0.95 by default.
Returns:
    Numbers with their intervals, and the rule's promise in words.
Examples:
    >>> import evaluate, peft_calib
    >>> metric = evaluate.load(peft_calib.metric_path("decision"))
    >>> calibration = {"calibration_predictions": [0.9] * 40, "calibration_references": [1] * 40}
    >>> asked = {"risk": 0.1, "input": "confidence"}
    >>> result = metric.compute(predictions=[0.95] * 10, references=[1] * 9 + [0], **calibration, **asked)
    >>> result["accepted"], result["errors"]
    (10, 1)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Decision(direct.DirectMetric):
    """Shell over `peft_calib.calibration.decide.stored.decision_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        urls = ["https://arxiv.org/abs/2110.01052", "https://arxiv.org/abs/2006.02544"]
        return direct.info(_DESCRIPTION, _KWARGS_DESCRIPTION, _CITATION, urls, datasets.Sequence(number), number)

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        return decision_scores(predictions, references, **options)
