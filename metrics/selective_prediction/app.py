"""The Space: paste or upload predictions and labels, or uncertainties and errors, see selective prediction."""

from functools import partial
from typing import Any

from matplotlib.figure import Figure

from peft_calib.calibration import risk_coverage_diagram
from peft_calib.calibration.scores.selective import selective_scores
from peft_calib.metrics.page import build_page, example_rows, pictured, table

DESCRIPTION = (
    "Does the uncertainty know where the errors are? With *uncertainty*, the label column says which rows are wrong."
)
EXAMPLE = example_rows()


def measure(predictions: Any, references: Any, settings: dict[str, Any]) -> tuple[str, str]:
    """AURC in words, and every score in a table."""
    scores = selective_scores(predictions, references, **settings)
    heading = f"### AURC {scores['aurc']:.4f}; a random ranking would score {scores['error_rate']:.4f}"
    if settings.get("input") == "uncertainty":
        return heading, table(scores)
    return heading, pictured(
        figure(predictions, references, settings.get("input", "probabilities")), "Risk and coverage"
    ) + table(scores)


def figure(predictions: Any, references: Any, kind: str = "probabilities") -> Figure:
    """What the page of the Space shows of its example."""
    return risk_coverage_diagram((predictions, references), input=kind)


# The page, not yet served.
page = partial(
    build_page, "Selective prediction", DESCRIPTION, measure, ["probabilities", "logits", "uncertainty"], EXAMPLE
)

if __name__ == "__main__":
    page().launch()
