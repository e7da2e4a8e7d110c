"""Is one model better than another on the same rows? Paired bootstrap, with a verdict in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from ..inputs import Rows, as_rows, check_confidence_level, check_num_bins
from ..scores.panel import compute_panel
from ..scores.table import BY_KEY, COMPARED, refuse_unknown
from .intervals import bootstrap_draws, num_resamples_for, swapped_draws


@dataclass(frozen=True)
class Difference:
    """One score of two models on the same rows.

    Attributes:
        score: Its key.
        a, b: The score of either model.
        difference: `a - b`.
        low, high: Interval of the difference.
        p_value: Two-sided p-value of no difference, the larger of bootstrap and swaps.
        adjusted_p_value: After Holm's correction for the number of model pairs compared.
        better: `"a"`, `"b"` or None where the data cannot tell, and of scores without a better side.
    """

    score: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float
    adjusted_p_value: float
    better: str | None


D = TypeVar("D", bound=Difference)


@dataclass(frozen=True)
class Comparison:
    """Two models, score by score.

    Attributes:
        names: Of model a and model b.
        differences: One a score.
        settings: Rows, confidence level, resamples, seed, number of pairs corrected for.
    """

    names: tuple[str, str]
    differences: tuple[Difference, ...]
    settings: dict[str, Any]

    def __getitem__(self, score: str) -> Difference:
        return {difference.score: difference for difference in self.differences}[score]

    @property
    def basis(self) -> str:
        """What the comparison rests on, in words."""
        return f"{self.settings['num_rows']:,} rows"

    @property
    def verdict(self) -> str:
        """In words: which scores tell the models apart, and which do not."""
        a, b = self.names
        parts = []
        for side, name, other in (("a", a, b), ("b", b, a)):
            won = [d for d in self.differences if d.better == side]
            if won:
                listed = ", ".join(f"{d.score} ({abs(d.difference):.4f}, p = {d.adjusted_p_value:.3g})" for d in won)
                parts.append(f"{name} is better than {other} in {listed}")
        alpha = 1.0 - self.settings["confidence_level"]
        apart = [d for d in self.differences if not BY_KEY[d.score].better and d.adjusted_p_value < alpha]
        if apart:
            told = ", ".join(f"{d.score} ({d.difference:+.4f}, p = {d.adjusted_p_value:.3g})" for d in apart)
            parts.append(f"{a} and {b} differ in {told}, of which neither side is better")
        open_ = [d.score for d in self.differences if d.better is None and d not in apart]
        if open_:
            parts.append(f"{self.basis} cannot tell them apart in {', '.join(open_)}")
        return "; ".join(parts) + "."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        scores = {d.score: {k: v for k, v in vars(d).items() if k != "score"} for d in self.differences}
        return {
            "a": self.names[0],
            "b": self.names[1],
            "verdict": self.verdict,
            "scores": scores,
            "settings": self.settings,
        }

    def to_markdown(self) -> str:
        """The verdict and a table."""
        a, b = self.names
        level = f"{self.settings['confidence_level']:.0%}"
        a, b = (name.replace("|", "\\|").replace("\n", " ") for name in (a, b))  # a name must not end its cell
        lines = [self.verdict, "", f"| score | {a} | {b} | difference | {level} interval | p | better |"]
        lines.append("|---|---:|---:|---:|---:|---:|---|")
        for d in self.differences:
            winner = {"a": a, "b": b, None: "–"}[d.better]
            numbers = f"{d.a:.4f} | {d.b:.4f} | {d.difference:+.4f} | [{d.low:+.4f}, {d.high:+.4f}]"
            lines.append(f"| {d.score} | {numbers} | {d.adjusted_p_value:.3g} | {winner} |")
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()


def compare(
    a: Any,
    b: Any,
    labels: Any,
    *,
    names: tuple[str, str] = ("a", "b"),
    scores: Sequence[str] = COMPARED,
    num_bins: int = 15,
    confidence_level: float = 0.95,
    num_resamples: int | None = None,
    input: str = "probabilities",
    mask: Any = None,
    ignore_index: int | None = -100,
    seed: int = 0,
) -> Comparison:
    """Compares two models on the same rows by a paired bootstrap and a test of swaps.

    Both models are scored on the same resampled rows, so what the rows have in common cancels. A bootstrap of a few
    rows knows nothing but those: one row gives the same difference in every resample. So the p-value is the larger
    of the bootstrap's and that of swapping the models' predictions row by row, which is exact at every number of rows.
    A score is called better where it is below `1 - confidence_level`; five rows or fewer cannot reach 0.05.

    Args:
        a: Predictions of the first model, as for `calibration_report`.
        b: Predictions of the second.
        labels: Integer class ids, in the same order for both.
        names: What to call the models.
        scores: Keys of a report.
        num_bins: Bins of every binned score.
        confidence_level: Of the intervals of the differences.
        num_resamples: Bootstrap resamples; by default 1,000, fewer for very many rows.
        input: `"probabilities"` or `"logits"`, for both.
        mask: Rows to keep.
        ignore_index: Label of rows to drop.
        seed: Of the private generator.

    Returns:
        The comparison; print it, or read `.verdict`.

    Raises:
        ValueError: For bad input, or predictions for another number of rows or classes.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> labels = generator.integers(0, 2, 500)
        >>> sure = np.where(labels[:, None] == [0, 1], 0.9, 0.1)
        >>> compare(sure, np.full((500, 2), 0.5), labels, num_resamples=100)["nll"].better
        'a'
    """
    return compare_many(
        {names[0]: a, names[1]: b}, labels, baseline=names[1], scores=scores, num_bins=num_bins, input=input,
        mask=mask, confidence_level=confidence_level, num_resamples=num_resamples, ignore_index=ignore_index,
        seed=seed,
    )[0]  # fmt: skip


def compare_many(
    models: Mapping[str, Any],
    labels: Any,
    *,
    baseline: str | None = None,
    scores: Sequence[str] = COMPARED,
    num_bins: int = 15,
    confidence_level: float = 0.95,
    num_resamples: int | None = None,
    input: str = "probabilities",
    mask: Any = None,
    ignore_index: int | None = -100,
    seed: int = 0,
) -> list[Comparison]:
    """Compares several models, each with a baseline or each with each, with Holm's (1979) correction.

    The correction is over the pairs, score by score: the chance that any pair is called different in a score where
    none is stays below `1 - confidence_level`. Intervals are not widened for the number of pairs.

    Args:
        models: Name to predictions.
        labels: Integer class ids.
        baseline: The model all others are compared with; None compares every pair.
        scores: Keys of a report.
        num_bins: Bins of every binned score.
        confidence_level: Of the intervals.
        num_resamples: Bootstrap resamples; by default 1,000, fewer for very many rows.
        input: `"probabilities"` or `"logits"`, for all.
        mask: Rows to keep.
        ignore_index: Label of rows to drop.
        seed: Of the private generator.

    Returns:
        One comparison a pair.

    Raises:
        ValueError: For fewer than two models, an unknown baseline or score, or bad input.
    """
    plan = ComparisonPlan.of(
        {name: [p] for name, p in models.items()}, labels, baseline=baseline, scores=scores, num_bins=num_bins,
        confidence_level=confidence_level, num_resamples=num_resamples, input=input, mask=mask,
        ignore_index=ignore_index, seed=seed,
    )  # fmt: skip
    rows = {name: runs[0] for name, runs in plan.rows.items()}
    points = {name: compute_panel(r, plan.resampling["num_bins"]) for name, r in rows.items()}
    # Equal seeds resample the same rows for every model: that is the pairing.
    draws = {name: bootstrap_draws(r, **plan.resampling) for name, r in rows.items()}
    swaps = {(a, b): swapped_draws(rows[a], rows[b], **plan.resampling) for a, b in plan.pairs}
    corrected = {}
    for key in scores:
        column = []
        for a, b in plan.pairs:
            found = _difference(key, points[a][key], points[b][key], draws[a][key] - draws[b][key], plan.level)
            column.append(_swapped(found, swaps[a, b][key], 1.0 - plan.level))
        corrected[key] = corrected_for_pairs(column, 1.0 - plan.level)
    settings = plan.settings()
    return [
        Comparison(pair, tuple(corrected[key][i] for key in scores), settings) for i, pair in enumerate(plan.pairs)
    ]


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison that can be made: what was given has been checked, what was left open is chosen.

    Attributes:
        rows: Name to the rows of its runs, all of the same shape.
        pairs: Names to compare.
        resampling: Options of `bootstrap_draws` and `swapped_draws`.
        level: Of the intervals.
    """

    rows: dict[str, list[Rows]]
    pairs: list[tuple[str, str]]
    resampling: dict[str, Any]
    level: float

    @classmethod
    def of(
        cls,
        models: Mapping[str, Sequence[Any]],
        labels: Any,
        *,
        baseline: str | None,
        scores: Sequence[str],
        num_bins: int,
        confidence_level: float,
        num_resamples: int | None,
        seed: int,
        **rows_as: Any,
    ) -> ComparisonPlan:
        """Check names, scores and predictions; `rows_as` are options of `as_rows`."""
        refuse_unknown(scores)
        if len(models) < 2 or (baseline is not None and baseline not in models):
            raise ValueError(
                f"Give at least two to compare, the baseline {baseline!r} among them; got {list(models)}."
            )
        num_bins, level = check_num_bins(num_bins), check_confidence_level(confidence_level)
        rows = {name: [as_rows(run, labels, **rows_as) for run in runs] for name, runs in models.items()}
        shapes = {name: sorted({run.probabilities.shape for run in runs}) for name, runs in rows.items()}
        if len({shape for found in shapes.values() for shape in found}) > 1:
            raise ValueError(f"All must predict the same rows and classes, got {shapes}.")
        first = next(iter(rows.values()))[0]
        resamples = num_resamples or num_resamples_for(len(first.labels), first.num_classes)
        resampling = {"num_bins": num_bins, "num_resamples": resamples, "seed": seed, "scores": tuple(scores)}
        return cls(rows, pairs_of(rows, baseline), resampling, level)

    @property
    def num_rows(self) -> int:
        """Rows that are compared."""
        return len(next(iter(self.rows.values()))[0].labels)

    def settings(self, **more: Any) -> dict[str, Any]:
        """What the comparison rests on, for its record."""
        how = {name: self.resampling[name] for name in ("num_bins", "num_resamples", "seed")}
        return {"num_rows": self.num_rows, "confidence_level": self.level, **how, "num_pairs": len(self.pairs), **more}


def pairs_of(names: Iterable[str], baseline: str | None) -> list[tuple[str, str]]:
    """Every other model with the baseline, or every pair once."""
    return [*combinations(names, 2)] if baseline is None else [(name, baseline) for name in names if name != baseline]


def _difference(score: str, a: float, b: float, drawn: np.ndarray, level: float) -> Difference:
    """The difference by the `(R,)` resampled ones."""
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) == 0:
        return Difference(score, a, b, a - b, np.nan, np.nan, 1.0, 1.0, None)
    low, high = np.quantile(drawn, (0.5 - 0.5 * level, 0.5 + 0.5 * level))
    # Ties count on both sides, and one is added: a bootstrap of R resamples cannot show p below 2 / (R + 1).
    below, above = (drawn <= 0.0).sum() + 1, (drawn >= 0.0).sum() + 1
    p = min(1.0, 2.0 * min(below, above) / (len(drawn) + 1))
    return Difference(score, a, b, a - b, float(low), float(high), float(p), float(p), None)


def _swapped(found: Difference, swapped: np.ndarray, alpha: float) -> Difference:
    """The difference with the larger of its p-value and that of the swaps; its interval holds 0 unless both are small.

    The models' own sides are one of the swaps, so the share of those that differ as much is exact where all are taken.
    """
    observed, others = swapped[0], swapped[np.isfinite(swapped)]
    if not np.isfinite(observed) or len(others) < 2:
        return replace(found, p_value=1.0, adjusted_p_value=1.0)
    slack = 1e-6 * (abs(observed) + 1e-6)  # sums are float32
    p = max(found.p_value, float((np.abs(others) >= abs(observed) - slack).mean()))
    low, high = (found.low, found.high) if p < alpha else (min(found.low, 0.0), max(found.high, 0.0))
    return replace(found, low=low, high=high, p_value=p, adjusted_p_value=p)


def corrected_for_pairs(column: Sequence[D], alpha: float) -> list[D]:
    """Holm's step-down adjustment over the pairs of one score, and who is better at that level."""
    p_values = np.array([d.p_value for d in column])
    order, adjusted = np.argsort(p_values, kind="stable"), np.empty(len(column))
    steps = np.minimum(p_values[order] * np.arange(len(column), 0, -1), 1.0)
    adjusted[order] = np.maximum.accumulate(steps)
    result = []
    for d, p in zip(column, adjusted.tolist(), strict=True):
        better = BY_KEY[d.score].better
        side = "a" if (d.difference > 0) == (better == "high") else "b"
        result.append(replace(d, adjusted_p_value=p, better=side if better and p < alpha else None))
    return result
