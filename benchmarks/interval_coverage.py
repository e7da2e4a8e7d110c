"""Coverage and width of every interval of a report, for models that are and are not calibrated.

    python benchmarks/interval_coverage.py --repeats 400 --output benchmarks/results/interval_coverage.json

Each model draws a confidence and the other classes' probabilities for a row, and its label from the probabilities at
another temperature, so the truth is known. What an interval should cover is the score of the whole population: the
panel of a very large sample, with the same bins. For scores over equal-mass bins these are the population's bins; for
`mce` and `average_gap`, which weigh a bin alike however few rows it has, the bins that hold at least one row in a
thousand; `rmsce_debiased` estimates the population's `rmsce`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from harness import describe_machine, parser, write

from peft_calib.calibration import calibration_report
from peft_calib.calibration.bins import uniform_bins
from peft_calib.calibration.inputs import Rows
from peft_calib.calibration.scores.panel import KEYS, build_tables, compute_panel

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
ROWS = (100, 400, 2000)


def drawn_labels(generator: np.random.Generator, p: np.ndarray) -> np.ndarray:
    """One label a row from its distribution."""
    return (generator.random((len(p), 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=p.shape[1] - 1)


def softmax_model(num_classes: int, spread: float, temperature: float) -> Draw:
    """Normal logits; the model's are `temperature` times too large."""

    def draw(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        z = spread * generator.normal(size=(size, num_classes))
        true, given = (np.exp(x - x.max(axis=1, keepdims=True)) for x in (z, temperature * z))
        true, given = true / true.sum(axis=1, keepdims=True), given / given.sum(axis=1, keepdims=True)
        return given, drawn_labels(generator, true)

    return draw


def one_bin_model(confidence: float, accuracy: float) -> Draw:
    """Two classes, every confidence in one bin, and one accuracy."""

    def draw(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        given = np.clip(generator.normal(confidence, 0.004, size), 0.5, 1.0)
        side = generator.integers(0, 2, size)
        right = generator.random(size) < accuracy
        p = np.where(np.arange(2) == side[:, None], given[:, None], 1.0 - given[:, None])
        return p, np.where(right, side, 1 - side)

    return draw


MODELS: dict[str, Draw] = {
    "one bin, calibrated": one_bin_model(0.56, 0.56),
    "one bin, gap 0.04": one_bin_model(0.56, 0.52),
    "one bin, sure, calibrated": one_bin_model(0.96, 0.96),
    "two classes, calibrated": softmax_model(2, 1.5, 1.0),
    "two classes, slightly over-confident": softmax_model(2, 1.5, 1.2),
    "two classes, badly over-confident": softmax_model(2, 1.5, 2.5),
    "five classes, calibrated": softmax_model(5, 2.0, 1.0),
    "five classes, badly over-confident": softmax_model(5, 2.0, 2.0),
    "forty classes, slightly over-confident": softmax_model(40, 2.0, 1.15),
}


def truth(draw: Draw, num_rows: int = 300_000) -> dict[str, float]:
    """The population's scores."""
    rows = Rows(*draw(np.random.default_rng(12345), num_rows))
    values = compute_panel(rows, 15)
    values["rmsce_debiased"] = values["rmsce"]
    tables = build_tables(rows, 15)
    top = uniform_bins(tables.confidence, tables.correct, 15)
    gaps = np.abs(top.gaps[top.weights >= 1e-3])
    return values | {"mce": float(gaps.max()), "average_gap": float(gaps.mean())}


def study(draw: Draw, expected: dict[str, float], num_rows: int, repeats: int, resamples: int, method: str) -> dict:
    """Of every score: coverage, misses on either side, median width."""
    inside, below, above, defined = (dict.fromkeys(KEYS, 0) for _ in range(4))
    widths: dict[str, list[float]] = {key: [] for key in KEYS}
    under_floor = 0
    for repeat in range(repeats):
        generator = np.random.default_rng([num_rows, repeat])
        options = {"num_resamples": resamples, "seed": repeat, "interval_method": method}
        report = calibration_report(*draw(generator, num_rows), **options)
        for key, (low, high) in report.intervals.items():
            if np.isfinite([low, high]).all():
                defined[key] += 1
                below[key] += high < expected[key] - 1e-9
                above[key] += low > expected[key] + 1e-9
                widths[key].append(high - low)
        under_floor += any(report.intervals[k][1] < report.floor[k].mean for k in ("ece", "ace", "smooth_ece", "tace"))
    for key in KEYS:
        inside[key] = defined[key] - below[key] - above[key]
    return {
        "scores": {
            key: {
                "truth": expected[key],
                "coverage": inside[key] / max(defined[key], 1),
                "below": below[key] / max(defined[key], 1),
                "above": above[key] / max(defined[key], 1),
                "width": float(np.median(widths[key])) if widths[key] else None,
            }
            for key in KEYS
        },
        "ends below the noise floor's mean": under_floor,
    }


def main() -> None:
    """Run the study and write it."""
    flags = parser(__doc__)
    flags.add_argument("--repeats", type=int, default=400)
    flags.add_argument("--resamples", type=int, default=400)
    flags.add_argument("--rows", type=int, nargs="+", default=ROWS)
    flags.add_argument("--models", nargs="+", default=list(MODELS))
    flags.add_argument("--method", default="bca")
    arguments = flags.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    results = {}
    expected = {name: truth(MODELS[name]) for name in arguments.models}
    for num_rows in arguments.rows:
        for name in arguments.models:
            options = arguments.repeats, arguments.resamples, arguments.method
            found = study(MODELS[name], expected[name], num_rows, *options)
            results[f"{name}, {num_rows} rows"] = found
            low = {
                key: (round(s["coverage"], 3), round(s["below"], 3), round(s["above"], 3))
                for key, s in found["scores"].items()
                if s["coverage"] < 0.93 and s["width"] is not None
            }
            print(name, num_rows, low, found["ends below the noise floor's mean"], flush=True)
            # after every cell: an interrupted study is not lost
            settings = vars(arguments) | {"output": None}
            write(arguments.output, {"machine": describe_machine(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
