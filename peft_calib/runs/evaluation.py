"""`peft-calib evaluate`: what a finished run is worth on rows that it has not seen."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import softmax

from ..calibration import calibration_report
from ..calibration.fingerprint import SplitFingerprint
from ..console import quiet
from ..files import file_hash, replace_folder, write_atomically
from ..json_files import without_nan
from ..prediction import Prediction
from ..predictor.answer import logits_of
from .about import class_names, told_of
from .answers import AFTER, BEFORE, answers_report
from .baseline import MostFrequent
from .decided import DecidableClasses, DecidableEntities, RunDecisions, reached_in
from .entities import entities_in, words_lost
from .error_head import head_report, load_head, read_head
from .folder import RunFolder, read_fields, read_json, write_json
from .loading import FinishedRun, load_task, read_record, run_identity
from .methods import most_draws, prediction_variants
from .outside import outside_report
from .processes import processes
from .rows import TestData, TestRows, load_outside_rows, load_test_rows
from .settings import RunConfig, check_metrics
from .sources import FileFormat
from .tables import evaluation_markdown
from .text_scores import text_report

REPORT, ROWS = "report.json", "rows.safetensors"


@dataclass(frozen=True)
class Evaluation:
    """Predictions of test rows and the reports made of them; `content` is that of its `report.json`."""

    folder: Path
    content: dict[str, Any]

    @property
    def main_variant(self) -> str:
        """The way of predicting that the method is made for: draws where it has them."""
        return "sample" if "sample" in self.content["variants"] else "mean"

    def probabilities(self, variant: str, stage: str) -> np.ndarray:
        """Probabilities of a variant before or after its temperature, (N, C)."""
        temperature = self.content["variants"][variant]["temperature"] if stage == AFTER else 1.0
        return softmax(self.arrays[f"log_probabilities.{variant}"] / temperature, axis=1)

    @property
    def items(self) -> dict[str, np.ndarray]:
        """`keys` (hash of an item's row), `positions` within it, and `labels`, one an item."""
        return {name: self.arrays[name] for name in ("keys", "positions", "labels")}

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The stored arrays; empty for a run without classes."""
        place = self.folder / ROWS
        if not place.is_file():
            if "perplexity" in self.content["variants"][self.main_variant][BEFORE]:
                return {}
            raise ValueError(f"{place} is missing, which holds the predictions of each row. Evaluate the run again.")
        try:
            return load_file(place)
        except SafetensorError as error:
            raise ValueError(f"{place} is damaged ({error}). Evaluate the run again.") from error


def evaluate_run(
    run_dir: str | Path,
    *,
    data: Any = None,
    subset: str | None = None,
    split: str | None = None,
    num_samples: int | None = None,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    encoding: str | None = None,
    delimiter: str | None = None,
    drop_missing: bool = False,
    outside: Any = None,
    group_column: str | None = None,
) -> Evaluation:
    """Measure a finished run on rows that it was neither trained nor calibrated on.

    A few rows that it has seen by chance (5 % at most) are left out and counted; more are refused. Written to
    `evaluation/<rows>` in the run: `report.json`, `report.md`, `report.html`, and the probabilities. An evaluation of
    the same rows in the same way is read back instead of made again, as long as the run's adapters, settings and
    temperatures are those that it was made of.

    Args:
        run_dir: Folder of the run.
        data: Rows to test on, a path, a Hub id or a data frame; the run's own test rows if not given.
        subset: Configuration name of a Hub data set.
        split: Which split.
        num_samples: Draws of a stochastic prediction; as many as the run's temperature was fitted with if not given.
        metrics: Scores in the table; those of the run's settings if not given.
        seed: Key of the draws and of the intervals.
        progress: Show a bar.
        encoding: Of text files that are not UTF-8.
        delimiter: Of CSV files whose delimiter cannot be found from their rows.
        drop_missing: Leave out rows without a text or a label.
        outside: Rows of other origin, without labels or with any: how sure the run is of them, and how well its
            confidence, and what its draws disagree on, tell them from the test rows.
        group_column: A column of the test rows that says which group each belongs to: scores of every group, and
            what a decision rule reaches in it.

    Returns:
        The evaluation.

    Raises:
        FileNotFoundError: If there is no finished run.
        ValueError: For unknown metrics, missing or empty rows, or rows that the run has seen.
    """
    folder = RunFolder(Path(run_dir).absolute())
    task = load_task(folder)
    if metrics is not None:
        check_metrics(metrics, task.config.task)
    if group_column is not None and (task.kind != "classes" or task.labels is None):
        raise ValueError(
            f"--group-column is for runs that answer with a class or with tags; of a {task.config.task} run evaluate "
            "the rows of each group by themselves"
        )
    variants = _variants(task.config, num_samples)
    where = TestData(data, subset, split, FileFormat(encoding, delimiter), drop_missing, group_column)
    with quiet():
        rows = load_test_rows(task, read_record(folder, task), where)
        other = None if outside is None else load_outside_rows(task, outside, where.form, drop_missing)
        place = folder.path / "evaluation" / _name(rows, variants, seed, other)
        identity = run_identity(folder, task.config)
        found = _made_before(place, identity, rows)
        if found is not None:
            return _shown(found, list(metrics or task.config.metrics))
        made = _measured(FinishedRun.assemble(folder, task), rows, other, variants, seed, progress)
    made.content.update(metrics=list(metrics or task.config.metrics), identity=identity)
    _write(place, made)
    _warn_of_another_adapter(folder, identity)
    return Evaluation(place, made.content)


def _made_before(place: Path, identity: dict[str, Any], rows: TestRows) -> Evaluation | None:
    """An evaluation that lies there whole and was made of the very adapters, settings and temperatures of now.

    Of the same rows, and of as many that were left out, which it tells.
    """
    if not (place / REPORT).is_file():
        return None
    content = read_json(place / REPORT)
    if content.get("identity") != identity or not isinstance(content.get("variants"), dict):
        return None
    if (content.get("rows_left_out"), content.get("rows_without_value", 0)) != (rows.left_out, rows.without_value):
        return None
    known = content.get("rows_file")
    if known is not None and (not (place / ROWS).is_file() or file_hash(place / ROWS) != known):
        return None
    fields = read_fields(place / REPORT)
    fields.listing("metrics", str)
    for variant in content["variants"] if "kind" not in content else ():
        fields.mapping("variants").mapping(variant).number("temperature", above=0)
    return Evaluation(place, content)


def _shown(found: Evaluation, metrics: list[str]) -> Evaluation:
    """An evaluation that was read back, whose table has the scores of now, and not those of when it was made."""
    content = {**found.content, "metrics": metrics}
    processes().wait_for_everyone()  # every process has read before one writes
    if processes().is_main_process and content != found.content:
        write_atomically(found.folder / "report.md", evaluation_markdown(content, metrics))
        write_json(found.folder / REPORT, content)
    return Evaluation(found.folder, content)


def _warn_of_another_adapter(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Say so where the stored temperatures were fitted for another adapter than the one that was measured."""
    stored = read_json(folder.temperature).values()
    if any(entry.get("adapters", identity["adapters"]) != identity["adapters"] for entry in stored):
        warnings.warn(
            f"{folder.temperature} was fitted for another adapter than the one that lies in the run now, so what is "
            "shown after the temperature is not calibrated. Train the run again, or bring its adapter back.",
            UserWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class Made:
    """What an evaluation is written from."""

    content: dict[str, Any]
    arrays: dict[str, np.ndarray]
    html: str | None


def _measured(
    run: FinishedRun, rows: TestRows, outside: TestRows | None, variants: dict[str, int], seed: int, progress: bool
) -> Made:
    """All that an evaluation says of a run, its rows and the predictions made of them."""
    rows = _by_length(rows, run)
    if run.task.kind != "classes":
        if outside is not None:
            raise ValueError(f"rows of other origin are told by confidence, of which {run.task.config.task} has none")
        made = Made(*answers_report(run, rows, variants, seed, progress))
    elif run.task.labels is None:
        made = Made(text_report(run, rows, variants, seed), {}, None)
    else:
        other = None if outside is None else _by_length(outside, run)
        made = _class_report(run, rows, variants, seed, progress, other)
        made.content["baseline"] = _baseline(run, made, seed)
    about = {
        "run": run.folder.path.name,
        "method": run.task.config.method,
        "data": rows.name,
        "rows": len(rows.rows),
        "rows_left_out": rows.left_out,
        "rows_without_value": rows.without_value,
        "rows_cut": rows.cut,
        "rows_digest": SplitFingerprint.of_hashes(rows.keys).digest,
        "seed": seed,
    }
    return replace(made, content=without_nan(about | made.content))


def _class_report(
    run: FinishedRun, rows: TestRows, variants: dict[str, int], seed: int, progress: bool, outside: TestRows | None
) -> Made:
    """Reports of every variant before and after its temperature."""
    content: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    html, pages, head = None, "", load_head(run)
    scalings = {variant: run.temperature(variant) for variant in variants}
    digest = None if head is None else head[0].stored.digest
    decisions = RunDecisions.of(run.folder, run.task.config, scalings, digest)
    for variant, count in variants.items():
        prediction = run.predict(rows.rows, variant, count, seed, progress)
        assert prediction.labels is not None
        labels = prediction.labels.numpy()
        logits = logits_of(prediction.probabilities)
        arrays |= {f"log_probabilities.{variant}": logits, **_items(prediction, rows, labels)}
        scaling, calibrated = scalings[variant], scalings[variant].transform(logits)
        groups = _item_groups(prediction, rows)
        report = calibration_report(
            calibrated, labels, seed=seed, groups=groups, class_names=class_names(run, calibrated)
        )
        reports = {BEFORE: calibration_report(prediction.probabilities, labels, seed=seed), AFTER: report}
        content[variant] = {
            "num_samples": count,
            "num_forwards": prediction.num_forwards,
            "temperature": scaling.temperature,
            "temperature_fit": run.temperature_fit(variant),
            "mutual_information": float(prediction.mutual_information.mean()),
            **{stage: {**report.to_dict(), "verdict": report.verdict()} for stage, report in reports.items()},
        }
        if outside is not None:
            elsewhere = run.predict(outside.rows, variant, count, seed, progress)
            content[variant]["outside"] = outside_report(prediction, elsewhere, scaling)
        told, page, entities = entities_in(run, prediction, calibrated, labels, seed)
        content[variant] |= told
        pages += page
        errors = None
        if head is not None and head[1] == variant:
            read = read_head(run, head[0], rows.rows, seed, progress)
            far = None if outside is None else read_head(run, head[0], outside.rows, seed, progress)[1]
            content[variant]["head"] = head_report(run, head[0], *read, seed, far)
            errors = read[1].error_probability.numpy()
        if decisions.stored:
            given: Any = DecidableClasses(np.asarray(calibrated), labels, errors, rows)
            if entities is not None:
                given = DecidableEntities(entities, prediction.positions[:, 0].unique().numpy(), rows)
            content[variant]["decision"], page = reached_in(decisions, variant, count, seed, given)
            pages += page
        about_it = told_of(run, rows, variant, count)  # of the last variant, the one the method is made for
        html = report.to_html(pages, before=reports[BEFORE], about=about_it, title=run.folder.path.name)
    about: dict[str, Any] = {"items": len(labels), **words_lost(prediction, rows), "variants": content}
    if outside is not None:
        about["outside"] = {"data": outside.name, "rows": len(outside.rows), "rows_cut": outside.cut}
    return Made(about, arrays, html)


def _baseline(run: FinishedRun, made: Made, seed: int) -> dict[str, Any]:
    """Scores of the most frequent class on the same items, and whether the run is better than that."""
    assert run.task.labels is not None
    names, labels = run.task.labels.names, made.arrays["labels"]
    counts = read_json(run.folder.finished).get("class_counts")  # runs of earlier releases have not counted
    known = MostFrequent.of(names, labels) if counts is None else MostFrequent(names, tuple(counts[n] for n in names))
    report = calibration_report(known.probabilities(len(labels)), labels, confidence_level=None, seed=seed)
    main = list(made.content["variants"])[-1]  # the way that the method is made for
    reached = made.content["variants"][main][BEFORE]
    verdict = known.verdict(run.folder.path.name, reached["accuracy"], reached["intervals"]["accuracy"], labels)
    about = {"answer": known.answer, "classes": list(known.names), "counts": list(known.counts), "verdict": verdict}
    return {**report.to_dict(), **about}


def _items(prediction: Prediction, rows: TestRows, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Which row each item belongs to, by the hash of its inputs, and where in the row it stands."""
    where = prediction.positions
    of_row = np.arange(len(labels)) if where is None else where[:, 0].numpy()
    positions = np.zeros(len(labels), np.int64) if where is None else where[:, 1].numpy()
    return {"keys": rows.keys[of_row].view(np.int64), "positions": positions, "labels": labels}


def _item_groups(prediction: Prediction, rows: TestRows) -> list[Any] | None:
    """The group of each item; None without groups."""
    if rows.groups is None:
        return None
    where = prediction.positions
    return list(rows.groups) if where is None else [rows.groups[row] for row in where[:, 0].tolist()]


def _variants(config: RunConfig, num_samples: int | None) -> dict[str, int]:
    """Ways of predicting, with the asked number of draws where there are draws."""
    variants = prediction_variants(config)
    if num_samples is None:
        return variants
    if "sample" not in variants:
        raise ValueError(f"a run of {config.method} is deterministic: --num-samples means nothing to it")
    most = most_draws(config)
    if num_samples < 1 or (most is not None and num_samples > most):
        bound = "" if most is None else f" and at most {most}, its members"
        raise ValueError(f"--num-samples must be at least 1{bound}, got {num_samples}")
    return {**variants, "sample": num_samples}


def _name(rows: TestRows, variants: dict[str, int], seed: int, outside: TestRows | None) -> str:
    """Folder of an evaluation: the rows' source, readable, and a digest of rows and way of predicting."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(rows.name).name.split(".")[0]).strip("-") or "rows"
    labels = next(
        (str(rows.rows[name][:]) for name in ("label", "labels", "target") if name in rows.rows.column_names), ""
    )
    content = rows.keys.tobytes() + json.dumps([variants, seed, labels]).encode()
    content += b"" if outside is None else outside.keys.tobytes()
    content += b"" if rows.groups is None else json.dumps(rows.groups, default=str).encode()
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}"


def _by_length(rows: TestRows, run: FinishedRun) -> TestRows:
    """Rows of similar length side by side, which is less padding and so less time; those that are cut are counted."""
    ids = run.task.encode_prediction(rows.rows, run.tokenizer)["input_ids"][:]
    rows = replace(rows, cut=run.task.num_cut(rows.rows, ids, run.tokenizer))
    if len(ids) != len(rows.rows):  # texts without a second token have left
        return rows
    order = np.argsort(list(map(len, ids)), kind="stable")
    groups = None if rows.groups is None else tuple(rows.groups[place] for place in order)
    return replace(rows, rows=rows.rows.select(order), keys=rows.keys[order], groups=groups)


def _write(place: Path, made: Made) -> None:
    """Write a folder on the main process; the numbers last: a folder with them is complete."""

    def write(new: Path) -> None:
        if made.arrays:
            save_file(made.arrays, new / ROWS)
            made.content["rows_file"] = file_hash(new / ROWS)
        if made.html is not None:
            write_atomically(new / "report.html", made.html)
        write_atomically(new / "report.md", evaluation_markdown(made.content, made.content["metrics"]))
        write_json(new / REPORT, made.content)

    if processes().is_main_process:
        replace_folder(place, write)
    processes().wait_for_everyone()
