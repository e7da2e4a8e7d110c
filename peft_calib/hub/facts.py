"""What a card says, as plain values: who reads a card cannot ask back, so each number comes with what it rests on."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artefact import Artefact, read_artefact
from ..calibration import CalibrationReport
from ..calibration.recalibrate import load_state
from ..calibration.report.sectioned import SectionedReport
from ..calibration.scores.kinds import PANELS, Panel
from ..identity import belongs_to_folder, folder_digest, read_config
from ..predictor.kinds.entities import Entities, marks_entities
from ..provenance.splits import SplitRecord, read_split
from ..provenance.stored_decision import StoredDecision, read_decisions
from ..uncertainty_head import UncertaintyHead
from ..uncertainty_head.stored import STEM

#: What decides what the Hub shows a model as, by PEFT's task.
PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
#: A report that a card can be written of.
Report = CalibrationReport | SectionedReport
#: Fields of a `Subject` that say nothing without its data set.
OF_DATASET = ("dataset_config", "dataset_revision", "benchmark_task")
#: Packages whose versions a card names.
PACKAGES = ("peft-calib", "peft", "transformers", "torch")


@dataclass(frozen=True)
class Subject:
    """What only whoever trained can say of an adapter.

    Attributes:
        base_model: Hub id of the base model, where the adapter names a folder of its own machine.
        dataset: Hub id of the data it was measured on, or any name for them. Of several sets of rows these are the
            ones that are called so, else the first.
        dataset_config: Configuration of that data set.
        dataset_revision: Its commit.
        benchmark_task: Task id of a Hub benchmark; the result is then written to `.eval_results/` too.
        license: Licence of the adapter, by the Hub's identifier.
        language: Language codes.
        training_datasets: Hub ids of the data it was trained on.
        examples: Texts for the widget.
        intended_use: What it predicts and for whom, in words.
    """

    base_model: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    benchmark_task: str | None = None
    license: str | None = None
    language: Sequence[str] = ()
    training_datasets: Sequence[str] = ()
    examples: Sequence[str] = ()
    intended_use: str | None = None

    def __post_init__(self) -> None:
        for name in ("language", "training_datasets", "examples"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(text, str) for text in value):
                raise TypeError(f"{name} is a list of texts, got {value!r}. Write {name}=[...].")
        told = [name for name in OF_DATASET if getattr(self, name) is not None]
        if told and self.dataset is None:
            raise ValueError(
                f"{told[0]} (--{told[0].replace('_', '-')}) is told of a data set: say which one with dataset "
                "(--dataset)."
            )


@dataclass(frozen=True)
class Measurement:
    """What was measured of one way of predicting on one set of rows.

    Attributes:
        way: In words, such as `"mean adapter"` or `"8 draws"`.
        kind: Of answer: `"classes"`, `"labels"`, `"numbers"`, `"entities"` or `"texts"`.
        split: Name of the rows, if they have one.
        before: Report before the recalibration, as its `to_dict` gives it.
        after: Report after it; the same where there is none.
        temperature: Of the recalibration; 1 where none was applied, None where nobody said.
        recalibration: In a few words, where it is no single temperature.
        rows_digest: Fingerprint of the rows.
        seed: Of draws and intervals.
        verdict: The report's sentence on its ECE.
        decisions: What the decision rules beside the adapter reach on these rows, as Markdown by kind.
        pictures: The report that pictures are drawn from, or None.
        rows: Rows, where the reports count their words or sentences; None where they count rows.
    """

    way: str
    split: str | None
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    temperature: float | None = None
    recalibration: str | None = None
    rows_digest: str | None = None
    seed: int | None = None
    verdict: str | None = None
    decisions: Mapping[str, str] = field(default_factory=dict)
    pictures: Report | None = field(default=None, repr=False)
    kind: str = "classes"
    rows: int | None = None

    @classmethod
    def of(cls, after: Report, before: Report | None = None, **about: Any) -> Measurement:
        """Of reports at hand: of classes, labels, numbers or entities."""
        found = after.to_dict()
        values = {"way": "as predicted", "split": None, "verdict": after.verdict(), "pictures": after, **about}
        return cls(before=found if before is None else before.to_dict(), after=found, kind=after.kind, **values)

    def __post_init__(self) -> None:
        rows = [_num_rows(of) for of in (self.before, self.after)]
        if rows[0] != rows[1]:
            raise ValueError(
                f"The report before the recalibration is of {rows[0]} rows and the one after it of {rows[1]}: measure "
                "both on the same rows."
            )

    @property
    def num_rows(self) -> int:
        """Rows it rests on."""
        return _num_rows(self.after) if self.rows is None else self.rows

    def is_of_rows(self, other: Measurement) -> bool:
        """Whether it is of the same rows."""
        return (self.split, self.rows_digest) == (other.split, other.rows_digest)

    @property
    def panel(self) -> Panel:
        """What there is to say of its kind of answer."""
        return PANELS[self.kind]

    @property
    def is_recalibrated(self) -> bool:
        """Whether there is a before and an after."""
        return any(self.number(key, self.before) != self.number(key) for key in self.panel.shown)

    @property
    def recalibrated(self) -> str:
        """What was done to the probabilities, in a few words; nothing where nobody said."""
        if self.recalibration is not None:
            return self.recalibration
        if self.temperature is None:
            return ""
        return "no temperature" if self.temperature == 1 else f"temperature {self.temperature:.4g}"

    def number(self, key: str, of: Mapping[str, Any] | None = None) -> float | None:
        """A score as a plain float; None where it is not defined."""
        value = (self.after if of is None else of).get(key)
        return None if value is None or not math.isfinite(float(value)) else float(value)

    def scores(self) -> dict[str, float]:
        """All scores after the recalibration that are defined."""
        found = {key: self.number(key) for key in self.panel.meanings}
        return {key: value for key, value in found.items() if value is not None}


def _num_rows(report: Mapping[str, Any]) -> int:
    """Rows of a report; of entities these are sentences."""
    settings = report["settings"]
    return int(settings["num_rows"] if "num_rows" in settings else settings["num_sentences"])


@dataclass(frozen=True)
class CardFacts:
    """All that a card says.

    Attributes:
        name: Of the model, for people.
        method: PEFT type.
        task: PEFT task type, or None.
        base_model: Hub id (or folder) of the base model.
        base_revision: Its commit, if the adapter names one.
        artefact: What `predictor.json` says.
        digest: Of the adapter.
        splits: What the adapter was trained and calibrated on.
        measured: What was measured of it.
        subject: What only whoever trained can say.
        head_report: What the uncertainty head beside the adapter says of itself, or None.
        decisions: The decision rules beside the adapter, by kind.
        has_lora: Whether the mean lies in `lora/` as a plain LoRA.
        versions: Of the packages that wrote this.
    """

    name: str
    method: str
    task: str | None
    base_model: str
    base_revision: str | None
    artefact: Artefact
    digest: str
    splits: SplitRecord
    measured: tuple[Measurement, ...]
    subject: Subject
    has_lora: bool
    head_report: str | None
    versions: Mapping[str, str]
    decisions: Mapping[str, StoredDecision] = field(default_factory=dict)

    @property
    def pipeline(self) -> str | None:
        """What the Hub shows it as; answers of a language model are classes, too."""
        answers = self.task == "CAUSAL_LM" and self.artefact.label_tokens
        return "text-classification" if answers else PIPELINES.get(self.task or "")

    @property
    def answers(self) -> str:
        """What a predictor of it answers with: a kind of answer, or `"tags"` of words that mark no entities."""
        if self.task != "TOKEN_CLS" or self.artefact.kind != "classes":
            return self.artefact.kind
        return Entities.name if marks_entities(self.artefact.classes or ()) else "tags"

    @property
    def needs_us(self) -> bool:
        """Whether stock PEFT cannot load the adapter itself."""
        return self.method != "LORA"


def leading(measured: Sequence[Measurement]) -> dict[str, Measurement]:
    """What pictures and a leaderboard tell, by kind of answer: the last way of predicting on the first rows.

    The first rows are those of a report that was given, else the run's own test rows.
    """
    firsts: dict[str, Measurement] = {}
    for one in measured:
        firsts.setdefault(one.kind, one)
    return {one.kind: one for one in measured if one.is_of_rows(firsts[one.kind])}


def of_dataset(measured: Sequence[Measurement], subject: Subject) -> list[Measurement]:
    """What was measured on the data set of a subject: on rows that are called so, else on the first rows."""
    if subject.dataset is None:
        return []
    for name in (f"{subject.dataset}, {subject.dataset_config}", subject.dataset):
        named = [one for one in measured if one.split == name or (one.split or "").startswith(f"{name} (")]
        if named:
            return named
    return [one for one in measured if one.is_of_rows(measured[0])]


def facts_of(folder: Path, name: str, subject: Subject, measured: Sequence[Measurement], has_lora: bool) -> CardFacts:
    """Read what a card says from an adapter's folder.

    Raises:
        ValueError: If the base model is a folder that nobody else has, or a recalibration, an uncertainty head
            or a decision rule there is of another adapter.
    """
    config = read_config(folder)
    artefact = read_artefact(folder) or Artefact()
    if artefact.ways and not all(belongs_to_folder(digest, folder) for digest in artefact.adapters.values()):
        raise ValueError(
            "The recalibration beside the adapter was fitted for other weights than these. Fit it again on a "
            "calibration split, or take the file away."
        )
    if getattr(config, "anchor_adapters", None):
        raise ValueError(
            "The curve's anchors lie in folders of their own, so the adapter is not complete by itself. Save it with "
            "save_anchors=True in its configuration."
        )
    heads = {place.stem.removeprefix(STEM).removeprefix(".") for place in folder.glob(f"{STEM}*.json")}
    found = {head: UncertaintyHead.from_pretrained(folder, name=head or "default") for head in heads}
    default = found.get("")
    return CardFacts(
        name=name,
        method=str(getattr(config.peft_type, "value", config.peft_type)),
        task=None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type)),
        base_model=base_of(config.base_model_name_or_path, subject),
        base_revision=config.revision,
        artefact=artefact,
        digest=folder_digest(folder),
        splits=read_split(folder),
        measured=tuple(measured),
        subject=subject,
        has_lora=has_lora,
        head_report=None if default is None else str(default.report),
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
        decisions=_decisions(folder, artefact, default),
    )


def _decisions(folder: Path, artefact: Artefact, head: UncertaintyHead | None) -> dict[str, StoredDecision]:
    """The decision rules in an adapter's folder, held against what lies there."""
    found = read_decisions(folder)
    methods = {how: load_state(state) for how, state in artefact.ways.items()}
    for one in found.values():
        other = one.unlike([folder], methods.get(one.to.how), None if head is None else head.stored.digest)
        if other is not None:
            raise ValueError(one.refused(folder, other))
    return found


def base_of(found: str | None, subject: Subject) -> str:
    """The name of the base model that others can load."""
    if subject.base_model is not None:
        return subject.base_model
    if not found or Path(found).exists() or Path(found).is_absolute() or found.count("/") > 1:
        raise ValueError(
            f"The adapter names its base model as {found!r}, which nobody else can load. Say which model "
            "of the Hub that is: base_model='organisation/name' (--base-model)."
        )
    return found
