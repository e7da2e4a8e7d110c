"""Uncertainty of whole entities and sentences, put together from that of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..calibration.entities import TagSet
from .features import FeatureSet

How = Literal["max", "mean", "any"]


@dataclass(frozen=True, eq=False)
class Grouped:
    """Groups of tokens, each with its uncertainty; entities as they were predicted, or sentences.

    Attributes:
        uncertainty: `(E,)` float64.
        errors: `(E,)` bool, or None without labels: an entity is wrong if its span or its type is.
        rows: `(E,)` int64, the row of each.
        spans: `(E, 2)` int64, the first item of each and the one after its last.
        types: Of entities, such as `"PER"`; empty for sentences.
        missed: Entities of the labels that were not predicted, by span and type: errors that no prediction carries.
    """

    uncertainty: torch.Tensor
    errors: torch.Tensor | None
    rows: torch.Tensor
    spans: torch.Tensor
    types: tuple[str, ...] = ()
    missed: int = 0

    def __len__(self) -> int:
        return len(self.uncertainty)


def entities(features: FeatureSet, uncertainty: torch.Tensor, names: Sequence[str], how: How = "max") -> Grouped:
    """The entities that a token classifier predicts, with the uncertainty and the error of each.

    Args:
        features: Of a token classification, one item for each word (its first token).
        uncertainty: `(N,)`, one number in [0, 1] an item, such as P(error).
        names: Tag of each class, in order: the model's `id2label`.
        how: What the uncertainty of an entity is, of its tokens' u: `"max"`, `"mean"`, or `"any"` for
            `1 - prod(1 - u)`, P(any token wrong) if they err independently.

    Returns:
        The entities, in the order of rows and tokens.

    Raises:
        ValueError: If the features are not of tokens, the tags are not as many as the classes, or `how` is unknown.
    """
    rows, together = _rows(features, uncertainty), _together(how)
    if len(names) != features.num_classes:
        raise ValueError(f"names are the tags of {features.num_classes} classes, in order; got {len(names)}.")
    tags = TagSet(names)
    predicted = [names[tag] for tag in features.predicted.tolist()]
    labels = None if features.labels is None else [names[tag] for tag in features.labels.tolist()]
    spans, types, owners, errors, missed = [], [], [], [], 0
    for row, start, stop in rows:
        made = tags.spans(predicted[start:stop])
        if labels is not None:
            right = set(tags.spans(labels[start:stop]))
            errors += [entity not in right for entity in made]
            missed += len(right - set(made))
        spans += [(start + first, start + last) for _, first, last in made]
        types += [kind for kind, _, _ in made]
        owners += [row] * len(made)
    return Grouped(
        _aggregated(uncertainty, spans, together),
        None if labels is None else torch.tensor(errors, dtype=torch.bool),
        torch.tensor(owners, dtype=torch.int64),
        torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
        tuple(types),
        missed,
    )


def sentences(features: FeatureSet, uncertainty: torch.Tensor, how: How = "max") -> Grouped:
    """The rows of a token classification, with the uncertainty of each; one is wrong if any of its tokens is.

    Args:
        features: Of a token classification.
        uncertainty: `(N,)`, one number in [0, 1] an item.
        how: As for `entities`.

    Returns:
        The sentences that have an item, in order.

    Raises:
        ValueError: If the features are not of tokens, or `how` is unknown.
    """
    rows, together = _rows(features, uncertainty), _together(how)
    spans = [(start, stop) for _, start, stop in rows]
    wrong = None if features.labels is None else features.errors
    return Grouped(
        _aggregated(uncertainty, spans, together),
        None if wrong is None else torch.stack([wrong[start:stop].any() for start, stop in spans]),
        torch.tensor([row for row, _, _ in rows]),
        torch.tensor(spans),
    )


def _rows(features: FeatureSet, uncertainty: torch.Tensor) -> list[tuple[int, int, int]]:
    """Row, first item and the one after the last, of each row."""
    if features.items is None:
        raise ValueError("These features have one item a row; entities and sentences are made of tokens.")
    if uncertainty.shape != (len(features),):
        raise ValueError(f"Give one uncertainty an item, ({len(features)},); got {tuple(uncertainty.shape)}.")
    owners, counts = torch.unique_consecutive(features.items[:, 0], return_counts=True)
    stops = counts.cumsum(0).tolist()
    return list(zip(owners.tolist(), [0, *stops[:-1]], stops, strict=True))


def _together(how: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """One number for some tokens' u."""
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "max": torch.max,
        "mean": torch.mean,
        "any": lambda u: -torch.expm1(torch.log1p(-u).sum()),
    }
    if how not in ways:
        raise ValueError(f"how must be one of {', '.join(map(repr, ways))}, got {how!r}.")
    return ways[how]


def _aggregated(
    uncertainty: torch.Tensor, spans: Sequence[tuple[int, int]], together: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    values = uncertainty.double()
    found = [together(values[start:stop]) for start, stop in spans]
    return torch.stack(found) if found else values[:0]
