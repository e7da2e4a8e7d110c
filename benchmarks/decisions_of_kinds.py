"""Do the rules of labels and of numbers keep what they promise, over 2,000 calibration splits each?

    python benchmarks/decisions_of_kinds.py --output benchmarks/results/decisions_of_kinds.json

A model is a population of 10,000 rows, out of which calibration splits are drawn with replacement, so that what a rule
reaches on all of it is known exactly. Labels, three a row: `calibrated` answers with the probabilities the labels are
drawn from, `over-confident` with logits three times too large, `tied` with probabilities in eighths, `tiny` is 50 rows
of the second. Numbers: Gaussians with the right spread, with a third of it and heavy tails, with residuals and spread
in steps, and 50 rows of the second. Beside each rule stands the plug-in: the lowest threshold above which the share of
errors of the split is within the target, and the 90 % quantile of the split's residuals. A rule that refuses breaks
nothing, and is counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from harness import describe_machine, parser, write
from scipy.special import expit

from peft_calib.calibration import ConformalInterval, LabelThresholds, NoGuaranteeError

POPULATION, LABELS, CONFIDENCE = 10_000, 3, 0.95
RISK, MISS, ALPHA = 0.2, 0.2, 0.1
#: Rows of a calibration split.
CASES = {"calibrated": 400, "over-confident": 400, "tied": 400, "tiny": 50}


def label_population(case: str) -> tuple[np.ndarray, np.ndarray]:
    """`(N, L)` probabilities and labels."""
    generator = np.random.default_rng(7)
    logits = 3.0 * generator.normal(size=(POPULATION, LABELS))
    labels = generator.random(logits.shape) < expit(logits)
    p = expit(logits if case in ("calibrated", "tied") else 3.0 * logits)
    return np.round(8.0 * p) / 8.0 if case == "tied" else p, labels


def number_population(case: str) -> tuple[np.ndarray, np.ndarray]:
    """`(N,)` predicted standard deviations and residuals."""
    generator = np.random.default_rng(8)
    sd = np.exp(0.5 * generator.normal(size=POPULATION))
    if case in ("over-confident", "tiny"):
        return sd / 3.0, sd * generator.standard_t(3, POPULATION)
    residuals = sd * generator.normal(size=POPULATION)
    return (np.round(2.0 * sd) + 1.0, np.round(10.0 * residuals) / 10.0) if case == "tied" else (sd, residuals)


def splits(case: str, repeats: int) -> Iterator[np.ndarray]:
    """Rows of calibration splits, drawn with replacement."""
    generator = np.random.default_rng(zlib.crc32(case.encode()))
    for _ in range(repeats):
        yield generator.integers(0, POPULATION, CASES[case])


class Sorted:
    """What thresholds reach on the population, label by label."""

    def __init__(self, p: np.ndarray, labels: np.ndarray) -> None:
        order = np.argsort(p, axis=0)
        self.p = np.take_along_axis(p, order, axis=0)
        self.held = np.vstack([np.zeros(LABELS), np.take_along_axis(labels, order, axis=0).cumsum(axis=0)])

    def risk(self, k: int, start: float) -> float:
        """Share without label `k` of the rows from a probability on; 0 where there is none."""
        place = int(np.searchsorted(self.p[:, k], start))
        given = POPULATION - place
        return 1.0 - float(self.held[-1, k] - self.held[place, k]) / given if given else 0.0

    def missed(self, k: int, below: float) -> float:
        """Share of the rows with label `k` that lie below a probability."""
        return float(self.held[int(np.searchsorted(self.p[:, k], below)), k] / self.held[-1, k])


def plug_in(p: np.ndarray, y: np.ndarray) -> float:
    """The lowest probability above which the share of errors of a split is at most the target."""
    order = np.argsort(-p, kind="stable")
    share = np.cumsum(~y[order]) / np.arange(1, len(y) + 1)
    ends = np.append(np.diff(p[order]) != 0, True)  # tied rows are given together
    fine = np.flatnonzero((share <= RISK) & ends)
    return float(p[order[fine[-1]]]) if len(fine) else np.inf


def labels_of(case: str, repeats: int) -> list[dict[str, Any]]:
    """How often thresholds break their promise: any of the labels at once, and the worst label by itself."""
    p, labels = label_population(case)
    known = Sorted(p, labels)
    broken = {kind: np.zeros(LABELS) for kind in ("each label", "plug-in, each label")}
    at_once = dict.fromkeys(("all labels", "plug-in, all labels"), 0)
    refused = dict.fromkeys(("all labels", "each label"), 0)
    for rows in splits(case, repeats):
        part, truth = p[rows], labels[rows]
        for kind in refused:
            try:
                rule = LabelThresholds(RISK, MISS, CONFIDENCE, joint=kind == "all labels").fit(part, truth)
            except NoGuaranteeError:
                refused[kind] += 1
                continue
            wrong = np.array([
                known.risk(k, one.given_from) > RISK + 1e-12 or known.missed(k, one.ruled_out_below) > MISS + 1e-12
                for k, one in enumerate(rule.parts)
            ])  # fmt: skip
            if kind == "all labels":
                at_once[kind] += bool(wrong.any())
            else:
                broken[kind] += wrong
        wrong = np.array([known.risk(k, plug_in(part[:, k], truth[:, k])) > RISK for k in range(LABELS)])
        broken["plug-in, each label"] += wrong
        at_once["plug-in, all labels"] += bool(wrong.any())
    counts = {**at_once, **{kind: float(found.max()) for kind, found in broken.items()}}
    return [_line(case, kind, count / repeats, repeats, refused.get(kind, 0)) for kind, count in counts.items()]


def numbers_of(case: str, repeats: int) -> list[dict[str, Any]]:
    """Coverage of intervals over splits, and how often it is below what was promised for a split."""
    sd, residuals = number_population(case)
    found = []
    for score in ("absolute", "normalised"):
        scores = np.abs(residuals) / (sd if score == "normalised" else 1.0)
        ordered = np.sort(scores)
        covered: dict[str, list[float]] = {"on average": [], "in 95 % of splits": [], "plug-in": []}
        for rows in splits(case, repeats):
            given = np.zeros(len(rows)), sd[rows], residuals[rows]
            reach = {
                "on average": ConformalInterval(ALPHA, score).fit(*given).reach,
                "in 95 % of splits": ConformalInterval(ALPHA, score, confidence=CONFIDENCE).fit(*given).reach,
                "plug-in": float(np.quantile(scores[rows], 1.0 - ALPHA, method="inverted_cdf")),
            }
            for kind, far in reach.items():
                covered[kind].append(float(np.searchsorted(ordered, far * (1 + 1e-12), side="right")) / POPULATION)
        for kind, shares in covered.items():
            short = float(np.mean(np.array(shares) < 1.0 - ALPHA - 1e-12))
            line = _line(case, f"{score}, {kind}", short, repeats, 0)
            line |= {"mean coverage": float(np.mean(shares)), "standard error": float(np.std(shares) / repeats**0.5)}
            found.append(line)
    return found


def _line(case: str, kind: str, violations: float, repeats: int, refused: int) -> dict[str, Any]:
    stated = 1.0 - CONFIDENCE
    most = stated + 2.0 * float(np.sqrt(stated * (1.0 - stated) / repeats))
    line = {"case": case, "rows": CASES[case], "kind": kind, "stated": round(stated, 6), "violations": violations}
    return line | {"most": most, "refused": refused / repeats}


def markdown(results: dict[str, Any]) -> tuple[str, str]:
    """The tables of docs/decide.md: broken promises of labels, coverage and broken promises of numbers."""
    found = {(line["case"], line["kind"]): line for line in (*results["labels"], *results["numbers"])}

    def share(case: str, kind: str) -> str:
        return f"{100.0 * found[case, kind]['violations']:.1f} %"

    first = [["", "all labels (refused)", "each label (refused)", "plug-in, all labels", "plug-in, each label"]]
    of_a_score = ["on average", "in 95 % of splits", "plug-in"]
    second = [["", *(f"{score}, {kind}" for score in ("absolute", "normalised") for kind in of_a_score)]]
    for case in CASES:
        kinds = ("all labels", "each label")
        own = [f"{share(case, kind)} ({100.0 * found[case, kind]['refused']:.0f} %)" for kind in kinds]
        first.append([case, *own, *(share(case, f"plug-in, {kind}") for kind in kinds)])
        cells = []
        for score in ("absolute", "normalised"):
            cells += [f"{100.0 * found[case, f'{score}, on average']['mean coverage']:.1f} %"]
            cells += [share(case, f"{score}, {kind}") for kind in of_a_score[1:]]
        second.append([case, *cells])
    return _table(first), _table(second)


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def main() -> None:
    """Run the study and write it."""
    flags = parser(__doc__)
    flags.add_argument("--repeats", type=int, default=2000)
    arguments = flags.parse_args()
    settings = {"repeats": arguments.repeats, "population": POPULATION, "labels": LABELS, "confidence": CONFIDENCE}
    settings |= {"risk": RISK, "miss": MISS, "alpha": ALPHA}
    results: dict[str, list[dict[str, Any]]] = {"labels": [], "numbers": []}
    for case in CASES:
        for name, study in (("numbers", numbers_of), ("labels", labels_of)):
            results[name] += (lines := study(case, arguments.repeats))
            print(*lines, sep="\n", flush=True)
    write(arguments.output, {"machine": describe_machine(), **settings, **results})


if __name__ == "__main__":
    main()
