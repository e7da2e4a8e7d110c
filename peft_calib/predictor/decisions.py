"""The decision rules beside an adapter: found, held against what they were fitted to, and applied to predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..artefact import Artefact
from ..base_models import base_fingerprint, is_other_base
from ..calibration.recalibrate import Recalibrator
from ..provenance.companions import attach_file
from ..provenance.stored_decision import DECISION_FILES, HEAD, PROBABILITY, StoredDecision, read_decisions
from .kinds import KINDS
from .table import ANSWERED, GIVEN, RULED_OUT, SET


def columns_of(rule: Any) -> list[str]:
    """The columns that a rule gives; an interval gives none of its own, but sets the ends that are there."""
    if rule.kind == "labels":
        return [GIVEN] if rule.miss is None else [GIVEN, RULED_OUT]
    return {"threshold": [ANSWERED], "sets": [SET], "interval": []}[rule.kind]


@dataclass(frozen=True)
class Decisions:
    """The rules of a predictor, by kind.

    Attributes:
        stored: `"threshold"` and `"sets"` of classes, `"labels"`, `"interval"` of numbers; those there are.
    """

    stored: Mapping[str, StoredDecision] = field(default_factory=dict)

    @property
    def digest(self) -> str | None:
        """One text for all rules; None where there is none."""
        if not self.stored:
            return None
        return hashlib.sha256("".join(self.stored[kind].text() for kind in sorted(self.stored)).encode()).hexdigest()

    def serving(
        self, how: str, count: int | None, seed: int, errors: bool, artefact: Artefact
    ) -> tuple[dict[str, StoredDecision], list[str]]:
        """The rules for a way of predicting, and in words why the others are none."""
        found, reasons = {}, []
        for kind, one in self.stored.items():
            why = one.silent_for(how, count, seed, artefact.label_tokens)
            if why is None and one.to.by == HEAD and not errors:
                why = f"the rule in {DECISION_FILES[kind]} goes by P(error), which is not known here"
            if why is None:
                found[kind] = one
            else:
                reasons.append(why)
        return found, reasons

    def columns(self, how: str, count: int | None, seed: int, errors: bool, artefact: Artefact) -> list[str]:
        """Names of the columns that predictions of some way have."""
        rules = self.serving(how, count, seed, errors, artefact)[0].values()
        return [name for one in rules for name in columns_of(one.rule)]

    def applied(self, found: Any, how: str, count: int | None, seed: int, artefact: Artefact) -> Any:
        """A prediction with what the rules say of its rows."""
        if not self.stored:
            return found
        rules, reasons = self.serving(how, count, seed, found.error_probability is not None, artefact)
        said: dict[str, Any] = {}
        for one in rules.values():
            said |= KINDS[artefact.kind].decided(one.rule, found, by=one.to.by)
        promises = [one.rule.promise() for one in rules.values()]
        return replace(
            found, **said, decision=" ".join([*promises, *(f"{why[0].upper()}{why[1:]}." for why in reasons)])
        )


def decisions_beside(
    folder: Path,
    places: Mapping[str, Path],
    model: PeftModel,
    methods: Mapping[str, Recalibrator],
    head: str | None,
    num_classes: int,
) -> Decisions:
    """The rules that lie in the folder of an artefact, or beside its only adapter.

    Args:
        folder: Of the artefact.
        places: Where each adapter of the model lies.
        model: The base model with the adapters.
        methods: The recalibration of each way of predicting.
        head: Hash of the uncertainty head.
        num_classes: Classes of the model.

    Raises:
        ValueError: If a rule is damaged, or was fitted for another adapter, base model, recalibration or head.
    """
    beside = [folder, *(places.values() if len(places) == 1 else ())]
    found: dict[str, StoredDecision] = {}
    lies: dict[str, Path] = {}
    for place in reversed(beside):
        there = read_decisions(place)
        found |= there
        lies |= dict.fromkeys(there, place)
    for kind, one in found.items():
        other = one.unlike(list(places.values()), methods.get(one.to.how), head) or _unlike(one, model, num_classes)
        if other is not None:
            raise ValueError(
                f"{one.refused(lies[kind], other)} In Python, decisions=False loads the adapter without it."
            )
        if len(places) == 1:  # who saves the model saves all
            attach_file(model, DECISION_FILES[one.kind], one.text())
    return Decisions(found)


def _unlike(one: StoredDecision, model: PeftModel, num_classes: int) -> str | None:
    if is_other_base(one.base, base_fingerprint(model)):
        return "another base model"
    count = one.rule.num_classes
    return f"{num_classes} classes instead of {count}" if one.to.by == PROBABILITY and count != num_classes else None
