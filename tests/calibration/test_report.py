"""The report in each of its forms, and the pictures."""

import base64
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from peft_calib.calibration import (
    CalibrationAccumulator,
    before_after_diagram,
    calibration_report,
    classwise_diagram,
    confidence_histogram,
    draw_uncertainty,
    reliability_diagram,
    risk_coverage_diagram,
)
from peft_calib.calibration.bins import group_by_value
from peft_calib.calibration.resampling.bands import consistency_band, wilson_interval
from peft_calib.calibration.scores.smooth import residual_grid, smooth_calibration_error
from peft_calib.calibration.scores.table import DEFINITIONS, KEYS


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    p = generator.dirichlet([0.5, 0.5, 0.5], 300)
    return p, np.where(generator.random(300) < 0.6, p.argmax(axis=1), generator.integers(0, 3, 300))


@pytest.fixture(scope="module")
def report(data):
    return calibration_report(*data, num_resamples=100)


def test_dictionary_and_json(report):
    values = report.to_dict()
    assert set(values) == {*KEYS, "settings", "intervals", "noise_floor"}
    assert all(isinstance(values[key], float) for key in KEYS)
    for key in KEYS:
        low, high = values["intervals"][key]
        assert low <= high or np.isnan(low)
        assert set(values["noise_floor"][key]) == {"mean", "low", "high"}
    assert np.isnan(values["intervals"].pop("brier_within_bin")).all()
    written = json.loads(report.to_json())
    assert written["intervals"].pop("brier_within_bin") == [None, None]
    assert written == json.loads(json.dumps(values))
    assert dict(report) == report.scores


def test_redefined_scores_have_no_interval_of_another_definition(data):
    report = calibration_report(*data, convention="netcal", num_resamples=50)
    assert {"ece", "mce", "rmsce", "ace"} & set(report.intervals) == set()
    assert {"nll", "brier", "smooth_ece"} <= set(report.intervals) & set(report.floor)
    assert "ECE" in report.verdict() and "| ece |" in report.to_markdown() and "netcal" in report.to_html()


def test_undefined_scores_are_null_in_json():
    report = calibration_report([[0.9, 0.1]] * 3, [0, 0, 0], confidence_level=None)
    assert np.isnan(report["error_auroc"])
    values = json.loads(report.to_json())
    assert values["error_auroc"] is None and values["intervals"] is None and values["noise_floor"] is None


def test_markdown(report):
    text = report.to_markdown()
    for key in KEYS:
        assert f"| {key} |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert text.startswith(report.verdict())


def test_html_is_self_contained(report):
    page = report.to_html()
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 5
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    for meaning in DEFINITIONS.values():
        assert meaning.replace("&", "&amp;").replace("'", "&#x27;").replace(">", "&gt;") in page


def test_the_page_says_what_it_is_of_and_shows_both_sides(data):
    p, labels = data
    before = calibration_report(p, labels, num_resamples=50)
    sharp = p**1.5 / (p**1.5).sum(axis=1, keepdims=True)
    after = calibration_report(sharp, labels, num_resamples=50, class_names=["low", "<b>", "high"])
    page = after.to_html(before=before, about={"run": "runs/<one>", "rows": 7}, title="a & b")
    first, _, rest = page.partition("<details>")
    assert "<h1>a &amp; b</h1>" in first
    assert "runs/&lt;one&gt;" in first and "<one>" not in page
    shown = re.findall(r"<td><code>(\w+)</code></td>", first)
    assert shown == ["accuracy", "nll", "brier", "ece", "smooth_ece", "aurc", "error_auroc", "mean_confidence"]
    assert f"{before['nll']:.4f}" in first and f"{after['nll']:.4f}" in first
    assert re.findall(r"<td><code>(\w+)</code></td>", rest) == list(after.scores)  # the others are folded
    assert first.count("data:image/png") == 2


def test_the_orders_beside_the_model_are_those_of_its_errors():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    axes = risk_coverage_diagram((p, np.array([0, 0, 0, 1]))).axes[0]
    model, best, chance = axes.lines
    np.testing.assert_allclose(best.get_xdata(), [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(best.get_ydata(), [0, 0, 0, 0.25])
    np.testing.assert_allclose(model.get_ydata(), best.get_ydata())  # its one error comes last
    assert set(chance.get_ydata()) == {0.25}
    wrong_first = risk_coverage_diagram((p, np.array([1, 0, 0, 0]))).axes[0].lines
    np.testing.assert_allclose(wrong_first[0].get_ydata(), [1, 0.5, 1 / 3, 0.25])
    np.testing.assert_allclose(wrong_first[1].get_ydata(), [0, 0, 0, 0.25])


def test_verdicts():
    generator = np.random.default_rng(1)
    p = generator.dirichlet([1.0, 1.0], 800)
    labels = (generator.random(800) < p[:, 1]).astype(int)
    assert "cannot tell the two apart" in calibration_report(p, labels, num_resamples=100).verdict()
    sharp = p**3 / (p**3).sum(axis=1, keepdims=True)
    assert "mostly over-confident" in calibration_report(sharp, labels, num_resamples=100).verdict()
    flat = p**0.3 / (p**0.3).sum(axis=1, keepdims=True)
    assert "mostly under-confident" in calibration_report(flat, labels, num_resamples=100).verdict()
    assert "no interval" in calibration_report(p, labels, confidence_level=None).verdict()


def test_a_streamed_report_renders_too(data):
    accumulator = CalibrationAccumulator()
    accumulator.update(*data)
    report = accumulator.compute()
    assert report.to_html().count("data:image/png") == 3
    assert "| ece |" in report.to_markdown()


FIGURES = {
    "reliability": lambda p, y: reliability_diagram(p, y, title="model"),
    "classwise": lambda p, y: classwise_diagram(p, y, class_names=["a", "b", "c"]),
    "risk coverage": lambda p, y: risk_coverage_diagram({"one": (p, y), "two": (p[:, ::-1], y)}),
    "confidence": lambda p, y: confidence_histogram(p, y),
    "before and after": lambda p, y: before_after_diagram(p, np.sqrt(p) / np.sqrt(p).sum(axis=1, keepdims=True), y),
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("kind", ["usual", "one row", "saturated"])
def test_every_figure_draws_every_kind_of_data(tmp_path, data, name, kind):
    p, y = data
    if kind == "one row":
        p, y = p[:1], y[:1]
    elif kind == "saturated":
        p = np.eye(3)[p.argmax(axis=1)]
    figure = FIGURES[name](p, y)
    figure.savefig(tmp_path / "figure.png")
    picture = imread(tmp_path / "figure.png")
    assert picture[..., :3].std() > 0.03


def test_pictures_leave_pyplot_alone():
    code = (
        "import sys, numpy as np\n"
        "from peft_calib.calibration import reliability_diagram\n"
        "reliability_diagram(np.full((4, 2), 0.5), [0, 1, 0, 1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_reliability_diagram_shows_the_numbers(data):
    figure = reliability_diagram(*data)
    ece = calibration_report(*data, confidence_level=None)["ece"]
    assert f"ECE {ece:.3f}" in figure.axes[0].texts[0].get_text()
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == pytest.approx(1.0)


def test_wilson_interval_against_its_defining_equation():
    low, high = wilson_interval(np.array([7.0]), np.array([20]), 0.95)
    for end in (low[0], high[0]):
        assert (0.35 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 20, rel=1e-5)


def test_consistency_band_against_scipy():
    from scipy.stats import binom

    n, p = np.array([1, 5, 37, 900, 0]), np.array([0.3, 0.9, 0.62, 0.5, np.nan])
    low, high = consistency_band(p, n, 0.95)
    assert low[:4] == pytest.approx(binom.ppf(0.025, n[:4], p[:4]) / n[:4])
    assert high[:4] == pytest.approx(binom.ppf(0.975, n[:4], p[:4]) / n[:4])
    assert np.isnan(low[4])
    wide = consistency_band(np.array([0.7]), np.array([40_000]), 0.95)
    assert wide[0][0] == pytest.approx(binom.ppf(0.025, 40_000, 0.7) / 40_000, abs=1e-12)


def _smooth_by_hand(f, r, s, size=4000):
    """smECE at one bandwidth, straight from its definition: reflected Gaussians on a grid."""
    t = (np.arange(size) + 0.5) / size
    total = np.zeros(size)
    for shift in range(-4, 5):
        for centre in (f + 2 * shift, 2 * shift - f):
            total += (np.exp(-0.5 * ((t[:, None] - centre) / s) ** 2) / (s * np.sqrt(2 * np.pi))) @ r
    return np.abs(total / len(f)).mean()


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_smooth_ece_is_the_fixed_point_of_its_definition(power):
    generator = np.random.default_rng(3)
    f = generator.random(300)
    y = generator.random(300) < f**power
    value = smooth_calibration_error(group_by_value(f, y))
    assert _smooth_by_hand(f, y - f, value) == pytest.approx(value, rel=0.02)


def test_smooth_ece_of_a_constant_predictor_is_its_bias():
    groups = group_by_value(np.full(100, 0.9), np.arange(100) < 60)
    assert residual_grid(groups).sum() == pytest.approx(-0.3)
    assert smooth_calibration_error(groups) == pytest.approx(0.3, abs=1e-3)


def test_uncertainty_of_draws():
    generator = np.random.default_rng(4)
    draws = generator.dirichlet([1.0, 1.0, 1.0], (8, 50))
    parts = draw_uncertainty(draws)
    mean = draws.mean(axis=0)
    assert parts.entropy == pytest.approx(-(mean * np.log(mean)).sum(axis=-1))
    assert parts.entropy == pytest.approx(parts.expected_entropy + parts.mutual_information, abs=1e-12)
    # Mutual information is the mean Kullback-Leibler divergence from the mean.
    assert parts.mutual_information == pytest.approx(
        (draws * np.log(draws / mean)).sum(axis=-1).mean(axis=0), abs=1e-12
    )
    one = draw_uncertainty(draws[:1])
    assert (one.mutual_information == 0).all() and (one.variation == 0).all()
    logits = np.log(draws) + generator.normal(size=(8, 50, 1))
    assert draw_uncertainty(logits, input="logits").entropy == pytest.approx(parts.entropy)
