"""Bad input is refused with a message that says what was wrong; good input of every kind gives the same rows."""

import numpy as np
import pytest
import torch

from peft_calib.calibration import (
    BetaCalibration,
    CalibrationAccumulator,
    HistogramCalibration,
    IsotonicCalibration,
    MatrixScaling,
    TemperatureScaling,
    VectorScaling,
    calibration_report,
    compare,
    compare_many,
    draw_uncertainty,
    reliability_diagram,
)
from peft_calib.calibration.inputs import as_rows, softmax
from peft_calib.calibration.scores.selective import rank, selective_scores
from peft_calib.calibration.scores.uncertainty import uncertainty_scores

RECALIBRATIONS = [
    TemperatureScaling,
    VectorScaling,
    MatrixScaling,
    IsotonicCalibration,
    HistogramCalibration,
    BetaCalibration,
]
GOOD = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
LABELS = np.array([0, 1, 2])


def _changed(row: int, column: int, value: float) -> np.ndarray:
    array = GOOD.copy()
    array[row, column] = value
    return array


BAD = {
    "row sum": (_changed(1, 0, 0.3), LABELS, "row 1 sums to 1.2"),
    "negative": (_changed(0, 0, -0.7), LABELS, "must lie in"),
    "nan": (_changed(2, 1, np.nan), LABELS, "NaN or infinity, first in row 2"),
    "infinity": (_changed(2, 1, np.inf), LABELS, "NaN or infinity, first in row 2"),
    "logits": (GOOD * 10, LABELS, 'input="logits"'),
    "row count": (GOOD, LABELS[:2], "3 rows but there are 2 labels"),
    "label too large": (GOOD, [0, 1, 3], r"\[0, 2\] for 3 classes, got 3"),
    "negative label": (GOOD, [0, -1, 2], "got -1"),
    "empty": (np.zeros((0, 3)), np.zeros(0, int), "no row to measure"),
    "all ignored": (GOOD, [-100] * 3, "no row to measure"),
    "one column": (GOOD[:, :1], LABELS, "1 column"),
    "three axes": (GOOD[None], LABELS, "do not go with labels"),
    "ragged": ([[0.5, 0.5], [1.0]], [0, 0], "ragged"),
    "scalar": (0.5, 1, "single number"),
    "binary out of range": ([0.2, 1.2], [0, 1], "must lie in"),
    "binary label": ([0.2, 0.7], [0, 2], "for 2 classes, got 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_probabilities_get_a_message(case):
    probabilities, labels, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        calibration_report(probabilities, labels, confidence_level=None)


@pytest.mark.parametrize("case", [case for case in BAD if case not in ("empty", "all ignored")])
def test_the_accumulator_refuses_the_same_and_keeps_its_state(case):
    probabilities, labels, message = BAD[case]
    accumulator = CalibrationAccumulator()
    accumulator.update(GOOD, LABELS)
    before = accumulator.state()
    with pytest.raises(ValueError, match=message):
        accumulator.update(probabilities, labels)
    assert all(torch.equal(before[key], value) for key, value in accumulator.state().items())


ENTRANCES = {
    "first of two": lambda p, y: compare(p, GOOD, y),
    "second of two": lambda p, y: compare(GOOD, p, y),
    "one of many": lambda p, y: compare_many({"a": GOOD, "b": p}, y),
    "selective prediction": selective_scores,
    "uncertainty of draws": lambda p, y: uncertainty_scores(np.stack([p, p], axis=1), y),
    "picture": reliability_diagram,
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    "case", ["row sum", "negative", "nan", "infinity", "row count", "label too large", "negative label", "empty"]
)
def test_every_entrance_is_guarded(entrance, case):
    probabilities, labels, _ = BAD[case]
    with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
        ENTRANCES[entrance](probabilities, labels)


@pytest.mark.parametrize("method", RECALIBRATIONS)
@pytest.mark.parametrize("case", ["nan", "infinity", "row count", "label too large", "negative label", "empty"])
def test_every_recalibration_is_guarded(method, case):
    logits, labels, _ = BAD[case]
    with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
        method().fit(logits, labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_refused_everywhere(bad):
    logits = _changed(1, 2, bad)
    masks = bad == -np.inf  # which recalibration takes for a masked class
    for call in (
        lambda: calibration_report(logits, LABELS, input="logits"),
        lambda: TemperatureScaling().fit(np.full((3, 3), bad) if masks else logits, LABELS),
        lambda: draw_uncertainty(logits[None], input="logits"),
        lambda: CalibrationAccumulator(input="logits").update(logits, LABELS),
    ):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call()


@pytest.mark.parametrize("num_bins", [0, -3, 1.5, "10", True])
def test_bad_bin_counts(num_bins):
    for call in (
        lambda: calibration_report(GOOD, LABELS, num_bins=num_bins),
        lambda: CalibrationAccumulator(num_bins),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "probs"}, "must be one of"),
        ({"convention": "mlr"}, "must be one of"),
        ({"confidence_level": 95}, "strictly between 0 and 1"),
        ({"num_resamples": 3}, "at least 20"),
        ({"interval_method": "normal"}, "must be one of"),
        ({"mask": [True, False]}, "mask has shape"),
        ({"mask": [0.5, 1, 1]}, "booleans"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        calibration_report(GOOD, LABELS, **options)


def test_probabilities_given_as_logits_are_noticed():
    with pytest.raises(ValueError, match="second softmax"):
        calibration_report(GOOD, LABELS, input="logits")
    shifted = calibration_report(GOOD + 1.0, LABELS, input="logits", confidence_level=None)
    assert np.isfinite(shifted["nll"])


def test_labels_that_are_not_integers():
    with pytest.raises(TypeError, match="integer class ids"):
        as_rows(GOOD, LABELS.astype(float))
    with pytest.raises(TypeError, match="must be numbers"):
        as_rows([["a", "b"]], [0])


def test_bad_draws():
    with pytest.raises(ValueError, match="one shape"):
        draw_uncertainty([GOOD, GOOD[:2]])
    with pytest.raises(ValueError, match="same number of draws"):
        uncertainty_scores([[[0.5, 0.5]], [[0.5, 0.5], [0.4, 0.6]]], [0, 1])
    with pytest.raises(ValueError, match="shape"):
        draw_uncertainty(GOOD)
    with pytest.raises(ValueError, match="summing to 1"):
        draw_uncertainty(2 * GOOD[None])
    with pytest.raises(ValueError, match="rows first"):
        uncertainty_scores(GOOD, LABELS)


def test_bad_rankings():
    with pytest.raises(ValueError, match="NaN or infinity"):
        rank([0.1, np.nan], [0, 1])
    with pytest.raises(ValueError, match="zeros and ones"):
        rank([0.1, 0.2], [0, 2])
    with pytest.raises(ValueError, match="coverage"):
        selective_scores([0.1, 0.2], [0, 1], input="uncertainty", coverages=[0.0])


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.tolist(),
        lambda x: x.astype(np.float32),
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.float32, requires_grad=True),
        lambda x: [torch.tensor(row) for row in x],
        np.asfortranarray,
    ],
    ids=["lists", "float32", "torch", "torch with grad", "list of tensors", "fortran order"],
)
def test_every_kind_of_array_gives_the_same_rows(convert):
    rows = as_rows(convert(GOOD), torch.tensor(LABELS))
    assert rows.probabilities == pytest.approx(GOOD, abs=1e-7)
    assert rows.probabilities.dtype == np.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_may_miss_one_by_their_own_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    exact = torch.softmax(3 * torch.randn(500, 7, generator=generator), dim=-1)
    labels = torch.randint(0, 7, (500,), generator=generator)
    report = calibration_report(exact.to(dtype), labels, confidence_level=None)
    direct = calibration_report(exact, labels, confidence_level=None)
    assert report["brier"] == pytest.approx(direct["brier"], abs=3e-3)
    accumulator = CalibrationAccumulator()
    accumulator.update(exact.to(dtype), labels)
    assert accumulator.compute()["brier"] == pytest.approx(report["brier"], abs=1e-12)


def test_binary_probabilities_are_those_of_class_one():
    positive = np.array([0.9, 0.2, 0.6, 0.5])
    labels = [1, 0, 0, 1]
    one = calibration_report(positive, labels, confidence_level=None).scores
    two = calibration_report(np.stack([1 - positive, positive], axis=1), labels, confidence_level=None).scores
    assert one == two
    logits = np.log(positive / (1 - positive))
    assert calibration_report(logits, labels, input="logits", confidence_level=None)["nll"] == pytest.approx(
        one["nll"]
    )


def test_token_rows_masks_and_ignored_labels():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(4, 6, 3)), generator.integers(0, 3, (4, 6))
    mask = generator.random((4, 6)) < 0.7
    ignored = np.where(mask, labels, -100)
    kept = calibration_report(softmax(logits[mask]), labels[mask], confidence_level=None).scores
    assert calibration_report(logits, ignored, input="logits", confidence_level=None).scores == kept
    assert calibration_report(logits, labels, input="logits", mask=mask, confidence_level=None).scores == kept
    accumulator = CalibrationAccumulator(input="logits")
    accumulator.update(logits, labels, mask=mask)
    accumulator.update(logits, np.full((4, 6), -100))
    assert accumulator.compute().scores == pytest.approx(kept, abs=1e-12)


def test_ignored_rows_may_hold_anything():
    dirty = np.concatenate([GOOD, np.full((1, 3), np.nan)])
    clean = calibration_report(GOOD, LABELS, confidence_level=None)
    assert calibration_report(dirty, [*LABELS, -100], confidence_level=None).scores == pytest.approx(
        clean.scores, nan_ok=True
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_half_precision_is_its_own_values_in_float64(kind, dtype):
    """Storing in half precision rounds; nothing after it may, so the same values in float64 give the same scores."""
    logits, labels = _logits(300)
    half = (logits if kind == "logits" else torch.softmax(logits, dim=-1)).to(dtype)
    given = calibration_report(half, labels, input=kind, confidence_level=None)
    wide = half.double()
    if kind == "probabilities":
        # As float64 numbers these rows miss 1 by more than their storage would excuse.
        assert (wide.sum(dim=-1) - 1).abs().max() > 1e-5
        rows = as_rows(half, labels)
        assert np.array_equal(rows.probabilities, np.minimum(wide.numpy(), 1.0))
    else:
        assert given.scores == calibration_report(wide, labels, input=kind, confidence_level=None).scores
    accumulator = CalibrationAccumulator(input=kind)
    for part in (slice(0, 100), slice(100, None)):
        accumulator.update(half[part], labels[part])
    assert accumulator.num_rows == 300
    for key in ("accuracy", "nll", "brier", "ece", "classwise_ece"):
        assert accumulator.compute()[key] == pytest.approx(given[key], abs=1e-12), key


def test_numpy_half_precision_equals_torch():
    logits, labels = _logits(200)
    half = torch.softmax(logits, dim=-1).half()
    by_torch = calibration_report(half, labels, confidence_level=None).scores
    assert calibration_report(half.numpy(), labels.numpy(), confidence_level=None).scores == by_torch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_are_draws(dtype):
    """Rows of bfloat16 sum to 1 within its own 0.8 %, stacked or as a list of draws."""
    p = torch.softmax(_logits(300)[0], -1).to(dtype)
    expected = draw_uncertainty(p.float().double().div(p.double().sum(-1, keepdim=True))[None]).entropy
    for draws in (p[None].expand(3, -1, -1), [p, p, p]):
        assert draw_uncertainty(draws).entropy == pytest.approx(expected, abs=2e-2)
    with pytest.raises(ValueError, match="summing to 1"):
        draw_uncertainty((p * 0.9)[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_excuse_a_wrong_sum(dtype):
    p = torch.tensor([[0.5, 0.5], [0.5, 0.4]], dtype=dtype)
    for call in (
        lambda: calibration_report(p, [0, 1], confidence_level=None),
        lambda: CalibrationAccumulator().update(p, [0, 1]),
    ):
        with pytest.raises(ValueError, match=r"row 1 sums to 0\.(9|8999)"):
            call()


def _logits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 5, (size,), generator=generator)
