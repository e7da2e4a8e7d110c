"""The Space: paste or upload predictions and labels, see what can be promised of them, and whether it is kept."""

import html
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from peft_calib.calibration import SelectiveThreshold, threshold_diagram
from peft_calib.calibration.decide.stored import decision_scores
from peft_calib.metrics.page import build_page, pictured, table

RISK, ALPHA = 0.1, 0.1
DESCRIPTION = (
    "Half of the rows, drawn at random, are to fit on, and the other half to see what is reached: a threshold above "
    f"which at most {RISK:.0%} of the answers are wrong, with 95 % confidence, and sets of classes that hold the "
    f"label in {1 - ALPHA:.0%} of the rows."
)


def example(num_rows: int = 200) -> str:
    """Rows of three classes as CSV, from a calibrated model."""
    generator = np.random.default_rng(0)
    p = generator.dirichlet([0.15] * 3, num_rows).round(4)
    p[:, 2] = 1.0 - p[:, 0] - p[:, 1]
    p = p.clip(0.0, 1.0)
    labels = (generator.random((num_rows, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=2)
    return "\n".join(f"{a:.4f},{b:.4f},{c:.4f},{label}" for (a, b, c), label in zip(p, labels, strict=True))


def measure(predictions: Any, references: Any, settings: dict[str, Any]) -> tuple[str, str]:
    """What the threshold promises, as a heading; what it and the sets promise and reach in tables."""
    order = np.random.default_rng(0).permutation(len(references))
    fit, new = order[::2], order[1::2]
    rows, labels = np.asarray(predictions), np.asarray(references)
    given = {"calibration_predictions": rows[fit], "calibration_references": labels[fit], **settings}
    asked: list[dict[str, Any]] = [{"risk": RISK}]
    if settings.get("input") != "confidence":
        asked.append({"alpha": ALPHA})
    found = [decision_scores(rows[new], labels[new], **given, **one) for one in asked]
    body = (
        ""
        if settings.get("input", "probabilities") != "probabilities"
        else pictured(figure(rows, labels), "Threshold")
    )
    for scores in found:
        numbers = {key: value for key, value in scores.items() if isinstance(value, (int, float))}
        body += f"<p>{html.escape(scores['promise'])}</p>{table(numbers)}"
    return f"### {found[0]['promise']}", body


def figure(predictions: Any, references: Any) -> Figure:
    """What the page of the Space shows of its example: the threshold of one half, and what it reaches on the other."""
    order = np.random.default_rng(0).permutation(len(references))
    rows, labels = np.asarray(predictions), np.asarray(references)
    fit, new = order[::2], order[1::2]
    rule = SelectiveThreshold(risk=RISK).fit(rows[fit], labels[fit])
    return threshold_diagram(rule, rule.evaluate(rows[new], labels[new]))


# The page, not yet served.
page = partial(build_page, "Decision", DESCRIPTION, measure, ["probabilities", "logits", "confidence"], example())

if __name__ == "__main__":
    page().launch()
