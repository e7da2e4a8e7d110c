"""Hand-computed cases: expected numbers come from the definitions, worked out outside this package."""

import numpy as np
import pytest

from peft_calib.calibration import calibration_report

COLUMN = np.array([0.95, 0.85, 0.75, 0.65, 0.45, 0.35, 0.15, 0.05, 0.92, 0.22])
V1 = (np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]), [0, 0, 1], 10)
V2 = (np.stack([COLUMN, 1 - COLUMN], axis=1), [0, 0, 1, 0, 1, 0, 1, 1, 1, 1], 5)
V3 = (
    np.array(
        [
            [0.7, 0.2, 0.1],
            [0.1, 0.8, 0.1],
            [0.25, 0.25, 0.5],
            [0.5, 0.3, 0.2],
            [0.05, 0.05, 0.9],
            [0.4, 0.35, 0.25],
            [0.2, 0.6, 0.2],
            [0.1, 0.3, 0.6],
        ]
    ),
    [0, 1, 2, 1, 2, 0, 0, 2],
    4,
)
V4 = (np.array([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 4), [0] * 6 + [1, 1] + [1] * 3 + [0], 10)


def _report(case, **options):
    probabilities, labels, num_bins = case
    return calibration_report(probabilities, labels, num_bins=num_bins, confidence_level=None, **options)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (V1, {"ece": 0.266667, "classwise_ece": 0.266667, "mce": 0.4, "ace": 0.266667, "tace": 0.266667}),
        (V1, {"brier": 0.173333}),
        (V2, {"ece": 0.18, "classwise_ece": 0.22, "mce": 0.45, "ace_classwise": 0.22, "tace_classwise": 0.22}),
        (V2, {"brier": 0.45096}),
        (V3, {"ece": 0.125, "classwise_ece": 0.1625, "mce": 0.2, "brier": 0.401875}),
        (V4, {"ece": 0.25, "classwise_ece": 0.25, "mce": 0.25, "ace": 0.25, "tace": 0.25, "brier": 0.5}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*probability of .nearly. 0:UserWarning")
def test_golden_values(case, expected):
    report = _report(case)
    for key, value in expected.items():
        assert report[key] == pytest.approx(value, abs=1e-6), key


def test_hypelora_convention_on_golden_vectors():
    report = _report(V2, convention="hypelora")
    assert report["ace"] == pytest.approx(0.344, abs=1e-9)
    assert report["tace"] == pytest.approx(0.17, abs=1e-9)


def test_equal_mass_ties_do_not_depend_on_the_order_of_rows():
    """Splitting by rank gives 0.15 or 0.40 on V3; spreading tied rows gives one number, worked out by hand here.

    Sorted confidences .4 .5 .5 .6 .6 .7 .8 .9 with outcomes 1 (1 0) (0 1) 1 1 1; tied pairs count half each. Bins of
    two: (.4, .5) vs 1.5 / 2, (.5, .6) vs .5, (.6, .7) vs 1.5 / 2, (.8, .9) vs 1: gaps .3, .05, .1, .15.
    """
    probabilities, labels, num_bins = V3
    labels = np.array(labels)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(labels))
        report = _report((probabilities[order], labels[order], num_bins))
        assert report["ace"] == pytest.approx((0.3 + 0.05 + 0.1 + 0.15) / 4, abs=1e-12)


def test_saturated_rows_of_zero_probability_are_clipped_with_a_warning():
    with pytest.warns(UserWarning, match="3 of 12 rows"):
        report = _report(V4)
    assert report["nll"] == pytest.approx(-3 / 12 * np.log(np.finfo(np.float64).eps), rel=1e-12)


def test_perfect_predictor_scores_zero_everywhere():
    labels = np.arange(100) % 2
    report = _report((np.eye(2)[labels], labels, 10))
    for key in ("nll", "brier", "ece", "mce", "ace", "tace", "classwise_ece", "ks_error", "aurc", "e_aurc", "augrc"):
        assert report[key] == pytest.approx(0.0, abs=1e-12), key
    assert report["accuracy"] == 1.0
    assert np.isnan(report["error_auroc"])
