"""Is one method better than another? Several runs of each on the same rows, with intervals over rows and runs.

Identical trainings that differ in their seed alone scatter by .01 to .07 nats on a few hundred rows. A comparison of
one run with one run says which of the two adapters is better, and nothing of the methods that made them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtrit

from ..inputs import Rows
from ..scores.panel import compute_panel
from ..scores.table import COMPARED
from .comparison import Comparison, ComparisonPlan, Difference, corrected_for_pairs
from .intervals import bootstrap_draws

#: Below this many rows the spread over rows is no basis for a t interval.
FEWEST_ROWS = 10
#: Fewer pairs of runs may lie close by luck, of which Welch and Satterthwaite's approximation makes a t of many
#: degrees: of two pairs it held the truth in 87 of 100 comparisons, of three in 92.
FEWEST_PAIRS = 4
#: The smallest p-value that is looked for.
SMALLEST_P = 1e-15

#: A variance and its degrees of freedom.
Part = tuple[float, float]


@dataclass(frozen=True)
class GroupDifference(Difference):
    """One score of two methods, each the mean over its runs.

    Attributes:
        run_sd_a, run_sd_b: Standard deviation of the score over the runs of either method.
        standard_error: Of the difference, over rows and runs.
        degrees_of_freedom: Of that error, by Welch and Satterthwaite. Interval and p-value go by it unless there are
            two or three pairs of runs: then by Banerjee's (1960) bound.
        over_rows: The part of the squared error that other rows make, with its degrees of freedom.
        over_runs: The parts that other runs make, likewise.
    """

    run_sd_a: float
    run_sd_b: float
    standard_error: float
    degrees_of_freedom: float
    over_rows: Part
    over_runs: tuple[Part, ...]


@dataclass(frozen=True)
class GroupComparison(Comparison):
    """Two methods, score by score, each by the mean of its runs."""

    differences: tuple[GroupDifference, ...]

    def __getitem__(self, score: str) -> GroupDifference:
        return super().__getitem__(score)  # type: ignore[return-value]

    @property
    def basis(self) -> str:
        """What the comparison rests on, in words."""
        counts = " + ".join(str(self.settings["num_runs"][name]) for name in self.names)
        return f"{super().basis} and {counts} runs"

    def spreads(self) -> str:
        """Standard deviation between the runs of either method, score by score, in Markdown."""
        a, b = self.names
        lines = [f"| standard deviation between runs | {a} | {b} |", "|---|---:|---:|"]
        lines += [f"| {d.score} | {d.run_sd_a:.4f} | {d.run_sd_b:.4f} |" for d in self.differences]
        return "\n".join(lines) + "\n"

    def to_markdown(self) -> str:
        """The verdict, a table, and how far the runs of each method lie apart."""
        return f"{super().to_markdown()}\n{self.spreads()}"


def compare_groups(
    groups: Mapping[str, Sequence[Any]],
    labels: Any,
    *,
    baseline: str | None = None,
    paired: bool = False,
    scores: Sequence[str] = COMPARED,
    num_bins: int = 15,
    confidence_level: float = 0.95,
    num_resamples: int | None = None,
    input: str = "probabilities",
    mask: Any = None,
    ignore_index: int | None = -100,
    seed: int = 0,
) -> list[GroupComparison]:
    """Compares methods by several runs each on the same rows, with intervals over rows and runs.

    A method's score is the mean of its runs' scores. The error of a difference has two parts: what other rows would
    change, from a bootstrap in which all runs see the same resamples, and what other runs would change, `s_a^2 / R_a +
    s_b^2 / R_b` from the spread of the runs' scores (the spread of the differences where runs are paired). Their sum
    with Student's t at Welch and Satterthwaite's degrees of freedom gives intervals and p-values. Of two or three
    pairs of runs they are Banerjee's (1960) bound, `sum_k t_k^2 v_k` with each part's own quantile, which keeps its
    level for any number. Holm's (1979) correction is over the pairs of methods.

    Args:
        groups: Name of a method to the predictions of its runs, two at least, each as for `calibration_report`.
        labels: Integer class ids, the same for all.
        baseline: The method all others are compared with; None compares every pair.
        paired: Whether run i of one method belongs to run i of every other: one training, or one split of the rows.
        scores: Keys of a report.
        num_bins: Bins of every binned score.
        confidence_level: Of the intervals.
        num_resamples: Bootstrap resamples; by default 1,000, fewer for very many rows.
        input: `"probabilities"` or `"logits"`.
        mask: Rows to keep.
        ignore_index: Label of rows to drop.
        seed: Of the private generator.

    Returns:
        One comparison a pair of methods.

    Raises:
        ValueError: For fewer than two methods, two runs or ten rows, pairs of unequal length, an unknown baseline or
            score, or bad input.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> labels = generator.integers(0, 2, 400)
        >>> def runs(noise):
        ...     logits = [3 * labels - 1.5 + noise * generator.normal(size=400) for _ in range(3)]
        ...     return [np.stack([1 - p, p], 1) for p in (1 / (1 + np.exp(-z)) for z in logits)]
        >>> found, = compare_groups({"b": runs(0.5), "a": runs(2.0)}, labels, baseline="a", num_resamples=100)
        >>> found["nll"].better
        'a'
    """
    _check_runs(groups, paired)
    plan = ComparisonPlan.of(
        groups, labels, baseline=baseline, scores=scores, num_bins=num_bins, confidence_level=confidence_level,
        num_resamples=num_resamples, input=input, mask=mask, ignore_index=ignore_index, seed=seed,
    )  # fmt: skip
    if plan.num_rows < FEWEST_ROWS:
        raise ValueError(f"{plan.num_rows} rows are too few to compare methods by; give at least {FEWEST_ROWS}.")
    measured = {name: [_Run.of(run, plan.resampling) for run in runs] for name, runs in plan.rows.items()}
    table = {
        key: [_difference(key, measured[a], measured[b], plan.num_rows, paired, plan.level) for a, b in plan.pairs]
        for key in scores
    }
    num_runs = {name: len(runs) for name, runs in groups.items()}
    return _comparisons(plan.pairs, table, plan.settings(num_runs=num_runs, paired=paired), plan.level)


def pool_comparisons(
    cells: Sequence[Sequence[GroupComparison]], *, rows: Sequence[Hashable] | None = None
) -> list[GroupComparison]:
    """Averages comparisons of the same methods over data sets or splits, each weighing the same.

    The errors of the cells are independent, so their squares add up; where cells are measured on the same rows, or on
    some of the same, what these rows do to one they may do to the others. Named by `rows`, such cells' errors over
    rows are added before they are squared, which holds however much they have in common; those over runs are
    independent still. The intervals are over other rows and other runs of these cells; they say nothing of data sets
    that are not among them.

    Args:
        cells: What `compare_groups` answered for each, of the same methods and scores.
        rows: Of each cell, where its rows come from: cells of one name may share some. Without it none do.

    Returns:
        One comparison a pair of methods, with the means over the cells.

    Raises:
        ValueError: For no cells, cells of other methods or scores, or more or fewer names than cells.

    Example:
        >>> labels = np.tile([0, 1], 50)
        >>> runs = lambda p: [np.where(labels[:, None] == [0, 1], q, 1 - q) for q in (p, p + 0.01)]
        >>> cell = compare_groups({"b": runs(0.9), "a": runs(0.7)}, labels, baseline="a", num_resamples=50)
        >>> (pooled,) = pool_comparisons([cell, cell], rows=["test", "test"])
        >>> pooled["nll"].over_rows[0] == cell[0]["nll"].over_rows[0]  # twice the same rows say no more than once
        True
    """
    asked = {tuple((pair.names, tuple(d.score for d in pair.differences)) for pair in cell) for cell in cells}
    if len(asked) != 1 or not cells[0]:
        raise ValueError("Pool comparisons of the same methods in the same scores, at least one.")
    if rows is not None and len(rows) != len(cells):
        raise ValueError(f"Name the rows of every cell: {len(cells)} cells, {len(rows)} names.")
    places = _places(range(len(cells)) if rows is None else rows)
    pairs, scores = [pair.names for pair in cells[0]], [d.score for d in cells[0][0].differences]
    level = cells[0][0].settings["confidence_level"]
    table = {
        key: [_pooled([cell[i][key] for cell in cells], places, level) for i in range(len(pairs))] for key in scores
    }
    counts = [cell[0].settings["num_runs"] for cell in cells]
    settings = {
        "num_cells": len(cells), "num_rows": sum(cell[0].settings["num_rows"] for cell in cells),
        "num_runs": {name: sum(count[name] for count in counts) for name in counts[0]},
        "confidence_level": level, "num_pairs": len(pairs),
    }  # fmt: skip
    return _comparisons(pairs, table, settings, level)


@dataclass(frozen=True)
class _Run:
    """The scores of one run on the rows, and in each resample of them."""

    point: dict[str, float]
    draws: dict[str, np.ndarray]

    @classmethod
    def of(cls, rows: Rows, options: dict[str, Any]) -> _Run:
        return cls(compute_panel(rows, options["num_bins"]), bootstrap_draws(rows, **options))


def _difference(
    score: str, a: list[_Run], b: list[_Run], num_rows: int, paired: bool, level: float
) -> GroupDifference:
    of_a, of_b = (np.array([run.point[score] for run in side]) for side in (a, b))
    drawn = np.mean([run.draws[score] for run in a], axis=0) - np.mean([run.draws[score] for run in b], axis=0)
    drawn = drawn[np.isfinite(drawn)]
    # a resample of n rows scatters by (n - 1) / n of what n other rows would
    over_rows = drawn.var() * num_rows / (num_rows - 1) if len(drawn) else np.nan
    sides = [of_a - of_b] if paired else [of_a, of_b]
    over_runs = [(side.var(ddof=1) / len(side), len(side) - 1) for side in sides]
    means, spreads = (of_a.mean(), of_b.mean()), (of_a.std(ddof=1), of_b.std(ddof=1))
    parts = (over_rows, num_rows - 1), over_runs
    return _with_error(score, means, spreads, *parts, level, is_bound=paired and len(a) < FEWEST_PAIRS)


def _places(names: Iterable[Hashable]) -> list[list[int]]:
    """Where each name stands."""
    found: dict[Hashable, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(name, []).append(place)
    return list(found.values())


def _pooled(column: Sequence[GroupDifference], places: Sequence[Sequence[int]], level: float) -> GroupDifference:
    count = len(column)
    if count == 1:
        return column[0]
    over_runs = [(part / count**2, freedom) for d in column for part, freedom in d.over_runs]
    over_rows = _summed([_together([column[i].over_rows for i in each], count) for each in places])
    means = np.mean([[d.a, d.b] for d in column], axis=0)
    spreads = np.sqrt(np.mean([[d.run_sd_a**2, d.run_sd_b**2] for d in column], axis=0))
    return _with_error(column[0].score, means, spreads, over_rows, over_runs, level)


def _together(parts: Sequence[Part], count: int) -> Part:
    """The most that errors which may be common to several of `count` cells make of their mean."""
    return (sum(part**0.5 for part, _ in parts) / count) ** 2, min(freedom for _, freedom in parts)


def _summed(parts: Sequence[Part]) -> Part:
    """Of independent errors, by Welch and Satterthwaite."""
    variance = sum(part for part, _ in parts)
    return variance, variance**2 / sum(part**2 / freedom for part, freedom in parts) if variance > 0 else parts[0][1]


def _with_error(
    score: str,
    means: Any,
    spreads: Any,
    over_rows: Part,
    over_runs: Sequence[Part],
    level: float,
    is_bound: bool = False,
) -> GroupDifference:
    """A difference whose variance is a sum of independent parts, each with its degrees of freedom.

    With `is_bound` its interval is a bound for any number of degrees.
    """
    (a, b), (sd_a, sd_b) = map(float, means), map(float, spreads)
    parts = [over_rows, *over_runs]
    whole = _summed(parts)
    error, freedom, p = float(np.sqrt(whole[0])), float("nan"), 1.0
    low = high = float("nan")
    if whole[0] > 0:  # where nothing scatters there is nothing to judge by
        freedom = float(whole[1])
        judged = parts if is_bound else [whole]
        half = _reach(judged, 1.0 - level)
        low, high = float(a - b - half), float(a - b + half)
        p = _p_value(judged, abs(a - b))
    rows, *runs = ((float(part), float(df)) for part, df in parts)
    return GroupDifference(
        score, a, b, a - b, low, high, p, p, None, sd_a, sd_b, error, freedom, over_rows=rows, over_runs=tuple(runs)
    )


def _reach(parts: Sequence[Part], alpha: float) -> float:
    """How far a difference may lie from its truth: beyond it with a probability of at most `alpha` (Banerjee, 1960).

    Of a single part that is Student's t, exactly.
    """
    return float(np.sqrt(sum(part * stdtrit(df, 1.0 - 0.5 * alpha) ** 2 for part, df in parts)))


def _p_value(parts: Sequence[Part], distance: float) -> float:
    """The level at which a difference is just as far away as it may be."""
    if distance <= 0.0:
        return 1.0
    if len(parts) == 1:
        (part, df), = parts  # fmt: skip
        return float(2 * stats.t.sf(distance / np.sqrt(part), df))
    if _reach(parts, SMALLEST_P) <= distance:
        return SMALLEST_P
    return float(np.exp(brentq(lambda place: _reach(parts, np.exp(place)) - distance, np.log(SMALLEST_P), 0.0)))


def _comparisons(
    pairs: Sequence[tuple[str, str]],
    table: Mapping[str, list[GroupDifference]],
    settings: dict[str, Any],
    level: float,
) -> list[GroupComparison]:
    corrected = {key: corrected_for_pairs(column, 1.0 - level) for key, column in table.items()}
    return [GroupComparison(pair, tuple(corrected[key][i] for key in table), settings) for i, pair in enumerate(pairs)]


def _check_runs(groups: Mapping[str, Sequence[Any]], paired: bool) -> None:
    counts = {name: len(runs) for name, runs in groups.items()}
    if min(counts.values(), default=2) < 2:
        raise ValueError(
            f"Give at least two runs of every method, since one says nothing of the spread between runs; got {counts}."
        )
    if paired and len(set(counts.values())) > 1:
        raise ValueError(f"Paired runs are as many in every method, got {counts}.")
