"""`entities_report`: what entities are worth, as the field counts them, and whether their probabilities hold."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from ..inputs import check_confidence_level
from ..report.confidence import confidence_report
from ..report.sectioned import SectionedReport
from ..report.tables import Name, Section, Table, html_section, number, pair
from ..resampling.intervals import NoiseFloor, num_resamples_for
from ..scores.kinds import OF_ENTITIES
from .found import Entities

#: How many resamples of sentences are at hand at a time.
_BLOCK = 50


@dataclass(frozen=True)
class TypeRow:
    """One type: entities found, true ones, and how many are right."""

    name: str
    found: int
    true: int
    right: int
    precision: float
    recall: float
    f1: float

    @property
    def shares(self) -> tuple[float, float, float]:
        """Precision, recall and F1."""
        return self.precision, self.recall, self.f1


@dataclass(frozen=True, eq=False)
class EntitiesReport(SectionedReport):
    """Scores of entities; as a mapping it holds the scores alone.

    Attributes:
        scores: Key to number, the keys of `OF_ENTITIES`.
        settings: Sentences, entities, bins, resamples, seed.
        intervals: Key to `(low, high)`: of F1, precision and recall from a bootstrap over sentences, of the others
            over entities; None if none were asked for.
        floor: Mean and band of the calibration errors if every probability were right; None likewise.
        types: One line a type.
    """

    title: ClassVar[str] = "Report of entities"

    scores: dict[str, float]
    settings: dict[str, Any]
    intervals: dict[str, tuple[float, float]] | None
    floor: NoiseFloor | None
    types: tuple[TypeRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The scores under their own keys, then `settings`, `intervals`, `noise_floor` and `types`."""
        return {**super().to_dict(), "types": [asdict(row) for row in self.types]}

    def verdict(self) -> str:
        """In words: F1, and how the probabilities compare with right ones."""
        size = f"{self.settings['num_found']:,} entities found in {self.settings['num_sentences']:,} sentences"
        told = f"F1 {self.scores['f1']:.4f} of {size}, {self.settings['num_true']:,} are there."
        if self.floor is None:
            return told
        ece, band = self.scores["ece"], self.floor["ece"]
        judgement = (
            "this many cannot tell the two apart"
            if ece <= band.high
            else "their probabilities are too "
            + ("high" if self.scores["mean_confidence"] > self.scores["precision"] else "low")
        )
        return (
            f"{told} ECE {ece:.4f}; probabilities that are right would score {band.mean:.4f} [{band.low:.4f}, "
            f"{band.high:.4f}] ({self.settings['confidence_level']:.0%} band): {judgement}."
        )

    def part(self) -> str:
        """Verdict and tables as a part of another page, in HTML."""
        return f"<p>{html.escape(self.verdict())}</p>" + "".join(map(html_section, self._sections()))

    def _sections(self) -> list[Section]:
        level = self.settings["confidence_level"]
        header = ["score", "value", *([f"{level:.0%} interval", "if calibrated"] if level else []), "meaning"]
        lines = []
        for key, value in self.scores.items():
            cells = [key, number(value)]
            if self.intervals is not None:
                cells += [pair(self.intervals.get(key))]
                cells += [number(self.floor[key].mean) if self.floor and key in self.floor else "–"]
            lines.append([*cells, OF_ENTITIES[key]])
        each = [
            [Name(row.name), str(row.found), str(row.true), str(row.right), *map(number, row.shares)]
            for row in self.types
        ]
        notes = ["F1, precision and recall: bootstrap over sentences; the others over entities."] if level else []
        of_types = ["type", "found", "true", "right", "precision", "recall", "F1"]
        return [Section("Entities", [Table(header, lines)], notes), Section("Types", [Table(of_types, each)], [])]


def entities_report(
    found: Entities,
    *,
    num_bins: int = 15,
    confidence_level: float | None = 0.95,
    num_resamples: int | None = None,
    seed: int = 0,
) -> EntitiesReport:
    """Measure entities: precision, recall and F1 as seqeval has them, and the probability of each against its truth.

    An entity is right if its span and its type are. One that is missed counts in recall and F1, and has no
    probability, so no calibration score knows of it.

    Args:
        found: Of `find_entities`, with labels.
        num_bins: Bins of the calibration errors.
        confidence_level: Level of intervals and bands; None computes neither.
        num_resamples: Bootstrap resamples; by default 1,000, fewer for many rows.
        seed: Of the private generator of intervals and bands.

    Returns:
        The report.

    Raises:
        ValueError: Without labels, or where no entity is found and so there is nothing to measure.

    Example:
        >>> from peft_calib.calibration import find_entities
        >>> p = [[0.1, 0.9], [0.3, 0.7], [0.8, 0.2]]
        >>> found = find_entities(p, ["O", "B-LOC"], [0, 1, 2], labels=[1, 0, 1])
        >>> report = entities_report(found, confidence_level=None)
        >>> report["precision"], report["recall"], report["f1"], round(report["brier"], 3)
        (0.5, 0.5, 0.5, 0.25)
    """
    if found.counts is None or found.correct is None:
        raise ValueError("These entities have no truth beside them; give labels= to find_entities.")
    if not len(found):
        raise ValueError(
            f"No entity is found in {found.num_sentences} sentences: every word has the tag O, so there is no "
            "probability to measure. Train longer, or look at the accuracy of words."
        )
    level = None if confidence_level is None else check_confidence_level(confidence_level)
    size = num_resamples_for(max(len(found), found.num_sentences)) if num_resamples is None else num_resamples
    panel = confidence_report(
        found.probability, found.correct, num_bins=num_bins, confidence_level=level, num_resamples=size, seed=seed
    )
    table = np.stack(list(found.counts.values()), axis=1)  # (S, types, 3)
    own = _scores(table.sum(axis=0)[None])
    scores = {key: float(own[key][0]) if key in own else panel[key] for key in OF_ENTITIES}
    intervals = None
    if level is not None:
        assert panel.intervals is not None
        intervals = {**panel.intervals, **_intervals(table, level, size, seed)}
        intervals = {key: intervals[key] for key in OF_ENTITIES if key in intervals}
    settings: dict[str, Any] = {"num_sentences": found.num_sentences, "num_found": len(found)}
    settings |= {"num_true": int(table[..., 1].sum()), "num_bins": num_bins, "confidence_level": level}
    settings |= {"num_resamples": size, "seed": seed} if level is not None else {}
    rows = tuple(_row(name, counts.sum(axis=0)) for name, counts in found.counts.items())
    return EntitiesReport(scores, settings, intervals, panel.floor, rows)


def _scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Of `(R, types, 3)` counts, each `(R,)`; 0 where a share is one of nothing, as in seqeval."""
    precision, recall, f1 = _of_counts(counts.sum(axis=1))
    return {"f1": f1, "f1_macro": _of_counts(counts)[2].mean(axis=1), "precision": precision, "recall": recall}


def _of_counts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of `(..., 3)` numbers of found, true and right ones."""
    found, true, right = np.moveaxis(counts.astype(np.float64), -1, 0)
    return right / np.maximum(found, 1), right / np.maximum(true, 1), 2 * right / np.maximum(found + true, 1)


def _intervals(table: np.ndarray, level: float, size: int, seed: int) -> Mapping[str, tuple[float, float]]:
    """Percentiles of resamples of whole sentences."""
    count, flat = len(table), table.reshape(len(table), -1)
    generator = np.random.default_rng(seed)
    blocks = []
    for start in range(0, size, _BLOCK):
        weights = generator.multinomial(count, np.full(count, 1.0 / count), size=min(_BLOCK, size - start))
        blocks.append((weights @ flat).reshape(-1, *table.shape[1:]))
    drawn = _scores(np.concatenate(blocks))
    ends = [0.5 - 0.5 * level, 0.5 + 0.5 * level]
    return {key: tuple(map(float, np.quantile(values, ends))) for key, values in drawn.items()}  # type: ignore[misc]


def _row(name: str, counts: np.ndarray) -> TypeRow:
    found, true, right = map(int, counts)
    return TypeRow(name, found, true, right, *(float(value) for value in _of_counts(counts)))
