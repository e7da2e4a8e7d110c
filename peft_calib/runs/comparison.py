"""`peft-calib compare`: which of several runs is better on the same rows, and which the rows cannot tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ..calibration import Comparison, compare_many
from ..calibration.scores.table import COMPARED
from .aligned import Aligned
from .baseline import CALLED, MostFrequent
from .comparison_table import comparison_table
from .evaluation import AFTER, BEFORE, Evaluation, evaluate_run
from .folder import RunFolder, write_json
from .loading import load_task
from .methods import prediction_variants
from .processes import processes
from .replicates import compare_replicates, replicates_among
from .settings import RunConfig, check_metrics


@dataclass(frozen=True)
class RunComparison:
    """Runs held against the first of them; `items` are the predictions compared: rows, or labelled words."""

    rows: int
    items: int
    comparisons: Sequence[Comparison]
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

    def to_table(self) -> RenderableType:
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

    Runs whose settings differ in the seed alone are replicates of one method. Where there are several methods with
    several runs each, the methods are compared, with intervals over rows and runs (`compare_groups`): identical
    trainings lie .01 to .07 nats apart, so that one run of each says little of the methods.

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
    folders = dict(zip(names, (RunFolder(Path(path).absolute()) for path in run_dirs), strict=True))
    configs = {name: load_task(folder).config for name, folder in folders.items()}
    if num_samples is not None and not any("sample" in prediction_variants(config) for config in configs.values()):
        raise ValueError("every one of these runs is deterministic: --num-samples means nothing to them")
    evaluations = {name: _evaluated(folders[name].path, configs[name], num_samples, options) for name in names}
    stage = AFTER if after_temperature else BEFORE
    groups = replicates_among(configs)
    aligned = Aligned.of(evaluations, stage)
    known = _most_frequent(evaluations[names[0]], aligned)
    how: dict[str, Any] = {"scores": scores, "seed": seed}
    pairs: Sequence[Comparison]
    if groups is None:
        pairs = compare_many(aligned.predictions, aligned.labels, baseline=None if every_pair else names[0], **how)
    else:
        first = None if every_pair else next(iter(groups))
        pairs = compare_replicates(aligned, groups, configs, baseline=first, **how)
    verdicts = [known.verdict_of(name, p, aligned.labels) for name, p in aligned.predictions.items()]
    return RunComparison(
        aligned.rows,
        len(aligned.labels),
        pairs,
        known.scores(aligned.labels, scores),
        [verdict for verdict in verdicts if verdict is not None],
    )


def _most_frequent(evaluation: Evaluation, aligned: Aligned) -> MostFrequent:
    """The class that was most frequent in training; in these rows, for a run that has not counted."""
    said = evaluation.content.get("baseline")
    if said is None:
        num_classes = next(iter(aligned.predictions.values())).shape[1]
        return MostFrequent.of([str(index) for index in range(num_classes)], aligned.labels)
    return MostFrequent(tuple(said["classes"]), tuple(said["counts"]))


def write_comparison(comparison: RunComparison, path: str | Path) -> None:
    """Write a comparison as JSON, on the main process."""
    if processes().is_main_process:
        write_json(Path(path), comparison.to_dict())


def _evaluated(path: Path, config: RunConfig, count: int | None, options: dict[str, Any]) -> Evaluation:
    """One run's evaluation; deterministic runs take no number of draws."""
    if count is not None and "sample" in prediction_variants(config):
        options = {**options, "num_samples": count}
    found = evaluate_run(path, **options)
    if "keys" not in found.arrays:
        raise ValueError(f"{path} has no classes to compare ({config.task}): see its evaluation")
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
