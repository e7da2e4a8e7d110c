"""What `peft-calib evaluate` measured of a run, for its card."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration import calibration_report, entities_report, find_entities
from ..predictor.kinds import KINDS
from ..runs.evaluation import AFTER, BEFORE, REPORT, Evaluation
from ..runs.folder import RunFolder, read_json
from ..runs.loading import adapter_names, load_task, run_identity
from ..runs.methods import prediction_variants
from ..runs.sources import READERS, source_name
from .facts import Measurement, Report

#: What an evaluation of a language model is of.
TEXTS = "texts"
#: Rows that a run is tested on where nothing is asked for, the first of them that there are.
OWN_ROWS = ("held out", "test", "validation")


def measured_in_run(source: Path) -> tuple[Path, Sequence[Measurement]]:
    """The adapter of a run, and every evaluation that was made of it as it is now.

    Raises:
        ValueError: If the run is an ensemble of several adapters.
    """
    folder = RunFolder(source.absolute())
    task = load_task(folder)
    names = adapter_names(task.config)
    if len(names) != 1:
        raise ValueError(
            f"{source} is an ensemble of {len(names)} adapters, and a repository of the Hub holds one: push each of "
            f"{', '.join(str(folder.adapter(name)) for name in names)}."
        )
    identity = run_identity(folder, task.config)
    tags = () if task.labels is None else task.labels.names
    counts = prediction_variants(task.config)
    found = sorted(_evaluations(folder, identity), key=lambda one: _rank(one, task.config.data, counts))
    measured = [one for evaluation in found for one in _measurements(evaluation, tags)]
    return folder.adapter(names[0]), measured


def _evaluations(folder: RunFolder, identity: dict) -> Iterator[Evaluation]:
    for place in sorted((folder.path / "evaluation").glob(f"*/{REPORT}")):
        content = read_json(place)
        if content.get("identity") != identity:
            warnings.warn(
                f"{place} was made of another state of the run (before `peft-calib decide`, say) and is left out. "
                "`peft-calib evaluate` with the same rows puts it on the card.",
                UserWarning, stacklevel=4,
            )  # fmt: skip
        elif AFTER in next(iter(content["variants"].values()), {}):
            yield Evaluation(place.parent, content)


def _rank(evaluation: Evaluation, data: str, counts: Mapping[str, int]) -> tuple[bool, int, str, bool, bool]:
    """Its own test rows come first, and of these what was predicted as the run was trained to comes last.

    That is what `leading` takes for a leaderboard and pictures: not what was tried with other draws.
    """
    content = evaluation.content
    source, split = _source_and_split(str(content["data"]))
    is_own = source in (data, source_name(data))
    found = content["variants"].items()
    as_trained = all(one["num_samples"] == counts.get(variant) for variant, one in found)
    place = OWN_ROWS.index(split) if split in OWN_ROWS else len(OWN_ROWS)
    rows = evaluation.folder.name.rpartition("-")[0]  # what other rows are called keeps theirs together
    return not is_own, place, rows, as_trained, content["seed"] == 0


def _measurements(evaluation: Evaluation, tags: Sequence[str]) -> Iterator[Measurement]:
    """One for each way of predicting, and one of its entities; the way that the run is for last, with pictures."""
    content, main = evaluation.content, evaluation.main_variant
    about: dict[str, Any] = {"split": _name_of(str(content["data"])), "rows_digest": content["rows_digest"]}
    about |= {"seed": content["seed"]}
    if _kind_of(content) == "classes" and content["items"] != content["rows"]:  # its items are words
        about["rows"] = content["rows"]
    for variant in sorted(content["variants"], key=lambda variant: variant == main):
        found, kind, drawn = content["variants"][variant], _kind_of(content), variant == main
        way = "mean adapter" if variant == "mean" else f"{found['num_samples']} draws"
        told = {**about, **{name: found.get(name) for name in ("temperature", "recalibration")}}
        decisions = {kind: one["told"] for kind, one in found.get("decision", {}).items() if "told" in one}
        pictures = _report(evaluation, variant, kind) if drawn else None
        stages = found if kind != TEXTS else _with_settings(found, content["rows"])
        yield _measurement(stages, **told, way=way, kind=kind, decisions=decisions, pictures=pictures)
        if AFTER in (entities := found.get("entities", {})):
            pictures = _entities(evaluation, variant, tags) if drawn else None
            yield _measurement(entities, **told, way=f"{way}, entities", kind="entities", pictures=pictures)


def _kind_of(content: Mapping[str, Any]) -> str:
    """The kind of answer that an evaluation is of."""
    of_texts = "perplexity" in next(iter(content["variants"].values()))[AFTER]
    return content.get("kind", TEXTS if of_texts else "classes")


def _with_settings(stages: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The scores of texts as a report has them."""
    return {stage: {**stages[stage], "settings": {"num_rows": rows}} for stage in (BEFORE, AFTER)}


def _measurement(stages: Mapping[str, Any], **told: Any) -> Measurement:
    """Of the reports in an evaluation; without one of before a recalibration there is that after it alone."""
    after = stages[AFTER]
    return Measurement(before=stages.get(BEFORE, after), after=after, verdict=after.get("verdict"), **told)


def _report(evaluation: Evaluation, variant: str, kind: str) -> Report | None:
    """The report of an evaluation once more, which pictures are drawn from; None of texts, which have none."""
    if kind == TEXTS:
        return None
    if kind == "classes":
        probabilities, labels = evaluation.probabilities(variant, AFTER), evaluation.items["labels"]
        return calibration_report(probabilities, labels, confidence_level=None)
    names = [row["name"] for row in evaluation.content["variants"][variant][AFTER].get("labels", ())]
    kept = {name.removesuffix(f".{variant}"): values for name, values in evaluation.arrays.items()}
    return KINDS[kind].report_of(kept, evaluation.arrays["targets"], names, 0, None)


def _entities(evaluation: Evaluation, variant: str, tags: Sequence[str]) -> Report:
    """The report of a tagger's entities once more: a sentence ends where the row does, or its words begin anew."""
    items = evaluation.items
    keys, places = items["keys"], items["positions"]
    sentences = np.cumsum(np.r_[0, (keys[1:] != keys[:-1]) | (places[1:] <= places[:-1])])
    probabilities = evaluation.probabilities(variant, AFTER).astype(np.float64)
    return entities_report(find_entities(probabilities, tags, sentences, items["labels"]), confidence_level=None)


def _source_and_split(data: str) -> tuple[str, str]:
    """The two parts of what an evaluation calls its rows, `source (split)`; of one split alone no split."""
    place, mark, split = data.removesuffix(")").rpartition(" (")
    return (place, split) if mark and data.endswith(")") else (data, "")


def _name_of(data: str) -> str:
    """What rows are called on a card: a Hub id as it is, and of a path its last part."""
    place, split = _source_and_split(data)
    path = Path(place.removesuffix(".gz"))
    is_file = path.suffix.lower() in READERS
    is_path = path.is_absolute() or is_file or place.startswith(".") or Path(place).exists() or place.count("/") > 1
    name = (path.stem if is_file else path.name) if is_path else place
    return f"{name} ({split})" if split else name
