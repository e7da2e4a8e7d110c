"""The Space: paste or upload probabilities and labels, see the calibration report."""

from functools import partial
from typing import Any

from peft_calib.calibration import calibration_report
from peft_calib.metrics.page import build_page, framed

DESCRIPTION = "Do the probabilities of a classifier mean what they say? Every number has its interval and noise floor."
EXAMPLE = "0.92,0.05,0.03,0\n0.10,0.80,0.10,1\n0.30,0.40,0.30,2\n0.55,0.25,0.20,0\n0.15,0.15,0.70,2\n0.60,0.30,0.10,1"


def measure(predictions: Any, references: Any, settings: dict[str, Any]) -> tuple[str, str]:
    """The verdict, and the whole report in a frame."""
    report = calibration_report(predictions, references, **settings)
    return f"### {report.verdict()}", framed(report.to_html())


# The page, not yet served.
page = partial(build_page, "Calibration", DESCRIPTION, measure, ["probabilities", "logits"], EXAMPLE, bins=True)

if __name__ == "__main__":
    page().launch()
