"""What `peft-calib evaluate` measured of a run, for its card."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..calibration import calibration_report
from ..runs.evaluation import AFTER, BEFORE, REPORT, Evaluation
from ..runs.folder import RunFolder, read_json
from ..runs.loading import adapter_names, load_task, run_identity
from .facts import Measurement


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
    return folder.adapter(names[0]), [one for found in _evaluations(folder, identity) for one in found]


def _evaluations(folder: RunFolder, identity: dict) -> Iterator[list[Measurement]]:
    for place in sorted((folder.path / "evaluation").glob(f"*/{REPORT}")):
        content = read_json(place)
        if content.get("identity") != identity:
            warnings.warn(f"{place} was made of another state of the run and is left out.", UserWarning, stacklevel=4)
        elif "kind" in content:
            warnings.warn(f"{place} is of {content['kind']}; a card reports on classes.", UserWarning, stacklevel=4)
        elif AFTER in next(iter(content["variants"].values()), {}):
            yield _measurements(Evaluation(place.parent, content))


def _measurements(evaluation: Evaluation) -> list[Measurement]:
    """One for each way of predicting; pictures of the one that the run is for."""
    content, found = evaluation.content, []
    for variant, about in content["variants"].items():
        count = about["num_samples"]
        report = None
        if variant == evaluation.main_variant:
            probabilities, labels = evaluation.probabilities(variant, AFTER), evaluation.items["labels"]
            report = calibration_report(probabilities, labels, confidence_level=None)
        found.append(
            Measurement(
                way="mean adapter" if variant == "mean" else f"{count} draws",
                split=_name_of(str(content["data"])),
                before=about[BEFORE],
                after=about[AFTER],
                temperature=about["temperature"],
                rows_digest=content["rows_digest"],
                seed=content["seed"],
                verdict=about[AFTER].get("verdict"),
                decisions={kind: one["told"] for kind, one in about.get("decision", {}).items() if "told" in one},
                pictures=report,
            )
        )
    return sorted(found, key=lambda one: one.pictures is not None)


def _name_of(data: str) -> str:
    """What rows are called on a card: a Hub id as it is, and of a path its last part."""
    path = Path(data)
    is_path = path.is_absolute() or path.suffix or data.startswith(".") or path.exists() or data.count("/") > 1
    return path.stem if is_path else data
