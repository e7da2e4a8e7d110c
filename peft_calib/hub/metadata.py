"""The head of a card, which the Hub reads: written as plain values, and read back by the Hub's own library.

That library writes results by their identifiers, so a second result of a task and data set loses its name, and numbers
of numpy become YAML that cannot be read. So the structure is written here, and the library only asked what it reads.
"""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub import ModelCard

from .facts import CardFacts, Measurement, leading, of_dataset

#: Names of the scores as the Hub's metrics are called, where they have another name there.
METRIC_TYPES = {"brier": "brier_score", "ece": "expected_calibration_error", "r2": "r_squared"}
TAGS = ("peft-calib", "calibration", "uncertainty-quantification")
#: How our results for leaderboards are called.
EVAL_RESULTS = ".eval_results/peft-calib-"
#: What makes a result of a model index.
RESULT_FIELDS = ("task_type", "task_name", "dataset_type", "dataset_name", "dataset_config", "dataset_split")
RESULT_FIELDS += ("dataset_revision", "metric_type", "metric_name", "metric_value")


class CardMismatchError(ValueError):
    """The Hub's library reads something else from a card than what was meant."""


def metadata_of(facts: CardFacts) -> dict[str, Any]:
    """The head of a card: plain texts, numbers, lists and mappings, without empty entries."""
    subject, pipeline = facts.subject, facts.pipeline
    found: dict[str, Any] = {
        "base_model": facts.base_model,
        "library_name": "peft",
        "pipeline_tag": pipeline,
        "license": subject.license,
        "language": list(subject.language),
        "datasets": list(subject.training_datasets),
        "tags": [*TAGS, facts.method.lower(), f"base_model:adapter:{facts.base_model}"],
        "widget": [{"text": text} for text in subject.examples],
        "model-index": _model_index(facts),
    }
    return {key: value for key, value in found.items() if value}


def _model_index(facts: CardFacts) -> list[dict[str, Any]]:
    results = [_result(facts, measured) for measured in facts.measured if measured.scores()]
    return [{"name": facts.name, "results": results}] if results else []


def _result(facts: CardFacts, measured: Measurement) -> dict[str, Any]:
    """One set of rows and one way of predicting, with all its scores."""
    subject = facts.subject
    kind = facts.pipeline or "other"
    dataset = {"type": "private", "name": "held-out rows", "split": measured.split}
    if any(one is measured for one in of_dataset(facts.measured, subject)):
        dataset |= {"type": subject.dataset, "name": subject.dataset}
        dataset |= {"config": subject.dataset_config, "revision": subject.dataset_revision}
    dataset["name"] = f"{dataset['name']} ({measured.num_rows:,} rows)"
    done = measured.recalibration
    if done is None and measured.temperature not in (None, 1.0):
        done = f"T = {measured.temperature:.4g}"
    told = ", ".join(filter(None, (measured.way, done)))
    return {
        "task": {"type": kind, "name": f"{kind.replace('-', ' ')}, {measured.way}"},
        "dataset": {key: value for key, value in dataset.items() if value is not None},
        "metrics": [
            {"type": METRIC_TYPES.get(key, key), "name": f"{key} ({told})", "value": value}
            for key, value in measured.scores().items()
        ],
    }


def with_metadata(metadata: dict[str, Any], body: str) -> str:
    """A card of its head and its text."""
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{head}---\n\n{body}"


def check_card(text: str, metadata: dict[str, Any]) -> None:
    """Read a card back, as YAML and with the Hub's library, and compare it with what was meant.

    Raises:
        CardMismatchError: Naming the first field that differs.
    """
    head = yaml.safe_load(text.removeprefix("---\n").split("\n---\n")[0])
    if head != metadata:
        wrong = next(key for key in {**head, **metadata} if head.get(key) != metadata.get(key))
        raise CardMismatchError(f"The card's {wrong} is read back as {head.get(wrong)!r:.200}.")
    card = ModelCard(text)
    for key, value in metadata.items():
        if key != "model-index" and card.data.get(key) != value:
            raise CardMismatchError(f"huggingface_hub reads {key} as {card.data.get(key)!r:.200}, not {value!r:.200}.")
    meant = _flat(metadata.get("model-index", []))
    read = [tuple(getattr(found, name) for name in RESULT_FIELDS) for found in card.data.eval_results or []]
    for one, other in zip(meant, read, strict=False):
        if one != other:
            raise CardMismatchError(f"huggingface_hub reads the result {one} as {other}.")
    if len(meant) != len(read):
        raise CardMismatchError(f"huggingface_hub reads {len(read)} of {len(meant)} results.")


def _flat(index: list[dict[str, Any]]) -> list[tuple]:
    """Every number of a model index with all that is said of it, in the order of `RESULT_FIELDS`."""
    return [
        (
            *(result["task"].get(name) for name in ("type", "name")),
            *(result["dataset"].get(name) for name in ("type", "name", "config", "split", "revision")),
            *(metric.get(name) for name in ("type", "name", "value")),
        )
        for model in index
        for result in model["results"]
        for metric in result["metrics"]
    ]


def benchmark_results(facts: CardFacts) -> dict[str, str]:
    """Files of `.eval_results/`, which a Hub benchmark's leaderboard reads: a score, and how calibrated it is.

    Their names begin with ours: others write there as well, and what they wrote stays.

    Raises:
        ValueError: If a benchmark is named and there is no score for it.
    """
    subject = facts.subject
    if subject.benchmark_task is None:
        return {}
    found = list(leading(of_dataset(facts.measured, subject)).values())
    if not found or found[-1].number(found[-1].panel.first[0]) is None:
        what = f"{found[-1].panel.first[0]} is not defined on these rows" if found else "nothing was measured"
        raise ValueError(
            f"--benchmark-task {subject.benchmark_task} tells a leaderboard a score, and {what}: evaluate the run "
            "first, on rows that allow one, or leave it out."
        )
    best = found[-1]
    about = {"id": subject.dataset, "task_id": subject.benchmark_task, "revision": subject.dataset_revision}
    scores, (ranked, *noted) = best.scores(), best.panel.first
    notes = ", ".join(f"{key} {scores[key]:.4f}" for key in noted if key in scores)
    entry = {
        "dataset": {key: value for key, value in about.items() if value is not None},
        "value": scores[ranked],
        "notes": f"{best.way}; {notes}; {best.num_rows:,} rows",
    }
    name = "".join(c if c.isalnum() else "-" for c in f"{subject.dataset}-{subject.benchmark_task}").lower()
    return {f"{EVAL_RESULTS}{name}.yaml": yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)}
