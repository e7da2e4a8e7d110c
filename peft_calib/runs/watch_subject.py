"""What `peft-calib watch` watches: a finished run, or an adapter that brings what a watch needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset
from peft.utils import CONFIG_NAME

from ..artefact import ARTEFACT_FILE, Artefact, place_of, read_artefact
from ..files import file_hash
from ..identity import folder_digest, read_config
from ..json_files import read_json
from ..predictor.inputs import text_names
from ..predictor.kinds.classes import NONE, Classes
from ..predictor.kinds.entities import Entities
from ..predictor.loading import answered_kind, folder_of
from ..provenance.splits import RowSet, read_split
from ..uncertainty_head.stored import file_names
from .deciding import TASKS
from .folder import RunFolder
from .loading import adapter_digests, head_hash, load_task, read_record
from .methods import prediction_variants
from .rows import TestData, load_test_rows
from .rows_to_decide import check_unseen_forms, text_forms
from .tasks import Task

PURPOSE = "held as the reference of a watch"
#: Where a row of a table stood, while rows that the run has seen are left out.
_PLACE = "__place"


class Subject(Protocol):
    """What is watched."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, in order."""

    def way(self, how: str | None) -> str:
        """The way of predicting that is watched; a `ValueError` for one that there is not."""

    def identity(self, way: str) -> dict[str, Any]:
        """All that a prediction hangs on: another of it, and the reference says nothing."""

    def reference(self, rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a table nothing was fitted on, and their labels."""


def subject_of(place: str | Path) -> Subject:
    """What lies there: a run, an adapter's folder, or an adapter on the Hub."""
    run = RunFolder(Path(place).absolute())
    if run.finished.is_file() or run.config.is_file():
        return _WatchedRun(run, _checked_task(run))
    found = folder_of(place)
    artefact = read_artefact(found)
    if artefact is None or artefact.classes is None:
        raise ValueError(
            f"{found} holds an adapter and no run, and a watch needs the names of its classes and its temperature, "
            f"which {ARTEFACT_FILE} would say: make it with Predictor.calibrate(rows) and Predictor.save(folder)"
        )
    artefact.check_belongs(found)
    kind = answered_kind(artefact, read_config(place_of(found, artefact.names[0])))
    if kind == Entities.name:
        raise ValueError(f"{found} answers with {kind}, and a watch is of rows that have one answer each")
    return _WatchedAdapter(found, artefact)


def _checked_task(folder: RunFolder) -> Task:
    task = load_task(folder)
    if task.config.task not in TASKS:
        raise ValueError(
            f"a watch is for rows with one answer each; a run of --task {task.config.task} answers with tokens. Watch "
            "whole texts or entities with peft_calib.calibration.Watch and input='confidence'"
        )
    return task


@dataclass(frozen=True)
class _WatchedRun:
    """A finished run."""

    folder: RunFolder
    task: Task

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def label_names(self) -> tuple[str, ...]:
        assert self.task.labels is not None
        return tuple(self.task.labels.names)

    def way(self, how: str | None) -> str:
        variants = prediction_variants(self.task.config)
        if how is None:
            return "sample" if "sample" in variants else "mean"
        if how not in variants:
            told = " or ".join(variants)
            raise ValueError(f"--how must be {told} for a run of {self.task.config.method}, got {how!r}")
        return how

    def identity(self, way: str) -> dict[str, Any]:
        temperature = read_json(self.folder.temperature).mapping(way).mapping("parameters").number("temperature")
        return _identity(
            adapter_digests(self.folder, self.task.config),
            temperature,
            head_hash(self.folder, self.task.config),
            way,
            self.label_names,
        )

    def reference(self, rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
        placed = rows.add_column(_PLACE, list(range(len(rows))))
        seen = TestData(source=placed, group_column=_PLACE)
        known = load_test_rows(self.task, read_record(self.folder, self.task), seen, PURPOSE)
        assert known.groups is not None
        return np.array(known.groups, np.int64), np.asarray(known.rows["label"][:])


@dataclass(frozen=True)
class _WatchedAdapter:
    """An adapter with its `predictor.json`."""

    path: Path
    artefact: Artefact

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.artefact.classes or ())

    def way(self, how: str | None) -> str:
        way = how or self.artefact.main_way or "mean"
        if way not in ("mean", "sample"):
            raise ValueError(f"--how must be mean or sample, got {how!r}")
        return way

    def identity(self, way: str) -> dict[str, Any]:
        state = self.artefact.ways.get(way)
        temperature = 1.0
        if state is not None:
            temperature = state.mapping("parameters").number("temperature", default=None)
            if temperature is None:
                told = state.text("method")
                raise ValueError(f"{self.path} is recalibrated by {told}, and a watch is for temperatures")
        places = {name: place_of(self.path, name) for name in self.artefact.names}
        beside = [self.path, *(places.values() if len(places) == 1 else ())]
        heads = [place / file_names("default")[1] for place in beside]
        head = next((file_hash(file) for file in heads if file.is_file()), None)
        digests = {name: folder_digest(place) for name, place in places.items()}
        return _identity(digests, temperature, head, way, self.label_names)

    def reference(self, rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
        inputs = self.artefact.inputs
        labels = Classes().targets(rows, inputs, self.label_names)
        if labels is None or NONE in labels:
            what = "no column of labels" if labels is None else f"{labels.count(NONE)} rows without one of the classes"
            raise ValueError(
                f"{name} has {what} ({', '.join(self.label_names[:8])}): the reference is of labelled rows"
            )
        if set(text_names(inputs, rows)) | set(inputs.choices_columns) <= set(rows.column_names):
            known = {one.kind: one for one in map(RowSet.of, [*text_forms(rows, inputs, inputs, name), rows])}
            check_unseen_forms(read_split(place_of(self.path, self.artefact.names[0])), known, name, PURPOSE)
        return np.arange(len(rows)), np.asarray(labels)


def no_test_rows(subject: Subject) -> ValueError | None:
    """Why what is watched has no evaluation to begin with; None for a run, which has."""
    if isinstance(subject, _WatchedRun):
        return None
    return ValueError(
        f"{subject.path} is no run, so it has no test rows of its own ({CONFIG_NAME} and no run.json): predict "
        "labelled rows with peft-calib predict, and begin with that file as --reference"
    )


def _identity(
    adapters: Mapping[str, str], temperature: float, head: str | None, way: str, names: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "adapters": dict(adapters),
        "temperature": temperature,
        "head": head,
        "how": way,
        "label_names": list(names),
    }
