"""The fused pass against the same sums taken plainly: one search among the edges, one argmax, one logarithm a row."""

import warnings

import numpy as np
import pytest

from peft_calib.calibration import CalibrationAccumulator, calibration_report
from peft_calib.calibration.bins import uniform_edges
from peft_calib.calibration.scores import top_label_pass
from peft_calib.calibration.scores.binned import SMALLEST_PROBABILITY
from peft_calib.calibration.scores.table import UNORDERED_KEYS
from peft_calib.calibration.scores.top_label_pass import TopLabelSums


def _rows(seed: int, size: int, classes: int, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    z = scale * generator.normal(size=(size, classes))
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True), generator.integers(0, classes, size)


def _plain(p: np.ndarray, y: np.ndarray, num_bins: int) -> dict[str, np.ndarray | float]:
    p = p.astype(np.float64)
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == y
    index = np.maximum(np.searchsorted(uniform_edges(num_bins), confidence) - 1, 0)
    of_label = p[np.arange(len(y)), y]
    return {
        "counts": np.bincount(2 * index + correct, minlength=2 * num_bins),
        "confidence": np.bincount(index, confidence, num_bins),
        "nll": float(-np.log(np.maximum(of_label, SMALLEST_PROBABILITY)).sum()),
        "brier": float(((p - np.eye(p.shape[1])[y]) ** 2).sum()),
        "num_impossible": int((of_label < SMALLEST_PROBABILITY).sum()),
    }


def _assert_equal(sums: TopLabelSums, expected: dict, squares: float = 1e-12) -> None:
    assert np.array_equal(sums.counts, expected["counts"])
    np.testing.assert_allclose(sums.confidence, expected["confidence"], rtol=1e-12)
    assert sums.nll == pytest.approx(expected["nll"], rel=1e-12, abs=1e-12)
    assert sums.brier == pytest.approx(expected["brier"], rel=1e-12, abs=squares * sums.num_rows)
    assert sums.num_impossible == expected["num_impossible"]


def _added(p: np.ndarray, y: np.ndarray, num_bins: int) -> TopLabelSums:
    sums = TopLabelSums(num_bins)
    assert sums.add(p, y, checked=False)
    assert sums.num_rows == len(y)
    return sums


@pytest.mark.parametrize("classes", [2, 3, 4, 50, 5000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_many_chunks(classes, dtype):
    p, y = _rows(0, max(37, 60_001 // classes), classes, scale=6.0)
    p = p.astype(dtype)
    _assert_equal(_added(p, y, 15), _plain(p, y, 15), squares=1e-8 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("num_bins", [*range(1, 41), 97, 98, 100, 196, 1000, 10_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_on_edges_and_next_to_them(num_bins, dtype):
    edges = uniform_edges(num_bins)[-1 - min(num_bins, 400) :].astype(dtype)
    near = [edges]
    for _ in range(3):
        near = [np.nextafter(near[0], dtype(0)), *near, np.nextafter(near[-1], dtype(2))]
    values = np.unique(np.clip(np.concatenate(near), 0.5, 1.0))
    p = np.stack([values, 1 - values], axis=1)
    _assert_equal(_added(p, np.arange(len(p)) % 2, num_bins), _plain(p, np.arange(len(p)) % 2, num_bins), squares=1e-7)


def test_decimals_lie_on_edges_by_the_thousand():
    generator = np.random.default_rng(1)
    p = np.round(generator.random(30_000) / 2 + 0.5, 1)
    p, y = np.stack([1 - p, p], axis=1), generator.integers(0, 2, 30_000)
    for num_bins in (10, 15, 20):
        _assert_equal(_added(p, y, num_bins), _plain(p, y, num_bins))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_go_to_the_first_class(dtype):
    generator = np.random.default_rng(2)
    p = (generator.multinomial(4, [0.25] * 4, 20_000) / 4).astype(dtype)
    y = generator.integers(0, 4, len(p))
    _assert_equal(_added(p, y, 15), _plain(p, y, 15))


@pytest.mark.parametrize("change", [np.asfortranarray, lambda p: np.repeat(p, 2, axis=0)[::2], lambda p: p[::-1]])
def test_memory_layouts(change):
    p, y = _rows(3, 20_000, 4)
    given = change(p)
    _assert_equal(_added(given, y, 15), _plain(np.ascontiguousarray(given), y, 15))


@pytest.mark.parametrize("row", [[0.7, 0.2, 0.1], [0.4, 0.3, 0.3], [0.999, 0.0005, 0.0005]])
def test_float32_squares_do_not_drift(row):
    """The worst case for sums in float32: one row over and over, so that all roundings point the same way."""
    p = np.tile(np.array(row, np.float32), (300_000, 1))
    y = np.zeros(len(p), np.int64)
    assert _added(p, y, 15).brier / len(p) == pytest.approx(_plain(p, y, 15)["brier"] / len(p), abs=1e-7)


def test_impossible_rows_are_counted_and_clipped():
    p = np.tile([[1.0, 0.0], [0.5, 0.5], [1e-15, 1 - 1e-15]], (5000, 1))
    y = np.tile([1, 0, 0], 5000)
    _assert_equal(_added(p, y, 15), _plain(p, y, 15))


def test_packed_counts_are_unpacked_in_time(monkeypatch):
    monkeypatch.setattr(top_label_pass, "FOLD", 1000)
    p, y = _rows(4, 3500, 3)
    _assert_equal(_added(p, y, 15), _plain(p, y, 15))


def test_a_packed_count_is_exact_up_to_its_largest():
    """As many rows between two read-outs as there may be, all in one bin, all right."""
    sums = TopLabelSums(2)
    packed = np.array([0.0, top_label_pass.FOLD * (1.0 + 1j * (top_label_pass.ROW + 1)), 0.0])
    assert sums._unpack(packed)
    assert sums.counts.tolist() == [0, 0, 0, top_label_pass.FOLD]


def _with(p: np.ndarray, row: int, values: list[float]) -> np.ndarray:
    p = p.copy()
    p[row] = values
    return p


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "values",
    [
        [0.5, 0.5, -1e-30],
        [0.6, 0.6, -0.2],
        [np.nan, 0.5, 0.5],
        [np.inf, 0.0, 0.0],
        [0.5, 0.5, 0.0012],
        [0.5, 0.4985, 0.0],
        [0.0, 0.0, 0.0],
        [1.0005, 0.0, 0.0],
    ],
    ids=["hardly negative", "negative", "nan", "infinity", "sum above", "sum below", "nothing", "above one"],
)
def test_one_bad_row_among_thousands_is_noticed(values, dtype):
    p, y = _rows(5, 30_000, 3)
    assert not TopLabelSums(15).add(_with(p, 29_999, values).astype(dtype), y, checked=False)


@pytest.mark.parametrize("label", [-1, 3, -100, np.iinfo(np.int64).min])
def test_one_bad_label_is_noticed(label):
    p, y = _rows(6, 30_000, 3)
    y[17] = label
    assert not TopLabelSums(15).add(p, y, checked=False)


def test_a_probability_just_above_one_counts_as_one():
    p, y = _rows(7, 500, 3)
    p = _with(p, 3, [1.0005, 0.0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole = calibration_report(p, y, confidence_level=None)
        accumulator = CalibrationAccumulator(ordered=False)
        accumulator.update(p, y)
        assert accumulator.compute().scores == pytest.approx({k: whole[k] for k in UNORDERED_KEYS}, abs=1e-12)


@pytest.mark.parametrize("ordered", [True, False])
def test_an_ignored_label_may_be_a_class(ordered):
    p, y = _rows(8, 400, 3)
    accumulator = CalibrationAccumulator(ordered=ordered, ignore_index=0)
    accumulator.update(p, y)
    kept = calibration_report(p[y != 0], y[y != 0], confidence_level=None)
    assert accumulator.num_rows == (y != 0).sum()
    assert accumulator.compute()["ece"] == pytest.approx(kept["ece"], abs=1e-12)
