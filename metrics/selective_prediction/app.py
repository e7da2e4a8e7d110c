"""The Space: paste or upload predictions and labels, or uncertainties and errors, see selective prediction."""

from functools import partial
from typing import Any

from peft_calib.calibration.scores.selective import selective_scores
from peft_calib.metrics.page import build_page, table

DESCRIPTION = (
    "Does the uncertainty know where the errors are? With *uncertainty*, the label column says which rows are wrong."
)
EXAMPLE = "0.92,0.05,0.03,0\n0.10,0.80,0.10,1\n0.30,0.40,0.30,2\n0.55,0.25,0.20,0\n0.15,0.15,0.70,2\n0.60,0.30,0.10,1"


def measure(predictions: Any, references: Any, settings: dict[str, Any]) -> tuple[str, str]:
    """AURC in words, and every score in a table."""
    scores = selective_scores(predictions, references, **settings)
    heading = f"### AURC {scores['aurc']:.4f}; a random ranking would score {scores['error_rate']:.4f}"
    return heading, table(scores)


# The page, not yet served.
page = partial(
    build_page, "Selective prediction", DESCRIPTION, measure, ["probabilities", "logits", "uncertainty"], EXAMPLE
)

if __name__ == "__main__":
    page().launch()
