"""Labels of which a row may have any number: a sigmoid each, temperatures, and thresholds that give them."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset

from ...artefact import Artefact, Inputs
from ...calibration.decide.base import DecisionRule
from ...calibration.labels import LabelScaling, LabelsReport, LabelThresholds, labels_report
from ...prediction import LabelsPrediction
from ...provenance.origins import at, is_missing
from ...provenance.stored_decision import PROBABILITY
from ..answer import Answer, names_by_probability
from ..table import ENTROPY, INFORMATION, LABELS
from .base import Kind

#: What may stand between labels in one text, in the order they are looked for.
SEPARATORS = ("|", ";", ",")
#: What is read as yes and as no in a column of its own.
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
#: A label of a row that says nothing of it.
UNKNOWN = -100


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LabelsAnswer(Answer, LabelsPrediction):
    """What a predictor of labels answers: a `LabelsPrediction` whose probabilities are calibrated.

    The temperatures were fitted to the mean of the draws' probabilities, and act there. `mutual_information` is that
    of the draws as they are.

    Args:
        calibrated: Float64 (N, L), the calibrated probabilities.
        label_names: Names of the labels, in order.
        recalibration: In words, what was applied or why nothing was.
        num_cut: Rows that were longer than what the model was trained on, and were cut.
        given: Bool (N, L), the labels that the rule beside the adapter gives; None where there is no such rule.
        ruled_out: Bool (N, L), those that it rules out; None likewise, or where it rules none out.
        decision: In words, what the rule promises, or why it is not applied.
    """

    item_tensors: ClassVar[tuple[str, ...]] = ("calibrated",)
    optional_item_tensors: ClassVar[tuple[str, ...]] = ("given", "ruled_out")
    calibrated: torch.Tensor
    given: torch.Tensor | None = None
    ruled_out: torch.Tensor | None = None
    error_probability: ClassVar[None] = None

    @property
    def _predictive(self) -> torch.Tensor:  # type: ignore[override]
        return self.calibrated

    @property
    def probabilities(self) -> torch.Tensor:
        """Calibrated probabilities, float64 (N, L)."""
        return self.calibrated

    @property
    def labels_predicted(self) -> list[list[str]]:
        """Names of the labels of a probability of 1/2 and more, the most probable first."""
        return self._named(self.predictions)

    @property
    def labels_given(self) -> list[list[str]] | None:
        """Names of the labels that the rule gives; None without a rule."""
        return None if self.given is None else self._named(self.given)

    @property
    def labels_ruled_out(self) -> list[list[str]] | None:
        """Names of the labels that the rule rules out; None where it rules none out."""
        return None if self.ruled_out is None else self._named(self.ruled_out)

    def _named(self, chosen: torch.Tensor) -> list[list[str]]:
        return names_by_probability(self.calibrated, chosen, self.label_names)

    def added(self) -> list[list]:
        """The columns that `Kind.columns` names, and a probability of every label."""
        columns: list[list] = [self.labels_predicted, self.entropy.tolist(), self.mutual_information.tolist()]
        columns += [] if self.labels_given is None else [self.labels_given]
        columns += [] if self.labels_ruled_out is None else [self.labels_ruled_out]
        return columns + self.calibrated.T.tolist()


class Labels(Kind):
    """Any of some labels."""

    name = "labels"
    predict_task = "labels"
    unit = "labels"
    rules = ("labels",)
    answers = LabelsAnswer

    def targets(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[Any] | None:
        """`(L,)` zeros and ones of each row; -100 for all where a row has a label that is none of these."""
        single = inputs.label_column
        if inputs.label_columns and all(name in table.column_names for name in inputs.label_columns):
            found = columns_of_flags(table, inputs.label_columns, "")
        elif single is not None and single in table.column_names:
            rows = [_read(value, inputs.label_separator) for value in named_values(table, single)]
            known = set(names)
            found = [
                [int(name in row) for name in names]
                if row is not None and set(row) <= known
                else [UNKNOWN] * len(names)
                for row in rows
            ]
        else:
            return None
        return found if any(map(self.is_known, found)) else None

    def strange(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[list[str]]:
        if inputs.label_columns and all(name in table.column_names for name in inputs.label_columns):
            fields = zip(*(table[name][:] for name in inputs.label_columns), strict=True)
            words = [[str(value) for value in row if not is_missing(value)] for row in fields]
            found = [[word for word in row if word.strip().lower() not in (*YES, *NO)] for row in words]
        elif inputs.label_column in table.column_names:
            values = named_values(table, str(inputs.label_column))
            rows = [(value, _read(value, inputs.label_separator)) for value in values]
            found = [[str(v)] if row is None else [n for n in row if n not in names] for v, row in rows]
        else:
            found = []
        return [words for words in found if words]

    def is_known(self, target: Any) -> bool:
        return UNKNOWN not in target

    def told(self, method: LabelScaling) -> str:
        if method.is_identity:
            return "T left off"
        if method.kind == "joint":
            return f"T = {method.temperatures[0]:.4g}"
        return "a temperature each" if method.kind == "label" else "a temperature and a bias each"

    def answer(self, made: Any, method: Any, artefact: Artefact, **said: Any) -> LabelsAnswer:
        own = {item.name: getattr(made, item.name) for item in fields(LabelsPrediction)}
        mean = made._predictive.double()
        calibrated = mean if method is None else torch.from_numpy(method.transform(mean.numpy()))
        return LabelsAnswer(**own, calibrated=calibrated, **said)

    def columns(self, further: Sequence[str]) -> list[str]:
        return [LABELS, ENTROPY, INFORMATION, *further]

    def decided(self, rule: Any, found: Any, **by: Any) -> dict[str, Any]:
        given = torch.from_numpy(rule.predict(found.calibrated.numpy()))
        if rule.miss is None:
            return {"given": given}
        return {"given": given, "ruled_out": torch.from_numpy(rule.ruled_out(found.calibrated.numpy()))}

    lead = "nll_micro"

    def report_of(
        self, kept: Mapping[str, np.ndarray], targets: np.ndarray, names: Sequence[str], seed: int, level: float | None
    ) -> LabelsReport:
        how: dict[str, Any] = {"label_names": names, "confidence_level": level, "seed": seed}
        return labels_report(kept["probabilities"], targets, **how)

    def arrays(self, found: Any) -> dict[str, np.ndarray]:
        return {"probabilities": found.calibrated.numpy()}

    def base_rates(self, targets: Any) -> dict[str, Any]:
        """How many rows there are, and how many have each label."""
        return {"rows": len(targets), "counts": np.asarray(targets).sum(axis=0).astype(int).tolist()}

    def baseline(self, rates: Mapping[str, Any], targets: np.ndarray) -> tuple[LabelsReport, str]:
        """One row is added with the label and one without, so that no share is 0 or 1."""
        shares = (np.asarray(rates["counts"], float) + 1.0) / (rates["rows"] + 2.0)
        report = labels_report(np.tile(shares, (len(targets), 1)), targets, confidence_level=None)
        return report, "the share of each label in the training rows, whatever the text"

    def training_scores(self, logits: np.ndarray, targets: np.ndarray, scale: float) -> dict[str, float]:
        return dict(labels_report(logits, targets, input="logits", confidence_level=None))

    def summary(self, found: Any) -> dict[str, Any]:
        counts = dict(zip(found.label_names, found.predictions.sum(0).tolist(), strict=True))
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        if found.given is None:
            return {"labels_predicted": counts, "told": told}
        given = int(found.given.sum())
        return {"labels_predicted": counts, "labels_given": given, "told": f"{told}; {given} labels are given"}

    def fit(self, made: Any, targets: np.ndarray, artefact: Artefact, setting: str | None = None) -> LabelScaling:
        """One temperature for all labels; of one label alone also a bias, or what the setting says."""
        kind = setting or ("joint" if targets.shape[1] > 1 else "platt")
        return LabelScaling(kind).fit(made._predictive.double().numpy(), targets)

    def unfitted(self, asked: Mapping[str, Any], seed: int) -> list[DecisionRule]:
        self._only(asked, ("risk", "miss", "confidence", "each_label"))
        own = {"joint": "each_label" not in asked, "seed": seed}
        return [LabelThresholds(asked.get("risk"), asked.get("miss"), asked.get("confidence", 0.95), **own)]

    def fit_rule(self, rule: Any, found: Any, targets: Any, by: str = PROBABILITY) -> None:
        rule.fit(found.calibrated.numpy(), np.asarray(targets), label_names=found.label_names)

    def evaluate_rule(self, rule: DecisionRule, found: Any, targets: np.ndarray, mask: np.ndarray) -> Any:
        return rule.evaluate(found.calibrated.numpy(), targets, mask=mask)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------ labels out of columns


def columns_of_flags(table: Dataset, columns: Sequence[str], source: str) -> list[list[int]]:
    """Zeros and ones of each row out of a column for each label.

    Raises:
        ValueError: If a field is neither yes nor no, unless no source is named; then it is -100.
    """
    found = []
    for name in columns:
        values = []
        for row, value in enumerate(table[name][:]):
            word = str(value).strip().lower()
            if word not in (*YES, *NO) and source:
                raise ValueError(
                    f"{at(source, table, row)}: row {row} has {value!r} in the column {name!r} of a label; expected "
                    "is 1 where the row has the label and 0 where not (also true and false, yes and no)"
                )
            values.append(1 if word in YES else 0 if word in NO else UNKNOWN)
        found.append(values)
    return [list(row) for row in zip(*found, strict=True)]


def named_values(table: Dataset, column: str) -> list[Any]:
    """Fields of a column of labels; of a `ClassLabel` in lists the names."""
    inner = getattr(table.features[column], "feature", table.features[column])
    values = table[column][:]
    if isinstance(inner, ClassLabel):
        return [None if row is None else [inner.names[k] for k in np.atleast_1d(row)] for row in values]
    return values


def labels_in(value: Any, separator: str | None) -> list[str]:
    """The labels of one field: a list, a list as JSON or Python writes it, or texts with something between them.

    Raises:
        ValueError: For a text in brackets that is no such list, as numpy's `['a' 'b']`: one text to Python.
    """
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_word(label) for label in value]
    if is_missing(value):
        return []
    text = str(value).strip()
    if text.startswith("[") and text.endswith("]"):
        return [_word(label) for label in _listed(text)]
    parts = [text] if separator is None else text.split(separator)
    return [part.strip() for part in parts if part.strip()]


def _read(value: Any, separator: str | None) -> list[str] | None:
    """The labels of a field; None where it cannot be read."""
    try:
        return labels_in(value, separator)
    except ValueError:
        return None


def _listed(text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = _python_list(text)
    if not isinstance(found, list) or not all(_is_label(label) for label in found):
        raise ValueError(
            f'{text!r} stands in brackets and is no list of labels; expected is ["a", "b"], as JSON or Python write it'
        )
    return found


def _python_list(text: str) -> list[Any] | None:
    """A list literal of as many members as there are commas between them; None for anything else."""
    try:
        tree = ast.parse(text, mode="eval").body
        tokens = [kind.type for kind in tokenize.generate_tokens(io.StringIO(text).readline)]
        found = ast.literal_eval(tree)
    except (ValueError, SyntaxError, tokenize.TokenError):
        return None
    joined = tokens.count(tokenize.STRING) > sum(isinstance(member, str) for member in found)
    return None if joined or not isinstance(found, list) else found


def _is_label(label: Any) -> bool:
    return isinstance(label, (str, int, float)) and not isinstance(label, bool)


def separator_of(values: Sequence[Any]) -> str | None:
    """What stands between the labels of a column's texts: the first of `|`, `;` and `,` that any of them holds."""
    texts = [value for value in values if isinstance(value, str) and not value.strip().startswith("[")]
    return next((mark for mark in SEPARATORS if any(mark in text for text in texts)), None)


def _word(label: Any) -> str:
    whole = isinstance(label, float) and label.is_integer()
    return str(int(label)) if whole else str(label).strip()
