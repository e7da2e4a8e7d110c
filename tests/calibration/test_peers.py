"""Agreement with other libraries under their own conventions, and where one of them is wrong, by how much.

netcal and lm-polygraph are not in the `test` extra: their metadata drags in pyro, gpytorch and tensorboard, and some
thirty packages for generation, which their metrics do not need (`pip install --no-deps netcal lm-polygraph` is
enough).
"""

import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from peft_calib.calibration import CalibrationAccumulator, calibration_report
from peft_calib.calibration.bins import accumulate, classwise_uniform_bins, top_label, uniform_bins
from peft_calib.calibration.scores.binned import calibration_error, debiased_l2_error
from peft_calib.calibration.scores.selective import aurc, prediction_rejection_ratio, rank

torchmetrics = pytest.importorskip("torchmetrics.functional.classification")

TOLERANCE = 1e-6


def _softmax(generator, size, classes, scale):
    z = scale * generator.normal(size=(size, classes))
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def _cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    cases = {}
    for classes in (2, 3, 10):
        p = _softmax(generator, 997, classes, 2.0)
        cases[f"random {classes}"] = p, generator.integers(0, classes, 997)
    cases["ties"] = np.repeat([[0.2, 0.5, 0.3]], 60, axis=0), np.arange(60) % 3
    cases["one sample"] = np.array([[0.1, 0.6, 0.3]]), np.array([1])
    cases["class never predicted"] = np.tile([[0.7, 0.2, 0.1], [0.6, 0.4, 0.0]], (20, 1)), np.arange(40) % 3
    cases["zeros"] = np.tile([[0.75, 0.25, 0.0], [0.0, 0.25, 0.75]], (20, 1)), np.arange(40) % 3
    sure = np.eye(3)[generator.integers(0, 3, 60)]
    cases["sure of everything"] = sure, np.where(generator.random(60) < 0.8, sure.argmax(axis=1), 2)
    mixed = np.concatenate([sure, _softmax(generator, 60, 3, 2.0), np.full((60, 3), 1 / 3)])
    cases["sure, unsure and between"] = mixed, generator.integers(0, 3, 180)
    # Values on the edges of 15 bins, where rounding decides.
    edge = np.linspace(0, 1, 16)[8:15]
    cases["on the edges"] = np.stack([edge, (1 - edge) / 2, (1 - edge) / 2], axis=1), np.array([0, 1, 2, 0, 0, 1, 0])
    half = _softmax(generator, 400, 4, 2.0).astype(np.float16)
    cases["float16"] = half, generator.integers(0, 4, 400)
    return cases


CASES = _cases()


def _report(p, y, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return calibration_report(p, y, confidence_level=None, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_torchmetrics_multiclass(case, num_bins):
    p, y = CASES[case]
    report = _report(p, y, num_bins=num_bins, convention="torchmetrics")
    for key, norm in (("ece", "l1"), ("rmsce", "l2"), ("mce", "max")):
        theirs = torchmetrics.multiclass_calibration_error(
            torch.tensor(p).float(), torch.tensor(y), num_classes=p.shape[1], n_bins=num_bins, norm=norm
        )
        assert report[key] == pytest.approx(float(theirs), abs=TOLERANCE), key


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torchmetrics_binary_means_the_positive_class(dtype):
    generator = np.random.default_rng(1)
    p = generator.random(500).astype(dtype)
    p[:40] = np.repeat(np.array([0.0, 1.0, 0.2, 0.8], dtype), 10)
    y = (generator.random(500) < p).astype(int)
    report = _report(p, y, convention="torchmetrics")
    theirs = torchmetrics.binary_calibration_error(torch.tensor(p), torch.tensor(y), n_bins=15)
    assert report["ece"] == pytest.approx(float(theirs), abs=TOLERANCE)


@pytest.fixture(scope="module")
def million() -> tuple[np.ndarray, np.ndarray]:
    """10^6 rows of a four-class model that is not calibrated."""
    generator = np.random.default_rng(4)
    p = _softmax(generator, 10**6, 4, 2.0)
    true = p**0.7
    cumulative = (true / true.sum(axis=1, keepdims=True)).cumsum(axis=1)
    return p, (generator.random((10**6, 1)) > cumulative).sum(axis=1).clip(max=3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torchmetrics_on_a_million_rows(million, dtype):
    p, y = million[0].astype(dtype), million[1]
    report = _report(p, y, convention="torchmetrics")
    theirs = torchmetrics.multiclass_calibration_error(torch.tensor(p), torch.tensor(y), num_classes=4, n_bins=15)
    assert report["ece"] == pytest.approx(float(theirs), abs=TOLERANCE)
    # The binary function keeps float64: given confidence and correctness, it is the same score without drift.
    exact = torch.tensor(p.max(axis=1).astype(np.float64)), torch.tensor((p.argmax(axis=1) == y).astype(int))
    for key, norm in (("ece", "l1"), ("rmsce", "l2"), ("mce", "max")):
        theirs = torchmetrics.binary_calibration_error(*exact, n_bins=15, norm=norm)
        assert report[key] == pytest.approx(float(theirs), abs=TOLERANCE), key


@pytest.mark.slow
def test_torchmetrics_drifts_on_a_million_rows(million):
    """Its sums over several classes are float32 whatever the input: the gap of a bin is off by some 2e-5."""
    p, y = million
    ours = _report(p, y, convention="torchmetrics")["mce"]
    tensors = torch.tensor(p), torch.tensor(y)
    theirs = torchmetrics.multiclass_calibration_error(*tensors, num_classes=4, n_bins=15, norm="max")
    exact = torchmetrics.binary_calibration_error(
        tensors[0].amax(dim=1), (tensors[0].argmax(dim=1) == tensors[1]).int(), n_bins=15, norm="max"
    )
    assert ours == pytest.approx(float(exact), abs=TOLERANCE)
    assert TOLERANCE < abs(float(theirs) - float(exact)) < 1e-3


@pytest.mark.slow
def test_torchmetrics_binary_on_a_million_rows(million):
    p, y = million[0][:, 0], (million[1] == 0).astype(int)
    theirs = torchmetrics.binary_calibration_error(torch.tensor(p), torch.tensor(y), n_bins=15)
    for dtype in (np.float32, np.float64):
        ours = _report(p.astype(dtype), y, convention="torchmetrics")["ece"]
        assert ours == pytest.approx(float(theirs), abs=TOLERANCE)


@pytest.mark.slow
def test_netcal_on_a_million_rows(million):
    metrics = pytest.importorskip("netcal.metrics", reason="see the module's docstring")
    p, y = million
    report = _report(p, y, convention="netcal")
    for key, metric in (("ece", metrics.ECE), ("mce", metrics.MCE), ("ace", metrics.ACE)):
        assert report[key] == pytest.approx(metric(bins=15).measure(p, y), abs=TOLERANCE), key


@pytest.mark.slow
def test_scikit_learn_on_a_million_rows(million):
    p, y = million
    report = _report(p, y, convention="sklearn")
    assert report["nll"] == pytest.approx(log_loss(y, p), abs=TOLERANCE)
    assert report["brier"] == pytest.approx(brier_score_loss(y, p, labels=range(4)), abs=TOLERANCE)
    one, is_first = p[:, 0], (y == 0).astype(int)
    binary = _report(one, is_first, convention="sklearn")
    for key, strategy in (("ece", "uniform"), ("ace", "quantile")):
        assert binary[key] == pytest.approx(_curve_error(is_first, one, strategy), abs=TOLERANCE), key


@pytest.mark.slow
def test_uncertainty_calibration_on_a_million_rows(million):
    peer = pytest.importorskip("calibration.utils", reason="not installed")
    p, y = million
    report = _report(p, y)
    assert report["ece"] == pytest.approx(peer.get_ece(p, y, num_bins=15), abs=TOLERANCE)
    scheme = {"binning_scheme": peer.get_equal_prob_bins, "num_bins": 15}
    theirs = peer.lower_bound_scaling_ce(p, y, p=2, debias=True, mode="top-label", **scheme)
    assert report["rmsce_debiased"] == pytest.approx(theirs, abs=TOLERANCE)
    theirs = peer.lower_bound_scaling_ce(p, y, p=1, debias=False, mode="marginal", **scheme)
    assert report["classwise_ece"] == pytest.approx(theirs, abs=TOLERANCE)
    # Equal mass to within a row a bin: without ties, theirs and ours are the same thing.
    assert report["ace"] == pytest.approx(peer.get_ece_em(p, y, num_bins=15), abs=2 * 15 / 10**6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_streamed_million_agrees_as_well(million, dtype):
    metrics = pytest.importorskip("netcal.metrics", reason="see the module's docstring")
    p, y = million
    accumulator = CalibrationAccumulator(ordered=False)
    for start in range(0, 10**6, 300_000):
        accumulator.update(p[start : start + 300_000].astype(dtype), y[start : start + 300_000])
    scores = accumulator.compute()
    # No row lies on an edge, so [lo, hi) and (lo, hi] are the same bins.
    assert scores["ece"] == pytest.approx(metrics.ECE(15).measure(p, y), abs=TOLERANCE)
    assert scores["nll"] == pytest.approx(log_loss(y, p), abs=TOLERANCE)
    assert scores["brier"] == pytest.approx(brier_score_loss(y, p, labels=range(4)), abs=TOLERANCE)


def test_torchmetrics_puts_confidence_one_in_a_bin_of_its_own():
    """100 rows at 1.0 with accuracy .8 and 100 at .95 with accuracy 1: two bins for them, one for everyone else."""
    p = np.repeat([[1.0, 0.0], [0.95, 0.05]], 100, axis=0)
    y = np.array([0] * 80 + [1] * 20 + [0] * 100)
    theirs = torchmetrics.multiclass_calibration_error(torch.tensor(p), torch.tensor(y), num_classes=2, n_bins=10)
    assert float(theirs) == pytest.approx(0.125, abs=1e-6)
    assert _report(p, y, num_bins=10, convention="torchmetrics")["ece"] == pytest.approx(0.125, abs=1e-6)
    assert _report(p, y, num_bins=10)["ece"] == pytest.approx(0.075, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_netcal(case, num_bins):
    metrics = pytest.importorskip("netcal.metrics", reason="see the module's docstring")
    p, y = CASES[case]
    if len(np.unique(y)) <= 2 and p.shape[1] > 2:
        pytest.skip("netcal takes two labels for a binary problem and refuses three columns")
    p = p.astype(np.float64)
    report = _report(p, y, num_bins=num_bins, convention="netcal")
    for key, metric in (("ece", metrics.ECE), ("mce", metrics.MCE), ("ace", metrics.ACE)):
        assert report[key] == pytest.approx(metric(bins=num_bins).measure(p, y), abs=TOLERANCE), key


@pytest.mark.parametrize("case", CASES)
def test_scikit_learn_losses(case):
    p, y = CASES[case]
    p = p.astype(np.float64)
    p = p / p.sum(axis=1, keepdims=True)
    classes = np.arange(p.shape[1])
    report = _report(p, y, convention="sklearn")
    assert report["nll"] == pytest.approx(log_loss(y, p, labels=classes), abs=TOLERANCE)
    if p.shape[1] == 2:
        assert report["brier"] == pytest.approx(brier_score_loss(y, p[:, 1]), abs=TOLERANCE)
    else:
        assert report["brier"] == pytest.approx(brier_score_loss(y, p, labels=classes), abs=TOLERANCE)


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_scikit_learn_calibration_curve(strategy):
    generator = np.random.default_rng(3)
    p = np.round(generator.random(400), 2)
    y = (generator.random(400) < p).astype(int)
    key = "ece" if strategy == "uniform" else "ace"
    theirs = _curve_error(y, p, strategy)
    assert _report(p, y, convention="sklearn")[key] == pytest.approx(theirs, abs=TOLERANCE)


def _curve_error(y: np.ndarray, p: np.ndarray, strategy: str) -> float:
    """The calibration error of scikit-learn's curve, its bins weighted by their rows."""
    frequency, confidence = calibration_curve(y, p, n_bins=15, strategy=strategy)
    edges = np.linspace(0, 1, 16) if strategy == "uniform" else np.percentile(p, np.linspace(0, 100, 16))
    counts = np.bincount(np.searchsorted(edges[1:-1], p), minlength=15)
    return float(np.abs(frequency - confidence) @ counts[counts > 0] / len(y))


@pytest.mark.parametrize("case", CASES)
def test_uncertainty_calibration(case):
    peer = pytest.importorskip("calibration.utils", reason="see the module's docstring")
    p, y = CASES[case]
    p = p.astype(np.float64)
    confidence, predicted = top_label(p)
    top = uniform_bins(confidence, predicted == y, 15)
    assert calibration_error(top) == pytest.approx(peer.get_ece(p, y, num_bins=15), abs=TOLERANCE)
    scheme = {"binning_scheme": peer.get_equal_prob_bins, "num_bins": 15}
    theirs = peer.lower_bound_scaling_ce(p, y, p=2, debias=True, mode="top-label", **scheme)
    assert debiased_l2_error(top) == pytest.approx(theirs, abs=TOLERANCE)
    by_class = classwise_uniform_bins(p, y, 15)
    theirs = peer.lower_bound_scaling_ce(p, y, p=1, debias=False, mode="marginal", **scheme)
    assert np.mean([calibration_error(by_class[k]) for k in range(p.shape[1])]) == pytest.approx(theirs, abs=TOLERANCE)
    # Their equal-mass bins have edges half-way between neighbours.
    edges = np.array(peer.get_equal_bins(list(confidence), 15))
    mass = accumulate(np.searchsorted(edges, confidence), confidence, predicted == y, len(edges))
    assert calibration_error(mass) == pytest.approx(peer.get_ece_em(p, y, num_bins=15), abs=TOLERANCE)
    if case.startswith("random"):
        ours = _report(p, y)["ace"]
        assert ours == pytest.approx(peer.get_ece_em(p, y, num_bins=15), abs=0.01)


def _nixon_reference(values, outcomes, num_bins, threshold):
    """Row by row, from the definition: [lo, hi) bins between the values at ranks round(r n / R)."""
    kept = [(v, o) for v, o in zip(values, outcomes, strict=True) if v > threshold]
    if not kept:
        return 0.0
    ordered = sorted(v for v, _ in kept)
    edges = [ordered[min(round(r * len(kept) / num_bins), len(kept) - 1)] for r in range(1, num_bins)]
    bins: dict[int, list] = {}
    for v, o in kept:
        bins.setdefault(sum(v >= e for e in edges), []).append((v, o))
    return sum(abs(sum(v - o for v, o in rows)) for rows in bins.values()) / len(kept)


@pytest.mark.parametrize("case", ["random 3", "ties", "class never predicted", "zeros"])
def test_nixon_convention_against_its_definition(case):
    p, y = CASES[case]
    report = _report(p, y, num_bins=7, convention="nixon")
    for key, threshold in (("ace", 0.0), ("tace", 0.01)):
        theirs = np.mean([_nixon_reference(p[:, k], (y == k).astype(int), 7, threshold) for k in range(p.shape[1])])
        assert report[key] == pytest.approx(theirs, abs=TOLERANCE), key


def test_the_three_meanings_of_ace_are_three_numbers():
    p, y = CASES["random 3"]
    values = {c: _report(p, y, convention=c)["ace"] for c in ("peft_calib", "netcal", "nixon")}
    assert len({round(v, 4) for v in values.values()}) == 3
    assert _report(p, y)["average_gap"] == pytest.approx(values["netcal"], abs=TOLERANCE)


def _lm_polygraph(module: str):
    """One of lm-polygraph's metric modules, without the package itself, which imports clients of remote services."""
    spec = importlib.util.find_spec("lm_polygraph")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lm-polygraph is not installed, see the module's docstring")
    parent = types.ModuleType("lm_polygraph_metrics")
    parent.__path__ = [str(Path(spec.submodule_search_locations[0]) / "ue_metrics")]
    sys.modules.setdefault(parent.__name__, parent)
    return importlib.import_module(f"{parent.__name__}.{module}")


def _uncertain_rows(levels: int | None) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    u = generator.random(872)
    errors = generator.random(872) < 0.1 + 0.5 * u
    return (u if levels is None else np.floor(u * levels) / levels), errors


def test_lm_polygraph_where_no_scores_are_tied():
    u, errors = _uncertain_rows(None)
    risk_coverage = _lm_polygraph("risk_cov_curve").RiskCoverageCurveAUC()
    rejection = _lm_polygraph("pred_rej_area").PredictionRejectionArea()
    assert aurc(rank(u, errors)) == pytest.approx(risk_coverage(u, 1 - errors), abs=TOLERANCE)
    # Their ratio: the area between the curve and random rejection, over that of the oracle.
    random, oracle = 1 - errors.mean(), rejection(errors, 1 - errors)
    theirs = (rejection(u, 1 - errors) - random) / (oracle - random)
    assert prediction_rejection_ratio(rank(u, errors)) == pytest.approx(theirs, abs=TOLERANCE)


def test_lm_polygraph_lets_the_order_of_rows_decide_among_ties():
    """Sorted by a score that many rows share, the same rows get another number whenever they come in another order."""
    u, errors = _uncertain_rows(8)
    peer = _lm_polygraph("risk_cov_curve").RiskCoverageCurveAUC()
    orders = {"errors last": np.argsort(errors, kind="stable"), "errors first": np.argsort(~errors, kind="stable")}
    theirs = {name: peer(u[order], 1 - errors[order]) for name, order in orders.items()}
    ours = {name: aurc(rank(u[order], errors[order])) for name, order in orders.items()}
    assert theirs["errors first"] - theirs["errors last"] > 0.02
    assert ours["errors first"] == pytest.approx(ours["errors last"], abs=1e-12)
    # Ours is what theirs is on average over orders.
    generator = np.random.default_rng(6)
    shuffles = [generator.permutation(len(u)) for _ in range(400)]
    values = np.array([peer(u[order], 1 - errors[order]) for order in shuffles])
    standard_error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean() - ours["errors last"]) < 4 * standard_error
    assert standard_error < 1e-3
