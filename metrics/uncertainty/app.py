"""The Space: paste or upload draws and labels, see the uncertainty split."""

import json
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.special import entr, softmax

from peft_calib.calibration.report.plots import new_figure
from peft_calib.calibration.scores.uncertainty import uncertainty_scores
from peft_calib.metrics.page import build_page, pictured, table

DESCRIPTION = (
    "Splits the uncertainty of several draws a row. Predictions are nested: rows, draws, classes; so JSON only."
)


def example(num_rows: int = 60, num_draws: int = 8) -> str:
    """Rows of two classes as JSON: a model is sure of some, its draws disagree on others."""
    generator = np.random.default_rng(0)
    score = 3.0 * generator.normal(size=(num_rows, 1)) + generator.normal(size=(num_rows, num_draws))
    p = (1.0 / (1.0 + np.exp(-score))).round(3)
    labels = (generator.random(num_rows) < p.mean(axis=1)).astype(int)
    draws = np.stack([1.0 - p, p], axis=-1).round(3)
    return json.dumps({"predictions": draws.tolist(), "references": labels.tolist()})


def measure(predictions: Any, references: Any, settings: dict[str, Any]) -> tuple[str, str]:
    """Mutual information in words, and every score in a table."""
    scores = uncertainty_scores(predictions, references, **settings)
    total, part = scores["mean_entropy"], scores["mean_mutual_information"]
    shown = pictured(
        figure(predictions, references, settings.get("input", "probabilities")), "Entropy and disagreement"
    )
    return f"### Of {total:.4f} nats of uncertainty, {part:.4f} are the draws' disagreement", shown + table(scores)


def figure(predictions: Any, references: Any, kind: str = "probabilities") -> Figure:
    """What the page of the Space shows of its example: each row's entropy and what of it is disagreement."""
    draws = np.asarray(predictions, dtype=np.float64)
    draws = softmax(draws, axis=-1) if kind == "logits" else draws
    mean = draws.mean(axis=1)
    total = entr(mean).sum(axis=-1)
    mutual = total - entr(draws).sum(axis=-1).mean(axis=1)
    drawn = new_figure(5.0, 4.0)
    axes = drawn.subplots()
    right = mean.argmax(axis=1) == np.asarray(references)
    for chosen, marker, name in ((right, "o", "right"), (~right, "x", "wrong")):
        axes.scatter(total[chosen], mutual[chosen], marker=marker, label=name)
    axes.set(xlabel="entropy of the mean (nats)", ylabel="mutual information (nats)")
    axes.legend(frameon=False)
    return drawn


# The page, not yet served.
page = partial(build_page, "Uncertainty", DESCRIPTION, measure, ["probabilities", "logits"], example())

if __name__ == "__main__":
    page().launch()
