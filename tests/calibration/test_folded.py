"""Intervals of scores that fold at zero: they hold the truth, and what the same rows allow in other words."""

import numpy as np
import pytest

from peft_calib.calibration import calibration_report
from peft_calib.calibration.inputs import Rows
from peft_calib.calibration.resampling.bands import skewed_mean_interval, wilson_interval
from peft_calib.calibration.resampling.folded import Folded, absolute, folded_interval, widened
from peft_calib.calibration.resampling.intervals import bootstrap_intervals, down_to_zero, noise_floor
from peft_calib.calibration.scores.panel import compute_panel
from peft_calib.calibration.scores.table import CALIBRATION_ERRORS, KEYS


def _one_bin(seed, size, confidence=0.56, accuracy=0.56):
    generator = np.random.default_rng(seed)
    given = generator.normal(confidence, 0.003, size)
    wrong = generator.random(size) >= accuracy
    return np.stack([given, 1.0 - given], axis=1), wrong.astype(int)


def _spread(seed, size, temperature, classes=2):
    generator = np.random.default_rng(seed)
    z = 1.5 * generator.normal(size=(size, classes))
    true, given = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (z, temperature * z))
    labels = (generator.random((size, 1)) > true.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    return given, labels


def test_one_clear_gap_has_the_interval_of_a_mean():
    generator = np.random.default_rng(0)
    deviations = generator.normal(0.0, 0.02, (1, 4000))
    item = Folded(np.array([-0.3]), np.array([0.02]), deviations, absolute(), 0.3, absolute())
    low, high = folded_interval(item, 0.025)
    assert low == pytest.approx(0.3 - 1.96 * 0.02, abs=0.003)
    assert high == pytest.approx(0.3 + 1.96 * 0.02, abs=0.003)


def test_many_gaps_of_noise_reach_down_to_zero_and_up_to_their_own_size():
    generator = np.random.default_rng(1)
    errors = np.full(15, 0.01)
    gaps, deviations = generator.normal(0.0, 0.01, 15), generator.normal(0.0, 0.01, (15, 4000))
    observed = float(np.abs(gaps).sum())
    low, high = folded_interval(Folded(gaps, errors, deviations, absolute(), observed, absolute()), 0.025)
    assert low == 0.0
    assert 0.6 * 15 * 0.008 < high < 2.0 * 15 * 0.008


def test_bins_that_hardly_vary_vary_as_labels_would():
    unit = np.random.default_rng(5).normal(size=20_000)
    deviations = np.array([0.0, 1.0, 0.1])[:, None] * unit
    moved, errors = widened(deviations, np.array([0.2, 0.2, 0.2]))
    assert errors == pytest.approx([0.2, deviations[1].std(), 0.2])
    assert np.array_equal(moved[1], deviations[1])
    assert moved.std(axis=1) == pytest.approx(errors, rel=0.02)
    # Resamples of one error among a hundred rows never have two errors fewer, labels from the predictions may.
    one_error = 0.01 * (1.0 - np.random.default_rng(6).poisson(1.0, 20_000))[None]
    assert one_error.max() == 0.01
    assert (widened(one_error, np.array([0.02]))[0] > 0.03).mean() > 0.025
    # Bins that go together still do.
    both = widened(np.concatenate([one_error, -one_error]), np.array([0.02, 0.02]))[0]
    assert both[0] == pytest.approx(-both[1], abs=1e-12)


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("right", [48, 52, 57, 60])
def test_one_bin_allows_what_its_mean_allows(method, right):
    """With one bin the ECE is the size of the gap: both ends of the gap's own interval belong to it, or zero does."""
    p = np.stack([np.full(100, 0.56), np.full(100, 0.44)], axis=1)
    p += np.linspace(-1e-3, 1e-3, 100)[:, None] * [1, -1]
    labels = np.random.default_rng(right).permutation((np.arange(100) >= right).astype(int))
    report = calibration_report(p, labels, interval_method=method, num_resamples=400)
    low, high = wilson_interval(np.array([right]), np.array([100]), 0.95)
    largest = max(abs(0.56 - low[0]), abs(0.56 - high[0]))
    for key in ("ece", "mce", "rmsce", "ace", "smooth_ece", "ks_error", "average_gap", "classwise_ece"):
        found = report.intervals[key]
        assert found[0] <= report[key] <= found[1]
        assert found[1] > 0.75 * largest, (key, found, largest)
        assert found[1] >= report.floor[key].mean


def test_no_end_lies_below_the_noise_floor():
    for seed in range(6):
        for rows in (_one_bin(seed, 100), _spread(seed, 150, 1.0), _spread(seed, 100, 1.0, classes=5)):
            report = calibration_report(*rows, num_resamples=100, seed=seed)
            for key in CALIBRATION_ERRORS:
                assert report.intervals[key][1] >= report.floor[key].mean, key
                assert report.intervals[key][0] <= report[key] + 1e-6, key


# Model, its truths, and the scores looked at. 80 data sets each: three standard errors below .95 is .877.
COVERAGE = {
    "one bin, calibrated": (lambda seed, n: _one_bin(seed, n), ["ece", "mce", "rmsce", "overconfidence"]),
    "one bin, gap": (lambda seed, n: _one_bin(seed, n, accuracy=0.52), ["ece", "mce", "rmsce", "overconfidence"]),
    "calibrated": (lambda seed, n: _spread(seed, n, 1.0), ["ece", "ace", "rmsce", "overconfidence", "classwise_ece"]),
    "over-confident": (lambda seed, n: _spread(seed, n, 2.5), ["ece", "ace", "rmsce", "classwise_ece", "accuracy"]),
}


@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_cover_the_population(name):
    draw, keys = COVERAGE[name]
    truth = compute_panel(Rows(*draw(10**6, 200_000)), 15)
    inside = dict.fromkeys(keys, 0)
    for seed in range(80):
        rows = Rows(*draw(seed, 100))
        options = {"num_resamples": 200, "seed": seed, "scores": keys}
        floor = noise_floor(rows, **options)
        intervals = down_to_zero(bootstrap_intervals(rows, **options), compute_panel(rows, 15), floor)
        for key in keys:
            inside[key] += intervals[key][0] - 1e-9 <= truth[key] <= intervals[key][1] + 1e-9
    assert min(inside.values()) / 80 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 80), inside


@pytest.mark.parametrize("right", [0, 30])
def test_a_share_of_nothing_or_all_is_not_certain(right):
    p = np.full((30, 2), [0.9, 0.1])
    report = calibration_report(p, (np.arange(30) >= right).astype(int), num_resamples=50)
    low, high = report.intervals["accuracy"]
    assert (high < 0.15 and low == 0.0) if right == 0 else (low > 0.85 and high == 1.0)
    assert high > low


def test_every_interval_is_in_order_and_holds_the_score_of_clear_data():
    report = calibration_report(*_spread(3, 400, 2.0, classes=4), num_resamples=200)
    assert set(report.intervals) == set(KEYS)
    assert np.isnan(report.intervals.pop("brier_within_bin")).all()
    biased = {"brier_reliability", "brier_resolution", "brier_uncertainty", "rmsce_debiased"}
    for key, (low, high) in report.intervals.items():
        assert low <= high, key
        if key not in biased:
            assert low - 5e-3 <= report[key] <= high + 5e-3, (key, low, report[key], high)


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_a_handful_of_errors_gives_finite_ends(wrong):
    p, _ = _spread(5, 100, 1.0, classes=3)
    labels = p.argmax(axis=1)
    labels[:wrong] = (labels[:wrong] + 1) % 3
    report = calibration_report(p, labels, num_resamples=100)
    for key in set(KEYS) - {"brier_within_bin"}:  # which has none
        low, high = report.intervals[key]
        assert np.isfinite([low, high]).all() and low <= high, key


def test_heavy_tailed_means_are_held_as_often_as_said():
    """Rows of skewness 5, as of a model that is sure and seldom wrong: Student's interval misses every tenth."""
    for shape, student in ((0.15, 0.91), (4.0, 0.95)):
        values = np.random.default_rng(3).gamma(shape, size=(2000, 100))
        ends = np.array([skewed_mean_interval(row, 0.025) for row in values])
        held = ((ends[:, 0] <= shape) & (shape <= ends[:, 1])).mean()
        assert 0.935 < held < 0.975 and held > student - 0.01, (shape, held)


def test_a_mean_without_skewness_has_students_interval():
    low, high = skewed_mean_interval(np.array([-2.0, -1.0, 0.0, 1.0, 2.0]), 0.025)
    assert (low, high) == pytest.approx((-1.9632, 1.9632), abs=1e-3)
    assert skewed_mean_interval(np.full(9, 0.3), 0.025) == pytest.approx((0.3, 0.3))


def test_the_uncertainty_of_many_equal_classes_reaches_its_most():
    """40 classes, 100 rows: some class is unseen, and what is seen is less even than the population."""
    p = np.full((100, 40), 1.0 / 40)
    for seed in range(8):
        labels = np.random.default_rng(seed).integers(0, 40, 100)
        rows = Rows(p, labels)
        low, high = bootstrap_intervals(rows, num_resamples=200, seed=seed, scores=["brier_uncertainty"])[
            "brier_uncertainty"
        ]
        assert low < 0.97 and high == pytest.approx(1 - 1 / 40, abs=1e-3), (seed, low, high)
