"""Selective prediction and error detection: does the uncertainty know where the errors are?

Every function takes `Ranking`, rows grouped by distinct uncertainty: ties count in expectation, in any order of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import digamma

from ..bins import Groups, group_by_value, top_outcomes
from ..inputs import as_numpy, as_rows


class Ranking(NamedTuple):
    """Rows grouped by uncertainty, the surest first."""

    counts: np.ndarray  # `(G,)` rows of each distinct uncertainty
    errors: np.ndarray  # `(G,)` errors among them
    ends: np.ndarray  # `(G,)` rows up to each group, the group included
    wrong: np.ndarray  # `(G,)` errors likewise

    @property
    def num_rows(self) -> float:
        """Rows, or the sum of their weights."""
        return self.ends[-1].item()

    @property
    def is_whole(self) -> bool:
        """Whether rows are counted, and not weighed."""
        return float(self.ends[-1]).is_integer() and float(self.wrong[-1]).is_integer()

    @property
    def num_errors(self) -> float:
        return float(self.wrong[-1])

    @property
    def error_rate(self) -> float:
        return self.num_errors / self.num_rows


def rank(uncertainty: Any, errors: Any) -> Ranking:
    """Groups `(N,)` rows by uncertainty, larger where less sure; errors are 1 where the prediction is wrong."""
    scores, wrong = as_numpy(uncertainty, "uncertainty").astype(np.float64), as_numpy(errors, "errors")
    if scores.ndim != 1 or wrong.shape != scores.shape or len(scores) == 0:
        raise ValueError(
            f"uncertainty and errors must be 1-D, paired and not empty, got {scores.shape} and {wrong.shape}."
        )
    if not np.isfinite(scores).all():
        raise ValueError("uncertainty holds NaN or infinity; rank it by a finite score.")
    if not np.isin(wrong, (0, 1)).all():
        raise ValueError("errors must be booleans or zeros and ones (1 where the prediction is wrong).")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    errors = np.bincount(inverse.reshape(-1), weights=wrong.astype(np.float64), minlength=len(counts))
    return Ranking(counts, errors, np.cumsum(counts), np.cumsum(errors))


def rank_by_confidence(groups: Groups) -> Ranking:
    """Ranking by top-label confidence, from rows grouped by it in ascending order."""
    rows, _, right = groups.up_to
    ends = (rows[-1] - rows[:-1])[::-1]
    counts = groups.counts[::-1].astype(np.float64)
    return Ranking(counts, counts - groups.outcome_sums[::-1], ends, ends - (right[-1] - right[:-1])[::-1])


def selective_scores(
    predictions: Any,
    references: Any,
    *,
    input: str = "probabilities",
    coverages: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    risks: Sequence[float] = (0.01, 0.05, 0.1),
) -> dict[str, float]:
    """Every selective-prediction score; NaN where it needs an error (or a correct row) and there is none.

    `(N,)` uncertainties (`input="uncertainty"`) come with errors, zeros and ones; else rows are ranked by `1 - max p`.
    """
    if input == "uncertainty":
        ranking = rank(predictions, references)
    else:
        rows = as_rows(predictions, references, input=input)
        confidence, correct = top_outcomes(rows.probabilities, rows.labels)
        ranking = rank_by_confidence(group_by_value(confidence, correct))
    return {
        "error_rate": ranking.error_rate,
        **ranking_scores(ranking),
        "prediction_rejection_ratio": prediction_rejection_ratio(ranking),
        "errors_accepted_at_95": errors_accepted_at_95(ranking),
        "correct_flagged_at_95": correct_flagged_at_95(ranking),
        **{f"accuracy_at_coverage_{c:g}": accuracy_at_coverage(ranking, c) for c in coverages},
        **{f"coverage_at_risk_{r:g}": coverage_at_risk(ranking, r) for r in risks},
        "num_distinct_scores": len(ranking.counts),
    }


def ranking_scores(ranking: Ranking) -> dict[str, float]:
    """The scores of a report that follow from a ranking alone."""
    auroc, area = error_auroc(ranking), aurc(ranking)
    return {
        "error_auroc": auroc,
        "error_aupr": error_aupr(ranking),
        "success_aupr": success_aupr(ranking),
        "aurc": area,
        "e_aurc": area - float(oracle_aurc(ranking.num_rows, ranking.num_errors, whole=ranking.is_whole)),
        "augrc": float(augrc(auroc, ranking.num_rows, ranking.num_errors)),
    }


def error_auroc(ranking: Ranking) -> float:
    """`P(u_error > u_correct) + P(tie) / 2`; NaN when there is no error, or nothing else."""
    surer = ranking.errors @ (ranking.ends - 0.5 * ranking.counts)
    return float(auroc_of_pairs(surer, ranking.num_rows, ranking.num_errors))


def auroc_of_pairs(
    surer: np.ndarray | float, num_rows: np.ndarray | float, num_errors: np.ndarray | float
) -> np.ndarray:
    """The AUROC of errors; NaN where there is no error, or nothing else.

    Pairs of an error and a surer correct row number `surer - E^2 / 2`, ties half, with `surer` the sum over groups of
    errors times the number of surer rows plus half the group.
    """
    pairs = np.asarray(num_errors * (num_rows - num_errors), dtype=np.float64)
    return np.divide(surer - 0.5 * num_errors**2, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def error_aupr(ranking: Ranking) -> float:
    """Average precision of errors, ranked by uncertainty; chance is the error rate. NaN without errors."""
    before = ranking.ends - ranking.counts, ranking.wrong - ranking.errors
    found = ranking.num_errors - before[1]
    return _average_precision(ranking.errors, found, ranking.num_rows - before[0], ranking.num_errors)


def success_aupr(ranking: Ranking) -> float:
    """Average precision of correct rows, ranked by confidence; chance is the accuracy. NaN without one."""
    num_correct = ranking.num_rows - ranking.num_errors
    return _average_precision(ranking.counts - ranking.errors, ranking.ends - ranking.wrong, ranking.ends, num_correct)


def aurc(ranking: Ranking) -> float:
    """Area under the risk-coverage curve, the mean error rate of the k surest rows (Geifman & El-Yaniv, 2017).

    With `w` errors before a group of ties and `e` a row in it, its rows `k = a + 1 .. b` add, in expectation,
    `sum_k (w + e (k - a)) / k = e (b - a) + (w - e a) (H_b - H_a)`.
    """
    counts, errors, ends, wrong = ranking
    # sums of weights are rounded: what lies before the first rows may come out below 0, where digamma has its poles
    before, share, harmonic = np.maximum(ends - counts, 0.0), errors / counts, 1.0 / ends
    tied = np.flatnonzero(counts != 1)
    harmonic[tied] = digamma(ends[tied] + 1.0) - digamma(before[tied] + 1.0)
    return float((ranking.num_errors + (wrong - errors - share * before) @ harmonic) / ranking.num_rows)


def oracle_aurc(num_rows: np.ndarray | float, num_errors: np.ndarray | float, *, whole: bool = True) -> np.ndarray:
    """AURC of the order that puts every error last; `e_aurc` is what is above it (Geifman et al., 2019).

    `whole` says that rows are counted, so that what sums of float32 miss by is rounded off.
    """
    right = np.rint(num_rows - num_errors) if whole else np.subtract(num_rows, num_errors)
    # `sum_{i <= c} (H_N - H_{i-1}) = c (1 + H_N - H_c)`, with `H_n = digamma(n + 1) + 0.577...`
    area = right * (1.0 + digamma(np.add(num_rows, 1.0)) - digamma(np.add(right, 1.0)))
    return 1.0 - area / num_rows


def augrc(auroc: np.ndarray | float, num_rows: np.ndarray | float, num_errors: np.ndarray | float) -> np.ndarray:
    """Area under the generalised risk-coverage curve, `(1 - AUROC) e (1 - e) + e^2 / 2` (Traub et al., 2024)."""
    rate = num_errors / num_rows
    return np.nan_to_num((1.0 - auroc) * rate * (1.0 - rate)) + 0.5 * rate**2


def prediction_rejection_ratio(ranking: Ranking) -> float:
    """Share of the attainable AURC gain over a random ranking: 1 for the oracle, 0 for random, NaN if none is."""
    attainable = ranking.error_rate - float(oracle_aurc(ranking.num_rows, ranking.num_errors))
    return float((ranking.error_rate - aurc(ranking)) / attainable) if attainable > 1e-12 else float("nan")


def risk_coverage_curve(ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
    """`(G,)` coverages, ascending to 1, and `(G,)` error rates at every distinct threshold."""
    return ranking.ends / ranking.num_rows, ranking.wrong / ranking.ends


def accuracy_at_coverage(ranking: Ranking, coverage: float) -> float:
    """Expected accuracy of the `ceil(coverage N)` surest rows, a tied group being drawn from at random."""
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage must lie in (0, 1], got {coverage!r}.")
    ends, wrong = (np.concatenate([[0], part]) for part in (ranking.ends, ranking.wrong))
    # 0.07 * 100 is 7.000000000000001: without the guard the ceiling would accept an eighth row.
    accepted = np.ceil(coverage * ends[-1] - 1e-9)
    return float(1.0 - np.interp(accepted, ends, wrong) / accepted)


def coverage_at_risk(ranking: Ranking, risk: float) -> float:
    """Largest coverage of any threshold whose error rate is at most `risk`; 0 if there is none."""
    if not 0.0 <= risk <= 1.0:
        raise ValueError(f"risk must lie in [0, 1], got {risk!r}.")
    coverage, risks = risk_coverage_curve(ranking)
    admissible = coverage[risks <= risk + 1e-12]
    return float(admissible[-1]) if len(admissible) else 0.0


def errors_accepted_at_95(ranking: Ranking) -> float:
    """FPR@95, success positive: least share of errors accepted where at least 95 % of the correct rows are."""
    return _rate_at_95(ranking.counts - ranking.errors, ranking.errors)


def correct_flagged_at_95(ranking: Ranking) -> float:
    """FPR@95, error positive: least share of correct rows flagged where at least 95 % of the errors are."""
    return _rate_at_95(ranking.errors[::-1], (ranking.counts - ranking.errors)[::-1])


def _rate_at_95(positives: np.ndarray, negatives: np.ndarray) -> float:
    if positives.sum() == 0 or negatives.sum() == 0:
        return float("nan")
    reached = np.cumsum(positives) >= 0.95 * positives.sum() - 1e-9
    return float(np.cumsum(negatives)[np.argmax(reached)] / negatives.sum())


def _average_precision(positives: np.ndarray, found: np.ndarray, looked_at: np.ndarray, total: float) -> float:
    return float((found / looked_at) @ positives / total) if total else float("nan")
