"""Decision rules on their way from an adapter to plain LoRAs that are written of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..artefact import DECISION_FILES, HERE, Artefact, place_of
from ..calibration.recalibrate import load_state
from ..identity import adapter_digest, folder_digest
from ..json_files import parse_json
from .companions import attached_file
from .stored_decision import HEAD, MEND, StoredDecision, recalibration_of


def attached_decisions(model: nn.Module, adapter_name: str) -> list[StoredDecision]:
    """The rules that are saved beside an adapter, but for those of an adapter that it was and is no more."""
    texts = ((name, attached_file(model, name, adapter_name)) for name in DECISION_FILES.values())
    found = [StoredDecision.from_fields(parse_json(text, name, MEND)) for name, text in texts if text is not None]
    own = (adapter_digest(model, adapter_name),) if found else ()
    return [one for one in found if one.adapters == own]


def export_decisions(
    rules: Sequence[StoredDecision],
    told: Artefact,
    folder: Path,
    names: Sequence[str] | None,
    seed: int | None,
) -> list[str]:
    """Write into a folder of plain LoRAs the rules that are for what they predict.

    Args:
        rules: Those of the adapter.
        told: What lies beside it.
        folder: Of the LoRAs, with their `predictor.json`.
        names: Of the draws in it; None for the mean, which is the folder's own.
        seed: Of the draws; None where they are of none, or are the mirrored ones that no rule is fitted to.

    Returns:
        In words, why others are not for it.
    """
    how, places = ("mean", [HERE]) if names is None else ("sample", list(names))
    state = told.ways.get(how)
    applied, reasons = recalibration_of(None if state is None else load_state(state)), []
    for one in rules:
        why = one.silent_for(how, len(places), seed, told.label_tokens)
        if why is None and one.to.by == HEAD:
            why = f"the rule in {DECISION_FILES[one.kind]} goes by P(error), and the uncertainty head stays behind"
        if why is None and one.to.recalibration != applied:
            why = f"the rule in {DECISION_FILES[one.kind]} was fitted with another recalibration"
        if why is None:
            one.exported([folder_digest(place_of(folder, name)) for name in places]).write(folder)
        else:
            reasons.append(why)
    return reasons


def export_decisions_of_draws(
    rules: Sequence[StoredDecision],
    told: Artefact,
    folder: Path,
    names: Sequence[str],
    mean: str | None,
    seed: int | None,
) -> list[str]:
    """The same for a folder of draws and the mean beside them; in words, why a rule is written for neither."""
    reasons = export_decisions(rules, told, folder, names, seed)
    if mean is None:
        return reasons
    of_mean = export_decisions(rules, told, folder / mean, None, None)
    return [why for why in reasons if why in of_mean]
