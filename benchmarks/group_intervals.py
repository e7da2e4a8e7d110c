"""Do the intervals of groups' gaps hold all true gaps at once, and is a group called worse that is not?

    python benchmarks/group_intervals.py --repeats 1000 --output benchmarks/results/group_intervals.json

Each case has groups of fixed sizes, each with its own difficulty and its own factor by which the model's logits are
too large, so the truth is known: the scores of a very large sample of each group, with the same bins, and of all rows
with the groups in the shares that they have. Per case and score: how often all gaps lie in their intervals, how often
that of each single group does, and the width. Per case: how often any group is called worse in a score in which its
true gap is not on the worse side, and how often the groups that are worse are called so. `fewest` does the same for
small groups, whatever the report's own bound is.
"""

from __future__ import annotations

import numpy as np
from harness import describe_machine, drawn_labels, kept, parser, write

from peft_calib.calibration.bins import BinStatistics
from peft_calib.calibration.grouping import as_groups
from peft_calib.calibration.inputs import Rows, softmax
from peft_calib.calibration.report import groups as report_groups
from peft_calib.calibration.report.measured import ReportSettings, measured
from peft_calib.calibration.scores.binned import calibration_error
from peft_calib.calibration.scores.panel import build_tables, compute_panel
from peft_calib.calibration.scores.table import HEADLINES

BINS = 15
# Rows, spread of the logits, and how many times too large they are, of each group.
CASES: dict[str, list[tuple[int, float, float]]] = {
    "calibrated, unlike": [(20, 1.0, 1.0), (40, 3.0, 1.0), (100, 1.5, 1.0), (300, 2.0, 1.0)],
    "calibrated, ten of 50": [(50, 1.5, 1.0)] * 10,
    "one over-confident": [(30, 1.5, 1.0), (60, 1.5, 1.0), (100, 1.5, 2.5), (300, 1.5, 1.0)],
    "all over-confident, two halves": [(150, 1.5, 2.0), (150, 1.5, 2.0)],
    "all over-confident, unlike": [(20, 1.0, 2.0), (50, 2.5, 2.0), (100, 1.5, 1.5), (200, 2.0, 2.0)],
}
FEWEST: dict[str, list[tuple[int, float, float]]] = {
    f"groups of {size}, {name}": [*[(size, 1.5, factor)] * 4, (200, 1.5, factor)]
    for size in (5, 10, 20, 30)
    for name, factor in (("calibrated", 1.0), ("over-confident", 2.0))
}


def drawn(generator: np.random.Generator, size: int, spread: float, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Three classes, normal logits."""
    z = spread * generator.normal(size=(size, 3))
    return softmax(factor * z), drawn_labels(generator, softmax(z))


def truths(case: list[tuple[int, float, float]], num_rows: int = 200_000) -> dict[str, np.ndarray]:
    """`(G,)` true gaps of each score."""
    shares = np.array([size for size, _, _ in case]) / sum(size for size, _, _ in case)
    scores, bins = [], []
    for index, (_, spread, factor) in enumerate(case):
        rows = Rows(*drawn(np.random.default_rng([7, index]), num_rows, spread, factor))
        scores.append(compute_panel(rows, BINS))
        bins.append(build_tables(rows, BINS).sums.bins)
    together = BinStatistics(
        *(sum(s * np.asarray(v, float) for s, v in zip(shares, parts, strict=True))
          for parts in zip(*(vars(b).values() for b in bins), strict=True))
    )  # fmt: skip
    whole = {key: float(shares @ [score[key] for score in scores]) for key in HEADLINES}
    whole["ece"] = float(calibration_error(together))
    return {key: np.array([score[key] for score in scores]) - whole[key] for key in HEADLINES}


def study(index: int, case: list[tuple[int, float, float]], repeats: int, resamples: int) -> dict:
    """Coverage of all gaps at once and of each, widths, false and right calls."""
    true = truths(case)
    member = np.repeat(np.arange(len(case)), [size for size, _, _ in case])
    held: dict[str, list[list[bool]]] = {key: [] for key in HEADLINES}
    width: dict[str, list[list[float]]] = {key: [] for key in HEADLINES}
    false_calls, right_calls = 0, np.zeros(len(case))
    for repeat in range(repeats):
        generator = np.random.default_rng([index, repeat])
        parts = [drawn(generator, *group) for group in case]
        rows = Rows(np.concatenate([p for p, _ in parts]), np.concatenate([y for _, y in parts]))
        asked = ReportSettings(BINS, "peft_calib", 0.95, resamples, "bca", repeat, HEADLINES)
        whole = measured(rows, asked, warn=False)
        found = report_groups.measured_groups(rows, as_groups(member, rows.labels), whole, asked)
        for key in HEADLINES:
            ends = np.array([found.gaps[key][name][1:] for name in found])
            held[key].append(((ends[:, 0] <= true[key] + 1e-3) & (true[key] - 1e-3 <= ends[:, 1])).tolist())
            width[key].append((ends[:, 1] - ends[:, 0]).tolist())
        called = [set((found.worse or {}).get(name, ())) for name in found]
        worse = [
            {key for key in HEADLINES if (-1 if key == "accuracy" else 1) * true[key][g] > 1e-3}
            for g in range(len(case))
        ]
        false_calls += any(c - w for c, w in zip(called, worse, strict=True))
        right_calls += [bool(c & w) for c, w in zip(called, worse, strict=True)]
    scores = {
        key: {
            "all_at_once": float(np.all(held[key], axis=1).mean()),
            "each": np.mean(held[key], axis=0).round(4).tolist(),
            "median_width": np.median(width[key], axis=0).round(4).tolist(),
            "true_gap": true[key].round(4).tolist(),
        }
        for key in HEADLINES
    }
    calls = {"false_calls": false_calls / repeats, "right_calls": (right_calls / repeats).tolist()}
    return {"groups": [size for size, _, _ in case], "sets": repeats, "scores": scores, **calls}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=1000, help="data sets a case")
    arguments.add_argument("--resamples", type=int, default=400)
    arguments.add_argument("--only", choices=("cases", "fewest"), help="one of the two studies")
    asked = arguments.parse_args()
    results = kept(asked.output) | {"machine": describe_machine(), "resamples": asked.resamples}
    for name, cases in (("cases", CASES), ("fewest", FEWEST)):
        if asked.only not in (None, name):
            continue
        report_groups.FEWEST_ROWS = 2 if name == "fewest" else report_groups.FEWEST_ROWS
        results[name] = {}
        for index, (title, case) in enumerate(cases.items()):
            found = results[name][title] = study(index, case, asked.repeats, asked.resamples)
            print(title, {key: found["scores"][key]["all_at_once"] for key in HEADLINES}, found["false_calls"],
                  found["right_calls"], flush=True)  # fmt: skip
            write(asked.output, results)


if __name__ == "__main__":
    main()
