"""Streaming: the numbers of the whole, in bounded memory, over processes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import run_ranks

from peft_calib.calibration import CalibrationAccumulator, calibration_report
from peft_calib.calibration.bins import uniform_index
from peft_calib.calibration.scores.table import KEYS, TACE_THRESHOLD, UNORDERED_KEYS
from peft_calib.calibration.streaming.sketch import CLASS_CELLS, Grid

# Scores that a histogram of cells stands in for, and how far it may be off.
IN_ORDER = {"ace", "ace_classwise", "tace", "tace_classwise", "smooth_ece", "ks_error", "error_auroc", "error_aupr",
            "success_aupr", "aurc", "e_aurc", "augrc"}  # fmt: skip


def _data(seed: int, size: int, classes: int = 4, scale: float = 2.5):
    generator = np.random.default_rng(seed)
    z = scale * generator.normal(size=(size, classes))
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    labels = np.where(generator.random(size) < 0.7, p.argmax(axis=1), generator.integers(0, classes, size))
    return p, labels


def _filled(p, y, batch: int, **options) -> CalibrationAccumulator:
    accumulator = CalibrationAccumulator(**options)
    for start in range(0, len(y), batch):
        accumulator.update(p[start : start + batch], y[start : start + batch])
    return accumulator


@pytest.mark.parametrize("scale", [0.3, 2.5, 12.0], ids=["unsure", "usual", "saturated"])
@pytest.mark.filterwarnings("ignore:.*probability of .nearly. 0:UserWarning")
def test_a_long_stream_has_the_numbers_of_the_whole(scale):
    p, y = _data(0, 30_000, scale=scale)
    accumulator = _filled(p, y, 701)
    assert not accumulator.is_exact
    whole, streamed = calibration_report(p, y, confidence_level=None), accumulator.compute()
    for key in KEYS:
        assert streamed[key] == pytest.approx(whole[key], abs=2e-3 if key in IN_ORDER else 1e-10), key
    assert abs(streamed["ace"] - whole["ace"]) <= accumulator.order_error()


def test_few_rows_are_exact():
    p, y = _data(1, 150)
    accumulator = _filled(p, y, 50)
    assert accumulator.is_exact
    assert accumulator.order_error() == 0
    assert accumulator.compute().scores == pytest.approx(
        calibration_report(p, y, confidence_level=None).scores, abs=1e-12
    )


def test_without_order_twelve_scores_remain():
    p, y = _data(2, 5000)
    accumulator = _filled(p, y, 512, ordered=False)
    scores = accumulator.compute().scores
    assert set(scores) == set(UNORDERED_KEYS)
    whole = calibration_report(p, y, confidence_level=None)
    assert scores == pytest.approx({key: whole[key] for key in UNORDERED_KEYS}, abs=1e-12)
    assert accumulator.num_bytes < 1024


def test_state_size_does_not_depend_on_the_number_of_rows():
    p, y = _data(3, 4000)
    sizes = [_filled(np.tile(p, (times, 1)), np.tile(y, times), 4000).num_bytes for times in (1, 5, 20)]
    assert len(set(sizes)) == 1
    assert sizes[0] < 64_000


@pytest.mark.parametrize("ordered", [True, False])
def test_merging_equals_streaming(ordered):
    p, y = _data(4, 9000)
    whole = _filled(p, y, 1000, ordered=ordered)
    left, right = (_filled(p[part], y[part], 700, ordered=ordered) for part in (slice(0, 3500), slice(3500, None)))
    merged = left.merge(right)
    assert torch.equal(merged.state()["counts"], whole.state()["counts"])
    assert torch.allclose(merged.state()["sums"], whole.state()["sums"], rtol=1e-12)
    assert merged.compute().scores == pytest.approx(whole.compute().scores, abs=1e-10)
    empty = CalibrationAccumulator(ordered=ordered)
    assert empty.merge(whole).num_rows == 9000
    assert whole.merge(CalibrationAccumulator(ordered=ordered)).num_rows == 9000


def test_state_is_additive_tensors():
    p, y = _data(5, 2000)
    a, b = _filled(p[:800], y[:800], 800), _filled(p[800:], y[800:], 1200)
    total = CalibrationAccumulator(num_classes=4)
    total.load_state({key: a.state()[key] + b.state()[key] for key in ("counts", "sums")})
    assert a.state()["counts"].dtype == torch.int64
    assert a.state()["sums"].dtype == torch.float64
    assert total.compute().scores == pytest.approx(_filled(p, y, 2000).compute().scores, abs=1e-10)
    with pytest.raises(ValueError, match="does not fit"):
        CalibrationAccumulator(num_classes=3).load_state(a.state())


def _rank(rank: int, folder: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    p, y = _data(6, 3001)
    mine = CalibrationAccumulator(num_classes=4)
    # The second rank gets no batch at all in the first round, and an uneven share in the second.
    if rank == 0:
        mine.update(p[:1000], y[:1000])
    part = slice(1000, 2500) if rank == 0 else slice(2500, None)
    mine.update(p[part], y[part])
    scores = mine.reduce(accelerator).compute().scores
    whole = _filled(p, y, 3001).compute().scores
    assert accelerator.num_processes == 2
    assert scores == pytest.approx(whole, abs=1e-10)
    np.savetxt(f"{folder}/rank{rank}", [scores["ece"]])


@pytest.mark.slow
def test_two_real_processes(tmp_path):
    run_ranks(_rank, str(tmp_path))
    assert np.loadtxt(tmp_path / "rank0") == np.loadtxt(tmp_path / "rank1")


def test_one_process_reduces_to_itself():
    class Alone:
        num_processes = 1

    accumulator = _filled(*_data(7, 100), 100)
    assert accumulator.reduce(Alone()) is accumulator


def test_an_empty_accumulator_says_so():
    with pytest.raises(ValueError, match="No batch"):
        CalibrationAccumulator().compute()
    with pytest.raises(ValueError, match="no row to measure"):
        CalibrationAccumulator(num_classes=3).compute()
    accumulator = _filled(*_data(8, 10), 10)
    with pytest.raises(ValueError, match="4 classes"):
        accumulator.update([[0.5, 0.5]], [0])
    with pytest.raises(ValueError, match="must agree"):
        accumulator.merge(_filled(*_data(8, 10, 3), 10))
    with pytest.raises(ValueError, match="at least 2"):
        CalibrationAccumulator(num_classes=1)


def test_the_caller_may_reuse_a_batch_buffer():
    p, y = _data(9, 60)
    buffer, labels = np.empty((20, 4)), np.empty(20, int)
    accumulator = CalibrationAccumulator()
    for start in (0, 20, 40):
        buffer[:], labels[:] = p[start : start + 20], y[start : start + 20]
        accumulator.update(buffer, labels)
    assert accumulator.compute().scores == pytest.approx(
        calibration_report(p, y, confidence_level=None).scores, abs=1e-12
    )


@pytest.mark.parametrize("num_bins", [1, 2, 10, 15, 100])
def test_cells_are_in_order_and_straddle_nothing(num_bins):
    grid = Grid(CLASS_CELLS, num_bins, TACE_THRESHOLD)
    edges = np.linspace(0, 1, num_bins + 1)
    powers = 10.0 ** -np.arange(1, 17)
    anywhere = np.random.default_rng(0).random(20_000)
    around = np.concatenate([np.nextafter(edges, 0), np.nextafter(edges, 1)])
    points = np.concatenate([edges, around, [TACE_THRESHOLD], powers, 1 - powers, anywhere])
    values = np.unique(np.clip(points, 0, 1))
    cells = grid.index(values)
    assert (np.diff(cells) >= 0).all()
    assert cells.min() >= 0 and cells.max() < grid.size
    for same in (uniform_index(values, num_bins), values > TACE_THRESHOLD):
        changes = np.flatnonzero(np.diff(same.astype(int)))
        assert (cells[changes] < cells[changes + 1]).all()
    assert (np.searchsorted(grid.starts, cells, side="right") - 1 == uniform_index(values, num_bins)).all()
