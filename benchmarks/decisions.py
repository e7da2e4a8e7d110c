"""Do decision rules keep what they promise? Thresholds and prediction sets over many calibration splits.

    python benchmarks/decisions.py --repeats 2000 --output benchmarks/results/decisions.json

A model is a population of 10,000 rows, out of which calibration splits are drawn with replacement: what a rule reaches
on the population is then known exactly. `calibrated` answers with the probabilities the labels are drawn from,
`over-confident` with logits three times too large, `tied` with probabilities in a few levels; `tiny` is 50 rows of
the second. Two are built to tempt: in `flat` the confidence says nothing and the risk is just above the target
everywhere, so that every answer breaks it; in `not monotone` the surest rows are wrong more often than the target,
and the next ones bring the risk below it, above it and below it again. A guarantee is broken where the population's
risk (coverage, cost) lies beyond what was promised; a rule that refuses breaks none, and is counted. Beside each
threshold for a risk stands the textbook's: the lowest above which the share of errors on the calibration split is
within the target.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from harness import describe_machine, drawn_labels, kept, parser, write

from peft_calib.calibration import ConformalSets, NoGuaranteeError, SelectiveThreshold
from peft_calib.calibration.decide.search import Prefixes
from peft_calib.calibration.inputs import softmax

POPULATION, CLASSES, CONFIDENCE, ALPHA = 10_000, 4, 0.95, 0.1
#: Rows of a calibration split of each model, and the risk it is asked for.
CASES = {
    "calibrated": (400, 0.1), "over-confident": (400, 0.1), "tied": (400, 0.1), "tiny": (50, 0.1),
    "flat": (400, 0.1), "not monotone": (400, 0.1),
}  # fmt: skip


class Population(NamedTuple):
    """All rows there are."""

    probabilities: np.ndarray
    labels: np.ndarray


def population(case: str) -> Population:
    """The rows of a model."""
    generator = np.random.default_rng(7)
    if case in ("flat", "not monotone"):
        return _tempting(generator, case)
    logits = 5.0 * generator.normal(size=(POPULATION, CLASSES))
    labels = drawn_labels(generator, softmax(logits))
    p = softmax(logits if case in ("calibrated", "tied") else 3.0 * logits)
    if case == "tied":  # eighths: a few dozen different rows, six confidences
        top, p = p.argmax(axis=1), np.round(8.0 * p)
        p[np.arange(len(p)), top] += 8.0 - p.sum(axis=1)
        p /= 8.0
    return Population(p, labels)


def _tempting(generator: np.random.Generator, case: str) -> Population:
    """Confidences from .4 to 1 in order, and exactly as many errors in each stretch as the case has."""
    confidence = np.linspace(1.0, 0.4, POPULATION)
    # a risk of .12, then .08 brings it down to .1 and below, .11 to .102, .05 below again, .4 far above
    shares = [0.1002] if case == "flat" else [0.12, 0.08, 0.07, 0.16, 0.05, 0.05, 0.4, 0.4]
    wrong = np.concatenate(
        [generator.permutation(len(part)) < round(share * len(part)) for part, share in
         zip(np.array_split(confidence, len(shares)), shares, strict=True)]
    )  # fmt: skip
    top = generator.integers(0, CLASSES, POPULATION)
    p = np.repeat((1.0 - confidence[:, None]) / (CLASSES - 1), CLASSES, axis=1)
    p[np.arange(POPULATION), top] = confidence
    return Population(p, np.where(wrong, (top + 1) % CLASSES, top))


Promise = Callable[[Any, Population], bool]


def risk_of(accepted: np.ndarray, people: Population) -> float:
    """The share of wrong ones among the answered, 0 if none is."""
    return float((people.probabilities.argmax(axis=1) != people.labels)[accepted].mean()) if accepted.any() else 0.0


def breaks_risk(rule: SelectiveThreshold, people: Population) -> bool:
    """Whether the risk of all that is answered is above the target."""
    return risk_of(rule.accept(people.probabilities), people) > rule.bound + 1e-12


def breaks_class_risk(rule: SelectiveThreshold, people: Population) -> bool:
    """Whether the risk of what is answered as any one class is."""
    accepted, predicted = rule.accept(people.probabilities), people.probabilities.argmax(axis=1)
    return any(risk_of(accepted & (predicted == part.predicted), people) > part.bound + 1e-12 for part in rule.parts)


def breaks_coverage(rule: SelectiveThreshold, people: Population) -> bool:
    """Whether fewer rows are answered than promised."""
    return bool(rule.accept(people.probabilities).mean() < rule.bound - 1e-12)


def breaks_cost(rule: SelectiveThreshold, people: Population) -> bool:
    """Whether a row costs more on average than promised."""
    assert rule.costs is not None
    wrong, passed_on = rule.costs
    accepted = rule.accept(people.probabilities)
    mean = wrong * risk_of(accepted, people) * accepted.mean() + passed_on * (1.0 - accepted.mean())
    return bool(mean > rule.bound + 1e-12)


def textbook(part: Population, risk: float) -> float:
    """The lowest confidence above which the share of errors of a split is at most the target; infinite if none is."""
    confidence = part.probabilities.max(axis=1)
    prefixes = Prefixes.of(confidence, part.probabilities.argmax(axis=1) == part.labels)
    fine = np.flatnonzero(prefixes.errors / prefixes.accepted <= risk)
    return float(prefixes.lowest[fine[-1]]) if len(fine) else np.inf


def splits(case: str, people: Population, repeats: int) -> list[Population]:
    """Calibration splits, drawn with replacement."""
    generator = np.random.default_rng(zlib.crc32(case.encode()))
    chosen = generator.integers(0, len(people.labels), (repeats, CASES[case][0]))
    return [Population(people.probabilities[rows], people.labels[rows]) for rows in chosen]


def thresholds(case: str, repeats: int) -> list[dict[str, Any]]:
    """How often each kind of threshold breaks its promise, refuses, and how much it answers."""
    people, risk = population(case), CASES[case][1]
    kinds: dict[str, tuple[dict[str, Any], Promise]] = {
        "risk": ({"risk": risk}, breaks_risk),
        "risk per class": ({"risk": risk, "per_class": True}, breaks_class_risk),
        "coverage": ({"target_coverage": 0.7}, breaks_coverage),
        "costs": ({"costs": (10.0, 1.0)}, breaks_cost),
    }
    parts, found = splits(case, people, repeats), []
    for name, (settings, breaks) in kinds.items():
        broken, refused, answered = 0, 0, []
        for part in parts:
            try:
                rule = SelectiveThreshold(confidence=CONFIDENCE, **settings).fit(part.probabilities, part.labels)
            except NoGuaranteeError:
                refused += 1
                continue
            broken += breaks(rule, people)
            answered.append(rule.coverage)
        found.append(_line(case, name, broken, refused, answered, repeats))
    broken, answered = 0, []
    confidence = people.probabilities.max(axis=1)
    for part in parts:
        threshold = textbook(part, risk)
        broken += risk_of(confidence >= threshold, people) > risk
        answered.append(float((part.probabilities.max(axis=1) >= threshold).mean()))
    return [*found, _line(case, "risk, textbook", broken, 0, answered, repeats)]


def _line(case: str, name: str, broken: int, refused: int, answered: list[float], repeats: int) -> dict[str, Any]:
    stated = 1.0 - CONFIDENCE
    return {
        "case": case, "rows": CASES[case][0], "kind": name, "stated": round(stated, 6), "violations": broken / repeats,
        "most": stated + 2.0 * float(np.sqrt(stated * (1.0 - stated) / repeats)), "refused": refused / repeats,
        "mean coverage": float(np.mean(answered)) if answered else None,
    }  # fmt: skip


SETS: dict[str, dict[str, Any]] = {
    f"{score}{', randomized' if randomized else ''}{', ' + name if name else ''}": {
        "score": score, "randomized": randomized, "groups": groups, "penalty": 0.05, "free_ranks": 1,
    }
    for score in ("lac", "aps", "raps") for randomized in (False, True)
    for name, groups in (("", None), ("class-conditional", "label"))
}  # fmt: skip


def sets_of(case: str, repeats: int) -> list[dict[str, Any]]:
    """Mean coverage of each kind of set over splits, on the population, and what its band says of new rows."""
    people, alpha = population(case), ALPHA
    parts, generator = splits(case, people, repeats), np.random.default_rng(11)
    found = []
    for name, settings in SETS.items():
        coverages, sizes, inside, refused = [], [], [], 0
        for k, part in enumerate(parts):
            try:
                sets = ConformalSets(alpha=alpha, seed=k, **settings).fit(part.probabilities, part.labels)
            except NoGuaranteeError:
                refused += 1
                continue
            # 500 rows of the population, other ones for each split: over splits their mean is the population's
            rows = generator.integers(0, POPULATION, 500)
            held = sets.predict(people.probabilities[rows])
            covered = held[np.arange(len(rows)), people.labels[rows]]
            labels = people.labels[rows]
            by_class = [covered[labels == c].mean() for c in range(CLASSES)]
            coverages.append(by_class if settings["groups"] else [covered.mean()])
            sizes.append(held.sum(axis=1).mean())
            if sets.coverage_law is not None:
                low, high = sets.coverage_law.band(200, CONFIDENCE)
                inside.append(low <= covered[:200].mean() <= high)
        found.append(_set_line(case, name, alpha, np.array(coverages), sizes, inside, refused / repeats))
    return found


def _set_line(
    case: str, name: str, alpha: float, coverages: np.ndarray, sizes: list[float], inside: list[bool], refused: float
) -> dict[str, Any]:
    """Of `(R, G)` coverages; that of the worst class where there are classes."""
    line = {"case": case, "rows": CASES[case][0], "kind": name, "stated": 1.0 - alpha, "refused": refused}
    if not len(coverages):
        return line
    means, errors = coverages.mean(axis=0), coverages.std(axis=0) / np.sqrt(len(coverages))
    worst = int((means + 2.0 * errors).argmin())
    line |= {"mean coverage": float(means[worst]), "standard error": float(errors[worst])}
    line |= {"keeps it": bool((means + 2.0 * errors >= 1.0 - alpha).all()), "mean size": float(np.mean(sizes))}
    return line | ({"inside the 95 % band": float(np.mean(inside))} if inside else {})


def markdown(results: dict[str, Any]) -> tuple[str, str]:
    """The tables of docs/decide.md: broken promises of thresholds, and coverage of sets."""

    def share(value: float | None) -> str:
        return "–" if value is None else f"{100.0 * value:.1f} %"

    lines = {(line["case"], line["kind"]): line for line in results["thresholds"]}
    kinds = ["risk", "risk per class", "coverage", "costs", "risk, textbook"]
    rows = [[*(f"{kind} (refused)" if kind.startswith("risk") and "," not in kind else kind for kind in kinds)]]
    for case in CASES:
        cells = []
        for kind in kinds:
            line = lines[case, kind]
            refused = f" ({100.0 * line['refused']:.0f} %)" if kind in ("risk", "risk per class") else ""
            cells.append(share(line["violations"]) + refused)
        rows.append(cells)
    first = table(["", *CASES], rows, len(kinds))
    kept_by = {(line["case"], line["kind"]): line for line in results["sets"]}
    cells = [[share(kept_by[case, kind].get("mean coverage")) for case in CASES] for kind in SETS]
    second = table(["", *SETS], [list(CASES), *cells], len(CASES))
    return first, second


def table(names: list[str], rows: list[list[str]], width: int) -> str:
    """A table in Markdown whose lines begin with names."""
    lines = ["| " + " | ".join([name, *cells]) + " |" for name, cells in zip(names, rows, strict=True)]
    return "\n".join([lines[0], "|---" + "|---:" * width + "|", *lines[1:]])


def main() -> None:
    """Run the study of the cases asked for and write it beside what stands there."""
    flags = parser(__doc__)
    flags.add_argument("--repeats", type=int, default=2000)
    flags.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = flags.parse_args()
    settings = {"repeats": arguments.repeats, "population": POPULATION, "classes": CLASSES, "confidence": CONFIDENCE}
    results = kept(arguments.output)
    for case in arguments.cases:
        found = {"thresholds": thresholds(case, arguments.repeats), "sets": sets_of(case, arguments.repeats)}
        for kind, lines in found.items():
            print(*lines, sep="\n", flush=True)
            results[kind] = [line for line in results.get(kind, []) if line["case"] != case] + lines
        write(arguments.output, {"machine": describe_machine(), **settings, **{k: results[k] for k in found}})


if __name__ == "__main__":
    main()
