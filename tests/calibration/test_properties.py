"""What may not change a score: the order of rows, the names of classes, batches, processes, repetition."""

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from peft_calib.calibration import CalibrationAccumulator, calibration_report
from peft_calib.calibration.scores.table import KEYS

# Scores that take every row for a new observation by definition: the finite-sample rule of AURC, the debiased error.
CHANGED_BY_REPETITION = {"aurc", "e_aurc", "rmsce_debiased"}
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def predictions(draw, most_classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Rows with ties, zeros and ones among them."""
    size, classes = draw(st.integers(1, 60)), draw(st.integers(2, most_classes))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["smooth", "quantised", "saturated"]))
    if kind == "smooth":
        p = generator.dirichlet(np.full(classes, draw(st.sampled_from([0.1, 1.0, 5.0]))), size)
    elif kind == "quantised":
        p = generator.multinomial(8, np.full(classes, 1 / classes), size) / 8
    else:
        p = np.eye(classes)[generator.integers(0, classes, size)]
    return p, generator.integers(0, classes, size)


def _scores(p: np.ndarray, y: np.ndarray, num_bins: int = 10) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return calibration_report(p, y, num_bins=num_bins, confidence_level=None).scores


def _assert_same(left: dict[str, float], right: dict[str, float], keys=KEYS, tolerance: float = 1e-9) -> None:
    for key in keys:
        assert left[key] == pytest.approx(right[key], abs=tolerance, nan_ok=True), key


def _unique_top(p: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows without a tie for the top: which class is predicted there depends on the order of classes."""
    keep = (p == p.max(axis=1, keepdims=True)).sum(axis=1) == 1
    assume(keep.any())
    return p[keep], y[keep]


@SETTINGS
@given(predictions(), st.integers(0, 2**32 - 1))
def test_order_of_rows(rows, seed):
    p, y = rows
    order = np.random.default_rng(seed).permutation(len(y))
    _assert_same(_scores(p, y), _scores(p[order], y[order]))


@SETTINGS
@given(predictions(), st.integers(0, 2**32 - 1))
def test_names_of_classes(rows, seed):
    p, y = _unique_top(*rows)
    order = np.random.default_rng(seed).permutation(p.shape[1])
    _assert_same(_scores(p, y), _scores(p[:, order], np.argsort(order)[y]))


@SETTINGS
@given(predictions(), st.integers(2, 4))
def test_repetition(rows, times):
    p, y = rows
    keys = [key for key in KEYS if key not in CHANGED_BY_REPETITION]
    _assert_same(_scores(p, y), _scores(np.tile(p, (times, 1)), np.tile(y, times)), keys)


@SETTINGS
@given(predictions(), st.lists(st.integers(0, 60), max_size=5))
def test_batches(rows, cuts):
    p, y = rows
    accumulator = CalibrationAccumulator(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for part in np.split(np.arange(len(y)), sorted(min(cut, len(y)) for cut in cuts)):
            if len(part):
                accumulator.update(p[part], y[part])
        assert accumulator.is_exact
        _assert_same(accumulator.compute().scores, _scores(p, y))


@SETTINGS
@given(predictions(), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_ranks_in_any_partition(rows, ranks, seed):
    p, y = rows
    member = np.random.default_rng(seed).integers(0, ranks, len(y))
    parts = [CalibrationAccumulator(10, num_classes=p.shape[1]) for _ in range(ranks)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for rank, part in enumerate(parts):
            if (member == rank).any():
                part.update(p[member == rank], y[member == rank])
        total = parts[0]
        for part in parts[1:]:
            total.merge(part)
        _assert_same(total.compute().scores, _scores(p, y))


@SETTINGS
@given(predictions())
def test_ranges_and_identities(rows):
    p, y = rows
    s = _scores(p, y)
    for key in KEYS:
        if key not in (
            "nll",
            "brier",
            "brier_uncertainty",
            "brier_within_bin",
            "confidence_gap",
            "mean_entropy",
            "e_aurc",
        ):
            assert np.isnan(s[key]) or -1e-9 <= s[key] <= 2.0 + 1e-9, key
    parts = s["brier_reliability"] - s["brier_resolution"] + s["brier_uncertainty"] + s["brier_within_bin"]
    assert s["brier"] == pytest.approx(parts, abs=1e-12)
    assert s["ece"] == pytest.approx(s["overconfidence"] + s["underconfidence"], abs=1e-12)
    assert s["confidence_gap"] == pytest.approx(s["mean_confidence"] - s["accuracy"], abs=1e-12)
    # |mean gap| <= mean |gap| <= root mean square gap <= largest gap (triangle, Jensen).
    assert abs(s["confidence_gap"]) <= s["ece"] + 1e-12
    assert s["ece"] <= s["rmsce"] + 1e-12 <= s["mce"] + 2e-12
    assert abs(s["confidence_gap"]) <= s["ace"] + 1e-12
    assert s["confidence_gap"] <= s["ks_error"] + 1e-12
    assert s["e_aurc"] >= -1e-12


@SETTINGS
@given(predictions(most_classes=2))
def test_binary_classwise_error_is_never_below_the_top_label_error(rows):
    """With an edge at one half (an even number of bins) the classes' bins refine the top label's."""
    p, y = _unique_top(*rows)
    s = _scores(p, y, num_bins=10)
    assert s["classwise_ece"] >= s["ece"] - 1e-12
