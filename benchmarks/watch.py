"""Does a watch keep its false-alarm rate, how long does it take to see a change, and what are its estimates worth?

    python benchmarks/watch.py --repeats 2000 --output benchmarks/results/watch.json

False alarms: streams that are drawn like their reference, 2,000 rows each; `every 200 rows: KS` is a two-sample
Kolmogorov-Smirnov test at the same level after every 200 rows, `fixed reference` are the same bets on places among the
reference alone. Delays: rows from a change to the alarm. Coverage: of the true accuracy, by the interval of each
estimate, where what it rests on holds and where it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from harness import describe_machine, kept, parser, write
from scipy.special import expit
from scipy.stats import ks_2samp

from peft_calib.calibration.inputs import softmax
from peft_calib.calibration.watch import Watch
from peft_calib.calibration.watch.signals import cells_of, odds_of
from peft_calib.calibration.watch.wealth import Wealth

LEVEL, ROWS = 0.05, 2000
#: Rows that the true accuracy is counted on.
POPULATION = 2_000_000
MEANS = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
SHARES = np.array([0.5, 0.3, 0.2])
Drawn = tuple[np.ndarray, np.ndarray]


def two_classes(generator: np.random.Generator, size: int, factor: float = 1.0, move: float = 0.0) -> Drawn:
    """Probabilities of class 1 that are `factor` times too far out in logits, and labels; `move` adds to the logit."""
    logits = generator.normal(move, 2.0, size)
    return expit(factor * logits), (generator.random(size) < expit(logits)).astype(int)


def tied(generator: np.random.Generator, size: int) -> Drawn:
    """Of three values only."""
    p = generator.choice([0.1, 0.6, 0.95], size, p=[0.4, 0.2, 0.4])
    return p, (generator.random(size) < p).astype(int)


def classes(
    generator: np.random.Generator, size: int, shares: np.ndarray = SHARES, factor: float = 1.0, move: float = 0.0
) -> Drawn:
    """Three normal classes, whose posterior under `SHARES` is known; `move` moves the inputs and not the posterior."""
    labels = generator.choice(3, size, p=shares)
    x = MEANS[labels] + generator.normal(size=(size, 2)) + move
    if move:  # covariate shift: labels as the posterior says at the place moved to
        posterior = softmax(np.log(SHARES) - 0.5 * ((x[:, None] - MEANS) ** 2).sum(axis=-1))
        labels = (generator.random(size)[:, None] > posterior.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    return softmax(factor * (np.log(SHARES) - 0.5 * ((x[:, None] - MEANS) ** 2).sum(axis=-1))), labels


def flipped(generator: np.random.Generator, size: int) -> Drawn:
    """Concept shift that no prediction shows: a fifth of the labels is another."""
    p, labels = classes(generator, size)
    return p, np.where(generator.random(size) < 0.2, (labels + 1) % 3, labels)


# Draw, rows of the reference.
NULLS: dict[str, tuple[Callable[..., Drawn], int]] = {
    "calibrated, 500 rows": (two_classes, 500),
    "over-confident, 500 rows": (lambda g, n: two_classes(g, n, 2.5), 500),
    "tied, 500 rows": (tied, 500),
    "tiny, 50 rows": (two_classes, 50),
    "three classes, 500 rows": (classes, 500),
}
# Reference, what comes after the change, rows of the reference, rows before the change.
CHANGES: dict[str, tuple[Callable[..., Drawn], Callable[..., Drawn], int, int]] = {
    "logits drawn together by a half": (two_classes, lambda g, n: two_classes(g, n, 0.5), 500, 0),
    "the same after 2,000 rows": (two_classes, lambda g, n: two_classes(g, n, 0.5), 500, 2000),
    "logits drawn together by a fifth": (two_classes, lambda g, n: two_classes(g, n, 0.8), 500, 0),
    "a half, 50 rows of reference": (two_classes, lambda g, n: two_classes(g, n, 0.5), 50, 0),
    "class shares 50:30:20 to 20:30:50": (classes, lambda g, n: classes(g, n, SHARES[::-1]), 500, 0),
    "inputs moved by 1": (classes, lambda g, n: classes(g, n, move=1.0), 500, 0),
    "a fifth of the labels is another": (classes, flipped, 500, 0),
}
# Reference, window, rows of the reference, rows of the window.
COVERED: dict[str, tuple[Callable[..., Drawn], Callable[..., Drawn], int, int]] = {
    "no change, calibrated": (two_classes, two_classes, 500, 1000),
    "no change, over-confident": (*[lambda g, n: two_classes(g, n, 2.5)] * 2, 500, 1000),
    "no change, tied": (tied, tied, 500, 1000),
    "no change, tiny": (two_classes, two_classes, 50, 1000),
    "no change, three classes": (classes, classes, 500, 1000),
    "label shift": (classes, lambda g, n: classes(g, n, SHARES[::-1]), 500, 1000),
    "label shift, over-confident": (
        lambda g, n: classes(g, n, factor=2.0), lambda g, n: classes(g, n, SHARES[::-1], 2.0), 500, 1000,
    ),
    "covariate shift, calibrated": (classes, lambda g, n: classes(g, n, move=1.0), 500, 1000),
    "covariate shift to easier rows, over-confident": (
        lambda g, n: classes(g, n, factor=2.0), lambda g, n: classes(g, n, factor=2.0, move=-1.0), 500, 1000,
    ),
    "labels changed unseen": (classes, flipped, 500, 1000),
}  # fmt: skip


def top(p: np.ndarray) -> np.ndarray:
    """Confidence of predictions."""
    return np.maximum(p, 1.0 - p) if p.ndim == 1 else p.max(axis=1)


def right(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which predictions are right."""
    return (p > 0.5).astype(int) == labels if p.ndim == 1 else p.argmax(axis=1) == labels


def false_alarms(index: int, draw: Callable[..., Drawn], size: int, repeats: int) -> dict:
    """Shares of unchanged streams with an alarm."""
    found = {"watch": 0, "every 200 rows: KS": 0, "fixed reference": 0}
    for repeat in range(repeats):
        generator = np.random.default_rng([1, index, repeat])
        (p, labels), (new, _) = draw(generator, size), draw(generator, ROWS)
        watch = Watch(false_alarm=LEVEL, seed=repeat).start(p, labels)
        found["watch"] += watch.update(new).alarmed
        before, now = top(p), top(new)
        found["every 200 rows: KS"] += any(
            ks_2samp(before, now[k : k + 200]).pvalue <= LEVEL for k in range(0, ROWS, 200)
        )
        cells, seen = cells_of(odds_of(now)), np.bincount(cells_of(odds_of(before)), minlength=400)
        above = seen[::-1].cumsum()[::-1] - seen
        places = (above[cells] + generator.random(ROWS) * (seen[cells] + 1)) / (size + 1)
        wealth = Wealth(1, float(np.log(1.0 / LEVEL)))
        wealth.bet(places[:, None])
        found["fixed reference"] += bool(wealth.alarmed[0])
    return {"streams": repeats, "level": LEVEL, **{name: count / repeats for name, count in found.items()}}


def delays(index: int, case: tuple, repeats: int) -> dict:
    """Rows from a change to an alarm, at a false-alarm probability of 1 %."""
    draw, after, size, before = case
    waited, early = [], 0
    for repeat in range(repeats):
        generator = np.random.default_rng([2, index, repeat])
        watch = Watch(seed=repeat).start(*draw(generator, size))
        early += before > 0 and watch.update(draw(generator, before)[0]).alarmed
        report = watch.update(after(generator, ROWS)[0])
        raised = [one.raised_at - before for one in report.alarms if one.raised_at is not None]
        waited.append(min(raised) if raised else np.inf)
    seen = np.array(waited)
    median = float(np.median(seen))
    return {
        "streams": repeats,
        "alarmed_within": {str(rows): float((seen <= rows).mean()) for rows in (100, 500, ROWS)},
        "median_delay": median if np.isfinite(median) else None,
        "alarm_before_the_change": early / repeats,
    }


def coverage(index: int, case: tuple, repeats: int) -> dict:
    """How often each interval holds the accuracy of the population that the window is drawn from."""
    draw, now, size, window = case
    generator = np.random.default_rng([3, index])
    many = now(generator, POPULATION)
    true = float(right(*many).mean())
    known: dict[str, list[tuple[bool, float, float]]] = {}
    alarms = 0
    for repeat in range(repeats):
        generator = np.random.default_rng([3, index, repeat])
        watch = Watch(seed=repeat).start(*draw(generator, size))
        report = watch.update(now(generator, window)[0])
        alarms += report.alarmed
        for one in report.expected:
            if one.accuracy is None:
                continue
            low, high = one.interval
            known.setdefault(one.name, []).append((low <= true <= high, one.accuracy - true, high - low))
    estimates = {
        name: {
            "coverage": float(np.mean([one[0] for one in rows])),
            "mean_error": round(float(np.mean([one[1] for one in rows])), 4),
            "median_width": round(float(np.median([one[2] for one in rows])), 4),
            "given": len(rows) / repeats,
        }
        for name, rows in known.items()
    }
    return {"sets": repeats, "accuracy": round(true, 4), "alarmed": alarms / repeats, "estimates": estimates}


def markdown(results: dict) -> list[str]:
    """The tables of the page."""
    ways = ("watch", "every 200 rows: KS", "fixed reference")
    alarms = [
        "| unchanged rows | watch | KS test every 200 rows | same bets, fixed reference |",
        "|---|---:|---:|---:|",
    ]
    for name, found in results["false_alarms"].items():
        alarms.append(f"| {name} | {' | '.join(f'{found[way]:.1%}' for way in ways)} |")
    waits = ["| change | within 100 rows | 500 | 2,000 | median |", "|---|---:|---:|---:|---:|"]
    for name, found in results["delays"].items():
        median = "–" if found["median_delay"] is None else f"{found['median_delay']:.0f}"
        waits.append(f"| {name} | {' | '.join(f'{v:.0%}' for v in found['alarmed_within'].values())} | {median} |")
    names = ("confidence", "threshold", "class_shares")
    held = [
        "| rows now | accuracy | alarm | by confidence | by threshold | by class shares |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in results["coverage"].items():
        cells = [
            f"{one['coverage']:.1%} ({100 * one['mean_error']:+.1f})" for one in map(found["estimates"].get, names)
        ]
        held.append(f"| {name} | {found['accuracy']:.1%} | {found['alarmed']:.0%} | {' | '.join(cells)} |")
    return ["\n".join(table) for table in (alarms, waits, held)]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=2000, help="unchanged streams")
    arguments.add_argument("--delays", type=int, default=500, help="streams with a change")
    arguments.add_argument("--sets", type=int, default=1000, help="references and windows of a case of coverage")
    arguments.add_argument("--only", nargs="+", metavar="CASE", help="cases to run; figures of the others are kept")
    asked = arguments.parse_args()
    results = kept(asked.output) | {"machine": describe_machine()}
    for part, cases in (("false_alarms", NULLS), ("delays", CHANGES), ("coverage", COVERED)):
        results[part] = {name: found for name, found in results.get(part, {}).items() if name in cases}
        for index, (name, case) in enumerate(cases.items()):
            if asked.only and name not in asked.only:
                continue
            if part == "false_alarms":
                results[part][name] = false_alarms(index, *case, asked.repeats)
            elif part == "delays":
                results[part][name] = delays(index, case, asked.delays)
            else:
                results[part][name] = coverage(index, case, asked.sets)
            print(part, name, results[part][name], flush=True)
            results[part] = {one: results[part][one] for one in cases if one in results[part]}
            write(asked.output, results)


if __name__ == "__main__":
    main()
