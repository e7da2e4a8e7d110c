"""A decision rule in a file beside its adapter, with all that it was fitted to and on which rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..artefact import DECISION_FILES, WAYS
from ..calibration.decide.stored import decision_of
from ..calibration.recalibrate import Recalibrator
from ..files import write_atomically
from ..identity import belongs_to_folder
from ..json_files import Fields, read_json, sealed, without_nan
from .splits import RowSet

FORMAT_VERSION = 1
MEND = "Fit the rule again: peft-calib decide"
#: What a rule goes by: the probability of the class, 1 - P(error) of the uncertainty head, or that of an entity.
PROBABILITY, HEAD, ENTITY = "probability", "head", "entity"
BY = (PROBABILITY, HEAD, ENTITY)


@dataclass(frozen=True)
class FittedTo:
    """The way of predicting that a rule is for; its promise holds for no other.

    Attributes:
        how: `"mean"` or `"sample"`.
        num_samples: Draws.
        seed: Of the draws; None where they do not hang on one.
        recalibration: Name and parameters of what was applied to the probabilities; None for nothing.
        by: What it goes by, one of `BY`.
        head: Hash of the uncertainty head that it goes by.
        label_tokens: Ids of the tokens that stand for the classes, where a language model answers.
    """

    how: str
    num_samples: int
    seed: int | None = None
    recalibration: Mapping[str, Any] | None = None
    by: str = PROBABILITY
    head: str | None = None
    label_tokens: tuple[int, ...] | None = None

    @property
    def way(self) -> str:
        """In words."""
        if self.how == "mean":
            return "the mean"
        return f"{self.num_samples} draws" + ("" if self.seed is None else f" of seed {self.seed}")

    @classmethod
    def from_fields(cls, fields: Fields) -> FittedTo:
        """The inverse of `asdict`, checked."""
        tokens, recalibration = fields.listing("label_tokens", int, None), fields.mapping("recalibration", None)
        return cls(
            how=fields.text("how", among=WAYS),
            num_samples=fields.integer("num_samples", least=1),
            seed=fields.integer("seed", default=None),
            recalibration=None if recalibration is None else dict(recalibration.content),
            by=fields.text("by", among=BY),
            head=fields.text("head", default=None),
            label_tokens=None if tokens is None else tuple(tokens),
        )


@dataclass(frozen=True, eq=False)
class StoredDecision:
    """A fitted rule and what it belongs to.

    Attributes:
        rule: The `SelectiveThreshold` or `ConformalSets`.
        to: The way of predicting that it is for.
        adapters: Digest of each adapter, in the order of the model.
        base: Fingerprint of the base model; None where it has none.
        rows: The rows it was fitted on by the hashes of their inputs, for each form that rows are known in.
        class_names: Names of the classes, in order; None where they are not known.
    """

    rule: Any
    to: FittedTo
    adapters: tuple[str, ...]
    base: str | None
    rows: Mapping[str, RowSet] = field(repr=False)
    class_names: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        """`"threshold"`, `"sets"`, `"labels"` or `"interval"`."""
        return kind_of(self.rule)

    @property
    def num_rows(self) -> int:
        """Rows it was fitted on."""
        return self.rule.num_rows

    def text(self) -> str:
        """The file."""
        content = {
            "format_version": FORMAT_VERSION,
            "promise": self.rule.promise(),
            "rule": self.rule.state(),
            "fitted_to": asdict(self.to),
            "adapters": list(self.adapters),
            "base": self.base,
            "rows": {kind: rows.to_dict() for kind, rows in self.rows.items()},
            "class_names": self.class_names,
        }
        return json.dumps(sealed(without_nan(content)), indent=1, allow_nan=False) + "\n"

    def told(self) -> str:
        """What the rule promises and rests on, in Markdown, with the classes by their names."""
        return self.rule.to_markdown(self.class_names)

    @property
    def digest(self) -> str:
        """One text for all of it."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def write(self, folder: str | Path) -> Path:
        """Write the file into a folder, whole or not at all."""
        path = Path(folder) / DECISION_FILES[self.kind]
        write_atomically(path, self.text())
        return path

    @classmethod
    def read(cls, path: str | Path) -> StoredDecision:
        """The inverse of `write`, checked; a `ValueError` names file, field and how to mend it."""
        found = cls.from_fields(read_json(path, MEND))
        if Path(path).name in DECISION_FILES.values() and Path(path).name != DECISION_FILES[found.kind]:
            raise ValueError(f"{path} holds a rule of another kind, {type(found.rule).__name__}. {MEND}.")
        return found

    @classmethod
    def from_fields(cls, fields: Fields) -> StoredDecision:
        """The inverse of `text`, checked."""
        if not fields.has_version(FORMAT_VERSION):
            raise fields.wrong("format_version", f"{FORMAT_VERSION}, which this release reads")
        rows, names = fields.mapping("rows"), fields.listing("class_names", str, None)
        found = cls(
            rule=decision_of(fields),
            to=FittedTo.from_fields(fields.mapping("fitted_to")),
            adapters=tuple(fields.listing("adapters", str)),
            base=fields.text("base", default=None),
            rows={kind: RowSet.from_dict(rows.mapping(kind)) for kind in rows},
            class_names=None if names is None else tuple(names),
        )
        if names is not None and found.rule.num_classes not in (1, len(names)):
            raise fields.wrong("class_names", f"null, or {found.rule.num_classes} names")
        fields.check_seal("the rule")
        return found

    def unlike(self, folders: Sequence[Path], method: Recalibrator | None, head: str | None) -> str | None:
        """In words, what is another one than the rule was fitted to; None where all is the same.

        Args:
            folders: Of the adapters, in the order of the model.
            method: The recalibration of the rule's way of predicting.
            head: Hash of the uncertainty head there is.
        """
        same = len(folders) == len(self.adapters) and all(map(belongs_to_folder, self.adapters, folders))
        if not same:
            return "another adapter, or one that has been trained on, edited or replaced since"
        now, then = recalibration_of(method), self.to.recalibration
        if now != then:
            return f"another recalibration: {_told(then)} where the rule was fitted, and {_told(now)} now"
        if self.to.by == HEAD and head != self.to.head:
            return "no uncertainty head" if head is None else "another uncertainty head"
        return None

    def exported(self, digests: Sequence[str]) -> StoredDecision:
        """The same rule for plain LoRAs that were written of its adapter, by their digests; they hang on no seed."""
        return replace(self, adapters=tuple(digests), to=replace(self.to, seed=None))

    def refused(self, folder: Path, other: str) -> str:
        """The message of something that differs."""
        return (
            f"{folder / DECISION_FILES[self.kind]} was not fitted for what lies there now, which has {other}. What it "
            f"promises does not hold for that: fit it again with peft-calib decide --overwrite, or remove the file."
        )

    def silent_for(self, how: str, count: int | None, seed: int, tokens: Sequence[int] | None) -> str | None:
        """Why it says nothing of predictions of some way; None where it does."""
        to, way = self.to, "sample" if how == "late" else how  # the same draws
        same_way = way == to.how and (to.how == "mean" or count == to.num_samples)
        if not same_way or (to.seed is not None and seed != to.seed):
            return f"the rule in {DECISION_FILES[self.kind]} was fitted for {to.way}"
        if (None if tokens is None else tuple(tokens)) != to.label_tokens:
            return f"the rule in {DECISION_FILES[self.kind]} was fitted for other label tokens"
        return None


def kind_of(rule: Any) -> str:
    """What a rule answers with, by which its file is called."""
    return rule.kind


def recalibration_of(method: Recalibrator | None) -> dict[str, Any] | None:
    """Name and parameters of a recalibration, as they come back out of a file."""
    if method is None:
        return None
    state = json.loads(json.dumps(method.state()))
    return {"method": state["method"], "parameters": state["parameters"]}


def read_decisions(folder: str | Path) -> dict[str, StoredDecision]:
    """The rules that lie in a folder, by kind."""
    paths = {kind: Path(folder) / name for kind, name in DECISION_FILES.items()}
    return {kind: StoredDecision.read(path) for kind, path in paths.items() if path.is_file()}


def _told(recalibration: Mapping[str, Any] | None) -> str:
    if recalibration is None:
        return "none"
    scale = recalibration["parameters"].get("temperature")
    return f"T = {scale:.6g}" if isinstance(scale, (int, float)) else str(recalibration["method"])
