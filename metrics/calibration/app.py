"""The Space: paste or upload probabilities and labels, see the calibration report."""

from functools import partial
from typing import Any

from matplotlib.figure import Figure

from peft_calib.calibration import calibration_report, reliability_diagram
from peft_calib.metrics.page import build_page, example_rows, framed

DESCRIPTION = "Do the probabilities of a classifier mean what they say? Every number has its interval and noise floor."
EXAMPLE = example_rows()


def measure(predictions: Any, references: Any, settings: dict[str, Any]) -> tuple[str, str]:
    """The verdict, and the whole report in a frame."""
    report = calibration_report(predictions, references, **settings)
    return f"### {report.verdict()}", framed(report.to_html())


def figure(predictions: Any, references: Any) -> Figure:
    """What the page of the Space shows of its example."""
    return reliability_diagram(predictions, references)


# The page, not yet served.
page = partial(build_page, "Calibration", DESCRIPTION, measure, ["probabilities", "logits"], EXAMPLE, bins=True)

if __name__ == "__main__":
    page().launch()
