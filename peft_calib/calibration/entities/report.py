"""`entities_report`: what entities are worth, as the field counts them, and whether their probabilities hold."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..bins import BinStatistics, uniform_bins
from ..inputs import Rows, check_confidence_level, check_seed
from ..report.confidence import confidence_report
from ..report.sectioned import SectionedReport
from ..report.tables import Name, Section, Table, html_section, number
from ..resampling.bands import clustered_share_interval, trials_of_shares
from ..resampling.intervals import (
    Band,
    NoiseFloor,
    bootstrap_counts,
    check_num_resamples,
    down_to_zero,
    num_resamples_for,
    weighted_draws,
)
from ..resampling.ranked import Interval, auroc_interval, one_more
from ..scores.binned import scores_of_bins
from ..scores.kinds import OF_ENTITIES
from ..scores.table import BY_KEY
from .found import Entities

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How many resamples of sentences are at hand at a time.
_BLOCK = 50
#: Scores of the probabilities; without an entity that is found there are none.
_OF_PROBABILITIES = tuple(key for key in OF_ENTITIES if key in BY_KEY)


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
        scores: Key to number, the keys of `OF_ENTITIES`; where no entity is found, those of F1, precision and recall
            alone, which are 0.
        settings: Sentences, entities, bins, resamples, seed.
        intervals: Key to `(low, high)`, from a bootstrap over sentences; None if none were asked for.
        floor: Mean and band of the calibration error if every probability were right, and the entities of a sentence
            right and wrong together; None likewise, and where no entity is found.
        types: One line a type.
        bins: Bins of the entities' probabilities, for the picture.
    """

    kind: ClassVar[str] = "entities"
    title: ClassVar[str] = "Report of entities"

    scores: dict[str, float]
    settings: dict[str, Any]
    intervals: dict[str, tuple[float, float]] | None
    floor: NoiseFloor | None
    types: tuple[TypeRow, ...]
    bins: BinStatistics

    def to_dict(self) -> dict[str, Any]:
        """The scores under their own keys, then `settings`, `intervals`, `noise_floor` and `types`."""
        return {**super().to_dict(), "types": [asdict(row) for row in self.types]}

    def verdict(self) -> str:
        """In words: F1, and how the probabilities compare with right ones."""
        size = f"{self.settings['num_found']:,} entities found in {self.settings['num_sentences']:,} sentences"
        told = f"F1 {self.scores['f1']:.4f} of {size}, {self.settings['num_true']:,} are there."
        if not self.settings["num_found"]:
            return f"{told} Of none there is no probability to measure."
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
            f"{band.high:.4f}] ({self.settings['confidence_level']:.0%} band, the entities of a sentence right and "
            f"wrong together): {judgement}."
        )

    def part(self, before: EntitiesReport | None = None) -> str:
        """Verdict, picture and tables as a part of another page, in HTML; `before` as for `to_html`."""
        told = f"<p>{html.escape(self.verdict())}</p>{self.pictured(before)}"
        return told + "".join(map(html_section, self._sections()))

    def figures(self, before: EntitiesReport | None = None) -> dict[str, Figure]:
        """Reliability of the entities' probabilities; none where none is found."""
        if not self.settings["num_found"]:
            return {}
        from ..report.plots import points_figure  # whoever wants numbers alone does not pay for matplotlib

        earlier = None if before is None or not before.settings["num_found"] else before.bins
        level, axes = self.settings["confidence_level"] or 0.95, ("probability of an entity", "share that is right")
        return {"Reliability of the entities": points_figure(self.bins, earlier, level=level, axes_names=axes)}

    def _sections(self) -> list[Section]:
        level = self.settings["confidence_level"]
        each = [
            [Name(row.name), str(row.found), str(row.true), str(row.right), *map(number, row.shares)]
            for row in self.types
        ]
        notes = ["Intervals: bootstrap over sentences."] if level else []
        of_types = ["type", "found", "true", "right", "precision", "recall", "F1"]
        return [
            Section("Entities", [self._score_table(OF_ENTITIES)], notes),
            Section("Types", [Table(of_types, each)], []),
        ]


def entities_report(
    found: Entities,
    *,
    num_bins: int = 15,
    confidence_level: float | None = 0.95,
    num_resamples: int | None = None,
    seed: int = 0,
) -> EntitiesReport:
    """Measure entities: precision, recall and F1, and the probability of each against its truth.

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
        ValueError: Without labels, or where there is no entity, neither found nor true.

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
    if not found.counts:
        raise ValueError(
            f"There is no entity in {found.num_sentences} sentences, neither found nor true, so there is nothing to "
            "measure; give sentences that hold some."
        )
    level = None if confidence_level is None else check_confidence_level(confidence_level)
    seed = check_seed(seed)
    size = num_resamples_for(max(len(found), found.num_sentences)) if num_resamples is None else num_resamples
    table = np.stack(list(found.counts.values()), axis=1)  # (S, types, 3)
    values = {key: float(value[0]) for key, value in _scores(table.sum(axis=0)[None]).items()}
    if len(found):
        panel = confidence_report(found.probability, found.correct, num_bins=num_bins, confidence_level=None)
        values |= {key: panel[key] for key in _OF_PROBABILITIES}
    scores = {key: values[key] for key in OF_ENTITIES if key in values}
    intervals, floor = None, None
    if level is not None:
        check_num_resamples(size)
        floor = _floor(found, num_bins, level, size, seed) if len(found) else None
        drawn = _resampled(found, table, num_bins, size, seed)
        intervals = _intervals(drawn, scores, level, floor or {}, table) | _of_ranking(found, drawn, scores, level)
        intervals = _with_one_more(intervals, found, drawn, level, seed)
    settings: dict[str, Any] = {"num_sentences": found.num_sentences, "num_found": len(found)}
    settings |= {"num_true": int(table[..., 1].sum()), "num_bins": num_bins, "confidence_level": level}
    settings |= {"num_resamples": size, "seed": seed} if level is not None else {}
    rows = tuple(_row(name, counts.sum(axis=0)) for name, counts in found.counts.items())
    bins = uniform_bins(found.probability, found.correct.astype(np.float64), num_bins)
    return EntitiesReport(scores, settings, intervals, floor, rows, bins)


def _scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Of `(R, types, 3)` counts, each `(R,)`; 0 where a share is one of nothing, as in seqeval.

    The mean over types is one over those that are found or true, and NaN is all where there is no entity.
    """
    precision, recall, f1 = _of_counts(counts.sum(axis=1))
    present = counts[..., :2].any(axis=2)
    count = present.sum(axis=1)
    macro = (_of_counts(counts)[2] * present).sum(axis=1) / np.maximum(count, 1)
    scores = {"f1": f1, "f1_macro": macro, "precision": precision, "recall": recall}
    return {key: np.where(count > 0, values, np.nan) for key, values in scores.items()}


def _of_counts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of `(..., 3)` numbers of found, true and right ones."""
    found, true, right = np.moveaxis(counts.astype(np.float64), -1, 0)
    return right / np.maximum(found, 1), right / np.maximum(true, 1), 2 * right / np.maximum(found + true, 1)


def _resampled(found: Entities, table: np.ndarray, num_bins: int, size: int, seed: int) -> dict[str, np.ndarray]:
    """Scores of resamples of whole sentences, since the entities of one are right and wrong together."""
    count, flat = len(table), table.reshape(len(table), -1)
    weights = bootstrap_counts(np.random.default_rng([seed, 0]), count, size)  # (S, R)
    blocks = [weights[:, start : start + _BLOCK].T.astype(np.int64) @ flat for start in range(0, size, _BLOCK)]
    drawn = _scores(np.concatenate(blocks).reshape(-1, *table.shape[1:]))
    if len(found):
        of_entity = weights[found.sentences]
        of_entity = of_entity[:, of_entity.any(axis=0)]  # a resample without an entity says nothing of them
        drawn |= weighted_draws(_as_rows(found), of_entity, num_bins=num_bins, scores=_OF_PROBABILITIES)
        drawn["brier"] = 0.5 * drawn["brier"]  # two equal columns
    return drawn


def _as_rows(found: Entities) -> Rows:
    assert found.correct is not None
    columns = np.stack([1.0 - found.probability, found.probability], axis=1)
    return Rows(columns, found.correct.astype(np.int64), against_rest=True)


def _intervals(
    drawn: Mapping[str, np.ndarray],
    scores: Mapping[str, float],
    level: float,
    floor: NoiseFloor,
    table: np.ndarray,
) -> dict[str, Interval]:
    """Percentiles; the calibration error's reach further down, by twice what resampling adds to it.

    It is a mean of absolute values, which chance makes larger: once in the rows, once more in their resamples. Shares
    of entities reach at least as far as Wilson's: resamples of few errors know of no other ones.
    """
    ends, found = [0.5 - 0.5 * level, 0.5 + 0.5 * level], {}
    num_found, num_true, num_right = np.moveaxis(table, -1, 0)
    trials = trials_of_shares(num_found, num_true, num_found + num_true - num_right)
    for key in scores:
        values = drawn[key][np.isfinite(drawn[key])]
        low, high = map(float, np.quantile(values, ends)) if len(values) else (np.nan, np.nan)
        if key == "ece":
            low = max(low - 2.0 * max(float(values.mean()) - scores[key], 0.0), 0.0)
        if key in trials and trials[key][1]:
            wider = clustered_share_interval(scores[key], float(values.var()), *trials[key], ends[0])
            low, high = min(low, wider[0]), max(high, wider[1])
        found[key] = low, high
    return down_to_zero(found, scores, floor)


def _of_ranking(
    found: Entities, drawn: Mapping[str, np.ndarray], scores: Mapping[str, float], level: float
) -> dict[str, Interval]:
    """Of how errors are ranked, as sure as there are sentences with a wrong entity, or with a right one, if fewer."""
    assert found.correct is not None
    parts = [np.unique(found.sentences[chosen]) for chosen in (found.correct, ~found.correct)]
    rarer, every = min(map(len, parts)), len(np.unique(found.sentences))
    if not rarer:
        return {}
    known = drawn["error_auroc"][np.isfinite(drawn["error_auroc"])]
    variance = float(known.var()) if len(known) else 0.0
    return {"error_auroc": auroc_interval(scores["error_auroc"], variance, rarer, every, 0.5 - 0.5 * level)}


def _with_one_more(
    intervals: Mapping[str, Interval], found: Entities, drawn: Mapping[str, np.ndarray], level: float, seed: int
) -> dict[str, Interval]:
    """Takes upper ends to where one wrong entity more would, if wrong ones are the fewer.

    As `ranked` has it for rows: resamples of no error have none. Of confidence `c` it adds `c^2 - (1 - c)^2` to a sum
    of Brier scores, and 1 to the sum of confidences less right ones, of which a calibration error is the size.
    """
    assert found.correct is not None
    size, right = len(found), int(found.correct.sum())
    if not size or 2 * right < size:
        return dict(intervals)
    generator = np.random.default_rng([seed, 4])
    weight = generator.exponential(size=len(drawn["brier"])) / size
    is_over = float(found.probability.sum()) >= right
    more = {
        "brier": drawn["brier"] + weight * generator.choice(2.0 * found.probability - 1.0, len(weight)),
        "ece": drawn["ece"] + weight if is_over else np.abs(weight - drawn["ece"]),
        "aurc": one_more(drawn["aurc"], "aurc", size, seed),
    }
    reach = {key: min(float(np.quantile(values, 0.5 + 0.5 * level)), 1.0) for key, values in more.items()}
    return {**intervals, **{key: (intervals[key][0], max(intervals[key][1], end)) for key, end in reach.items()}}


def _floor(found: Entities, num_bins: int, level: float, size: int, seed: int) -> NoiseFloor:
    """The calibration error where probabilities are right, and the entities of a sentence right and wrong together.

    One uniform number a sentence says which of its entities are right: each with its probability, and together as
    much as that allows. How much they really are is not known; so the band is wide enough whatever it is.
    """
    generator, drawn = np.random.default_rng([seed, 1]), []
    for _ in range(size):
        right = generator.random(found.num_sentences)[found.sentences] < found.probability
        drawn.append(scores_of_bins(uniform_bins(found.probability, right.astype(np.float64), num_bins))["ece"])
    low, high = np.quantile(drawn, [0.5 - 0.5 * level, 0.5 + 0.5 * level])
    return {"ece": Band(float(np.mean(drawn)), float(low), float(high))}


def _row(name: str, counts: np.ndarray) -> TypeRow:
    found, true, right = map(int, counts)
    return TypeRow(name, found, true, right, *(float(value) for value in _of_counts(counts)))
