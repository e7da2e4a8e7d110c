"""`peft-calib train-head`: an uncertainty head for the adapter of a finished run, and what it is worth on new rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..calibration import confidence_report
from ..console import quiet
from ..uncertainty_head import ErrorPrediction, UncertaintyHead, entities, sentences
from ..uncertainty_head.bound import BoundHead
from ..uncertainty_head.copies import row_groups
from ..uncertainty_head.features import FeatureSet
from ..uncertainty_head.stored import file_names
from ..uncertainty_head.verdict import judge
from .folder import RunFolder, read_json
from .loading import FinishedRun, head_folder, head_hash, load_task
from .methods import most_draws, prediction_variants
from .outside import told_apart
from .processes import processes
from .rows import RunRows, load_run_rows
from .tasks import Task

#: Scores that a ranking alone has: all that can be said of a score that claims no probability.
RANKING = ("error_auroc", "aurc")


@dataclass(frozen=True)
class TrainedHead:
    """A head that lies beside the adapter of a run."""

    head: UncertaintyHead
    folder: Path
    variant: str

    def lines(self) -> list[str]:
        """What a user should know of it."""
        files = " and ".join(file_names("default"))
        return [*str(self.head.report).splitlines(), f"Written to {self.folder}: {files}"]


def train_head(
    run_dir: str | Path,
    *,
    fit_on: str | None = None,
    how: str | None = None,
    num_samples: int | None = None,
    data: str | None = None,
    score: str | None = None,
    paper: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> TrainedHead:
    """Fit a head that says how likely each prediction of a run is wrong, and write it beside its adapter.

    Neither the adapter nor a prediction changes. The rows are the run's own: those it was trained on, and those it was
    calibrated on.

    Args:
        run_dir: Folder of the run.
        fit_on: `"cross"` (folds of the calibration rows), `"validation"` (a part of them), or `"train"` (the training
            rows, as in the papers, chosen among by the calibration rows); that of `paper` or `"cross"` if not given.
        how: `"mean"` or `"sample"`: which prediction it is for; draws if not given, where there are some.
        num_samples: Draws; as many as the run's temperature was fitted with if not given.
        data: Where the run's rows lie now, if they have moved.
        score: `"entropy"`, `"sr_norm"` or `"sr_raw"`.
        paper: `"v1"` or `"v2"`, settings of the papers.
        seed: Key of the draws, and of the fit.
        batch_size: Rows of a forward; as in training if not given.
        overwrite: Replace a head that lies there.
        progress: Show bars.
        options: Further fields of `uncertainty_head.HeadSettings`, such as `lr` or `calibrate`.

    Returns:
        The head and where it lies; `head.report` says whether it helps.

    Raises:
        FileNotFoundError: If there is no finished run.
        FileExistsError: If it has a head.
        ValueError: For a run without classes, rows that are not the run's any more, or what `UncertaintyHead.fit`
            refuses.
    """
    folder = RunFolder(Path(run_dir).absolute())
    task = load_task(folder)
    place = head_folder(folder, task.config)
    _check_free(place, overwrite)
    variant, count = _way(task, how, num_samples)
    options |= {} if fit_on is None else {"split": fit_on}
    with quiet():
        rows = _own_rows(folder, task, data)
        run = FinishedRun.assemble(folder, task)
        train, calibration = (task.encode_prediction(part, run.tokenizer) for part in (rows.train, rows.calibration))
        asked = _reading(run) | _asked(run, variant, count)
        asked |= {} if batch_size is None else {"batch_size": batch_size}
        head = UncertaintyHead.fit(
            run.model, train, calibration, score, paper=paper, seed=seed, progress=progress, **asked, **options
        )
        if processes().is_main_process:
            head.save_pretrained(place)
        processes().wait_for_everyone()
    return TrainedHead(head, place, variant)


def load_head(run: FinishedRun) -> tuple[BoundHead, str] | None:
    """The head of a run and the way of predicting that it is about; None where there is none that was fitted to it."""
    if head_hash(run.folder, run.task.config) is None:
        return None
    stored = UncertaintyHead.from_pretrained(head_folder(run.folder, run.task.config)).stored
    if stored.asked is None:
        return None
    several = stored.asked.num_samples != 1 or stored.asked.adapter_names is not None
    return BoundHead(stored, run.model), "sample" if several else "mean"


def read_head(
    run: FinishedRun, head: BoundHead, rows: Dataset, seed: int, progress: bool
) -> tuple[FeatureSet, ErrorPrediction]:
    """What a head says of canonical rows, with draws of a seed, and the features that it says it of."""
    encoded = run.task.encode_prediction(rows, run.tokenizer)
    return head.read(encoded, seed, progress=progress, **_reading(run))


def head_report(
    run: FinishedRun,
    head: BoundHead,
    features: FeatureSet,
    found: ErrorPrediction,
    seed: int,
    outside: ErrorPrediction | None = None,
) -> dict[str, Any]:
    """What a head is worth on labelled rows that it has not seen, beside the frozen model's own score."""
    chance, base, stored = found.error_probability, found.base_uncertainty, head.stored
    wrong = features.errors.numpy()
    about: dict[str, Any] = {
        "score": stored.settings.score,
        "kept_base": stored.deltas is None,
        "why_base": stored.report.why_base,
        "functions": len(features.features),
        **_measured(chance.numpy(), base.numpy(), wrong, seed),
    }
    if 0 < wrong.sum() < len(wrong) and not about["kept_base"]:
        groups = row_groups(features)
        about["verdict"] = str(judge(wrong, base.numpy(), found.uncertainty.numpy(), groups=groups, seed=seed))
    if features.items is not None:
        about |= _of_groups(run, features, chance, base, seed)
    if outside is not None:
        about["outside"] = told_apart(1 - chance.numpy(), 1 - outside.error_probability.numpy())
    return about


def _of_groups(run: FinishedRun, features: FeatureSet, chance: Any, base: Any, seed: int) -> dict[str, Any]:
    """The same of entities and sentences, each with the largest uncertainty of its tokens."""
    assert run.task.labels is not None
    names = run.task.labels.names
    levels = {
        "entities": [entities(features, of, names) for of in (chance, base)],
        "sentences": [sentences(features, of) for of in (chance, base)],
    }
    found: dict[str, Any] = {}
    for name, (likely, own) in levels.items():
        if likely.errors is not None and len(likely):
            scores = _measured(likely.uncertainty.numpy(), own.uncertainty.numpy(), likely.errors.numpy(), seed)
            found[name] = {"items": len(likely), "missed": likely.missed, **scores}
    return found


def _measured(chance: np.ndarray, base: np.ndarray, wrong: np.ndarray, seed: int) -> dict[str, Any]:
    """Scores with intervals: of P(error), and of the base score those that its ranking has."""
    whole = confidence_report(1 - chance, ~wrong, seed=seed).to_dict()
    own = confidence_report(1 - np.clip(base, 0, 1), ~wrong, seed=seed)
    assert own.intervals is not None
    ranked = {key: own[key] for key in RANKING}
    return {
        "errors": int(wrong.sum()),
        "error_probability": whole,
        "base": {**ranked, "intervals": {key: list(own.intervals[key]) for key in RANKING}},
    }


def _reading(run: FinishedRun) -> dict[str, Any]:
    """How batches are made of the encoded rows of a run."""
    return {"tokenizer": run.tokenizer, "batch_size": run.task.inputs().batch_size or 8}


def _asked(run: FinishedRun, variant: str, count: int) -> dict[str, Any]:
    """How the model of a run is asked for a way of predicting."""
    words = {"task": run.task.predict_task, "label_tokens": run.task.answer_tokens(run.tokenizer)}
    if len(run.adapter_names) > 1:
        return {**words, "num_samples": count, "adapter_names": run.adapter_names[:count]}
    return {**words, "num_samples": 1 if variant == "mean" else count}


def _way(task: Task, how: str | None, num_samples: int | None) -> tuple[str, int]:
    """The way of predicting that a head is for, and its number of functions."""
    config = task.config
    if task.labels is None or task.kind != "classes":
        raise ValueError(
            f"a run of --task {config.task} answers with no class, so that none of its predictions is "
            "right or wrong; a head is for seq-cls, token-cls and multiple-choice"
        )
    variants = prediction_variants(config)
    chosen = how or list(variants)[-1]
    if chosen not in variants:
        raise ValueError(f"a run of {config.method} predicts with --how {' or '.join(variants)}, got {how!r}")
    if num_samples is None or num_samples == variants[chosen]:
        return chosen, variants[chosen]
    most = most_draws(config)
    if chosen == "mean" or num_samples < 2 or (most is not None and num_samples > most):
        raise ValueError(
            f"--num-samples {num_samples} is no number of draws of {config.method} with --how {chosen}: there are "
            + ("none" if chosen == "mean" else "2 or more" if most is None else f"2 to {most}, its members")
        )
    return chosen, num_samples


def _own_rows(folder: RunFolder, task: Task, data: str | None) -> RunRows:
    """The rows that a run was trained and calibrated on, held against what it says of them."""
    config = task.config if data is None else replace(task.config, data=data)
    try:
        _, rows = load_run_rows(config)
    except OSError as error:
        raise ValueError(f"{error}. If the run's rows have moved, name them with --data") from error
    if rows.to_dict() != read_json(folder.config)["rows"]:
        raise ValueError(
            f"{config.data} does not hold the rows that the run was trained and calibrated on any more: name those "
            "with --data, or train the run again"
        )
    return rows


def _check_free(place: Path, overwrite: bool) -> None:
    there = [name for name in file_names("default") if (place / name).is_file()]
    if there and not overwrite:
        raise FileExistsError(f"{place} holds an uncertainty head; pass --overwrite to replace it")
