"""How often intervals of scores of weighted rows hold the truth.

    python benchmarks/weighted_intervals.py --output benchmarks/results/weighted_intervals.json

Rows are drawn from one population and weighed by the density ratio to another, whose scores are known from a million
rows. Three classes; an over-confident model whose log-odds are 1.5 times too large, wrong more often where the ratio
is large. The ratio is `2 x` with `x` uniform (effective rows: three in four), or log-normal (one in four).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from harness import describe_machine, parser, write

from peft_calib.calibration.inputs import as_rows, effective_rows
from peft_calib.calibration.resampling.intervals import bootstrap_intervals
from peft_calib.calibration.scores.panel import compute_panel
from peft_calib.calibration.scores.table import KEYS

DATA_SETS, RESAMPLES, POPULATION, SIZES = 200, 200, 1_000_000, (200, 1000)
RATIOS = ("linear", "log-normal")


def drawn(count: int, ratio: str, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, labels and weights of rows."""
    normal = generator.normal(size=count)
    weights = np.exp(1.2 * normal - 0.72) if ratio == "log-normal" else 2.0 * generator.random(count)
    place = normal if ratio == "log-normal" else 3.0 * (weights - 1.0)
    logits = generator.normal(size=(count, 3)) * (1.5 - 0.25 * place.clip(-2, 2))[:, None]
    truth = np.exp(logits)
    truth /= truth.sum(axis=1, keepdims=True)
    labels = (generator.random((count, 1)) > truth.cumsum(axis=1)).sum(axis=1).clip(max=2)
    p = np.exp(1.5 * logits)
    return p / p.sum(axis=1, keepdims=True), labels, np.maximum(weights, 1e-6)


def coverage(ratio: str, size: int) -> dict[str, Any]:
    """Shares of data sets whose interval holds the population's score."""
    generator = np.random.default_rng([size, RATIOS.index(ratio)])
    p, labels, weights = drawn(POPULATION, ratio, generator)
    truth = compute_panel(as_rows(p, labels, sample_weight=weights), 15, warn=False)
    held: dict[str, list[bool]] = {key: [] for key in KEYS}
    effective = []
    for seed in range(DATA_SETS):
        p, labels, weights = drawn(size, ratio, generator)
        rows = as_rows(p, labels, sample_weight=weights)
        effective.append(effective_rows(rows.weights))
        for key, (low, high) in bootstrap_intervals(rows, num_resamples=RESAMPLES, seed=seed).items():
            held[key].append(low - 1e-12 <= truth[key] <= high + 1e-12)
    shares = {key: float(np.mean(values)) for key, values in held.items() if key != "brier_within_bin"}
    return {"ratio": ratio, "rows": size, "effective rows": float(np.mean(effective)), "held": shares}


def markdown(results: dict[str, Any], keys: tuple[str, ...] = ("accuracy", "nll", "brier", "ece", "aurc")) -> str:
    """The table of docs/calibration.md."""
    lines = [f"| weights | rows | effective | {' | '.join(f'`{key}`' for key in keys)} |"]
    lines.append("|---|---:|---:|" + "---:|" * len(keys))
    for case in results["cases"]:
        shares = " | ".join(f"{case['held'][key]:.2f}" for key in keys)
        lines.append(f"| {case['ratio']} | {case['rows']:,} | {case['effective rows']:.0f} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study and write it."""
    arguments = parser(__doc__).parse_args()
    cases = []
    for ratio in RATIOS:
        for size in SIZES:
            cases.append(coverage(ratio, size))
            print(cases[-1], flush=True)
    about = {"machine": describe_machine(), "data sets": DATA_SETS, "resamples": RESAMPLES}
    write(arguments.output, {**about, "cases": cases})


if __name__ == "__main__":
    main()
