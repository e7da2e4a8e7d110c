"""Uncertainty of several draws (ensembles, Bayesian adapters, dropout samples) for `evaluate`."""

from typing import Any

import datasets
import evaluate

from peft_calib.calibration.scores.uncertainty import uncertainty_scores
from peft_calib.metrics import direct

_CITATION = """\
@inproceedings{depeweg2018decomposition,
  title     = {Decomposition of Uncertainty in {Bayesian} Deep Learning for Efficient and Risk-sensitive Learning},
  author    = {Depeweg, Stefan and Hernandez-Lobato, Jose-Miguel and Doshi-Velez, Finale and Udluft, Steffen},
  booktitle = {International Conference on Machine Learning},
  year      = {2018}
}
"""

_DESCRIPTION = """\
Splits the uncertainty of predictions made of several draws: entropy of the mean prediction (total), mean entropy of
the draws (aleatoric) and their difference, the mutual information (epistemic); and how well each of them finds the
errors.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each row, a list of K draws, each a list of C probabilities (or logits): shape (N, K, C).
    references: integer labels.
    input: "probabilities" (default) or "logits".
Returns:
    "mean_entropy", "mean_expected_entropy", "mean_mutual_information" (nats), "mean_variation", "num_draws",
    "accuracy", "nll" and "brier" of the mean prediction, and "<part>_error_auroc" of entropy, expected entropy, mutual
    information and confidence.
Examples:
    >>> import evaluate, peft_calib
    >>> metric = evaluate.load(peft_calib.metric_path("uncertainty"))
    >>> result = metric.compute(predictions=[[[1.0, 0.0], [0.0, 1.0]]], references=[0])
    >>> round(result["mean_mutual_information"], 4)
    0.6931
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Uncertainty(direct.DirectMetric):
    """Shell over `peft_calib.calibration.scores.uncertainty.uncertainty_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        draws = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        urls = ["https://arxiv.org/abs/1710.07283"]
        return direct.info(_DESCRIPTION, _KWARGS_DESCRIPTION, _CITATION, urls, draws)

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        return uncertainty_scores(predictions, references, **options)
