"""Decision rules out of files, and what one reaches as plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...json_files import Fields, read_json
from .base import MEND, RULES, DecisionRule
from .sets import ConformalSets
from .threshold import SelectiveThreshold

#: What asks for a threshold; `alpha` asks for sets.
OF_THRESHOLDS = ("risk", "target_coverage", "costs")


def load_decision(path: str | Path) -> DecisionRule:
    """Reads a rule of any kind, as its `save` wrote it, or as it lies beside an adapter.

    Args:
        path: The JSON file.

    Raises:
        ValueError: If it is no such file, or was changed after the fit; the message names file, field and value.
    """
    fields = read_json(path, MEND)
    rule = decision_of(fields)
    fields.check_seal("the rule")
    return rule


def decision_of(fields: Fields) -> DecisionRule:
    """The rule in the fields of a file, which beside an adapter stands among what it belongs to."""
    if isinstance(fields.get("rule"), dict):
        fields = fields.mapping("rule")
    rule = RULES[fields.text("rule", among=tuple(RULES))]
    return rule.from_state(fields)


def decision_scores(
    predictions: Any,
    references: Any,
    *,
    rule: str | Path | None = None,
    calibration_predictions: Any = None,
    calibration_references: Any = None,
    input: str = "probabilities",
    groups: Any = None,
    calibration_groups: Any = None,
    confidence_level: float = 0.95,
    **settings: Any,
) -> dict[str, Any]:
    """What a decision rule reaches on rows it was not fitted on, as plain numbers with their intervals.

    Args:
        predictions: Probabilities, logits or confidences, as `SelectiveThreshold.fit` takes them.
        references: Their labels.
        rule: A rule's file; without one a rule is fitted on the calibration rows.
        calibration_predictions: Rows to fit a rule on, with `risk`, `target_coverage` or `costs` for a threshold and
            `alpha` for sets, and their other settings.
        calibration_references: Their labels.
        input: `"probabilities"`, `"logits"` or, for thresholds, `"confidence"`.
        groups: Names of the rows' groups, for sets that go by groups.
        calibration_groups: Those of the calibration rows.
        confidence_level: Of the intervals.
        settings: Of `SelectiveThreshold` or `ConformalSets`.

    Returns:
        Of a threshold `risk`, `coverage`, their `_low` and `_high`, `accepted`, `errors`, `bound`, `threshold` (null
        where each class has one) and `mean_cost` (null without costs). Of sets `coverage` with `_low` and `_high`,
        `band_low` and `band_high` (null with groups), `mean_set_size`, `singletons`, `singleton_accuracy`, `empty`.
        Of both `num_rows` and `promise`.

    Raises:
        ValueError: If there is no rule and nothing to fit one on, the rows are those of the fit, they do not allow
            what is asked for, or groups are given to a threshold, which knows none.
    """
    options = {"input": input, "confidence_level": confidence_level}
    if rule is None:
        found = _fitted(calibration_predictions, calibration_references, input, calibration_groups, settings)
    elif settings or any(part is not None for part in (calibration_predictions, calibration_references,
                                                       calibration_groups)):  # fmt: skip
        raise ValueError("Give either `rule`, a file, or rows to fit a rule on with its settings; not both.")
    else:
        loaded = load_decision(rule)
        if not isinstance(loaded, (SelectiveThreshold, ConformalSets)):
            kind = type(loaded).__name__
            raise ValueError(f"{rule} holds a {kind}, which does not decide over classes; use its own evaluate.")
        found = loaded
    if isinstance(found, SelectiveThreshold):
        if groups is not None or calibration_groups is not None:
            raise ValueError(
                "A threshold goes by no groups: leave `groups` out; reached_by_group says what it reaches in each."
            )
        return _of_threshold(found, predictions, references, options)
    return _of_sets(found, predictions, references, {**options, "groups": groups})


def _fitted(
    predictions: Any, references: Any, input: str, groups: Any, settings: dict[str, Any]
) -> SelectiveThreshold | ConformalSets:
    asked = [name for name in (*OF_THRESHOLDS, "alpha") if settings.get(name) is not None]
    if predictions is None or references is None or len(asked) != 1:
        raise ValueError(
            "Give `rule`, the file of a saved rule, or `calibration_predictions` and `calibration_references` with "
            f"one of `risk`, `target_coverage`, `costs` and `alpha`; got {', '.join(asked) or 'none of these'}."
        )
    if asked == ["alpha"]:
        return ConformalSets(**settings).fit(predictions, references, input=input, groups=groups)
    return SelectiveThreshold(**settings).fit(predictions, references, input=input)


def _of_threshold(rule: SelectiveThreshold, predictions: Any, references: Any, options: Any) -> dict[str, Any]:
    reached = rule.evaluate(predictions, references, **options)
    return {
        "risk": reached.risk, "risk_low": reached.risk_interval[0], "risk_high": reached.risk_interval[1],
        "coverage": reached.coverage, "coverage_low": reached.coverage_interval[0],
        "coverage_high": reached.coverage_interval[1], "mean_cost": reached.mean_cost,
        "accepted": reached.accepted, "errors": reached.errors, "num_rows": reached.num_rows,
        "bound": rule.bound, "threshold": None if rule.per_class else rule.threshold, "promise": rule.promise(),
    }  # fmt: skip


def _of_sets(sets: ConformalSets, predictions: Any, references: Any, options: Any) -> dict[str, Any]:
    reached = sets.evaluate(predictions, references, **options)
    low, high = (None, None) if reached.band is None else reached.band
    return {
        "coverage": reached.coverage, "coverage_low": reached.coverage_interval[0],
        "coverage_high": reached.coverage_interval[1], "band_low": low, "band_high": high,
        "mean_set_size": reached.mean_size, "singletons": reached.singletons,
        "singleton_accuracy": reached.singleton_accuracy, "empty": reached.empty,
        "num_rows": reached.num_rows, "promise": sets.promise(),
    }  # fmt: skip
