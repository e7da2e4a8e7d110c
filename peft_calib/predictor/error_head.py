"""The uncertainty head beside an adapter: found, held against the model, and asked in the forward that predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..artefact import Artefact
from ..calibration.recalibrate import Recalibrator, TemperatureScaling
from ..identity import adapter_digest
from ..prediction import Prediction
from ..uncertainty_head.bound import BoundHead
from ..uncertainty_head.head import UncertaintyHead
from ..uncertainty_head.stored import file_names
from .inputs import Encoded

NONE = "no uncertainty head is stored"


@dataclass(frozen=True)
class ErrorHead:
    """The head of a predictor, or why it has none.

    Attributes:
        bound: The head on the model; None where there is none.
        told: In words.
    """

    bound: BoundHead | None = None
    told: str = NONE

    @property
    def digest(self) -> str | None:
        """One text for all of the head."""
        return None if self.bound is None else self.bound.stored.digest

    def serves(self, how: str, count: int | None, method: Recalibrator | None, artefact: Artefact) -> tuple[bool, str]:
        """Whether it says how likely a prediction of some way is wrong, and what is to be said of it."""
        if self.bound is None:
            return False, self.told
        asked, report = self.bound.asked, self.bound.stored.report
        way = "mean" if asked.num_samples == 1 and asked.adapter_names is None else "sample"
        own = "the mean" if way == "mean" else f"{asked.num_samples} draws"
        if how != way or (way == "sample" and count != asked.num_samples):
            return False, f"the uncertainty head was fitted for {own}"
        if asked.label_tokens != artefact.label_tokens:
            return False, "the uncertainty head was fitted for other label tokens"
        if method is not None and not isinstance(method, TemperatureScaling):
            return False, f"{type(method).__name__} may predict other classes than the uncertainty head was fitted for"
        if report.why_base is not None:
            return True, "P(error) by the base score"
        return True, f"P(error) by an uncertainty head{'' if report.helps else ' that cannot be told to help'}"

    def predict(
        self, rows: Encoded, order: list[int], how: str, seed: int, options: Mapping[str, Any]
    ) -> tuple[Prediction, torch.Tensor]:
        """The prediction of rows in an order, and how likely each is wrong, from one forward."""
        assert self.bound is not None
        unlabelled = replace(rows, labels=None).as_dataset(order)
        features, errors = self.bound.read(unlabelled, seed, **options)
        known = rows.labels is not None and rows.words is None  # the tags of words are lists
        labels = torch.tensor([rows.labels[place] for place in order]) if known else None  # type: ignore[index]
        made = Prediction(
            sample_probabilities=features.logits.softmax(-1),
            num_forwards=features.num_forwards,
            how=how,
            seed=None if how == "mean" else seed,
            labels=labels,
            positions=features.items,
        )
        return made, errors.error_probability


def head_beside(folder: Path, places: Mapping[str, Path], model: PeftModel) -> ErrorHead:
    """The head that lies in the folder of an artefact, or beside its only adapter.

    Args:
        folder: Of the artefact.
        places: Where each adapter of the model lies.
        model: The base model with the adapters.

    Raises:
        ValueError: If the head is damaged, or was fitted for another adapter.
    """
    beside = [folder, *(places.values() if len(places) == 1 else ())]
    found = next((place for place in beside if (place / file_names("default")[1]).is_file()), None)
    if found is None:
        return ErrorHead()
    try:
        head = UncertaintyHead.from_pretrained(found)
        stored = head.stored
        if stored.asked is None:
            return ErrorHead(None, "the uncertainty head was fitted to features, so how to ask the model is not known")
        if stored.asked.adapter_names is not None and len(stored.asked.adapter_names) == len(places):
            stored = replace(
                stored, asked=replace(stored.asked, adapter_names=tuple(places))
            )  # as they are called here
        bound = BoundHead(stored, model, folders=places)
        if len(places) == 1 and (stored.belongs is None or adapter_digest(model) in stored.belongs.adapters):
            head.attach(model)  # who saves the model saves all; of a rounded adapter it would not be the head
    except ValueError as error:
        raise ValueError(f"{error} recalibrate=False loads the adapter without it.") from error
    return ErrorHead(bound, "")
