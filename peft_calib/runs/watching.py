"""`peft-calib watch`: a run after deployment, held by its unlabelled predictions against rows that were labelled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration import Watch, WatchReport, prometheus
from ..calibration.watch.taken import FURTHER
from ..console import quiet
from ..files import file_hash, folder_lock, write_atomically
from ..json_files import Fields, read_json, sealed
from .evaluation import AFTER, evaluate_run
from .predictions import PredictedFile, predicted_files, read_predicted
from .sources import FileFormat, read_splits
from .watch_subject import Subject, no_test_rows, subject_of

STATE = "watch.json"
FORMAT_VERSION = 1
MEND = "Restore it from a copy, or begin anew with --overwrite"
#: Files that are remembered, so that none is counted twice.
MOST_FILES = 1000


@dataclass(frozen=True)
class Watched:
    """Where the watch of a run stands after a call; `skipped` files had been counted before."""

    state: Path
    report: WatchReport
    counted: int = 0
    skipped: tuple[str, ...] = ()
    started: str | None = None

    def lines(self) -> list[str]:
        """What a user should know of it."""
        lines = [] if self.started is None else [f"Started from {self.started}."]
        lines += [f"{name} has been counted before, and was left out." for name in self.skipped]
        lines += [f"{self.counted:,} rows counted."] if self.counted else []
        return [*lines, *self.report.to_markdown().splitlines(), f"Kept in {self.state}"]

    def to_dict(self) -> dict[str, Any]:
        """What `peft-calib watch --json` prints."""
        about = {"state": str(self.state), "rows_counted": self.counted, "files_skipped": list(self.skipped)}
        return {**about, **self.report.to_dict()}


def watch_run(
    run_dir: str | Path,
    predictions: str | Path | None = None,
    *,
    state: str | Path | None = None,
    data: Any = None,
    split: str | None = None,
    reference: str | Path | None = None,
    how: str | None = None,
    false_alarm: float | None = None,
    window: int | None = None,
    seed: int | None = None,
    prefix: str = "",
    metrics_file: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **reading: Any,
) -> Watched:
    """Count the predictions that a run has made since, and say what has become of it.

    The first call begins the watch: its reference is the run's evaluation (made now, or read back), or predictions of
    labelled rows. Rows that the run was trained or calibrated on are no reference. The state is written after every
    file, whole or not at all; a file that was counted is not counted again.

    Args:
        run_dir: Folder of a finished run; or an adapter's folder or Hub id, which begins with a `reference`.
        predictions: What `peft-calib predict` or `predict_to` wrote: a file, or a folder of shards.
        state: Where the watch is kept; `watch.json` in the run if not given.
        data: Labelled rows of the reference, as for `evaluate_run`; the run's own test rows if not given.
        split: Which split of them.
        reference: Instead: a file that `peft-calib predict` wrote of labelled rows, which also has the mutual
            information and, with an uncertainty head, P(error): those are then watched, too.
        how: Way of predicting, `"mean"` or `"sample"`; that which the method is made for if not given.
        false_alarm: Highest probability of a false alarm over the whole life of the watch; 0.01 if not given.
        window: Rows that estimates are of; 1,000 if not given.
        seed: Key of what is left to chance; 0 if not given.
        prefix: Of the names of the columns, as it was given to `predict`.
        metrics_file: Where to write the report for Prometheus's textfile collector.
        overwrite: Begin anew where a watch lies.
        progress: Show a bar, where an evaluation is made.
        reading: How tables are read: `subset`, `encoding`, `delimiter`, `drop_missing`.

    Returns:
        The report, and where the watch lies.

    Raises:
        FileNotFoundError: If there is no finished run or adapter, or no such predictions.
        ValueError: For predictions of another adapter, temperature or way, for tables that are none of predictions,
            for settings that a watch has begun without, or rows that the run has seen.
    """
    unknown = set(reading) - {"subset", "encoding", "delimiter", "drop_missing"}
    if unknown:
        raise TypeError(f"watch_run() has no argument {', '.join(sorted(unknown))}")
    subject = subject_of(run_dir)
    place = _place_of(state, subject, run_dir)
    form = FileFormat(reading.get("encoding"), reading.get("delimiter"))
    files = [] if predictions is None else predicted_files(Path(predictions))
    settings: dict[str, Any] = {"false_alarm": false_alarm, "window": window, "seed": seed}
    rows: dict[str, Any] = {
        "data": data,
        "split": split,
        **{name: reading.get(name) or None for name in ("subset", "drop_missing")},
    }
    about_start = {**settings, **rows, "reference": reference, "how": how}
    with folder_lock(place):
        started = None
        if place.is_file() and not overwrite:
            _refuse_settings(place, about_start)
            kept = _Kept.read(place)
            _check_same(subject, kept, place)
        else:
            way = subject.way(how)
            with quiet():
                start = _Start(subject, way, form, progress)
                watch = Watch(**{name: value for name, value in settings.items() if value is not None})
                if reference is None:
                    started = start.by_evaluation(watch, data, split, reading)
                elif any(value is not None for value in rows.values()):
                    told = [f"--{name.replace('_', '-')}" for name, value in rows.items() if value is not None]
                    raise ValueError(f"--reference names the labelled rows: leave out {' and '.join(told)}")
                else:
                    started = start.by_file(watch, Path(reference), prefix)
            kept = _Kept(watch, subject.identity(way), [])
            kept.write(place)
        counted, skipped = _count(kept, files, place, subject.label_names, prefix, form)
    report = kept.watch.report()
    if metrics_file is not None:
        write_atomically(metrics_file, prometheus(report, labels={"run": subject.path.name}))
    return Watched(place, report, counted, tuple(skipped), started)


def _place_of(state: str | Path | None, subject: Subject, asked: str | Path) -> Path:
    if state is not None:
        return Path(state)
    if not Path(asked).is_dir():
        raise ValueError(f"{asked} lies on the Hub, where no watch is kept: say where with --state")
    return subject.path / STATE


def _refuse_settings(place: Path, given: dict[str, Any]) -> None:
    """What is settled when a watch begins cannot be said later."""
    said = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if said:
        raise ValueError(
            f"{place} holds a watch that has begun, and {', '.join(said)} was settled then: leave it out, or begin "
            "anew with --overwrite"
        )


# ------------------------------------------------------------------------------------------------------- what is kept


@dataclass
class _Kept:
    """A watch, what it is of, and which files have been counted."""

    watch: Watch
    of: dict[str, Any]
    files: list[str]

    def write(self, place: Path) -> None:
        content = {"format_version": FORMAT_VERSION, "of": self.of, "files": self.files, "watch": self.watch.state()}
        write_atomically(place, json.dumps(sealed(content), allow_nan=False) + "\n")

    @classmethod
    def read(cls, place: Path) -> _Kept:
        fields = read_json(place, MEND)
        if not fields.has_version(FORMAT_VERSION):
            raise fields.wrong("format_version", str(FORMAT_VERSION))
        watch = fields.mapping("watch")
        state = Fields(watch.content, f"{place}: watch", MEND)
        kept = cls(Watch.from_state(state), dict(fields.mapping("of").content), fields.listing("files", str))
        fields.check_seal("the reference")
        return kept


def _check_same(subject: Subject, kept: _Kept, place: Path) -> None:
    now = subject.identity(str(kept.of.get("how")))
    differing = [name for name in now if kept.of.get(name) != now[name]]
    if "head" in differing and "error_probability" not in kept.watch.signals:
        differing.remove("head")  # nothing that is watched hangs on it
    if differing:
        raise ValueError(
            f"{place} watches another {', '.join(differing)} than {subject.path} has now, so its reference says "
            "nothing of it. Begin anew with --overwrite"
        )


# ----------------------------------------------------------------------------------------------------- the reference


@dataclass(frozen=True)
class _Start:
    """Where a watch begins."""

    subject: Subject
    way: str
    form: FileFormat
    progress: bool

    def by_evaluation(self, watch: Watch, data: Any, split: str | None, reading: dict[str, Any]) -> str:
        """On the rows of an evaluation, which refuses those that the run has seen."""
        missing = no_test_rows(self.subject)
        if missing is not None:
            raise missing
        found = evaluate_run(self.subject.path, data=data, split=split, progress=self.progress, **reading)
        watch.start(found.probabilities(self.way, AFTER), found.items["labels"])
        return f"the evaluation on {found.content['data']}, {len(found.items['labels']):,} rows"

    def by_file(self, watch: Watch, path: Path, prefix: str) -> str:
        """On predictions of labelled rows."""
        rows, names = next(iter(read_splits(path, form=self.form).values())), self.subject.label_names
        found = read_predicted(rows, str(path), names, prefix)
        kept, labels = self.subject.reference(rows, str(path))
        # the mean adapter has one function, whose draws cannot disagree
        further = {name: values[kept] for name, values in found.further.items() if name in self._watched()}
        about: dict[str, Any] = {"num_classes": len(names), **further}
        watch.start(found.confidence[kept], labels, input="confidence", predicted=found.predicted[kept], **about)
        left_out = len(rows) - len(kept)
        left = f", {left_out} that the run has seen left out" if left_out else ""
        return f"{path}, {len(kept):,} rows{left}"

    def _watched(self) -> tuple[str, ...]:
        return tuple(FURTHER) if self.way == "sample" else ("error_probability",)


# ------------------------------------------------------------------------------------------------- what has come since


def _count(
    kept: _Kept, files: list[PredictedFile], place: Path, names: Sequence[str], prefix: str, form: FileFormat
) -> tuple[int, list[str]]:
    """Count files that were not counted yet, and write the state after each."""
    counted, skipped = 0, []
    for file in files:
        file.check_made_by(kept.of)
        digest = file_hash(file.path)[:16]
        if digest in kept.files:
            skipped.append(file.path.name)
            continue
        found = read_predicted(file.rows(form), str(file.path), names, prefix)
        further = {name: found.further.get(name) for name in kept.watch.signals if name in FURTHER}
        lacking = [f"{prefix}{name}" for name, values in further.items() if values is None]
        if lacking:
            raise ValueError(f"{file.path} has no column {lacking[0]}, which the reference of the watch had")
        kept.watch.update(found.confidence, input="confidence", predicted=found.predicted, **further)
        kept.files = [*kept.files, digest][-MOST_FILES:]
        kept.write(place)
        counted += len(found.confidence)
    return counted, skipped
