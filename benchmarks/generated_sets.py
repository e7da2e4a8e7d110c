"""Do sets of samples keep their coverage? 2,000 data sets for each case, with the plug-in choice beside it.

    python benchmarks/generated_sets.py --output benchmarks/results/generated_sets.json

Prompts differ in how likely each of their samples is right; scores know a little of which is, and are tied or not.
Coverage is that of the law the data come from, by 4,000 further prompts, the same for all data sets of a case. "On
average" asks that the mean coverage be at least `1 - alpha`; "with confidence" that it be so in 90 % of the data sets.
The plug-in takes the number, or the cut, that covers `1 - alpha` of the labelled prompts themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from harness import parser, write

from peft_calib.calibration import NoGuaranteeError, SampleSets

DATA_SETS, SAMPLES, CONFIDENCE = 2000, 12, 0.9
#: Kind of the data, labelled prompts, alpha.
CASES = [
    ("plain", 50, 0.2),
    ("plain", 200, 0.1),
    ("plain", 1000, 0.1),
    ("tied", 200, 0.1),
    ("useless scores", 200, 0.1),
]


def prompts(kind: str, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`(N, M)` which samples are right, and scores."""
    chance = 0.25 + 0.75 * generator.beta(1.0, 1.0, size=(count, 1))
    right = generator.random((count, SAMPLES)) < chance
    scores = generator.normal(size=right.shape) + (0.0 if kind == "useless scores" else 1.0) * right
    return right, np.round(scores) if kind == "tied" else scores


def case(kind: str, count: int, alpha: float, by: str) -> dict[str, Any]:
    """Coverage of the three choices over data sets."""
    right, scores = prompts(kind, 4000, np.random.default_rng(1))
    values = -scores if by == "score" else np.broadcast_to(np.arange(1.0, SAMPLES + 1.0), right.shape)
    law = np.sort(np.where(right, values, np.inf).min(axis=1))
    found: dict[str, list[float]] = {"on average": [], "with confidence": [], "plug-in": []}
    refused = {"on average": 0, "with confidence": 0}
    generator = np.random.default_rng(0)
    for _ in range(DATA_SETS):
        given, given_scores = prompts(kind, count, generator)
        arguments = (given, given_scores) if by == "score" else (given, None)
        for name, confidence in (("on average", None), ("with confidence", CONFIDENCE)):
            try:
                sets = SampleSets(alpha, by, confidence=confidence).fit(*arguments)
            except NoGuaranteeError:
                refused[name] += 1
                continue
            assert sets.quantile is not None
            found[name].append(float(np.searchsorted(law, sets.quantile, side="right") / len(law)))
        own = -given_scores if by == "score" else np.broadcast_to(np.arange(1.0, SAMPLES + 1.0), given.shape)
        needed = np.sort(np.where(given, own, np.inf).min(axis=1))[int(np.ceil(count * (1 - alpha))) - 1]
        found["plug-in"].append(float(np.searchsorted(law, needed, side="right") / len(law)))
    return {name: _told(np.array(covered), alpha, refused.get(name, 0)) for name, covered in found.items()}


def _told(covered: np.ndarray, alpha: float, refused: int) -> dict[str, Any]:
    kept = float((covered >= 1 - alpha).mean())
    return {
        "mean_coverage": float(covered.mean()),
        "standard_error": float(covered.std() / np.sqrt(len(covered))),
        "share_of_data_sets_covered": kept,
        "refused": refused,
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    found = {
        f"{kind}, {count} prompts, alpha {alpha}, by {by}": case(kind, count, alpha, by)
        for kind, count, alpha in CASES
        for by in ("count", "score")
    }
    write(args.output, {"data_sets": DATA_SETS, "samples": SAMPLES, "confidence": CONFIDENCE, "cases": found})


if __name__ == "__main__":
    main()
