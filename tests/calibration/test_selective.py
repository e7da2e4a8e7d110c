"""Selective prediction against brute force, scikit-learn and closed forms; ties in expectation."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from peft_calib.calibration import calibration_report
from peft_calib.calibration.bins import tie_key
from peft_calib.calibration.scores.selective import (
    accuracy_at_coverage,
    aurc,
    correct_flagged_at_95,
    coverage_at_risk,
    error_aupr,
    error_auroc,
    errors_accepted_at_95,
    prediction_rejection_ratio,
    rank,
    ranking_scores,
    risk_coverage_curve,
    selective_scores,
    success_aupr,
)
from peft_calib.calibration.scores.uncertainty import uncertainty_scores


def _data(seed: int, size: int = 200, levels: int | None = None):
    generator = np.random.default_rng(seed)
    u = generator.random(size)
    e = generator.random(size) < 0.1 + 0.5 * u
    return (u if levels is None else np.floor(u * levels) / levels), e


@pytest.mark.parametrize("levels", [None, 8, 1])
def test_against_scikit_learn(levels):
    u, e = _data(0, levels=levels)
    ranking = rank(u, e)
    assert error_auroc(ranking) == pytest.approx(roc_auc_score(e, u), abs=1e-12)
    assert error_aupr(ranking) == pytest.approx(average_precision_score(e, u), abs=1e-12)
    assert success_aupr(ranking) == pytest.approx(average_precision_score(~e, -u), abs=1e-12)


def _aurc_of_order(errors) -> float:
    return float(np.mean(np.cumsum(errors) / np.arange(1, len(errors) + 1)))


def test_aurc_without_ties_is_the_mean_of_the_risks():
    u, e = _data(1)
    assert aurc(rank(u, e)) == pytest.approx(_aurc_of_order(e[np.argsort(u)]), abs=1e-12)


def test_aurc_with_ties_is_the_mean_over_all_orders_of_tied_rows():
    u, e = np.array([0.1, 0.5, 0.5, 0.5, 0.9, 0.9]), np.array([0, 1, 0, 1, 1, 0])
    values = []
    for middle in itertools.permutations([1, 2, 3]):
        for end in itertools.permutations([4, 5]):
            values.append(_aurc_of_order(e[[0, *middle, *end]]))
    assert aurc(rank(u, e)) == pytest.approx(np.mean(values), abs=1e-12)


def test_order_of_rows_changes_the_naive_aurc_and_not_ours():
    """lm-polygraph sorts stably, so that the input order decides among ties: 0.025 to 0.061 on one data set."""
    u, e = _data(2, 872, levels=8)
    orders = [np.argsort(e, kind="stable"), np.argsort(~e, kind="stable"), np.arange(len(e))]
    naive = [_aurc_of_order(e[o][np.argsort(u[o], kind="stable")]) for o in orders]
    ours = [aurc(rank(u[o], e[o])) for o in orders]
    assert max(naive) - min(naive) > 0.02
    assert max(ours) - min(ours) < 1e-12
    assert min(naive) < ours[0] < max(naive)


def test_augrc_is_the_area_under_the_generalised_curve():
    u, e = _data(3)
    ranking = rank(u, e)
    coverage, risk = risk_coverage_curve(ranking)
    x, joint = np.append(0, coverage), np.append(0, coverage * risk)
    assert ranking_scores(ranking)["augrc"] == pytest.approx(np.trapezoid(joint, x), abs=1e-12)


def test_limits():
    u = np.arange(50) / 50
    oracle = rank(u, u > 0.795)
    assert ranking_scores(oracle)["e_aurc"] == pytest.approx(0, abs=1e-12)
    assert prediction_rejection_ratio(oracle) == pytest.approx(1)
    assert ranking_scores(oracle)["augrc"] == pytest.approx(0.5 * 0.2**2)
    constant = rank(np.ones(50), u > 0.795)
    assert error_auroc(constant) == 0.5
    assert aurc(constant) == pytest.approx(0.2)
    assert prediction_rejection_ratio(constant) == pytest.approx(0)
    nothing = rank(u, np.zeros(50))
    assert aurc(nothing) == ranking_scores(nothing)["e_aurc"] == ranking_scores(nothing)["augrc"] == 0
    assert np.isnan(error_auroc(nothing)) and np.isnan(error_aupr(nothing))
    everything = rank(u, np.ones(50))
    assert aurc(everything) == pytest.approx(1) and ranking_scores(everything)["augrc"] == pytest.approx(0.5)
    assert np.isnan(error_auroc(everything)) and np.isnan(success_aupr(everything))


def test_coverage_and_risk():
    ranking = rank([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1])
    assert accuracy_at_coverage(ranking, 0.5) == 0.5
    assert accuracy_at_coverage(ranking, 1.0) == 0.5
    assert accuracy_at_coverage(ranking, 0.01) == 1.0
    assert coverage_at_risk(ranking, 0.4) == 0.75
    assert coverage_at_risk(ranking, 0.0) == 0.25
    # The surest row wrong: no threshold reaches a risk of 0, but 0.5 is reached by all.
    assert coverage_at_risk(rank([0.1, 0.2], [1, 0]), 0.4) == 0.0
    assert coverage_at_risk(rank([0.1, 0.2], [1, 0]), 0.5) == 1.0
    tied = rank([0.5, 0.5, 0.5, 0.5], [0, 0, 0, 1])
    assert accuracy_at_coverage(tied, 0.5) == 0.75


def test_both_readings_of_the_false_positive_rate():
    u = np.concatenate([np.linspace(0, 0.5, 100), np.linspace(0.3, 1, 20)])
    e = np.repeat([0, 1], [100, 20])
    ranking = rank(u, e)
    # 95 of 100 correct rows lie at or below their 95th smallest score; so do this many errors.
    threshold = np.sort(u[e == 0])[94]
    assert errors_accepted_at_95(ranking) == pytest.approx((u[e == 1] <= threshold).mean())
    threshold = np.sort(u[e == 1])[::-1][18]
    assert correct_flagged_at_95(ranking) == pytest.approx((u[e == 0] >= threshold).mean())


def test_modules_take_for_tied_what_a_report_does():
    """Of decimals and what they leave of 1 the last bit differs: 0.7 is not 1 - 0.2 - 0.1."""
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(3), 200).round(2)
    p[:, 2] = 1.0 - p[:, 0] - p[:, 1]
    p, labels = np.clip(p, 0.0, 1.0), generator.integers(0, 3, 200)
    report, scores = calibration_report(p, labels, confidence_level=None), selective_scores(p, labels)
    for key in ("error_auroc", "error_aupr", "success_aupr", "aurc", "e_aurc", "augrc"):
        assert scores[key] == pytest.approx(report[key], abs=1e-12), key
    of_draws = uncertainty_scores(p[:, None], labels)
    assert of_draws["confidence_error_auroc"] == pytest.approx(report["error_auroc"], abs=1e-12)
    assert scores["num_distinct_scores"] == len(np.unique(tie_key(p.max(axis=1)))) < len(np.unique(p.max(axis=1)))


def test_probabilities_rank_by_their_maximum():
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.55, 0.45]])
    by_rows = selective_scores(p, [0, 0, 0])
    by_score = selective_scores(1 - p.max(axis=1), [0, 1, 0], input="uncertainty")
    assert by_rows == pytest.approx(by_score)
    assert by_rows["num_distinct_scores"] == 3
