"""Fit a recalibration to an adapter that has none, such as a LoRA of another tool, and store it with the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..artefact import ARTEFACT_FILE, HERE
from ..calibration.recalibrate import FittedMethod, TemperatureScaling
from ..identity import adapter_digest
from ..provenance.companions import attach_file, attach_recalibration
from ..provenance.splits import RowSet, record_split
from .answer import logits_of
from .decisions import Decisions
from .inputs import as_table
from .kinds.classes import NONE


def calibrated(
    predictor: Any,  # the `Predictor` that this is a method of
    rows: Any,
    labels: Sequence[str | int] | None,
    method: FittedMethod | None,
    how: str | None,
    num_samples: int | None,
    seed: int,
    batch_size: int | None,
) -> Any:
    """See `Predictor.calibrate`."""
    if len(predictor.adapter_names) > 1:
        raise ValueError("An ensemble of adapters is calibrated in its run: peft-calib train --method ensemble.")
    if predictor.kind.of_words:
        raise ValueError("A tagger of words is calibrated where it is trained: peft-calib train --task token-cls.")
    way = predictor.way_of(how, num_samples)
    if way not in ("mean", "sample"):
        raise ValueError(f"A recalibration is fitted to how='mean' or 'sample', got {way!r}.")
    plain = replace(predictor, artefact=replace(predictor.artefact, ways={}), decisions=Decisions())
    made = plain.predict(rows, num_samples, way, seed, batch_size=batch_size)
    given = made.labels.numpy() if labels is None and made.labels is not None else labels
    if predictor.kind.name == "classes":
        classes = _classes(given, len(made), predictor.label_names)
        method = TemperatureScaling() if method is None else method
        method.fit(logits_of(made.probabilities), classes)
    else:
        method = _of_another_kind(predictor, made, given, method)
    model, own = predictor.model, plain.artefact
    table = as_table(rows)
    record_split(model, calibrated_on=RowSet.of(rows if table is None else table))
    attach_file(model, ARTEFACT_FILE, replace(own, adapters={HERE: adapter_digest(model)}).text())
    count = None if way == "mean" else made.num_samples
    found = attach_recalibration(model, method.state(), num_samples=count, seed=seed, label_tokens=own.label_tokens)
    return replace(plain, artefact=found)


def _of_another_kind(predictor: Any, made: Any, given: Any, method: Any) -> Any:
    """The recalibration of labels or of a number; a `LabelScaling` says of which kind."""
    if given is None or len(given) != len(made):
        found = "none" if given is None else len(given)
        raise ValueError(f"There are {len(made)} rows and {found} labels; give labels=, one entry for each row.")
    truth = np.asarray(given, np.float64)
    truth = truth[:, None] if predictor.kind.has_probabilities and truth.ndim == 1 else truth
    in_its_unit = replace(predictor.artefact, target=None)  # what was predicted is already
    return predictor.kind.fit(made, truth, in_its_unit, getattr(method, "kind", None))


def _classes(given: Any, count: int, names: tuple[str, ...]) -> np.ndarray:
    """Labels as positions of the classes."""
    if given is None:
        raise ValueError("The rows have no labels of the classes; give labels=, one for each row.")
    if len(given) != count:
        raise ValueError(f"There are {count} rows and {len(given)} labels.")
    known = {name: place for place, name in enumerate(names)} | {place: place for place in range(len(names))}
    found = [known.get(label if isinstance(label, str) else int(label), NONE) for label in given]
    unknown = next((row for row, label in enumerate(found) if label == NONE), None)
    if unknown is not None:
        raise ValueError(f"Row {unknown} has the label {given[unknown]!r}, which is none of {', '.join(names[:8])}.")
    return np.array(found)


def saved(predictor: Any, folder: str | Path) -> Path:
    """See `Predictor.save`."""
    if len(predictor.adapter_names) > 1:
        raise ValueError("The members of an ensemble lie in its run; copy that.")
    predictor.model.save_pretrained(str(folder))
    predictor.tokenizer.save_pretrained(str(folder))
    return Path(folder)
