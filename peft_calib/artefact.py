"""`predictor.json`: what a prediction needs of an adapter and its own files do not say, in one file beside it.

The names of the classes, the tokens that stand for them, how rows become inputs, a recalibration for each way of
predicting, and which adapter and base model all that holds for. Earlier versions wrote `classes.json` and
`recalibration.json` instead, and in a run all of it stood in the run's own files; these are read where there is no
`predictor.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .files import write_atomically
from .identity import belongs_to_folder, folder_digest
from .json_files import Fields, inside, read_json, sealed

ARTEFACT_FILE = "predictor.json"
#: Of classes, and of other kinds of answer.
FORMAT_VERSION, OTHER_VERSION = 1, 2
#: What earlier versions wrote.
CLASSES_FILE, RECALIBRATION_FILE = "classes.json", "recalibration.json"
#: Rules that decide over its predictions, fitted on rows of their own, by what they answer with.
DECISION_FILES = {kind: f"decision.{kind}.json" for kind in ("threshold", "sets", "labels", "interval")}
#: What an adapter answers with, and what transformers calls such a head: one of some classes, any of some labels, or a
#: number.
KINDS = {"classes": None, "labels": "multi_label_classification", "numbers": "regression"}
#: What a run says of itself: its settings, that it is finished, its temperatures.
RUN_CONFIG, RUN_FINISHED, RUN_TEMPERATURE = "config.json", "run.json", "temperature.json"
#: Ways of predicting that have a recalibration of their own; `"late"` gives the draws of `"sample"` and has theirs.
WAYS = ("mean", "sample")
#: The name of an adapter that lies in the folder itself.
HERE = "."
MEND = "Restore it from a copy, or train again"


@dataclass(frozen=True)
class Inputs:
    """How rows become what the model reads; None where whoever trained has not said.

    Attributes:
        text_columns: Columns of the texts, two for pairs; the question's for a multiple-choice prompt.
        label_column: Column of the label, where rows have one.
        max_length: Tokens that a row is cut to.
        batch_size: Rows of a forward.
        choices_columns: Columns of the choices of a multiple-choice prompt.
        prompt: That prompt, with `{question}` and `{choices}`.
        label_columns: Columns of zeros and ones, one for each of several labels.
        label_separator: What stands between several labels in a column of texts.
    """

    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    max_length: int | None = None
    batch_size: int | None = None
    choices_columns: tuple[str, ...] = ()
    prompt: str | None = None
    label_columns: tuple[str, ...] = ()
    label_separator: str | None = None

    @classmethod
    def from_fields(cls, fields: Fields) -> Inputs:
        """The inverse of `asdict`, checked."""
        texts = fields.listing("text_columns", str, None)
        if texts is not None and len(texts) not in (1, 2):
            raise fields.wrong("text_columns", "null, or a list of one or two names")
        return cls(
            text_columns=None if texts is None else tuple(texts),
            label_column=fields.text("label_column", default=None),
            max_length=fields.integer("max_length", least=1, default=None),
            batch_size=fields.integer("batch_size", least=1, default=None),
            choices_columns=tuple(fields.listing("choices_columns", str)),
            prompt=fields.text("prompt", default=None),
            label_columns=tuple(fields.listing("label_columns", str, [])),
            label_separator=fields.text("label_separator", default=None),
        )


@dataclass(frozen=True)
class Artefact:
    """The content of `predictor.json`; base model and task stand in `adapter_config.json`.

    Attributes:
        classes: Names of the classes, in order; of labels theirs, and of a number its one.
        label_tokens: Ids of the tokens that stand for them, where a language model answers.
        inputs: How rows become inputs.
        seed: What was made fresh with the base model, and not trained since, followed this seed.
        base: Fingerprint of the base model, see `peft_calib.base_models.base_fingerprint`.
        adapters: Digest of each adapter, by its folder (`"."`: this one); the members of an ensemble.
        ways: A fitted recalibration, with `num_samples` and `seed` of the prediction it was fitted to, for each way.
        kind: What it answers with, one of `KINDS`.
        target: Of a number: offset and scale of what the head says, which was trained on standardised targets.
    """

    classes: tuple[str, ...] | None = None
    label_tokens: tuple[int, ...] | None = None
    inputs: Inputs = field(default_factory=Inputs)
    seed: int | None = None
    base: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    ways: Mapping[str, Fields] = field(default_factory=dict)
    kind: str = "classes"
    target: tuple[float, float] | None = None

    def with_way(self, how: str, num_samples: int, seed: int, state: Mapping[str, Any], **more: Any) -> Artefact:
        """The same with the recalibration of one way of predicting: its `state`, and what else was chosen with it."""
        entry = {"num_samples": num_samples, "seed": seed, **state, **more}
        return replace(self, ways={**self.ways, how: Fields(entry, ARTEFACT_FILE, MEND)})

    def exported(self, how: str, digests: Mapping[str, str], num_samples: int = 1) -> Artefact:
        """The same for plain LoRAs that were written of the adapter: draws, or its mean.

        Args:
            how: The way of predicting that they stand for, whose recalibration they keep.
            digests: Digest of each, by its folder.
            num_samples: How many draws they are; with another number than T was fitted with, that is kept beside it.
        """
        ways = {}
        if how in self.ways:
            entry = dict(self.ways[how].content)
            fitted = self.ways[how].integer("num_samples", least=1)
            entry |= {"num_samples": num_samples, "fitted_num_samples": fitted} if fitted != num_samples else {}
            ways[how] = Fields(entry, ARTEFACT_FILE, MEND)
        return replace(self, adapters=dict(digests), ways=ways)

    def exported_draws(self, folder: Path, names: Sequence[str], mean: str | None = None) -> None:
        """Write it into a folder of draws, and beside the mean there."""
        self.exported("sample", {name: folder_digest(folder / name) for name in names}, len(names)).write(folder)
        if mean is not None:
            self.exported("mean", {HERE: folder_digest(folder / mean)}).write(folder / mean)

    def with_temperatures(self, temperatures: Fields, adapters: Mapping[str, str]) -> Artefact:
        """The same with those of a run's file, fitted for the adapters that it names, or else for those given."""
        found = self
        for how in temperatures:
            fields = temperatures.mapping(how)
            told = fields.mapping("adapters", None)
            found = replace(found, adapters=dict(adapters if told is None else told.content))
            if "method" in fields:  # over a vocabulary there is a number, and no method for classes
                state = {n: value for n, value in fields.content.items() if n not in ("num_samples", "adapters")}
                found = found.with_way(how, fields.integer("num_samples", least=1), 0, state)
        return found

    def text(self) -> str:
        """The file."""
        # earlier releases would take labels or a number for classes, so they are not to read them
        other = {} if self.kind == "classes" else {"kind": self.kind, "target": self.target}
        content = {
            "format_version": OTHER_VERSION if other else FORMAT_VERSION,
            **other,
            "classes": self.classes,
            "label_tokens": self.label_tokens,
            "inputs": asdict(self.inputs),
            "seed": self.seed,
            "base": self.base,
            "adapters": dict(self.adapters),
            "ways": {how: dict(fields.content) for how, fields in self.ways.items()},
        }
        return json.dumps(sealed(content), indent=1, allow_nan=False) + "\n"

    def write(self, folder: str | Path) -> None:
        """Write the file into a folder, whole or not at all."""
        write_atomically(Path(folder) / ARTEFACT_FILE, self.text())

    @classmethod
    def from_fields(cls, fields: Fields) -> Artefact:
        """The inverse of `text`, checked; a recalibration itself is read by whoever applies it."""
        kind = fields.text("kind", among=tuple(KINDS), default="classes")
        version = FORMAT_VERSION if kind == "classes" else OTHER_VERSION
        if not fields.has_version(version):
            raise fields.wrong("format_version", f"{version}, which this release reads")
        names = fields.listing("classes", str, None)
        if names is not None and not (_different(names) or (len(names) == 1 and kind != "classes")):
            raise fields.wrong("classes", "null, or a list of at least two different texts")
        target = None if fields.get("target", None) is None else tuple(map(float, fields.array("target", (2,))))
        if (kind == "numbers") != (target is not None) or (target is not None and target[1] <= 0):
            raise fields.wrong("target", "offset and scale (above 0) of a number, and null for anything else")
        tokens = fields.listing("label_tokens", int, None)
        if tokens is not None and (not _different(tokens) or len(tokens) != len(names or tokens)):
            raise fields.wrong("label_tokens", "null, or a list of different token ids, one for each class")
        adapters, ways = fields.mapping("adapters"), fields.mapping("ways")
        for how in ways:
            ways.mapping(how).integer("num_samples", least=1)
            if how not in WAYS:
                raise fields.wrong("ways", f"recalibrations of {' and '.join(WAYS)} only")
        fields.check_seal()
        return cls(
            classes=None if names is None else tuple(names),
            label_tokens=None if tokens is None else tuple(tokens),
            inputs=Inputs.from_fields(fields.mapping("inputs")),
            seed=fields.integer("seed", least=0, default=None),
            base=fields.text("base", default=None),
            adapters={name: adapters.text(name) for name in adapters},
            ways={how: ways.mapping(how) for how in ways},
            kind=kind,
            target=target,
        )

    @property
    def main_way(self) -> str | None:
        """The way of predicting that was calibrated: with draws where these were; None where nothing was."""
        return "sample" if "sample" in self.ways else next(iter(self.ways), None)

    @property
    def names(self) -> tuple[str, ...]:
        """The folders of the adapters; this one where nothing is said."""
        return tuple(self.adapters) or (HERE,)

    def check_belongs(self, folder: str | Path) -> None:
        """Raise `ValueError` unless the adapters that lie there are those that all this holds for."""
        for name, digest in self.adapters.items():
            if not belongs_to_folder(digest, place_of(folder, name)):
                raise ValueError(
                    f"{self._told_by(folder)} was {'fitted' if self.ways else 'made'} for other weights, or another "
                    f"configuration, than the adapter beside it ({name}), which has been trained on, edited or "
                    "replaced since. Fit it again; with a BestCalibrationCallback, list the RecalibrationCallback "
                    "after it."
                )

    def _told_by(self, folder: str | Path) -> Path:
        told = (Path(folder) / name for name in (ARTEFACT_FILE, RECALIBRATION_FILE, RUN_TEMPERATURE))
        return next((file for file in told if file.is_file()), Path(folder))


def place_of(folder: str | Path, name: str) -> Path:
    """Where an adapter that an artefact names lies: in its own folder, or inside it."""
    return Path(folder) if name == HERE else inside(folder, name, str(Path(folder) / ARTEFACT_FILE))


def read_artefact(folder: str | Path) -> Artefact | None:
    """What lies beside an adapter, also in the files of earlier versions; None where there is nothing.

    Args:
        folder: Of a saved adapter, or of a run.

    Returns:
        The artefact. That its adapters are those that lie there is the caller's to check.

    Raises:
        ValueError: If a file is damaged; the message names it, the field and how to mend it.
    """
    folder = Path(folder)
    if (folder / ARTEFACT_FILE).is_file():
        return Artefact.from_fields(read_json(folder / ARTEFACT_FILE, MEND))
    if is_earlier_run(folder):
        return _of_run(folder)
    found = Artefact()
    if (folder / CLASSES_FILE).is_file():
        found = replace(found, classes=read_old_names(folder / CLASSES_FILE))
    if (folder / RECALIBRATION_FILE).is_file():
        state = read_json(folder / RECALIBRATION_FILE, "Fit it again on a calibration split")
        adapters = {HERE: state.text("adapter", default="")}
        found = replace(found, adapters=adapters, ways={state.text("how", among=WAYS, default="mean"): state})
    return None if found == Artefact() else found


def is_earlier_run(folder: str | Path) -> bool:
    """Whether a folder is a finished run of a version that wrote no `predictor.json`."""
    folder = Path(folder)
    written = all((folder / name).is_file() for name in (RUN_CONFIG, RUN_FINISHED))
    return written and not any(folder.glob(ARTEFACT_FILE)) and not any(folder.glob(f"*/{ARTEFACT_FILE}"))


def _of_run(folder: Path) -> Artefact:
    """What such a run says in its own files."""
    resolved = read_json(folder / RUN_CONFIG, MEND)
    if not resolved.has_version(FORMAT_VERSION):
        raise resolved.wrong("format_version", f"{FORMAT_VERSION}, which this release reads")
    settings, labels = resolved.mapping("settings"), resolved.mapping("labels", None)
    choice = settings.text("task") == "multiple-choice"
    texts = [settings.text("question_column")] if choice else settings.listing("text_column", str)
    inputs = Inputs(
        text_columns=tuple(texts),
        label_column=settings.text("label_column", default=None),
        max_length=settings.integer("max_length", least=1, default=None),
        batch_size=2 * settings.integer("batch_size", least=1),
        choices_columns=tuple(settings.listing("choices_column", str)) if choice else (),
        prompt=settings.text("prompt") if choice else None,
    )
    names = None if labels is None else tuple(labels.listing("names", str))
    adapters = read_json(folder / RUN_FINISHED, MEND).listing("adapters", str)
    digests = {name: folder_digest(inside(folder, name, str(folder / RUN_FINISHED))) for name in adapters}
    found = Artefact(classes=names, inputs=inputs, seed=settings.integer("seed", least=0), adapters=digests)
    if not (folder / RUN_TEMPERATURE).is_file():
        return found
    return found.with_temperatures(read_json(folder / RUN_TEMPERATURE, MEND), digests)


def read_old_names(file: Path) -> tuple[str, ...]:
    """The names of the classes in a `classes.json`."""
    fields = read_json(file, "Restore it, or pass id2label")
    names = fields.listing("names", str)
    if not names or len(set(names)) < len(names):
        raise fields.wrong("names", "a list of different texts")
    return tuple(names)


def _different(entries: list) -> bool:
    return len(entries) > 1 and len(set(entries)) == len(entries)
