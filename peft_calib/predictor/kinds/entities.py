"""Entities in tagged words: spans with a type, each with the probability that both are right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset

from ...artefact import Artefact, Inputs
from ...calibration import SelectiveThreshold, find_entities
from ...calibration.decide.base import DecisionRule
from ...calibration.entities import Entities as Found
from ...files import fill_folder, write_atomically
from ...json_files import read_json
from ...provenance.origins import is_missing
from ...provenance.stored_decision import ENTITY, PROBABILITY
from ..answer import CalibratedPrediction
from ..encoded import Encoded, Words
from ..table import ENTITIES, ERROR
from .base import Kind, flag_of

#: Names under which a table that says nothing else has its tags.
TAGS = ("tags", "labels", "ner_tags")
#: What an answer says beside the prediction of its words, in a folder.
FACTS = "entities.json"
#: The tag outside of entities.
OUTSIDE = "O"
#: What `decide` takes, and why it does not take the rest.
ASKED = ("risk", "target_coverage", "confidence")
NOT_ASKED = {
    "costs": "an entity that is missed costs too, and no rule knows of it",
    "alpha": "there is no list of the spans and types that a set would be taken from",
    "by": "the uncertainty head is of words",
}


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EntitiesAnswer:
    """What a predictor of entities answers, in the order of the rows.

    Args:
        words: The prediction of the words, with the temperature; `words.positions` has row and token of each.
        texts: The words of each row.
        kept: Of each row, which of its words have an answer; a row that was cut lacks those at its end.
        decision: In words, what the rule promises, or why it is not applied.
        accepted: Bool (E,), which entities the rule beside the adapter answers; None where there is no such rule.
    """

    words: CalibratedPrediction
    texts: Sequence[Sequence[str]]
    kept: Sequence[Sequence[int]]
    decision: str = ""
    accepted: torch.Tensor | None = None
    error_probability: ClassVar[None] = None

    def __repr__(self) -> str:
        told = f"{len(self.found)} entities in {len(self)} rows, {self.words!r}"
        return f"EntitiesAnswer({', '.join(filter(None, [told, self.decision]))})"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def how(self) -> str:
        """Way of predicting."""
        return self.words.how

    @property
    def num_samples(self) -> int:
        """Number of draws."""
        return self.words.num_samples

    @property
    def recalibration(self) -> str:
        """In words, what was applied or why nothing was."""
        return self.words.recalibration

    @property
    def num_cut(self) -> int:
        """Rows that were longer than what the model was trained on, and were cut."""
        return self.words.num_cut

    @property
    def label_names(self) -> tuple[str, ...]:
        """The tags, in order."""
        return self.words.label_names

    @cached_property
    def found(self) -> Found:
        """The entities, of `find_entities` with the probabilities of the words after the temperature."""
        return self.against(None)

    def against(self, tags: Sequence[Sequence[int]] | None) -> Found:
        """The same, held against the tags of all words of each row."""
        assert self.words.positions is not None
        true = None
        if tags is not None:
            true = np.array([row[word] for row, kept in zip(tags, self.kept, strict=True) for word in kept])
        rows = self.words.positions[:, 0].numpy()
        return find_entities(self.words.probabilities.numpy(), self.label_names, rows, true)

    @cached_property
    def entities(self) -> list[list[dict[str, Any]]]:
        """Of each row its entities, as mappings.

        They have `type`, `first` and `last` word counted from 0, `text`, `probability`, `error_probability` where an
        uncertainty head says how likely their words' tags are wrong, the largest of these, and `answered` where a rule
        says so.
        """
        rows: list[list[dict[str, Any]]] = [[] for _ in self.texts]
        accepted = None if self.accepted is None else self.accepted.tolist()
        errors = self.words.error_probability
        words = [word for kept in self.kept for word in kept]  # of every item
        places = zip(self.found.sentences.tolist(), self.found.spans.tolist(), strict=True)
        for number, (row, (start, stop)) in enumerate(places):
            first, last = words[start], words[stop - 1]
            one: dict[str, Any] = {"type": self.found.types[number], "first": first, "last": last}
            one |= {"text": " ".join(self.texts[row][first : last + 1])}
            one |= {"probability": float(self.found.probability[number])}
            one |= {} if errors is None else {ERROR: float(errors[start:stop].max())}
            rows[row].append(one if accepted is None else one | {"answered": accepted[number]})
        return rows

    def save(self, path: str | Path) -> Path:
        """Write the answer to a folder; nothing half written takes a good one's place.

        Args:
            path: The folder; made if missing. `CalibratedPrediction.load` reads the prediction of the words there.

        Returns:
            The folder.
        """
        folder = Path(path)
        facts: dict[str, Any] = {"texts": [list(row) for row in self.texts], "kept": [list(row) for row in self.kept]}
        facts |= {"decision": self.decision, "accepted": None if self.accepted is None else self.accepted.tolist()}

        def write(place: Path) -> None:
            self.words.save(place)
            write_atomically(place / FACTS, json.dumps(facts) + "\n")

        fill_folder(folder, write, FACTS)
        return folder

    @classmethod
    def load(cls, path: str | Path) -> EntitiesAnswer:
        """Read an answer back.

        Args:
            path: A folder written by `save`.

        Returns:
            The answer.

        Raises:
            ValueError: If the folder holds none, or a damaged one.
        """
        folder = Path(path)
        if not (folder / FACTS).is_file():
            raise ValueError(f"{folder} holds no saved entities ({FACTS}). Predict and save again.")
        facts, words = read_json(folder / FACTS, "Predict and save again"), CalibratedPrediction.load(folder)
        texts, kept = facts.listing("texts", list), facts.listing("kept", list)
        inside = len(texts) == len(kept) and all(map(_are_places, kept, map(len, texts)))
        if words.positions is None or not inside or sum(map(len, kept)) != len(words):
            raise facts.wrong("kept", f"the words of each row that the {len(words)} predictions are of")
        given = facts.listing("accepted", bool, None)
        accepted = None if given is None else torch.tensor(given, dtype=torch.bool)
        found = cls(words=words, texts=texts, kept=kept, decision=facts.text("decision"), accepted=accepted)
        if accepted is not None and len(accepted) != len(found.found):
            raise facts.wrong("accepted", f"null, or true or false for each of {len(found.found)} entities")
        return found

    def added(self) -> list[list]:
        """The column that `Kind.columns` names."""
        return [self.entities]

    def added_types(self) -> list[pa.DataType]:
        """Its type in a file: of rows without entities the values would not say it."""
        fields = {"type": pa.string(), "first": pa.int64(), "last": pa.int64(), "text": pa.string()}
        fields |= {"probability": pa.float64()}
        fields |= {} if self.words.error_probability is None else {ERROR: pa.float64()}
        fields |= {} if self.accepted is None else {"answered": pa.bool_()}
        return [pa.list_(pa.struct(list(fields.items())))]


class Entities(Kind):
    """Entities in the words of each row."""

    name = "entities"
    predict_task = "token"
    unit = "tags"
    rules = ("threshold",)
    fewest = 2
    of_words = True
    counted = "sentences, one entity of each,"
    answers = EntitiesAnswer

    def targets(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[Any] | None:
        """A tag for each word of each row; None for a row without, or with one that the adapter does not know."""
        values = _values(table, inputs)
        if values is None:
            return None
        index = {name: place for place, name in enumerate(names)}
        found = [None if row is None else [index.get(tag, -1) for tag in row] for row in values]
        known = [None if row is None or min(row, default=-1) < 0 else row for row in found]
        return known if any(map(self.is_known, known)) else None

    def strange(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[list[str]]:
        unknown = [[tag for tag in row or () if tag not in names] for row in _values(table, inputs) or []]
        return [row for row in unknown if row]

    def is_known(self, target: Any) -> bool:
        return target is not None

    def told(self, method: Any) -> str:
        fit = method.fit_result
        return "T left off" if fit is not None and not fit.applied else f"T = {method.temperature:.4g}"

    def items_in_order(self, made: Any, order: np.ndarray) -> torch.Tensor:
        return torch.argsort(torch.from_numpy(order)[made.positions[:, 0]], stable=True)

    def in_order(self, made: Any, order: np.ndarray) -> Any:
        back = super().in_order(made, order)
        rows = torch.from_numpy(order)[back.positions[:, 0]]
        return replace(back, positions=torch.stack([rows, back.positions[:, 1]], dim=1))

    def said_of(self, rows: Encoded) -> dict[str, Any]:
        return {"rows": rows.words}

    def answer(self, made: Any, method: Any, artefact: Artefact, **said: Any) -> EntitiesAnswer:
        rows: Words = said.pop("rows")
        words = CalibratedPrediction.of(replace(made, labels=None), method, **said)
        return EntitiesAnswer(words=words, texts=rows.texts, kept=rows.kept)

    def columns(self, further: Sequence[str]) -> list[str]:
        return [ENTITIES]

    def summary(self, found: EntitiesAnswer) -> dict[str, Any]:
        types = found.found.types
        counts = {name: types.count(name) for name in sorted(set(types))}
        told = ", ".join(f"{name} {count}" for name, count in counts.items()) or "no entity is found"
        told += f"; {found.words.error_head}" if found.words.error_probability is not None else ""
        if found.accepted is None:
            return {"entities": counts, "told": told}
        answered = int(found.accepted.sum())
        told = f"{told}; {answered} of {len(types)} entities are answered"
        return {"entities": counts, "entities_answered": answered, "told": told}

    def decided(self, rule: Any, found: EntitiesAnswer, **by: Any) -> dict[str, Any]:
        return {"accepted": rule.accept(torch.from_numpy(found.found.probability), input="confidence")}

    def unfitted(self, asked: Mapping[str, Any], seed: int) -> list[DecisionRule]:
        why = next(
            (f"{flag_of(name)} is not of entities: {NOT_ASKED[name]}" for name in NOT_ASKED if name in asked), ""
        )
        if why:
            raise ValueError(f"{why}; a rule for entities takes {', '.join(map(flag_of, ASKED))}")
        self._only(asked, ASKED)
        return [SelectiveThreshold(**asked, seed=seed)]

    def goes_by(self, rule: DecisionRule, by: str) -> str:
        return ENTITY

    def fit_rule(self, rule: Any, found: EntitiesAnswer, targets: Any, by: str = PROBABILITY) -> None:
        entities = found.against(targets)
        if not len(entities):
            raise ValueError(f"no entity is found in the {len(found)} rows, so there is none to fit a rule to")
        assert entities.correct is not None
        once = entities.one_a_sentence(rule.seed)
        rule.fit(entities.probability, entities.correct.astype(int), input="confidence", mask=once)


def _are_places(values: Sequence[Any], size: int) -> bool:
    """Whether these are different places among so many, in order."""
    whole = all(type(value) is int for value in values)
    return whole and all(a < b for a, b in pairwise([-1, *values, size]))


def marks_entities(names: Sequence[str]) -> bool:
    """Whether tags mark entities: one of them says that a word lies outside."""
    return OUTSIDE in names


def check_entity_tags(names: Sequence[str], folder: Any) -> None:
    """Refuse tags that mark no entities."""
    if not marks_entities(names):
        raise ValueError(
            f"The tags of {folder} have no {OUTSIDE!r} outside of entities ({', '.join(names[:8])}), so they mark "
            "none. Predict the words with peft_calib.predict_dataset(model, rows, task='token')."
        )


def _values(table: Dataset, inputs: Inputs) -> list[list[str] | None] | None:
    """The tags of each row as texts; None without such a column, or for a row that says nothing."""
    columns = TAGS if inputs.label_column is None else (inputs.label_column,)
    column = next((name for name in columns if name in table.column_names), None)
    if column is None:
        return None
    inner = getattr(table.features[column], "feature", None)
    values = table[column][:]
    rows = [None if not isinstance(row, list) or any(map(is_missing, row)) else row for row in values]
    if isinstance(inner, ClassLabel):
        return [None if row is None or min(row, default=0) < 0 else [inner.names[k] for k in row] for row in rows]
    return [None if row is None else list(map(str, row)) for row in rows]
