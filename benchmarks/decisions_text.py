"""Decision rules on real texts: what is promised, what is reached on like rows, and what after a shift.

    python benchmarks/decisions_text.py --data FOLDER --output benchmarks/results/decisions_text.json

FOLDER has `sst2`, `sentiment_shift`, `trec` and `newsgroups20` as gzipped JSON lines with `text` and `label`, of which
equal texts are read once. The model is a logistic regression on TF-IDF, which needs seconds: a rule knows
probabilities and labels, and not whose they are. It is trained once; held-out rows are then cut 20 times into rows to
fit a rule on and rows to see what it reaches. The shifts: film reviews to airline and kitchen reviews; TREC's own test
questions; newsgroups' later messages, and messages of which every third is of a group that is none of the classes, so
that any answer is wrong.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import describe_machine, parser, write
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from peft_calib.calibration import ConformalSets, NoGuaranteeError, SelectiveThreshold
from peft_calib.calibration.decide.bounds import exact_interval

RISKS, ALPHA, REPEATS, LEFT_OUT = (0.05, 0.1), 0.1, 20, 5


class Texts(NamedTuple):
    """Texts with their labels."""

    texts: list[str]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> Texts:
        """Some of the rows."""
        return Texts([self.texts[i] for i in rows], self.labels[rows])


class Task(NamedTuple):
    """Rows to train on, held-out rows like them, and others."""

    train: Texts
    held_out: Texts
    shifts: dict[str, Texts]


def read(file: Path) -> Texts:
    """One file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = list({row["text"]: row for row in map(json.loads, lines)}.values())
    return Texts([row["text"] for row in rows], np.array([row["label"] for row in rows]))


def cut(rows: Texts, size: int, generator: np.random.Generator) -> tuple[Texts, Texts]:
    """Rows of which `size` are held out."""
    order = generator.permutation(len(rows.labels))
    return rows.take(order[size:]), rows.take(order[:size])


def tasks(folder: Path) -> dict[str, Task]:
    """The three tasks."""
    generator = np.random.default_rng(0)
    films = read(folder / "sst2" / "train.jsonl.gz")
    films = films.take(np.array([i for i, text in enumerate(films.texts) if len(text.split()) >= 8]))
    reviews = {name: read(folder / "sentiment_shift" / f"{name}.jsonl.gz") for name in ("airline", "kitchen")}
    questions = cut(read(folder / "trec" / "train.jsonl.gz"), 2000, generator)
    early, late = (read(folder / "newsgroups20" / f"{name}.jsonl.gz") for name in ("train", "test"))
    known = [rows.take(np.flatnonzero(rows.labels < 20 - LEFT_OUT)) for rows in (early, late)]
    foreign = early.take(np.flatnonzero(early.labels >= 20 - LEFT_OUT))
    messages = cut(known[0], 3000, generator)
    half = len(foreign.labels) * 2
    later = known[1].take(generator.permutation(len(known[1].labels))[:half])
    mixed = Texts(messages[1].texts + foreign.texts[:1500], np.append(messages[1].labels, foreign.labels[:1500]))
    return {
        "sst2": Task(films, read(folder / "sst2" / "dev.jsonl.gz"), reviews),
        "trec": Task(*questions, {"its test questions": read(folder / "trec" / "test.jsonl.gz")}),
        "newsgroups": Task(*messages, {"later messages": later, "a third of other groups": mixed}),
    }


def study(task: Task) -> list[dict[str, Any]]:
    """Each rule on like rows and on shifted ones, over cuts of the held-out rows."""
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(C=10.0, max_iter=200))
    model.fit(task.train.texts, task.train.labels)
    held = model.predict_proba(task.held_out.texts), task.held_out.labels
    others = {name: (model.predict_proba(rows.texts), rows.labels) for name, rows in task.shifts.items()}
    num_classes, generator = held[0].shape[1], np.random.default_rng(1)
    cuts = [np.array_split(generator.permutation(len(held[1])), 2) for _ in range(REPEATS)]
    lines = []
    for risk in RISKS:
        places: dict[str, list[dict[str, Any]]] = {"like rows": [], **{name: [] for name in others}}
        refused = 0
        for fit, new in cuts:
            try:
                rule = SelectiveThreshold(risk=risk).fit(held[0][fit], held[1][fit])
            except NoGuaranteeError:
                refused += 1
                continue
            for name, (p, y) in {"like rows": (held[0][new], held[1][new]), **others}.items():
                places[name].append(reached(rule, p, y, num_classes))
        for name, found in places.items():
            lines.append({"rule": "threshold", "risk": risk, "rows": name, "fit rows": len(cuts[0][0]),
                          "refused": refused / REPEATS, **summary(found, risk)})  # fmt: skip
    for name, (p, y) in {"like rows": held, **others}.items():
        if y.max() >= num_classes:
            continue  # no set can hold a class that is none
        reports = []
        for fit, new in cuts:
            sets = ConformalSets(ALPHA).fit(held[0][fit], held[1][fit])
            rows = (p[new], y[new]) if name == "like rows" else (p, y)
            reports.append(sets.evaluate(*rows))
        lines.append({
            "rule": "sets", "alpha": ALPHA, "rows": name, "fit rows": len(cuts[0][0]),
            "coverage": float(np.mean([r.coverage for r in reports])), "band": reports[0].band,
            "below its band": float(np.mean([r.coverage < r.band[0] for r in reports])),
            "mean size": float(np.mean([r.mean_size for r in reports])),
            "singletons": float(np.mean([r.singletons for r in reports])),
        })  # fmt: skip
    return lines


def example(task: Task) -> dict[str, str]:
    """What both rules say of the first cut, as docs/decide.md shows it."""
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(C=10.0, max_iter=200))
    p, y = model.fit(task.train.texts, task.train.labels).predict_proba(task.held_out.texts), task.held_out.labels
    fit, new = np.array_split(np.random.default_rng(1).permutation(len(y)), 2)
    rule = SelectiveThreshold(risk=RISKS[0]).fit(p[fit], y[fit])
    sets = ConformalSets(ALPHA).fit(p[fit], y[fit])
    told = {"rule": rule, "rule reached": rule.evaluate(p[new], y[new])}
    return {
        name: str(one) for name, one in {**told, "sets": sets, "sets reached": sets.evaluate(p[new], y[new])}.items()
    }


def reached(rule: SelectiveThreshold, p: np.ndarray, y: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Risk and coverage; an answer to a row of no known class is wrong."""
    right = np.where(y < num_classes, p.argmax(axis=1) == y, False)
    answered = rule.accept(p)
    # what `rule.evaluate` counts, which refuses labels that are no class
    return {"errors": int((answered & ~right).sum()), "accepted": int(answered.sum()), "rows": len(y)}


def summary(found: list[dict[str, Any]], risk: float) -> dict[str, Any]:
    """Means over cuts, the first cut with exact intervals, and how often such an interval is above the target."""
    if not found:
        return {}
    first = found[0]
    shares = [one["errors"] / one["accepted"] for one in found if one["accepted"]]
    lows = [exact_interval(one["errors"], one["accepted"], 0.95)[0] for one in found if one["accepted"]]
    return {
        "mean risk": float(np.mean(shares)) if shares else None,
        "mean coverage": float(np.mean([one["accepted"] / one["rows"] for one in found])),
        "shown to be above": float(np.mean([low > risk for low in lows])) if lows else 0.0,
        "first cut": {**first, "risk interval": exact_interval(first["errors"], first["accepted"], 0.95),
                      "coverage interval": exact_interval(first["accepted"], first["rows"], 0.95)},
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/decide.md."""
    head = "| | 5 %: wrong (answered) | 10 %: wrong (answered) | sets, 90 %: coverage (band), mean size |"
    lines = [head, "|---|---:|---:|---:|"]
    for task, found in results["tasks"].items():
        for place in dict.fromkeys(line["rows"] for line in found):
            mine = [line for line in found if line["rows"] == place]
            cells = [_told(next(line for line in mine if line.get("risk") == risk)) for risk in RISKS]
            sets = [line for line in mine if line["rule"] == "sets"]
            cells += [_told_of_sets(sets[0]) if sets else "no set can hold them"]
            lines.append(f"| {task}, {place} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _told(line: dict[str, Any]) -> str:
    if line["refused"] == 1.0:
        return "refused"
    told = f"{100 * line['mean risk']:.1f} % ({100 * line['mean coverage']:.0f} %)"
    return told + (f", refused in {100 * line['refused']:.0f} %" if line["refused"] else "")


def _told_of_sets(line: dict[str, Any]) -> str:
    low, high = (100 * end for end in line["band"])
    return f"{100 * line['coverage']:.1f} % ({low:.0f} to {high:.0f}), {line['mean size']:.2f}"


def main() -> None:
    """Run the study and write it."""
    flags = parser(__doc__)
    flags.add_argument("--data", type=Path, required=True)
    arguments = flags.parse_args()
    found, all_tasks = {}, tasks(arguments.data)
    for name, task in all_tasks.items():
        found[name] = study(task)
        print(name, *found[name], sep="\n", flush=True)
    write(arguments.output, {"machine": describe_machine(), "repeats": REPEATS, "tasks": found,
                             "example": example(all_tasks["trec"])})  # fmt: skip


if __name__ == "__main__":
    main()
