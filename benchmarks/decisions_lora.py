"""Decision rules on predictions of LoRA adapters: what is promised, what is reached on like rows and after a shift.

    python benchmarks/decisions_lora.py --place DIR --runs DIR --output benchmarks/results/decisions_lora.json

The adapters are finished runs of `benchmarks/evidence.py` (`--runs`; MiniLM, 300 training rows), `--place` has what
they answer to rows of the training split that they have not seen (`pool`) and to their test sets, as
`benchmarks/uncertainty_head.py extract` keeps it, so that no forward is made here. Every cut of a pool gives 300 rows
to fit an uncertainty head on, 800 to fit rules on, and 400 that are drawn like these. A rule goes by the probability
of the predicted class after the run's temperature, or by the head's 1 - P(error).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import describe_machine, parser, write
from uncertainty_head_rows import read, read_head

from peft_calib.calibration import NoGuaranteeError, SelectiveThreshold, TemperatureScaling
from peft_calib.json_files import read_json
from peft_calib.predictor.answer import logits_of
from peft_calib.uncertainty_head import FeatureSet, UncertaintyHead

CELLS = {
    "trec-0": {"test": "its test questions"},
    "sst2-0": {"test": "its dev reviews", "airline": "airline", "kitchen": "kitchen"},
    "cola-0": {"test": "in-domain dev", "dev_out_of_domain": "out-of-domain dev"},
    "ag_news-0": {"test": "its test news"},
}
RUNS, CUTS, RISKS = 2, 10, (0.05, 0.1)
PARTS = {"head": 300, "rule": 800, "like rows": 400}
#: What a rule goes by, and the parts it is fitted on: the head's rows are labelled, too, and a rule may have them.
BY = {
    "max p": ("probability", ("rule",)),
    "max p, 1,100 rows": ("probability", ("rule", "head")),
    "1 - P(error)": ("head", ("rule",)),
}


class Answered(NamedTuple):
    """Rows as a rule sees them."""

    confidence: dict[str, np.ndarray]  # By what a rule may go by
    correct: np.ndarray


def answered(features: FeatureSet, scaling: TemperatureScaling, head: UncertaintyHead) -> Answered:
    """Confidences of rows, and whether the predicted class is right."""
    assert features.labels is not None
    p = np.asarray(scaling.transform(logits_of(features.probabilities)))
    by_head = 1.0 - head.predict_features(features).error_probability.numpy()
    right = p.argmax(1) == features.labels.numpy()
    return Answered({"probability": p.max(1), "head": by_head}, right.astype(int))


def cuts_of(folder: Path, scaling: TemperatureScaling, names: list[str]) -> list[dict[str, Any]]:
    """What both kinds of rule reach in each cut of a run's pool."""
    pool, head = read(folder / "pool.safetensors", tokens=False), read_head(folder)
    tests = {name: read(folder / f"{name}.safetensors", tokens=False) for name in names}
    found = []
    for cut in range(CUTS):
        order = np.random.default_rng([cut, 16]).permutation(len(pool))
        places = np.split(order, np.cumsum(list(PARTS.values()))[:-1])
        rows = dict(zip(PARTS, (pool.select(torch.from_numpy(place)) for place in places), strict=True))
        fitted = UncertaintyHead.fit_features(None, rows["head"], head, calibrate="platt", seed=cut)
        sets = {name: answered(part, scaling, fitted) for name, part in (rows | tests).items()}
        fit = {name: sets.pop(name) for name in ("head", "rule")}
        kept = fitted.report.why_base is not None
        found += [one | {"cut": cut, "head kept the base score": kept} for one in reached(fit, sets)]
    return found


def reached(fit: dict[str, Answered], sets: dict[str, Answered]) -> list[dict[str, Any]]:
    """Risk and coverage of each rule on each set of rows, with exact intervals."""
    lines: list[dict[str, Any]] = []
    for risk in RISKS:
        for by, (what, parts) in BY.items():
            confidence = np.concatenate([fit[part].confidence[what] for part in parts])
            correct = np.concatenate([fit[part].correct for part in parts])
            try:
                rule = SelectiveThreshold(risk=risk).fit(confidence, correct, input="confidence")
            except NoGuaranteeError as error:
                lines.append({"target": risk, "by": by, "rows needed": error.rows_needed})
                continue
            for name, rows in sets.items():
                told = rule.evaluate(rows.confidence[what], rows.correct, input="confidence").to_dict()
                keys = ("num_rows", "accepted", "errors", "risk", "risk_interval", "coverage", "coverage_interval")
                lines.append({"target": risk, "by": by, "rows": name, **{key: told[key] for key in keys}})
    return lines


def summary(found: list[dict[str, Any]], names: dict[str, str]) -> list[dict[str, Any]]:
    """Means over runs and cuts at which a rule was possible, and the mean ends of the exact 95 % intervals."""
    lines = []
    for risk in RISKS:
        for by in BY:
            mine = [line for line in found if (line["target"], line["by"]) == (risk, by)]
            refused = sum("rows" not in line for line in mine) / (RUNS * CUTS)
            needed = [line["rows needed"] for line in mine if line.get("rows needed") is not None]
            about = {"target": risk, "by": by, "refused": refused,
                     "rows needed, median": float(np.median(needed)) if needed else None}  # fmt: skip
            for name, called in {"like rows": "like rows", **names}.items():
                here = [line for line in mine if line.get("rows") == name]
                lines.append({"rows": called, **about, **_means(here, risk)})
    return lines


def _means(here: list[dict[str, Any]], risk: float) -> dict[str, Any]:
    told = [line for line in here if line["accepted"]]
    if not told:
        return {}

    def mean(key: str) -> Any:
        return np.mean([line[key] for line in told], axis=0).tolist()

    above = float(np.mean([line["risk_interval"][0] > risk for line in told]))
    numbers = {key: mean(key) for key in ("risk", "risk_interval", "coverage", "coverage_interval")}
    return {"cuts": len(told), **numbers, "shown to be above": above}


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/decide.md."""
    heads = [f"{100 * risk:.0f} %, {name}" for risk in RISKS for name in BY]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for cell, found in results["cells"].items():
        for place in dict.fromkeys(line["rows"] for line in found["summary"]):
            mine = {(line["target"], line["by"]): line for line in found["summary"] if line["rows"] == place}
            cells = [_told(mine[risk, by]) for risk in RISKS for by in BY]
            lines.append(f"| {cell.rpartition('-')[0]}, {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(line: dict[str, Any]) -> str:
    if "risk_interval" not in line:
        return "refused"
    low, high = (100 * end for end in line["risk_interval"])
    told = f"{100 * line['risk']:.1f} % [{low:.1f}, {high:.1f}] of {100 * line['coverage']:.0f} %"
    return told + (f", refused in {100 * line['refused']:.0f} %" if line["refused"] else "")


def main() -> None:
    """Run the study and write it."""
    flags = parser(__doc__)
    flags.add_argument("--place", type=Path, required=True)
    flags.add_argument("--runs", type=Path, required=True)
    arguments = flags.parse_args()
    cells: dict[str, Any] = {}
    for cell, names in CELLS.items():
        found, facts = [], []
        for run in range(RUNS):
            state = read_json(arguments.runs / "runs" / f"{cell}-lora-{run}" / "temperature.json").mapping("mean")
            scaling = TemperatureScaling.from_state(state)
            lines = cuts_of(arguments.place / f"{cell}-{run}", scaling, list(names))
            found += [{"run": run, **line} for line in lines]
            kept = {line["cut"] for line in lines if line["head kept the base score"]}
            facts.append({"temperature": scaling.temperature, "heads that kept the base score": len(kept)})
        cells[cell] = {"runs": facts, "summary": summary(found, names), "cuts": found}
        print(cell, *cells[cell]["summary"], sep="\n", flush=True)
    write(
        arguments.output, {"machine": describe_machine(), "runs": RUNS, "cuts": CUTS, "parts": PARTS, "cells": cells}
    )


if __name__ == "__main__":
    main()
