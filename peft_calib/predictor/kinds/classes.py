"""One of some classes: a softmax, a temperature, thresholds and sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset

from ...artefact import Artefact, Inputs
from ...calibration import ConformalSets, SelectiveThreshold
from ...calibration.decide.base import DecisionRule
from ...calibration.decide.groups import BY_LABEL, BY_PREDICTION
from ...calibration.recalibrate import TemperatureScaling
from ...provenance.origins import is_missing
from ...provenance.stored_decision import HEAD
from ...provenance.stored_decision import PROBABILITY as BY_PROBABILITY
from ..answer import CalibratedPrediction
from ..table import ENTROPY, INFORMATION, LABEL, PROBABILITY
from .base import Kind, flag_of

#: Names under which a table that says nothing else has its labels.
LABELS = ("label", "labels")
#: Arguments of `decide` that ask for a threshold.
PURPOSES = ("risk", "target_coverage", "costs")
#: Those of sets: what they are called in the command, and by `ConformalSets`.
OF_SETS = {
    "score": ("--score", "score"),
    "groups": ("--groups", "groups"),
    "randomized": ("--randomized", "randomized"),
    "sets_confidence": ("--sets-confidence", "confidence"),
}
#: Label of a row that has none.
NONE = -100


class Classes(Kind):
    """One of some classes."""

    name = "classes"
    predict_task = "classification"
    unit = "classes"
    rules = ("threshold", "sets")
    fewest = 2
    answers = CalibratedPrediction

    def targets(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[Any] | None:
        """Class of each row that has one of the classes, -100 for the others."""
        values = _values(table, inputs)
        found = [] if values is None else _positions(values, names)
        return found if any(map(self.is_known, found)) else None

    def strange(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[list[str]]:
        values = _values(table, inputs) or []
        places = zip(values, _positions(values, names), strict=True)
        return [[str(value)] for value, place in places if place == NONE and not is_withheld(value)]

    def is_known(self, target: Any) -> bool:
        return target != NONE

    def told(self, method: Any) -> str:
        if not isinstance(method, TemperatureScaling):
            return type(method).__name__
        fit = method.fit_result
        return "T left off" if fit is not None and not fit.applied else f"T = {method.temperature:.4g}"

    def answer(self, made: Any, method: Any, artefact: Artefact, **said: Any) -> CalibratedPrediction:
        return CalibratedPrediction.of(made, method, **said)

    def columns(self, further: Sequence[str]) -> list[str]:
        return [LABEL, PROBABILITY, ENTROPY, INFORMATION, *further]

    def summary(self, found: Any) -> dict[str, Any]:
        counts = {name: found.labels_predicted.count(name) for name in found.label_names}
        return {"labels_predicted": counts, "told": ", ".join(f"{name} {count}" for name, count in counts.items())}

    def decided(self, rule: Any, found: Any, **by: Any) -> dict[str, Any]:
        values, what = gone_by(by.get("by"), found.probabilities, found.error_probability)
        if rule.kind == "sets":
            return {"sets": rule.predict(values, input=what)}
        return {"answered": rule.accept(values, input=what)}

    def unfitted(self, asked: Mapping[str, Any], seed: int) -> list[DecisionRule]:
        foreign = next((name for name in ("miss", "each_label") if name in asked), None)
        if foreign is not None:
            raise ValueError(f"{flag_of(foreign)} is of several labels a row")
        alone = "alpha" in asked and not any(name in asked for name in PURPOSES)
        if not alone:
            if asked.get("by") == HEAD and "per_class" in asked:
                raise ValueError("--per-class goes by the probabilities of the classes: leave out --by head")
        elif "per_class" in asked or "by" in asked:
            raise ValueError("--per-class and --by are of a threshold: ask for one with --risk beside --alpha")
        elif "confidence" in asked:
            raise ValueError(
                "--confidence is of a threshold: say --sets-confidence for prediction sets, or ask for a threshold "
                "with --risk beside --alpha"
            )
        own = {name: asked[name] for name in (*PURPOSES, "per_class", "confidence") if name in asked}
        rules: list[DecisionRule] = [] if alone else [SelectiveThreshold(**own, seed=seed)]
        return [*rules, *_sets(asked, seed)]

    def goes_by(self, rule: DecisionRule, by: str) -> str:
        return by if isinstance(rule, SelectiveThreshold) else BY_PROBABILITY

    def fit_rule(self, rule: Any, found: Any, targets: Any, by: str = BY_PROBABILITY) -> None:
        values, what = gone_by(by, found.probabilities, found.error_probability)
        labels = np.asarray(targets)
        if by == HEAD:
            labels = (found.predictions.numpy() == labels).astype(int)
        named = {"label_names": list(map(repr, found.label_names))} if getattr(rule, "per_class", False) else {}
        rule.fit(values, labels, input=what, **named)
        if rule.kind == "sets" and rule.grouping == BY_PREDICTION and len(rule.parts) < len(found.label_names):
            known = {part.group for part in rule.parts}
            missing = [name for k, name in enumerate(found.label_names) if k not in known]
            raise ValueError(
                f"--groups predicted needs rows of every predicted class, and {missing[0]} was predicted for none of "
                f"the {len(labels)} rows: bring more rows, or leave out --groups"
            )


def gone_by(by: str | None, probabilities: Any, errors: Any) -> tuple[torch.Tensor, str]:
    """What a rule goes by: `(N, C)` probabilities or `(N,)` 1 - P(error), and what a rule calls it."""
    if by == HEAD:
        return 1.0 - torch.as_tensor(errors), "confidence"
    return torch.as_tensor(probabilities), "probabilities"


def _sets(asked: Mapping[str, Any], seed: int) -> list[DecisionRule]:
    """Prediction sets, if there was asked for some."""
    given = {OF_SETS[name][1]: asked[name] for name in OF_SETS if name in asked}
    if "alpha" not in asked:
        if given:
            flag = next(flag for name, (flag, _) in OF_SETS.items() if name in asked)
            raise ValueError(f"{flag} is of prediction sets: ask for them with --alpha")
        return []
    if asked.get("groups") not in (None, BY_LABEL, BY_PREDICTION):
        raise ValueError(f"--groups must be {BY_LABEL} or {BY_PREDICTION}, got {asked['groups']!r}")
    return [ConformalSets(alpha=asked["alpha"], seed=seed, **given)]


def is_withheld(value: Any) -> bool:
    """Whether a field says nothing: it is empty, or -1, as in the test splits of GLUE."""
    return is_missing(value) or _word(value) == "-1"


def _values(table: Dataset, inputs: Inputs) -> list[Any] | None:
    """What the rows have in the column of the labels, a `ClassLabel` by name; None without such a column."""
    columns = LABELS if inputs.label_column is None else (inputs.label_column,)
    column = next((name for name in columns if name in table.column_names), None)
    if column is None:
        return None
    values, feature = table[column][:], table.features[column]
    if isinstance(feature, ClassLabel):
        return [feature.names[value] if value is not None and value >= 0 else None for value in values]
    return values


def _positions(values: Sequence[Any], names: Sequence[str]) -> list[int]:
    """Position of each class, by its name, or by its number where no row has a name."""
    index = {name: position for position, name in enumerate(names)}
    by_number = {str(position): position for position in range(len(names))}
    known = index if any(_word(value) in index for value in values) else by_number
    return [NONE if is_missing(value) else known.get(_word(value), NONE) for value in values]


def _word(value: Any) -> Any:
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole or isinstance(value, (bool, int, np.integer)) else str(value)
