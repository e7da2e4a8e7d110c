"""A score is defined once: one line in the table, one function for the report, the resamples and the stream."""

import ast
from pathlib import Path

import numpy as np
import pytest

from peft_calib.calibration import CalibrationAccumulator, calibration_report
from peft_calib.calibration.bins import equal_mass_bins, group_by_value, uniform_bins
from peft_calib.calibration.inputs import Rows
from peft_calib.calibration.resampling import intervals
from peft_calib.calibration.scores import binned, columns
from peft_calib.calibration.scores.panel import compute_panel
from peft_calib.calibration.scores.table import KEYS, TACE_THRESHOLD

ROOT = Path(__file__).parents[2]
PACKAGES = ("peft_calib", "metrics", "trainer_callbacks", "hub_examples")


def _listed(node: ast.AST) -> list[str]:
    """The scores that a literal list, tuple or set, or a string that is split, names."""
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        words = [item.value for item in node.elts if isinstance(item, ast.Constant)]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "split":
        text = node.func.value
        words = text.value.split() if isinstance(text, ast.Constant) and isinstance(text.value, str) else []
    else:
        return []
    return [word for word in words if word in KEYS]


def test_wilsons_formula_stands_once():
    found = [path.name for path in (ROOT / "peft_calib").rglob("*.py") if "z**2" in path.read_text(encoding="utf-8")]
    assert found == ["bands.py"]


def test_no_list_of_scores_is_typed_twice():
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                found = _listed(node)
                assert len(found) < 3, f"{file.relative_to(ROOT)}:{node.lineno} lists scores anew: {found}"


@pytest.mark.parametrize("kind", ["spread", "decimals", "saturated", "missing classes"])
def test_bins_of_columns_are_those_of_a_full_sort(kind):
    generator = np.random.default_rng(3)
    z = generator.normal(size=(150_000, 4)) * (40 if kind == "saturated" else 3)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    if kind == "decimals":
        p = generator.multinomial(100, [0.6, 0.2, 0.15, 0.05], len(p)) / 100
    labels = generator.integers(0, 2 if kind == "missing classes" else 4, len(p))
    found = columns.column_bins(Rows(p, labels), 15)
    hits = np.arange(4) == labels[:, None]
    for k in np.unique(labels):
        high = p[:, k] > TACE_THRESHOLD
        for bins, expected in (
            (found.uniform, uniform_bins(p[:, k], hits[:, k], 15)),
            (found.mass, equal_mass_bins(group_by_value(p[:, k], hits[:, k]), 15)),
            (found.kept, equal_mass_bins(group_by_value(p[high, k], hits[high, k]), 15)),
        ):
            _assert_same(bins[k], expected)
    high = p > TACE_THRESHOLD
    _assert_same(found.pooled, equal_mass_bins(group_by_value(p[high], hits[high]), 15))


def _assert_same(found, expected):
    np.testing.assert_allclose(found.counts, expected.counts, rtol=1e-12)
    np.testing.assert_allclose(found.confidence_sums, expected.confidence_sums, rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(found.outcome_sums, expected.outcome_sums, rtol=1e-11, atol=1e-8)


@pytest.mark.parametrize(
    ("function", "keys"),
    [
        ("debiased_l2_error", ["rmsce_debiased"]),
        ("classwise_error", ["classwise_ece", "ace_classwise", "tace_classwise"]),
        ("brier_decomposition", ["brier_reliability", "brier_resolution"]),
        ("calibration_error", ["ece", "mce", "rmsce", "average_gap", "tace"]),
    ],
)
def test_one_function_serves_report_resamples_and_stream(function, keys, monkeypatch):
    """What it says of a score is what all three say: there is no second formula."""
    generator = np.random.default_rng(5)
    p, labels = generator.dirichlet(np.ones(3), 3000), generator.integers(0, 3, 3000)
    real = getattr(binned, function)

    def moved(*args, **kwargs):
        found = real(*args, **kwargs)
        return {key: value + 7.0 for key, value in found.items()} if isinstance(found, dict) else found + 7.0

    monkeypatch.setattr(binned, function, moved)
    rows, stream = Rows(p, labels), CalibrationAccumulator()
    stream.update(p, labels)
    stream._kept = None  # as after many rows
    resampled = intervals.bootstrap_draws(rows, num_resamples=20)
    for scores in (compute_panel(rows, 15), stream.compute(), {key: resampled[key].min() for key in keys}):
        assert all(scores[key] >= 7.0 for key in keys)


def test_report_and_stream_give_the_scores_over_equal_width_bins_by_one_arithmetic():
    generator = np.random.default_rng(4)
    p = generator.dirichlet(np.ones(3), 5000)
    labels = generator.integers(0, 3, 5000)
    stream = CalibrationAccumulator()
    stream.update(p, labels)
    report, streamed = calibration_report(p, labels, confidence_level=None), stream.compute()
    for key in ("ece", "mce"):
        assert streamed[key] == pytest.approx(report[key], abs=1e-13)
