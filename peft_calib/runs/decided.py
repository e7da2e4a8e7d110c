"""What the decision rules of a run reach on rows that they were not fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artefact import DECISION_FILES
from ..calibration import decision_html, reached_by_group
from ..calibration.entities import Entities
from ..predictor.kinds import Kind
from ..predictor.kinds.classes import gone_by
from ..provenance.row_hashes import hash_rows
from ..provenance.splits import MAX_OVERLAP
from ..provenance.stored_decision import HEAD, StoredDecision, read_decisions
from .folder import RunFolder
from .loading import adapter_names, head_folder
from .rows import TestRows
from .settings import RunConfig


@dataclass(frozen=True)
class RunDecisions:
    """The rules beside the adapter of a run, and why one is not that of the run as it is now."""

    stored: Mapping[str, StoredDecision]
    stale: Mapping[str, str]

    @classmethod
    def of(cls, folder: RunFolder, config: RunConfig, methods: Mapping[str, Any], head: str | None) -> RunDecisions:
        """Of a run; `methods` are the temperatures of its ways of predicting, `head` is the hash of its head."""
        place, found = head_folder(folder, config), read_decisions(head_folder(folder, config))
        adapters = [folder.adapter(name) for name in adapter_names(config)]
        others = {kind: one.unlike(adapters, methods.get(one.to.how), head) for kind, one in found.items()}
        stale = {kind: found[kind].refused(place, other) for kind, other in others.items() if other is not None}
        return cls(found, stale)


@dataclass(frozen=True)
class DecidableClasses:
    """Predictions of classes that a rule may decide over."""

    probabilities: np.ndarray  # `(N, C)` after the temperature
    labels: np.ndarray
    errors: np.ndarray | None  # `(N,)` P(error); None without a head for this way
    rows: TestRows

    def reached(self, one: StoredDecision, mask: np.ndarray) -> tuple[Any, Any]:
        """What a rule reaches on the rows of a mask, and in their groups."""
        goes_by, what = gone_by(one.to.by, self.probabilities, self.errors)
        values = np.asarray(goes_by)
        labels = self.labels
        if one.to.by == HEAD:
            labels = (self.probabilities.argmax(1) == labels).astype(int)
        options: dict[str, Any] = {"input": what, "mask": mask}
        reached, groups = one.rule.evaluate(values, labels, **options), None
        if self.rows.groups is not None:
            groups = reached_by_group(one.rule, values, labels, list(self.rows.groups), **options)
        return reached, groups


@dataclass(frozen=True)
class Decidable:
    """Answers of another kind that a rule may decide over."""

    kind: Kind
    found: Any
    targets: np.ndarray
    rows: TestRows
    errors: None = None

    def reached(self, one: StoredDecision, mask: np.ndarray) -> tuple[Any, Any]:
        """What a rule reaches on the rows of a mask; groups are of classes."""
        return self.kind.evaluate_rule(one.rule, self.found, self.targets, mask), None


@dataclass(frozen=True)
class DecidableEntities:
    """Entities that a rule may decide over, one of each sentence, as it was fitted."""

    found: Entities
    sentences: np.ndarray  # row of each sentence
    rows: TestRows
    errors: None = None

    def reached(self, one: StoredDecision, mask: np.ndarray) -> tuple[Any, Any]:
        """What a rule reaches on the entities of the rows of a mask, and in the groups of these rows."""
        found = self.found
        if not len(found):
            raise ValueError("no entity is found in these rows, so there is none to decide over.")
        assert found.correct is not None
        values, correct, of_row = found.probability, found.correct.astype(int), self.sentences[found.sentences]
        options: dict[str, Any] = {"input": "confidence", "mask": mask[of_row] & found.one_a_sentence(one.rule.seed)}
        groups = None
        if self.rows.groups is not None:
            names = [self.rows.groups[row] for row in of_row.tolist()]
            groups = reached_by_group(one.rule, values, correct, names, **options)
        return one.rule.evaluate(values, correct, **options), groups


#: What a rule may decide over.
Given = DecidableClasses | Decidable | DecidableEntities


def reached_in(decisions: RunDecisions, how: str, count: int, seed: int, given: Given) -> tuple[dict[str, Any], str]:
    """What the rules for a way of predicting reach: their part of a report by kind, and the same as HTML."""
    content, pages = {}, []
    for kind, one in decisions.stored.items():
        if kind not in decisions.stale and one.to.how != how:
            continue
        if kind in decisions.stale:
            found: tuple[dict[str, Any], str] = _refused(one, decisions.stale[kind])
        else:
            found = _reached(one, how, count, seed, given)
        content[kind] = {"promise": one.rule.promise(), "by": one.to.by, "fitted_rows": one.num_rows, **found[0]}
        pages.append(found[1])
    return content, "".join(pages)


def _reached(one: StoredDecision, how: str, count: int, seed: int, given: Given) -> tuple[dict[str, Any], str]:
    why = one.silent_for(how, count, seed, one.to.label_tokens)
    if why is None and one.to.by == HEAD and given.errors is None:
        why = f"the rule in {DECISION_FILES[one.kind]} goes by P(error), which is not known of these predictions"
    if why is not None:
        return _refused(one, f"Not measured: {why}.")
    kind, hashes = hash_rows(given.rows.rows)
    own = np.isin(hashes, one.rows[kind].hashes) if kind in one.rows else np.zeros(len(hashes), bool)
    if own.mean() > MAX_OVERLAP:
        return _refused(
            one,
            f"Refused: {own.sum()} of the {len(own)} rows are among the {one.num_rows} that the rule was fitted on, "
            "and would flatter it. Evaluate on other rows.",
        )
    try:
        reached, groups = given.reached(one, ~own)
    except ValueError as error:
        return _refused(one, f"Refused: {error}")
    content = {
        "reached": reached.to_dict(),
        "told": reached.to_markdown(one.class_names),
        "rows_left_out": int(own.sum()),
    }
    if groups is not None:
        content["groups"] = {**groups.to_dict(), "told": groups.to_markdown()}
    return content, decision_html(one.rule, reached, groups)


def _refused(one: StoredDecision, told: str) -> tuple[dict[str, Any], str]:
    return {"refused": told}, decision_html(one.rule, told)
