"""What a tagger's entities are worth: of a run whose tags mark them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calibration import entities_report, find_entities
from ..calibration.entities import Entities
from ..predictor.kinds.entities import marks_entities
from .answers import AFTER, BEFORE
from .loading import FinishedRun
from .rows import TestRows


def entities_in(
    run: FinishedRun, prediction: Any, calibrated: Any, labels: np.ndarray, seed: int
) -> tuple[dict[str, Any], str, Entities | None]:
    """The reports of entities before and after the temperature under `"entities"`, that after it as HTML, and these.

    Before it an entity's probability is the mean of the draws'; after it that of the calibrated words, which have the
    temperature of the mean and are taken as independent.

    Args:
        run: The run.
        prediction: Of words.
        calibrated: `(N, C)` probabilities of the words after the temperature.
        labels: `(N,)` tags.
        seed: Of the intervals.

    Returns:
        Nothing where the tags have no outside, `O`; a sentence where there is no entity, neither found
        nor true.
    """
    assert run.task.labels is not None
    names = run.task.labels.names
    if prediction.positions is None or not marks_entities(names):
        return {}, "", None
    sentences = prediction.positions[:, 0].numpy()
    stages = {BEFORE: prediction.sample_probabilities.double().numpy(), AFTER: np.asarray(calibrated, np.float64)}
    found = {stage: find_entities(p, names, sentences, labels) for stage, p in stages.items()}
    if not all(one.counts for one in found.values()):
        none = {"told": "there is none in these sentences, and none is found."}
        return {"entities": none}, "", found[AFTER]
    reports = {stage: entities_report(one, seed=seed) for stage, one in found.items()}
    told = {stage: {**one.to_dict(), "verdict": one.verdict()} for stage, one in reports.items()}
    return {"entities": {**told, "told": reports[AFTER].verdict()}}, reports[AFTER].part(reports[BEFORE]), found[AFTER]


def words_lost(prediction: Any, rows: TestRows) -> dict[str, int]:
    """How many tagged words have no answer, at the end of rows that were cut; nothing where rows are the items."""
    if prediction.positions is None:
        return {}
    tagged = sum(tag >= 0 for tags in rows.rows["labels"][:] for tag in tags)
    return {"words_lost": tagged - len(prediction)}
