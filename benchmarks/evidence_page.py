"""`docs/evidence.md`, from the results of `evidence.py` and nothing else."""

from __future__ import annotations

from typing import Any

#: The baseline that the question is about.
LORA = "lora"
#: Methods of one kind, of which a protocol has one.
KINDS = {
    "members, two or three": (
        "members",
        "three members, six epochs",
        "three members, three quarters of the passes",
    )
}

HEAD = """# Is it better than a LoRA with a temperature?

<!-- written by benchmarks/evidence.py page; change that, or the results -->

Every protocol below, its cells, settings and rule, was written down before any of its runs was made
(`benchmarks/evidence/`). The figures are in `benchmarks/results/`; `make evidence EVIDENCE_DATA=DIR` makes them again.

Differences are to the baseline, a LoRA with a temperature where none is named; below 0 is better in all scores but
accuracy. Intervals (95 %) are over other rows and other runs of these data sets, runs paired by their seed, with
which both methods see the same training and calibration rows. `run sd` is the standard deviation between runs of one
method that differ in their seed alone. Cells of one data set share test rows or may share some: their errors over
rows are added before they are squared, as if they had all in common, which is the most these can be. Of the first
protocol, whose predictions are no longer there, they were taken for independent.
Nothing here speaks of data sets that are not here.
"""

PROTOCOL = """
## {number}. {question}

**Rule.** {decision}

**Answer.** {answer}

{baseline}{seeds} runs a side. Not counted: {excluded} Learning rate: {learning_rate}.
"""

TOGETHER = """
## All cells together

Nobody wrote this down beforehand: the mean over the cells of all protocols whose baseline is the LoRA, each protocol
by its share of the cells, for methods that are in two or more. A cell's training rows and runs are in one protocol
only, its test rows in all: their errors over rows are added, too.

| method | rows | score | difference | 95 % interval |
|---|---|---|---:|---|
"""


def page(results: list[dict[str, Any]]) -> str:
    """The page in Markdown, one part a protocol."""
    parts = [HEAD]
    for number, found in enumerate(results, 1):
        protocol = found["protocol"]
        told = {key: protocol[key] for key in ("question", "decision", "seeds", "excluded", "learning_rate")}
        baseline = "" if protocol["baseline"] == LORA else f"Baseline: {protocol['baseline']}. "
        parts.append(PROTOCOL.format(**told, number=number, answer=_answer(found), baseline=baseline))
        for title in ("in distribution", "shifted"):
            if title in found:
                parts.append(f"\n### {title.capitalize()}\n\n{_means(found[title])}\n{_cells(found[title])}")
    of_lora = [found for found in results if found["protocol"]["baseline"] == LORA]
    if len(of_lora) > 1:
        parts.append(TOGETHER + "".join(_together(of_lora)))
    return "".join(parts)


def together(results: list[dict[str, Any]], title: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Difference, low and high of each score over the cells of all protocols that have a method, or one of a kind."""
    parts = [one[title] for one in results if title in one]
    methods = {name: (name,) for part in parts for name in part["mean over cells"]}
    kinds = {kind: names for kind, names in KINDS.items() if all(name in methods for name in names)}
    found = {}
    for told, names in (methods | kinds).items():
        held = [(part, name) for part in parts for name in names if name in part["mean over cells"]]
        if len(held) > 1:
            scores = [(part["mean over cells"][name], len(part["cells"])) for part, name in held]
            found[told] = {score: _pooled([(of[score], count) for of, count in scores]) for score in scores[0][0]}
    return found


def _pooled(found: list[tuple[dict[str, float], int]]) -> tuple[float, float, float]:
    """Difference, low and high over the cells of protocols that share test rows and no run.

    The mean over all cells is that of the protocols' means by their numbers of cells. Of its interval's half width the
    parts over runs add up by their squares, those over rows as they are.
    """
    shares = [count / sum(count for _, count in found) for _, count in found]
    halves = [_halves(d) for d, _ in found]
    mean = sum(share * d["difference"] for share, (d, _) in zip(shares, found, strict=True))
    rows = sum(share * half for share, (half, _) in zip(shares, halves, strict=True))
    runs = sum((share * half) ** 2 for share, (_, half) in zip(shares, halves, strict=True)) ** 0.5
    half = (rows**2 + runs**2) ** 0.5
    return mean, mean - half, mean + half


def _halves(d: dict[str, float]) -> tuple[float, float]:
    """Half an interval's width, over rows and over runs; all over rows where its parts are not known."""
    half = (d["high"] - d["low"]) / 2
    if "error_rows" not in d:
        return half, 0.0
    whole = (d["error_rows"] ** 2 + d["error_runs"] ** 2) ** 0.5
    return half * d["error_rows"] / whole, half * d["error_runs"] / whole


def _together(results: list[dict[str, Any]]) -> list[str]:
    return [
        f"| {method} | {title} | {score} | {mean:+.4f} | [{low:+.4f}, {high:+.4f}] |\n"
        for title in ("in distribution", "shifted")
        for method, scores in together(results, title).items()
        for score, (mean, low, high) in scores.items()
    ]


def _answer(found: dict[str, Any]) -> str:
    """The verdict of the rule, or, against another baseline than it speaks of, the differences."""
    if found["protocol"]["baseline"] != LORA:
        means = found["in distribution"]["mean over cells"].items()
        return " ".join(
            f"`{method}`: NLL {_said(of['nll'])}, Brier score {_said(of['brier'])}." for method, of in means
        )
    told = []
    for method, clauses in found["decision"].items():
        missed = [clause for clause, holds in clauses.items() if not holds]
        verdict = "not shown to be better; missed: " + ", ".join(missed) if missed else "better, by every clause"
        told.append(f"`{method}`: {verdict}.")
    return " ".join(told)


def _said(d: dict[str, float]) -> str:
    return f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"


def _means(part: dict[str, Any]) -> str:
    """One row a method and score, over all cells."""
    lines = ["| method | score | baseline | method | difference | 95 % interval | run sd, baseline | run sd, method |"]
    lines.append("|---|---|---:|---:|---:|---|---:|---:|")
    for method, scores in part["mean over cells"].items():
        for score, d in scores.items():
            sides = f"{d['b']:.4f} | {d['a']:.4f} | {_said(d).replace(' ', ' | ', 1)}"
            lines.append(f"| {method} | {score} | {sides} | {d['run_sd_b']:.3f} | {d['run_sd_a']:.3f} |")
    return "\n".join(lines) + "\n"


def _cells(part: dict[str, Any]) -> str:
    """NLL and Brier score of every cell by itself."""
    lines = ["| cell | method | NLL of the baseline | NLL | Brier score |", "|---|---|---:|---|---|"]
    for cell, methods in part["cells"].items():
        for method, scores in methods.items():
            nll = scores["nll"]
            lines.append(f"| {cell} | {method} | {nll['b']:.4f} | {_said(nll)} | {_said(scores['brier'])} |")
    return "\n".join(lines) + "\n"
