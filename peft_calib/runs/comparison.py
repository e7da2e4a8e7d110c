"""`peft-calib compare`: which of several runs is better on the same rows, and which the rows cannot tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..calibration import Comparison, compare_many
from ..calibration.scores.table import COMPARED
from .baseline import CALLED, MostFrequent
from .comparison_table import comparison_table
from .evaluation import AFTER, BEFORE, Evaluation, evaluate_run
from .folder import RunFolder, write_json
from .loading import load_task
from .methods import prediction_variants
from .processes import processes
from .settings import check_metrics


@dataclass(frozen=True)
class RunComparison:
    """Runs held against the first of them; `items` are the predictions compared: rows, or labelled words."""

    rows: int
    items: int
    comparisons: list[Comparison]
    baseline: dict[str, float] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "items": self.items,
            "pairs": [pair.to_dict() for pair in self.comparisons],
            CALLED.replace(" ", "_"): self.baseline,
            "no_better_than_that": self.verdicts,
        }

    def to_markdown(self) -> str:
        """The verdict and the table of every pair."""
        return "\n".join(pair.to_markdown() for pair in self.comparisons)

    def to_table(self) -> Table:
        """One line a run, for a terminal."""
        items = "" if self.items == self.rows else f", {self.items} items"
        title = f"{self.rows} rows that all runs were measured on and none has seen{items}"
        return comparison_table(self.comparisons, {CALLED: self.baseline}, title)


def compare_runs(
    run_dirs: Sequence[str | Path],
    *,
    num_samples: int | None = None,
    metrics: Sequence[str] | None = None,
    after_temperature: bool = True,
    every_pair: bool = False,
    seed: int = 0,
    progress: bool = True,
    **where: Any,
) -> RunComparison:
    """Compare finished runs by a paired bootstrap on the rows that none of them has seen.

    Each run predicts in the way its method is made for: with draws where it has them. What is not evaluated on these
    rows yet is evaluated first. P-values carry Holm's correction for the number of pairs.

    Args:
        run_dirs: Folders of runs; the first is the baseline.
        num_samples: Draws of the stochastic runs.
        metrics: Scores to compare.
        after_temperature: Compare probabilities after each run's temperature.
        every_pair: Compare each run with each, instead of each with the first.
        seed: Key of the draws and of the bootstrap.
        progress: Show bars.
        where: Rows to test on, as `evaluate_run` takes them: `data`, `subset`, `split`, `encoding`, `delimiter`,
            `drop_missing`; each run's own test rows if not given.

    Returns:
        The comparison.

    Raises:
        ValueError: For fewer than two runs, the same run twice, unknown metrics, or rows that carry other labels or
            classes in one run than in another.
    """
    names = _names(run_dirs)
    scores = list(metrics or COMPARED)
    check_metrics(scores)
    options = {"seed": seed, "progress": progress, **where}
    evaluations = {name: _evaluated(path, num_samples, options) for name, path in zip(names, run_dirs, strict=True)}
    order = _common_order(evaluations)
    stage = AFTER if after_temperature else BEFORE
    predictions = {
        name: found.probabilities(found.main_variant, stage)[order[name]] for name, found in evaluations.items()
    }
    first = evaluations[names[0]].items
    labels = first["labels"][order[names[0]]]
    known = _most_frequent(evaluations[names[0]], labels, next(iter(predictions.values())).shape[1])
    baseline = None if every_pair else names[0]
    pairs = compare_many(predictions, labels, baseline=baseline, scores=scores, seed=seed)
    verdicts = [known.verdict_of(name, probabilities, labels) for name, probabilities in predictions.items()]
    return RunComparison(
        len(np.unique(first["keys"][order[names[0]]])),
        len(labels),
        pairs,
        known.scores(labels, scores),
        [verdict for verdict in verdicts if verdict is not None],
    )


def _most_frequent(evaluation: Evaluation, labels: np.ndarray, num_classes: int) -> MostFrequent:
    """The class that was most frequent in training; in these rows, for a run that has not counted."""
    said = evaluation.content.get("baseline")
    if said is None:
        return MostFrequent.of([str(index) for index in range(num_classes)], labels)
    return MostFrequent(tuple(said["classes"]), tuple(said["counts"]))


def write_comparison(comparison: RunComparison, path: str | Path) -> None:
    """Write a comparison as JSON, on the main process."""
    if processes().is_main_process:
        write_json(Path(path), comparison.to_dict())


def _evaluated(path: str | Path, count: int | None, options: dict[str, Any]) -> Evaluation:
    """One run's evaluation; deterministic runs take no number of draws."""
    if count is not None and "sample" in prediction_variants(load_task(RunFolder(Path(path).absolute())).config):
        options = {**options, "num_samples": count}
    found = evaluate_run(path, **options)
    if "keys" not in found.arrays:
        raise ValueError(f"{path} has no classes to compare: a causal-lm run has a loss per token, see its evaluation")
    return found


def _names(run_dirs: Sequence[str | Path]) -> list[str]:
    """A short name for each run: its folder's, or the path where that is not enough."""
    paths = [Path(path) for path in run_dirs]
    if len(paths) < 2:
        raise ValueError("name at least two runs to compare")
    if len({path.absolute() for path in paths}) < len(paths):
        raise ValueError("the same run is named twice")
    short = [path.name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _common_order(evaluations: dict[str, Evaluation]) -> dict[str, np.ndarray]:
    """For each run the items of the rows that all runs have, in one order."""
    items = {name: found.items for name, found in evaluations.items()}
    common = set.intersection(*({*found["keys"].tolist()} for found in items.values()))
    if not common:
        raise ValueError("the runs have no test row in common; name rows that none of them has seen, with --data")
    wanted = np.array(sorted(common), np.int64)
    order: dict[str, np.ndarray] = {}
    for name, found in items.items():
        kept = np.flatnonzero(np.isin(found["keys"], wanted))
        sequence = np.lexsort((found["positions"][kept], found["labels"][kept], found["keys"][kept]))
        order[name] = kept[sequence]
    first, *others = items
    for name in others:
        same = all(
            np.array_equal(items[first][part][order[first]], items[name][part][order[name]])
            for part in ("keys", "labels", "positions")
        )
        if not same:
            raise ValueError(
                f"{first} and {name} do not ask about the same items: their classes, their labels or the tokens of "
                "their words differ, so they cannot be paired"
            )
    return order
