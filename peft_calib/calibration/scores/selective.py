# SPDX-License-Identifier: Apache-2.0
"""Selective prediction and error detection: does the uncertainty know where the errors are?

Every function takes `Ranking`, rows grouped by distinct uncertainty, so tied scores are handled exactly (as the
expectation over random tie-breaking) and the order of the rows cannot matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_calib.calibration.bins import Groups, top_label
from peft_calib.calibration.inputs import as_numpy, as_rows


class Ranking(NamedTuple):
    """Rows grouped by uncertainty, the surest first.

    Attributes:
        counts: `(G,)` rows of each distinct uncertainty.
        errors: `(G,)` errors among them.
    """

    counts: np.ndarray
    errors: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.counts.sum())

    @property
    def error_rate(self) -> float:
        return float(self.errors.sum() / self.counts.sum())


def rank(uncertainty: Any, errors: Any) -> Ranking:
    """Groups rows by uncertainty.

    Args:
        uncertainty: `(N,)` finite numbers, larger where less sure (entropy, `1 - max p`, a head's score).
        errors: `(N,)` booleans or zeros and ones, 1 where the prediction is wrong.

    Returns:
        The ranking.

    Raises:
        ValueError: for another shape, no row, a score that is not finite, or errors other than 0 and 1.

    Example:
        >>> rank([0.1, 0.3, 0.3], [0, 1, 0]).errors
        array([0., 1.])
    """
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
    return Ranking(counts, np.bincount(inverse.reshape(-1), weights=wrong.astype(np.float64), minlength=len(counts)))


def rank_by_confidence(groups: Groups) -> Ranking:
    """Ranking by top-label confidence, from rows grouped by it in ascending order."""
    return Ranking(groups.counts[::-1], (groups.counts - groups.outcome_sums)[::-1])


def selective_scores(
    predictions: Any,
    references: Any,
    *,
    input: str = "probabilities",
    coverages: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    risks: Sequence[float] = (0.01, 0.05, 0.1),
) -> dict[str, float]:
    """Every selective-prediction score.

    Args:
        predictions: `(N, C)` probabilities or logits, ranked by `1 - max p`; or `(N,)` uncertainties.
        references: `(N,)` labels; or errors, zeros and ones, where predictions are uncertainties.
        input: `"probabilities"`, `"logits"` or `"uncertainty"`.
        coverages: coverages to give the accuracy at.
        risks: error rates to give the coverage at.

    Returns:
        Score to number; NaN where a score needs an error (or a correct row) and there is none.

    Raises:
        ValueError: for bad input, see `rank` and `as_rows`.
    """
    if input == "uncertainty":
        ranking = rank(predictions, references)
    else:
        rows = as_rows(predictions, references, input=input)
        confidence, predicted = top_label(rows.probabilities)
        ranking = rank(1.0 - confidence, predicted != rows.labels)
    return {
        "error_rate": ranking.error_rate,
        "error_auroc": error_auroc(ranking),
        "error_aupr": error_aupr(ranking),
        "success_aupr": success_aupr(ranking),
        "aurc": aurc(ranking),
        "e_aurc": e_aurc(ranking),
        "augrc": augrc(ranking),
        "prediction_rejection_ratio": prediction_rejection_ratio(ranking),
        "errors_accepted_at_95": errors_accepted_at(ranking),
        "correct_flagged_at_95": correct_flagged_at(ranking),
        **{f"accuracy_at_coverage_{c:g}": accuracy_at_coverage(ranking, c) for c in coverages},
        **{f"coverage_at_risk_{r:g}": coverage_at_risk(ranking, r) for r in risks},
        "num_distinct_scores": len(ranking.counts),
    }


def error_auroc(ranking: Ranking) -> float:
    """`P(u_error > u_correct) + P(tie) / 2`; NaN when there is no error, or nothing else."""
    correct = ranking.counts - ranking.errors
    num_errors, num_correct = ranking.errors.sum(), correct.sum()
    if num_errors == 0 or num_correct == 0:
        return float("nan")
    surer = np.cumsum(correct) - 0.5 * correct
    return float(ranking.errors @ surer / (num_errors * num_correct))


def error_aupr(ranking: Ranking) -> float:
    """Average precision of errors, ranked by uncertainty; chance is the error rate. NaN without errors."""
    return _average_precision(ranking.errors[::-1], ranking.counts[::-1])


def success_aupr(ranking: Ranking) -> float:
    """Average precision of correct rows, ranked by confidence; chance is the accuracy. NaN without one."""
    return _average_precision(ranking.counts - ranking.errors, ranking.counts)


def aurc(ranking: Ranking) -> float:
    """Area under the risk-coverage curve, `(1/N) sum_k r_k` with `r_k` the error rate of the k surest rows.

    Written as `(1/N) sum_i e_(i) (H_N - H_{i-1})` with harmonic numbers, where each tied row carries its group's mean
    error. A random ranking scores the error rate (Geifman & El-Yaniv, 2017).
    """
    ends = np.cumsum(ranking.counts)
    area = _harmonic_area(np.concatenate([[0], ends]), int(ends[-1]))
    return float((ranking.errors / ranking.counts) @ np.diff(area) / ends[-1])


def oracle_aurc(ranking: Ranking) -> float:
    """AURC, by the same finite-sample rule, of the order that puts every error last."""
    return aurc(_oracle(ranking.num_rows, round(float(ranking.errors.sum()))))


def e_aurc(ranking: Ranking) -> float:
    """Excess AURC over the oracle order; 0 for a perfect ranking (Geifman et al., 2019)."""
    return aurc(ranking) - oracle_aurc(ranking)


def augrc(ranking: Ranking) -> float:
    """Area under the generalised risk-coverage curve, `(1 - AUROC) e (1 - e) + e^2 / 2` (Traub et al., 2024)."""
    rate = ranking.error_rate
    if rate in (0.0, 1.0):
        return 0.5 * rate
    return float((1.0 - error_auroc(ranking)) * rate * (1.0 - rate) + 0.5 * rate**2)


def prediction_rejection_ratio(ranking: Ranking) -> float:
    """Share of the attainable AURC gain over a random ranking: 1 for the oracle, 0 for random, NaN if none is."""
    attainable = ranking.error_rate - oracle_aurc(ranking)
    return float((ranking.error_rate - aurc(ranking)) / attainable) if attainable > 1e-12 else float("nan")


def risk_coverage_curve(ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and error rate at every distinct threshold.

    Returns:
        `(G,)` coverages, ascending to 1, and `(G,)` risks.
    """
    ends = np.cumsum(ranking.counts)
    return ends / ends[-1], np.cumsum(ranking.errors) / ends


def accuracy_at_coverage(ranking: Ranking, coverage: float) -> float:
    """Expected accuracy of the `ceil(coverage N)` surest rows, a tied group being drawn from at random.

    Raises:
        ValueError: if the coverage is not in (0, 1].
    """
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage must lie in (0, 1], got {coverage!r}.")
    ends = np.concatenate([[0], np.cumsum(ranking.counts)])
    # 0.07 * 100 is 7.000000000000001: without the guard the ceiling would accept an eighth row.
    accepted = np.ceil(coverage * ends[-1] - 1e-9)
    return float(1.0 - np.interp(accepted, ends, np.concatenate([[0.0], np.cumsum(ranking.errors)])) / accepted)


def coverage_at_risk(ranking: Ranking, risk: float) -> float:
    """Largest coverage of any threshold whose error rate is at most `risk`; 0 if there is none.

    Raises:
        ValueError: if the risk is not in [0, 1].
    """
    if not 0.0 <= risk <= 1.0:
        raise ValueError(f"risk must lie in [0, 1], got {risk!r}.")
    coverage, risks = risk_coverage_curve(ranking)
    admissible = coverage[risks <= risk + 1e-12]
    return float(admissible[-1]) if len(admissible) else 0.0


def errors_accepted_at(ranking: Ranking, correct_accepted: float = 0.95) -> float:
    """FPR@95, success positive: least share of errors accepted where at least 95 % of the correct rows are."""
    correct = ranking.counts - ranking.errors
    return _rate_at(correct, ranking.errors, correct_accepted)


def correct_flagged_at(ranking: Ranking, errors_flagged: float = 0.95) -> float:
    """FPR@95, error positive: least share of correct rows flagged where at least 95 % of the errors are."""
    correct = ranking.counts - ranking.errors
    return _rate_at(ranking.errors[::-1], correct[::-1], errors_flagged)


def _rate_at(positives: np.ndarray, negatives: np.ndarray, recall: float) -> float:
    if positives.sum() == 0 or negatives.sum() == 0:
        return float("nan")
    reached = np.cumsum(positives) >= recall * positives.sum() - 1e-9
    return float(np.cumsum(negatives)[np.argmax(reached)] / negatives.sum())


def _average_precision(positives: np.ndarray, counts: np.ndarray) -> float:
    if positives.sum() == 0:
        return float("nan")
    precision = np.cumsum(positives) / np.cumsum(counts)
    return float(precision @ positives / positives.sum())


def _oracle(num_rows: int, num_errors: int) -> Ranking:
    counts = np.array([num_rows - num_errors, num_errors])
    errors = np.array([0.0, float(num_errors)])
    return Ranking(counts[counts > 0], errors[counts > 0])


def harmonic(n: np.ndarray) -> np.ndarray:
    """Harmonic numbers `H_n` to float64 rounding: summed below 256, by their asymptotic series above."""
    n = np.asarray(n)
    small = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, 256))])
    large = np.maximum(n, 1).astype(np.float64)
    series = np.log(large) + np.euler_gamma + 0.5 / large - 1.0 / (12.0 * large**2) + 1.0 / (120.0 * large**4)
    return np.where(n < 256, small[np.minimum(n, 255)], series)


def _harmonic_area(ends: np.ndarray, total: int) -> np.ndarray:
    """`sum_{i <= c} (H_N - H_{i-1}) = c (1 + H_N - H_c)` at each `c`."""
    return ends * (1.0 + harmonic(np.array([total])) - harmonic(ends))
