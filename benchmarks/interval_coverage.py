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
from harness import describe_machine, drawn_labels, kept, parser, write
from scipy.stats import norm
from scipy.stats import t as student_t

from peft_calib.calibration import calibration_report
from peft_calib.calibration.inputs import Rows, softmax
from peft_calib.calibration.resampling.intervals import bootstrap_draws
from peft_calib.calibration.scores.panel import build_tables, compute_panel
from peft_calib.calibration.scores.table import KEYS

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
ROWS = (100, 400, 2000)
ALTERNATIVES = ("percentile", "basic", "standard", "bias-corrected")


def softmax_model(num_classes: int, spread: float, temperature: float) -> Draw:
    """Normal logits; the model's are `temperature` times too large."""

    def draw(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        z = spread * generator.normal(size=(size, num_classes))
        return softmax(temperature * z), drawn_labels(generator, softmax(z))

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
    top = build_tables(rows, 15).sums.bins
    gaps = np.abs(top.gaps[top.weights >= 1e-3])
    return values | {"mce": float(gaps.max()), "average_gap": float(gaps.mean())}


def alternatives(draws: np.ndarray, point: float, num_rows: int) -> dict[str, tuple[float, float]]:
    """What else could be done with the same resamples of a score: the methods of the textbooks."""
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [0.025, 0.975])
    reach = student_t.ppf(0.975, num_rows - 1) * draws.std()
    below = np.clip(((draws < point).sum() + 0.5 * (draws == point).sum()) / len(draws), 1e-3, 1.0 - 1e-3)
    corrected = np.quantile(draws, norm.cdf(2.0 * norm.ppf(below) + norm.ppf([0.025, 0.975])))
    return {
        "percentile": (low, high),
        "basic": (2.0 * point - high, 2.0 * point - low),
        "standard": (point - reach, point + reach),
        "bias-corrected": (corrected[0], corrected[1]),
    }


def told(intervals: list[tuple[float, float]], truth: float) -> dict:
    """Coverage, misses on either side and median width of a score's intervals, without those not defined."""
    low, high = np.array([ends for ends in intervals if np.isfinite(ends).all()]).reshape(-1, 2).T
    size, below, above = max(len(low), 1), int((high < truth - 1e-9).sum()), int((low > truth + 1e-9).sum())
    return {
        "sets": len(low),
        "coverage": 1.0 - (below + above) / size,
        "below": below / size,
        "above": above / size,
        "width": float(np.median(high - low)) if len(low) else None,
    }


def study(model: int, expected: dict[str, float], num_rows: int, repeats: int, resamples: int) -> dict:
    """Of every score and method: coverage, misses on either side, median width; no two models share a draw."""
    draw = list(MODELS.values())[model]
    found: dict[str, dict[str, list]] = {key: {way: [] for way in ("ours", *ALTERNATIVES)} for key in KEYS}
    under_floor = 0
    for repeat in range(repeats):
        p, labels = draw(np.random.default_rng([num_rows, repeat, model]), num_rows)
        report = calibration_report(p, labels, num_resamples=resamples, seed=repeat)
        draws = bootstrap_draws(Rows(p, labels), num_resamples=resamples, seed=repeat)
        for key, interval in report.intervals.items():
            found[key]["ours"].append(interval)
            if np.isfinite(report[key]) and np.isfinite(draws[key]).any():
                for way, ends in alternatives(draws[key], report[key], num_rows).items():
                    found[key][way].append(ends)
        under_floor += any(report.intervals[k][1] < report.floor[k].mean for k in ("ece", "ace", "smooth_ece", "tace"))
    return {
        "truth": expected,
        "scores": {key: {way: told(ends, expected[key]) for way, ends in ways.items()} for key, ways in found.items()},
        "ends below the noise floor's mean": under_floor,
    }


def summary(results: dict[str, dict], rows: list[int]) -> str:
    """One line a score: coverage over the models, the worst one, and the width against the shortest adequate method.

    Adequate is a method that covers in every model as often as 93 % would, two standard errors allowed; the ratio is
    the mean over models, ours against the shortest of ours and the adequate ones.
    """
    lines = [
        "| score | " + " | ".join(f"{n:,} rows: mean, worst, width" for n in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for key in KEYS:
        cells = []
        for n in rows:
            found = [cell["scores"][key] for name, cell in results.items() if name.endswith(f", {n} rows")]
            found = [ways for ways in found if ways["ours"]["width"] is not None]
            if not found:
                cells.append("none")
                continue
            coverage = {way: np.array([ways[way]["coverage"] for ways in found]) for way in found[0]}
            sets = min(ways["ours"]["sets"] for ways in found)
            least = 0.93 - 2.0 * np.sqrt(0.93 * 0.07 / sets)
            adequate = [way for way in found[0] if way == "ours" or coverage[way].min() >= least]
            ratios = [
                ways["ours"]["width"] / max(min(ways[way]["width"] for way in adequate), 1e-12) for ways in found
            ]
            cells.append(f"{coverage['ours'].mean():.3f}, {coverage['ours'].min():.2f}, {np.mean(ratios):.2f}")
        lines.append(f"| `{key}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the study and write it."""
    flags = parser(__doc__)
    flags.add_argument("--repeats", type=int, default=400)
    flags.add_argument("--resamples", type=int, default=400)
    flags.add_argument("--rows", type=int, nargs="+", default=ROWS)
    flags.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = flags.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    results = kept(arguments.output).get("results", {})
    expected = {name: truth(MODELS[name]) for name in arguments.models}
    for num_rows in arguments.rows:
        for name in arguments.models:
            found = study(list(MODELS).index(name), expected[name], num_rows, arguments.repeats, arguments.resamples)
            results[f"{name}, {num_rows} rows"] = found
            low = {
                key: tuple(round(ways["ours"][part], 3) for part in ("coverage", "below", "above"))
                for key, ways in found["scores"].items()
                if ways["ours"]["coverage"] < 0.93 and ways["ours"]["width"] is not None
            }
            print(name, num_rows, low, found["ends below the noise floor's mean"], flush=True)
            # after every cell: an interrupted study is not lost
            settings = vars(arguments) | {"output": None}
            write(arguments.output, {"machine": describe_machine(), "settings": settings, "results": results})
    print(summary(results, sorted({int(name.split(", ")[-1].split()[0]) for name in results})))


if __name__ == "__main__":
    main()
