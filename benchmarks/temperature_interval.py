"""Coverage of a temperature's interval, and how often it leaves out 1, by rows and classes.

    python benchmarks/temperature_interval.py --repeats 1000 --output benchmarks/results/temperature_interval.json

Logits are normal, labels drawn from their softmax at temperature 1 (`exact`), or from it after one label in ten was
replaced by any class (`noisy`: no temperature is quite right). The model answers with its logits times `T`. Truth is
the temperature of least expected NLL, for `noisy` found on 200,000 rows.
"""

from __future__ import annotations

import itertools

import numpy as np
from harness import describe_machine, drawn_labels, parser, write

from peft_calib.calibration.inputs import LogitRows, softmax
from peft_calib.calibration.recalibrate.temperature_fit import temperature_fit

ROWS, CLASSES, TEMPERATURES, KINDS = (5, 10, 20, 50, 200, 1000), (2, 20), (1.0, 2.0), ("exact", "noisy")


def drawn(generator: np.random.Generator, kind: str, num_rows: int, num_classes: int, temperature: float) -> LogitRows:
    """A calibration split of a model whose logits are `temperature` times too large."""
    logits = 2.0 * generator.normal(size=(num_rows, num_classes))
    labels = drawn_labels(generator, softmax(logits))
    if kind == "noisy":
        wrong = generator.random(num_rows) < 0.1
        labels = np.where(wrong, generator.integers(0, num_classes, num_rows), labels)
    return LogitRows(temperature * logits, labels, np.arange(num_rows))


def study(kind: str, num_rows: int, num_classes: int, temperature: float, truth: float, repeats: int) -> dict:
    """Share of the intervals that hold the truth and that leave out 1, and their median width."""
    generator = np.random.default_rng([num_rows, num_classes, int(10 * temperature)])
    fits = [temperature_fit(drawn(generator, kind, num_rows, num_classes, temperature)) for _ in range(repeats)]
    return {
        "kind": kind, "rows": num_rows, "classes": num_classes, "temperature": temperature, "truth": truth,
        "coverage": float(np.mean([fit.low <= truth <= fit.high for fit in fits])),
        "leaves out 1": float(np.mean([not fit.low <= 1.0 <= fit.high for fit in fits])),
        "median ratio of the ends": float(np.median([fit.high / fit.low for fit in fits])),
    }  # fmt: skip


def main() -> None:
    """Run the study and write it."""
    flags = parser(__doc__)
    flags.add_argument("--repeats", type=int, default=1000)
    arguments = flags.parse_args()
    results = []
    for kind, num_classes, temperature in itertools.product(KINDS, CLASSES, TEMPERATURES):
        truth = temperature
        if kind == "noisy":
            truth = temperature_fit(drawn(np.random.default_rng(0), kind, 200_000, num_classes, temperature)).fitted
        for num_rows in ROWS:
            results.append(study(kind, num_rows, num_classes, temperature, truth, arguments.repeats))
            print(results[-1], flush=True)
    write(arguments.output, {"machine": describe_machine(), "repeats": arguments.repeats, "results": results})


if __name__ == "__main__":
    main()
