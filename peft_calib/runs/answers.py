"""Runs whose answer is no class: what is fitted on their calibration rows, and what they are worth on others."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from ..calibration.recalibrate.temperature import FEWEST_ROWS
from ..predictor.kinds import KINDS, Kind
from .about import told_of
from .decided import Decidable, RunDecisions, reached_in
from .folder import read_json
from .loading import FinishedRun
from .rows import TestRows

#: A prediction as it is, and after what was fitted on the calibration rows.
BEFORE, AFTER = "before", "after"


def fitted_method(run: FinishedRun, rows: Dataset, variant: str, count: int) -> tuple[dict[str, Any], str]:
    """What is kept of a way of predicting, and a sentence; nothing is fitted on too few rows."""
    kind, made = KINDS[run.task.kind], run.predict(rows, variant, count, progress=False)
    if len(made) < FEWEST_ROWS:
        reason = f"Nothing is fitted: it takes {FEWEST_ROWS} rows, and there are {len(made)}."
        return {"parameters": {}, "fit": {"reason": reason, "applied": False}}, reason
    targets = np.asarray(run.task.targets(rows))
    artefact = run.task.described(run.tokenizer, None)
    method: Any = kind.fit(made, targets, artefact, run.task.config.label_scaling)
    found = kind.report(_named(kind, made, method, artefact), targets, 0, None)
    known, told = kind.baseline(kind.base_rates(targets), targets)
    verdict = _no_better(kind, "the run", found[kind.lead], known[kind.lead], told)
    fit = {"reason": method.reason, "applied": True}
    return {**method.state(), "fit": fit}, " ".join([method.reason, *([] if verdict is None else [verdict])])


def _named(kind: Kind, made: Any, method: Any, artefact: Any) -> Any:
    return kind.answer(made, method, artefact, label_names=artefact.classes)


def _no_better(kind: Kind, name: str, reached: float, known: float, told: str) -> str | None:
    """In plain words, that a model is no better than one that has not read the texts; None where it is."""
    if reached < known:
        return None
    return f"{name} is no better than always answering with {told}: {kind.lead} {reached:.4f} against {known:.4f}."


def answers_report(
    run: FinishedRun, rows: TestRows, variants: dict[str, int], seed: int, progress: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """Content, arrays and page of an evaluation."""
    kind, artefact = KINDS[run.task.kind], run.artefact()
    targets = np.asarray(run.task.targets(rows.rows))
    methods = {variant: run.method(variant) for variant in variants}
    decisions = RunDecisions.of(run.folder, run.task.config, methods, None)
    content: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {"targets": targets, "row_keys": rows.keys.view(np.int64)}
    html = ""
    for variant, count in variants.items():
        made = run.predict(rows.rows, variant, count, seed, progress)
        found = _named(kind, made, methods[variant], artefact)
        report = kind.report(found, targets, seed)
        stages = {AFTER: report}
        if kind.has_before:
            stages = {BEFORE: kind.report(_named(kind, made, None, artefact), targets, seed), AFTER: report}
        content[variant] = {
            "num_samples": count,
            "num_forwards": made.num_forwards,
            "recalibration": "nothing" if methods[variant] is None else kind.told(methods[variant]),
            "temperature_fit": run.temperature_fit(variant),
            **{stage: {**one.to_dict(), "verdict": one.verdict()} for stage, one in stages.items()},
        }
        arrays |= {f"{name}.{variant}": values for name, values in kind.arrays(found).items()}
        page = ""
        if decisions.stored:
            given = Decidable(kind, found, targets, rows)
            content[variant]["decision"], page = reached_in(decisions, variant, count, seed, given)
        about_it = told_of(run, rows, variant, count)  # of the last variant, the one the method is made for
        earlier = stages[BEFORE] if kind.has_before else None
        html = report.to_html(page, before=earlier, about=about_it, title=run.folder.path.name)
    about = {"items": len(targets), "variants": content, "kind": kind.name}
    rates = read_json(run.folder.finished).get("base_rates") or kind.base_rates(targets)
    known, told = kind.baseline(rates, targets)
    reached = content[list(content)[-1]][AFTER]
    verdict = _no_better(kind, run.folder.path.name, reached[kind.lead], known[kind.lead], told)
    about["baseline"] = {**known.to_dict(), "told": told, "verdict": verdict}
    return about, arrays, html
