"""Does the interval of class shares hold them, and what is it worth where the model is not calibrated?

    python benchmarks/prior_intervals.py --repeats 1000 --output benchmarks/results/prior_intervals.json

Normal classes, so that the posterior under the training shares is known; `factor` times its log-odds stand for a model
that is over-confident. Per case: coverage of every class's share, mean error and median width.
"""

from __future__ import annotations

import numpy as np
from harness import describe_machine, kept, parser, write

from peft_calib.calibration import estimate_prior
from peft_calib.calibration.inputs import softmax

MEANS = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
TRAIN = np.array([0.5, 0.3, 0.2])
# Shares, rows, distance of the classes, and by what the log-posterior is multiplied.
CASES = {
    "moved shares, 100 rows": ([0.1, 0.2, 0.7], 100, 1.0, 1.0),
    "moved shares, 1,000 rows": ([0.1, 0.2, 0.7], 1000, 1.0, 1.0),
    "a rare class, 100 rows": ([0.03, 0.37, 0.6], 100, 1.0, 1.0),
    "a rare class, 1,000 rows": ([0.03, 0.37, 0.6], 1000, 1.0, 1.0),
    "an absent class, 200 rows": ([0.0, 0.4, 0.6], 200, 1.0, 1.0),
    "classes hard to tell apart, 200 rows": ([0.2, 0.3, 0.5], 200, 0.4, 1.0),
    "20 rows": ([0.2, 0.3, 0.5], 20, 1.0, 1.0),
    "over-confident, 1,000 rows": ([0.1, 0.2, 0.7], 1000, 1.0, 2.5),
}


def study(index: int, shares: list[float], size: int, distance: float, factor: float, repeats: int) -> dict:
    """Coverage, error and width of each class's share."""
    true, held, width, error = np.array(shares), [], [], []
    for repeat in range(repeats):
        generator = np.random.default_rng([index, repeat])
        means = distance * MEANS
        x = means[generator.choice(3, size, p=true)] + generator.normal(size=(size, 2))
        logits = np.log(TRAIN) - 0.5 * ((x[:, None] - means) ** 2).sum(axis=-1)
        found = estimate_prior(softmax(factor * logits), TRAIN, num_resamples=400, seed=repeat)
        held.append((found.low <= true + 1e-9) & (true - 1e-9 <= found.high))
        width.append(found.high - found.low)
        error.append(found.prior - true)
    return {
        "shares": shares,
        "sets": repeats,
        "coverage": np.mean(held, axis=0).round(4).tolist(),
        "mean_error": np.mean(error, axis=0).round(4).tolist(),
        "median_width": np.median(width, axis=0).round(4).tolist(),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=1000)
    arguments.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    asked = arguments.parse_args()
    results = kept(asked.output) | {"machine": describe_machine(), "resamples": 400}
    for index, (name, case) in enumerate(CASES.items()):
        if name not in asked.only:
            continue
        results[name] = study(index, *case, repeats=asked.repeats)
        print(name, results[name]["coverage"], results[name]["mean_error"], flush=True)
        write(asked.output, results)


if __name__ == "__main__":
    main()
