"""A line for every class, where averages over classes hide some."""

import json

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, precision_score, recall_score

from peft_calib.calibration import calibration_report
from peft_calib.calibration.bins import uniform_bins
from peft_calib.calibration.inputs import Rows, softmax
from peft_calib.calibration.report.classes import against_rest
from peft_calib.calibration.resampling.bands import skewed_mean_interval, wilson_interval
from peft_calib.calibration.resampling.intervals import bootstrap_intervals, down_to_zero, noise_floor
from peft_calib.calibration.scores.binned import calibration_error

NAMES = ("common", "<i>rare</i>", "odd|one")


def _rare(generator, size, factor=1.0):
    """Three classes of shares near 0.8, 0.05, 0.15."""
    z = generator.normal(size=(size, 3)) + np.array([2.5, -0.5, 0.5])
    y = (generator.random((size, 1)) > softmax(z).cumsum(axis=1)).sum(axis=1).clip(max=2)
    return softmax(factor * z), y


@pytest.fixture(scope="module")
def data():
    return _rare(np.random.default_rng(0), 400)


@pytest.fixture(scope="module")
def report(data):
    return calibration_report(*data, per_class=True, class_names=NAMES, num_resamples=200)


def test_each_line_is_what_scikit_learn_says_of_one_class_against_the_rest(data, report):
    p, y = data
    predicted = p.argmax(axis=1)
    recall = recall_score(y, predicted, average=None)
    precision = precision_score(y, predicted, average=None, zero_division=np.nan)
    for k, row in enumerate(report.classes):
        assert (row.name, row.num_rows, row.num_predicted) == (NAMES[k], (y == k).sum(), (predicted == k).sum())
        assert row.scores["recall"] == pytest.approx(recall[k], abs=1e-12)
        assert row.scores["precision"] == pytest.approx(precision[k], abs=1e-12, nan_ok=True)
        assert row.scores["brier"] == pytest.approx(brier_score_loss(y == k, p[:, k]), abs=1e-12)
        hits = np.array([((predicted == k) & (y == k)).sum()], float)
        ends = wilson_interval(hits, np.array([(y == k).sum()]), 0.95)
        assert row.intervals["recall"] == pytest.approx((ends[0][0], ends[1][0]))


def test_the_lines_add_up_to_the_report(report):
    assert sum(row.scores["brier"] for row in report.classes) == pytest.approx(report["brier"], abs=1e-12)
    assert np.mean([row.scores["ece"] for row in report.classes]) == pytest.approx(report["classwise_ece"], abs=1e-12)
    assert sum(row.num_rows for row in report.classes) == 400


def test_intervals_hold_the_score_and_that_of_the_mean(data, report):
    p, y = data
    for k, row in enumerate(report.classes):
        for key in ("ece", "brier"):
            low, high = row.intervals[key]
            assert 0.0 <= low <= row.scores[key] <= high <= 1.0
        formula = skewed_mean_interval((p[:, k] - (y == k)) ** 2, 0.025)
        low, high = row.intervals["brier"]
        assert low <= formula[0] + 1e-12 and formula[1] - 1e-12 <= high
        assert high - low < 1.5 * (formula[1] - formula[0])


def test_the_floor_is_the_error_of_labels_drawn_from_the_column():
    p, _ = _rare(np.random.default_rng(1), 300)
    rows = against_rest(Rows(p, np.zeros(300, int)), 2)
    band = noise_floor(rows, scores=("ece",), num_resamples=400)["ece"]
    generator, bins = np.random.default_rng(2), np.ceil(p[:, 2] * 15).astype(int)
    drawn = []
    for _ in range(400):
        gap = p[:, 2] - (generator.random(300) < p[:, 2])
        drawn.append(np.abs(np.bincount(bins, weights=gap)).sum() / 300)
    assert band.mean == pytest.approx(np.mean(drawn), rel=0.03)


def test_the_ece_of_a_calibrated_rare_class_is_held_at_zero_and_of_a_shifted_one_is_not():
    generator = np.random.default_rng(3)
    how = {"num_bins": 15, "num_resamples": 60, "scores": ("ece",)}

    def low(size, k, factor=1.0):
        rows = against_rest(Rows(*_rare(generator, size, factor)), k)
        ece = float(calibration_error(uniform_bins(rows.probabilities[:, 1], rows.labels, 15)))
        return down_to_zero(bootstrap_intervals(rows, **how), {"ece": ece}, noise_floor(rows, **how))["ece"][0]

    held = sum(low(200, 1) == 0.0 for _ in range(30))
    assert held >= 26
    assert low(1500, 2, factor=3.0) > 0.0


def test_nobody_who_does_not_ask_sees_a_line(data, report):
    plain = calibration_report(*data, num_resamples=200)
    found = report.to_dict()
    assert len(found.pop("classes")) == 3
    assert json.dumps(found) == json.dumps(plain.to_dict())
    assert "Classes" not in plain.to_markdown() and "<h2>Classes" not in plain.to_html()


def test_text_and_page_show_names_as_text(report):
    page, text = report.to_html(), report.to_markdown()
    assert "<i>rare" not in page and "&lt;i&gt;rare&lt;/i&gt;" in page
    assert r"| \<i\>rare\</i\> |" in text and r"| odd\|one |" in text
    assert json.loads(report.to_json())["classes"][1]["name"] == "<i>rare</i>"


def test_a_class_without_rows_and_a_report_without_intervals():
    p = np.tile([0.7, 0.2, 0.1], (30, 1))
    report = calibration_report(p, [0] * 20 + [1] * 10, per_class=True, num_resamples=50)
    absent = report.classes[2]
    assert absent.num_rows == 0 and np.isnan(absent.scores["recall"]) and np.isnan(absent.scores["precision"])
    assert absent.scores["ece"] == pytest.approx(0.1) and np.isfinite(absent.intervals["ece"]).all()
    assert json.loads(report.to_json())["classes"][2]["recall"] is None
    report.to_html()
    plain = calibration_report(p, [0] * 20 + [1] * 10, per_class=True, confidence_level=None)
    assert plain.classes[0].intervals is None and "## Classes" in plain.to_markdown()


def test_very_many_classes_have_values_and_shares_with_intervals():
    generator = np.random.default_rng(4)
    p = generator.dirichlet(np.ones(230), 60)
    report = calibration_report(p, generator.integers(0, 230, 60), per_class=True, num_resamples=20)
    assert len(report.classes) == 230 and set(report.classes[0].intervals) == {"recall", "precision"}


def test_wrong_names_are_refused(data):
    for names in (["a", "b"], "abc"):
        with pytest.raises(ValueError, match="one name a class"):
            calibration_report(*data, class_names=names, confidence_level=None)
