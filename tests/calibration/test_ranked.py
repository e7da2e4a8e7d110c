"""Intervals of ranking scores where right or wrong rows are rare."""

import numpy as np
import pytest
from scipy.stats import gamma

from peft_calib.calibration import calibration_report
from peft_calib.calibration.inputs import Rows
from peft_calib.calibration.resampling.intervals import bootstrap_intervals
from peft_calib.calibration.resampling.ranked import auroc_interval, one_more, places
from peft_calib.calibration.scores.panel import compute_panel

AREAS = ("aurc", "e_aurc", "augrc", "success_aupr")


def sure_rows(generator: np.random.Generator, size: int, accuracy: float) -> Rows:
    """Two classes whose confidence says nothing of which row is right."""
    confidence = generator.uniform(0.9, 0.99, size)
    return Rows(np.stack([confidence, 1.0 - confidence], axis=1), (generator.random(size) > accuracy).astype(np.int64))


@pytest.mark.parametrize("key", ["aurc", "augrc"])
def test_a_place_is_worth_what_an_error_there_adds(key):
    p = np.stack([np.linspace(0.99, 0.6, 30), 1.0 - np.linspace(0.99, 0.6, 30)], axis=1)
    worth = places(key, 30)
    for place in (0, 7, 29):
        labels = np.zeros(30, np.int64)
        labels[[3, 12]] = 1
        without = compute_panel(Rows(p, labels), 15)[key]
        labels[place] = 1
        assert compute_panel(Rows(p, labels), 15)[key] - without == pytest.approx(worth[place], abs=1e-12)


def test_one_more_error_has_the_moments_of_the_exact_limit():
    resampled = np.random.default_rng(0).poisson(4.0, 200_000).astype(float)
    count = one_more(resampled, "augrc", 10**6, seed=1)
    # An error at a random place weighs a half on average: only its weight's first moment is that of Gamma(5).
    assert (count - resampled).mean() * 10**6 == pytest.approx(0.5, abs=0.01)
    weighted = resampled + np.random.default_rng(2).exponential(size=len(resampled))
    assert weighted.mean() == pytest.approx(gamma.mean(5.0), rel=0.01)
    assert weighted.var() == pytest.approx(gamma.var(5.0), rel=0.02)


def test_no_error_seen_is_not_no_error_possible():
    p = np.stack([np.linspace(0.99, 0.9, 30), np.linspace(0.01, 0.1, 30)], axis=1)
    report = calibration_report(p, np.zeros(30, np.int64))
    for key in ("aurc", "e_aurc", "augrc"):
        assert report[key] == 0.0 and report.intervals[key][0] == 0.0
        assert 0.02 < report.intervals[key][1] < 0.3
    assert report["success_aupr"] == pytest.approx(1.0)
    assert 0.7 < report.intervals["success_aupr"][0] < 0.98
    wrong = calibration_report(p, np.ones(30, np.int64))
    assert wrong["aurc"] == pytest.approx(1.0) and wrong.intervals["aurc"][1] == pytest.approx(1.0)
    assert 0.7 < wrong.intervals["aurc"][0] < 0.98


def test_few_errors_leave_the_rankings_open():
    """Coverage, where quantiles of the resamples hold the truth in 83 to 93 of 100 data sets."""
    truth = compute_panel(sure_rows(np.random.default_rng(3), 200_000, 0.96), 15)
    sets, held = 120, dict.fromkeys((*AREAS, "error_auroc"), 0)
    for repeat in range(sets):
        rows = sure_rows(np.random.default_rng([4, repeat]), 100, 0.96)
        found = bootstrap_intervals(rows, num_resamples=200, seed=repeat, scores=tuple(held))
        for key, (low, high) in found.items():
            held[key] += not np.isfinite(low) or low <= truth[key] <= high
    assert min(held.values()) >= 0.93 * sets, held


def test_no_error_seen_is_not_no_loss_possible():
    """30 right of 30 leave a share of errors of gamma's quantile, 3.7 rows; each would cost what such a row costs."""
    p = np.tile([0.9, 0.06, 0.04], (30, 1))
    report = calibration_report(p, np.zeros(30, np.int64))
    most = gamma.ppf(0.975, 1.0) / 30
    for key, of_error in (("brier", 2 * (0.9 - 0.05)), ("nll", np.log(0.9 / 0.05)), ("confidence_gap", 1.0)):
        low, high = report.intervals[key]
        assert low <= report[key] + 1e-6 and high == pytest.approx(report[key] + most * of_error, rel=0.15), key
    wrong = calibration_report(p, np.full(30, 2))
    for key, of_right in (("brier", 2 * (0.9 - 0.04)), ("nll", np.log(0.9 / 0.04)), ("confidence_gap", 1.0)):
        low, high = wrong.intervals[key]
        assert high >= wrong[key] - 1e-6 and low == pytest.approx(wrong[key] - most * of_right, rel=0.15), key


def test_a_model_that_is_seldom_wrong_has_losses_that_are_held():
    """Coverage, where resamples alone hold the truth in 6 of 10 data sets: in a third of them no row is wrong."""
    keys, held = ("brier", "nll", "confidence_gap"), dict.fromkeys(("brier", "nll", "confidence_gap"), 0)

    def rows_of(generator: np.random.Generator, size: int) -> Rows:
        sure = generator.uniform(0.98, 1.0, size)
        is_wrong = generator.random(size) > sure
        return Rows(np.stack([sure, 1.0 - sure], axis=1), is_wrong.astype(np.int64))

    truth = compute_panel(rows_of(np.random.default_rng(5), 1_000_000), 15)
    for repeat in range(40):
        rows = rows_of(np.random.default_rng([6, repeat]), 100)
        for key, (low, high) in bootstrap_intervals(rows, num_resamples=100, seed=repeat, scores=keys).items():
            held[key] += low <= truth[key] <= high
    assert min(held.values()) >= 37, held


def test_a_class_that_no_row_has_may_still_cost_something():
    p = np.tile([0.69, 0.3, 0.01], (60, 1))
    report = calibration_report(p, np.arange(60) % 2, per_class=True, num_resamples=100)
    rare = report.classes[2]
    assert rare.num_rows == 0 and rare.scores["brier"] == pytest.approx(1e-4)
    assert rare.intervals["brier"][1] == pytest.approx(3.7 / 60, rel=0.25)


@pytest.mark.parametrize("rarer", [1, 4, 100])
def test_a_perfect_ranking_is_as_sure_as_its_rarer_rows_are_many(rarer):
    low, high = auroc_interval(1.0, 0.0, rarer, 1000, 0.025)
    assert high == 1.0
    assert {1: low < 0.01, 4: 0.2 < low < 0.4, 100: 0.95 < low < 0.97}[rarer]
    flipped = auroc_interval(0.0, 0.0, rarer, 1000, 0.025)
    assert flipped == pytest.approx((1.0 - high, 1.0 - low), abs=1e-12)


def test_many_rows_of_both_kinds_get_the_normal_interval():
    low, high = auroc_interval(0.8, 1e-4, 500, 20_000, 0.025)
    assert (low, high) == pytest.approx((0.8 - 0.0196, 0.8 + 0.0196), abs=1e-3)
