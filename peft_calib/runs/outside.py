"""How a run takes rows from another distribution, for which there is no right answer."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calibration import TemperatureScaling
from ..calibration.scores.selective import error_auroc, rank
from ..prediction import Prediction
from ..predictor.answer import logits_of


def outside_report(inside: Prediction, outside: Prediction, scaling: TemperatureScaling) -> dict[str, Any]:
    """Confidence on rows of other origin before and after a temperature, and the AUROC of test rows having more."""
    plain = [found.probabilities.double().numpy() for found in (inside, outside)]
    scaled = [np.asarray(scaling.transform(logits_of(found.probabilities))) for found in (inside, outside)]
    report: dict[str, Any] = {"before": _told_apart(*plain), "after": _told_apart(*scaled)}
    if outside.num_samples > 1:
        information = [found.mutual_information.numpy() for found in (inside, outside)]
        report["mutual_information"] = float(information[1].mean())
        report["auroc_of_mutual_information"] = _auroc(*information)
    return report


def told_apart(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """Of confidences `(N,)` and `(M,)`: their mean on rows of other origin, and the AUROC of test rows having more."""
    return {"mean_confidence": float(outside.mean()), "auroc": _auroc(1 - inside, 1 - outside)}


def _told_apart(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    entropy = -np.sum(outside * np.log(np.maximum(outside, np.finfo(float).tiny)), axis=1)
    return {**told_apart(inside.max(axis=1), outside.max(axis=1)), "mean_entropy": float(entropy.mean())}


def _auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Probability that a row of other origin has the larger number."""
    return error_auroc(rank(np.concatenate([inside, outside]), np.repeat([0, 1], [len(inside), len(outside)])))
