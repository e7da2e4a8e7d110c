"""`docs/evidence.md`, from the results of `evidence.py` and nothing else."""

from __future__ import annotations

from typing import Any

HEAD = """# Is it better than a LoRA with a temperature?

<!-- written by benchmarks/evidence.py page; change that, or the results -->

**Question.** {question}

The runs, the settings and the rule below were written down before any run was made
(`benchmarks/evidence/protocol.json`); the figures are in `benchmarks/results/evidence.json`, and
`make evidence EVIDENCE_DATA=DIR` makes them again.

**Rule.** {decision}

**Answer.** {answer}
"""

TAIL = """
Differences are to the baseline, each the mean over {seeds} runs a side; below 0 is better in all scores but accuracy.
Intervals (95 %) are over other rows and other runs of these data sets, runs paired by their seed, with which both
methods see the same training and calibration rows; the last columns are the standard deviation between runs of one
method that differ in their seed alone. They say nothing of data sets that are not here.

Not counted: {excluded} Learning rate: {learning_rate}.
"""


def page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    protocol = results["protocol"]
    told = {key: protocol[key] for key in ("question", "decision")}
    parts = [HEAD.format(**told, answer=_answer(results["decision"]))]
    for title in ("in distribution", "shifted"):
        if title in results:
            parts.append(f"\n## {title.capitalize()}\n\n{_means(results[title])}\n{_cells(results[title])}")
    parts.append(TAIL.format(**{key: protocol[key] for key in ("seeds", "excluded", "learning_rate")}))
    return "".join(parts)


def _answer(decision: dict[str, dict[str, bool]]) -> str:
    told = []
    for method, clauses in decision.items():
        missed = [clause for clause, holds in clauses.items() if not holds]
        verdict = "not shown to be better; missed: " + ", ".join(missed) if missed else "better, by every clause"
        told.append(f"`{method}`: {verdict}.")
    return " ".join(told)


def _means(part: dict[str, Any]) -> str:
    """One row a method and score, over all cells."""
    lines = ["| method | score | baseline | method | difference | 95 % interval | run sd, baseline | run sd, method |"]
    lines.append("|---|---|---:|---:|---:|---|---:|---:|")
    for method, scores in part["mean over cells"].items():
        for score, d in scores.items():
            interval = f"[{d['low']:+.4f}, {d['high']:+.4f}]"
            sides = f"{d['b']:.4f} | {d['a']:.4f} | {d['difference']:+.4f} | {interval}"
            lines.append(f"| {method} | {score} | {sides} | {d['run_sd_b']:.3f} | {d['run_sd_a']:.3f} |")
    return "\n".join(lines) + "\n"


def _cells(part: dict[str, Any]) -> str:
    """NLL and Brier score of every cell by itself."""
    lines = ["| cell | method | NLL of the baseline | NLL | Brier score |", "|---|---|---:|---|---|"]
    for cell, methods in part["cells"].items():
        for method, scores in methods.items():
            nll, brier = (
                f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" for d in (scores["nll"], scores["brier"])
            )
            lines.append(f"| {cell} | {method} | {scores['nll']['b']:.4f} | {nll} | {brier} |")
    return "\n".join(lines) + "\n"
