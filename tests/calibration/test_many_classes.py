"""Many classes: what is measured costs no more than a few copies of the predictions, and its values stay exact."""

import tracemalloc

import numpy as np
import pytest

from peft_calib.calibration import CalibrationAccumulator, calibration_report, compare
from peft_calib.calibration.bins import equal_mass_bins, group_by_value
from peft_calib.calibration.inputs import Rows
from peft_calib.calibration.scores.binned import calibration_error
from peft_calib.calibration.scores.panel import compute_panel
from peft_calib.calibration.scores.table import CLASSWISE_KEYS, KEYS, MOST_RESAMPLED_CLASSES, TACE_THRESHOLD

ROWS = 64


def _rows(num_classes, seed=0, size=ROWS):
    """Five likely classes, and as many rare ones as are asked for."""
    generator = np.random.default_rng([seed, num_classes])
    z = generator.normal(size=(size, num_classes))
    z[:, :5] += 2.0 + np.log(num_classes / 5)
    p = np.exp(z)
    p /= p.sum(axis=1, keepdims=True)
    return p, (generator.random((size, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=num_classes - 1)


def _report(num_classes):
    calibration_report(*_rows(num_classes))


def _compare(num_classes):
    p, labels = _rows(num_classes)
    compare(p, _rows(num_classes, 1)[0], labels)


def _stream(num_classes):
    p, labels = _rows(num_classes)
    accumulator = CalibrationAccumulator(num_classes=num_classes)
    for start in range(0, ROWS, 16):
        accumulator.update(p[start : start + 16], labels[start : start + 16])
    accumulator.compute()


def _peak(work, num_classes):
    tracemalloc.start()
    try:
        work(num_classes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("work", [_report, _compare, _stream], ids=["report", "compare", "stream"])
def test_memory_beyond_the_predictions_does_not_grow_by_class(work):
    small = _peak(work, 10)
    for num_classes in (1000, 20_000):
        predictions = 8 * ROWS * num_classes
        # Eight copies (the test's own are two or three), and two kilobytes a class for its bins.
        assert _peak(work, num_classes) < small + 8 * predictions + 2000 * num_classes, num_classes


def test_scores_over_class_columns_have_no_interval_above_the_limit_and_the_report_says_so():
    few, many = (
        calibration_report(*_rows(n), num_resamples=20) for n in (MOST_RESAMPLED_CLASSES, MOST_RESAMPLED_CLASSES + 1)
    )
    assert set(few.intervals) >= CLASSWISE_KEYS
    assert set(many.intervals) == set(many.floor) == set(KEYS) - CLASSWISE_KEYS
    assert set(many) == set(KEYS)
    note = f"no interval above {MOST_RESAMPLED_CLASSES} classes"
    assert note in many.to_markdown() and note in many.to_html()
    assert note not in few.to_markdown()


def test_a_class_that_is_no_label_needs_no_order():
    """Column by column, with and without a label: the mean of all is what a report says."""
    p, labels = _rows(300)
    for key, threshold in (("ace_classwise", 0.0), ("tace_classwise", TACE_THRESHOLD)):
        errors = []
        for k in range(300):
            keep = p[:, k] > threshold
            groups = group_by_value(p[keep, k], (labels == k)[keep])
            errors.append(calibration_error(equal_mass_bins(groups, 15)) if keep.any() else 0.0)
        assert compute_panel(Rows(p, labels), 15)[key] == pytest.approx(np.mean(errors), abs=1e-14)


def test_a_stream_of_many_classes_keeps_what_uniform_bins_hold():
    p, labels = _rows(1000, size=300)
    whole = calibration_report(p, labels, confidence_level=None)
    parts = [CalibrationAccumulator(num_classes=1000) for _ in range(2)]
    for part, rows in zip(parts, (slice(0, 101), slice(101, None)), strict=True):
        part.update(p[rows], labels[rows])
    streamed = parts[0].merge(parts[1]).compute()
    assert set(KEYS) - set(streamed) == {"ace_classwise", "tace", "tace_classwise"}
    for key in ("classwise_ece", "brier_reliability", "brier_resolution", "brier_within_bin", "ece", "nll"):
        assert streamed[key] == pytest.approx(whole[key], abs=1e-12), key
    assert parts[0].num_bytes < 500 * 1000 + 20_000
