"""The Space: paste or upload draws and labels, see the uncertainty split."""

from functools import partial
from typing import Any

from peft_calib.calibration.scores.uncertainty import uncertainty_scores
from peft_calib.metrics.page import build_page, table

DESCRIPTION = (
    "Splits the uncertainty of several draws a row. Predictions are nested: rows, draws, classes; so JSON only."
)
EXAMPLE = '{"predictions": [[[0.9, 0.1], [0.6, 0.4]], [[0.2, 0.8], [0.7, 0.3]]], "references": [0, 1]}'


def measure(predictions: Any, references: Any, settings: dict[str, Any]) -> tuple[str, str]:
    """Mutual information in words, and every score in a table."""
    scores = uncertainty_scores(predictions, references, **settings)
    total, part = scores["mean_entropy"], scores["mean_mutual_information"]
    return f"### Of {total:.4f} nats of uncertainty, {part:.4f} are the draws' disagreement", table(scores)


# The page, not yet served.
page = partial(build_page, "Uncertainty", DESCRIPTION, measure, ["probabilities", "logits"], EXAMPLE)

if __name__ == "__main__":
    page().launch()
