"""How often `compare` calls one of two equally good models better, from one row to two thousand.

    python benchmarks/false_winners.py --output benchmarks/results/false_winners.json

Both models add their own noise, of the same size, to the logits that labels are drawn from: neither is better, though
they differ on every row. At the 95 % level a winner should be named in at most 5 of 100 comparisons, and never where
five rows or fewer decide.
"""

from __future__ import annotations

import warnings

import numpy as np
from harness import describe_machine, drawn_labels, parser, write

from peft_calib.calibration import compare
from peft_calib.calibration.inputs import softmax

SCORES = ("nll", "brier", "accuracy")
COMPARISONS = {1: 400, 2: 400, 3: 400, 5: 400, 10: 400, 20: 400, 50: 400, 200: 400, 2000: 200}
# Number of classes, spread of the true logits, noise of either model's.
MODELS = {"two classes": (2, 1.5, 1.0), "five classes": (5, 2.0, 1.5), "two classes, sure and noisy": (2, 4.0, 3.0)}


def winners(name: str, num_rows: int, comparisons: int, resamples: int) -> dict[str, float]:
    """Share of comparisons that name a winner, score by score."""
    classes, spread, noise = MODELS[name]
    named = dict.fromkeys(SCORES, 0)
    for repeat in range(comparisons):
        generator = np.random.default_rng([num_rows, repeat])
        z = spread * generator.normal(size=(num_rows, classes))
        labels = drawn_labels(generator, softmax(z))
        a, b = (softmax(z + noise * generator.normal(size=z.shape)) for _ in range(2))
        found = compare(a, b, labels, scores=SCORES, num_resamples=resamples, seed=repeat)
        for key in SCORES:
            named[key] += found[key].better is not None
    return {key: count / comparisons for key, count in named.items()}


def main() -> None:
    """Run the study and write it."""
    flags = parser(__doc__)
    flags.add_argument("--rows", type=int, nargs="+", default=list(COMPARISONS))
    flags.add_argument("--models", nargs="+", default=list(MODELS))
    flags.add_argument("--resamples", type=int, default=400)
    arguments = flags.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    results: dict[str, dict] = {}
    for num_rows in arguments.rows:
        comparisons = COMPARISONS.get(num_rows, 200)
        for name in arguments.models:
            found = winners(name, num_rows, comparisons, arguments.resamples)
            results[f"{name}, {num_rows} rows"] = {"comparisons": comparisons, "winners": found}
            print(name, num_rows, found, flush=True)
        # after every number of rows: an interrupted study is not lost
        settings = vars(arguments) | {"output": None}
        write(arguments.output, {"machine": describe_machine(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
