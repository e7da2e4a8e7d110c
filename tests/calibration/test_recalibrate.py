"""Recalibration: finds what was put in, never leaves its bounds, comes back from disk, refuses its own rows."""

import json
import warnings

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from transformers import BertConfig, BertForSequenceClassification

from peft_calib.calibration import (
    BetaCalibration,
    HistogramCalibration,
    IsotonicCalibration,
    MatrixScaling,
    TemperatureScaling,
    VectorScaling,
    calibration_report,
)
from peft_calib.calibration.fingerprint import SplitFingerprint, row_hashes
from peft_calib.calibration.inputs import softmax
from peft_calib.calibration.recalibrate.per_class import logistic_regression
from peft_calib.calibration.recalibrate.temperature import BOUNDS, fit_temperature

METHODS = [
    TemperatureScaling,
    VectorScaling,
    MatrixScaling,
    IsotonicCalibration,
    HistogramCalibration,
    BetaCalibration,
]


def _drawn(generator, logits):
    p = softmax(logits)
    return (generator.random((len(p), 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=p.shape[1] - 1)


def _data(seed: int, size: int, classes: int, temperature: float = 2.0):
    generator = np.random.default_rng(seed)
    logits = 3.0 * generator.normal(size=(size, classes))
    return temperature * logits, _drawn(generator, logits)


def _nll(logits, labels, temperature):
    return float(torch.nn.functional.cross_entropy(torch.tensor(logits) / temperature, torch.tensor(labels)))


def _lbfgs(logits, labels) -> float:
    """The usual recipe (gpleiss/temperature_scaling): LBFGS on T itself, from 1.5."""
    z, y = torch.tensor(logits), torch.tensor(labels)
    temperature = torch.nn.Parameter(torch.full((1,), 1.5, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([temperature], lr=0.01, max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(z / temperature, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(temperature.detach())


@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0, 3.0, 12.0, 50.0])
def test_temperature_is_recovered(temperature):
    logits, labels = _data(0, 20_000, 4, temperature)
    fitted = TemperatureScaling().fit(logits, labels).temperature
    assert fitted == pytest.approx(temperature, rel=0.03)
    assert _nll(logits, labels, fitted) <= _nll(logits, labels, _lbfgs(logits, labels)) + 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_temperature_is_the_minimum(seed):
    """Against a golden-section search of the NLL itself."""
    from scipy.optimize import minimize_scalar

    logits, labels = _data(seed, 300, 3, 4.0)
    best = minimize_scalar(
        lambda t: _nll(logits, labels, np.exp(t)), bounds=(-4, 6), method="bounded", options={"xatol": 1e-9}
    )
    assert fit_temperature(logits, labels) == pytest.approx(np.exp(best.x), rel=1e-5)


def test_temperature_closed_form():
    """Two classes, one margin: the fitted confidence is the accuracy."""
    logits = np.tile([[4.0, 0.0]], (10, 1))
    labels = np.array([0] * 8 + [1] * 2)
    assert fit_temperature(logits, labels) == pytest.approx(4.0 / np.log(0.8 / 0.2), rel=1e-8)


def test_separable_and_hopeless_data_stay_within_the_bounds():
    logits = np.array([[5.0, 0.0], [0.0, 50.0], [1000.0, 0.0]])
    assert fit_temperature(logits, np.array([0, 1, 0])) == BOUNDS[0]
    assert fit_temperature(logits, np.array([1, 0, 1])) == BOUNDS[1]
    assert fit_temperature(np.ones((4, 3)), np.array([0, 1, 2, 0])) == 1.0


@pytest.mark.parametrize("shift", [1e6, -1e6])
def test_temperature_does_not_see_a_constant_added_to_a_row(shift):
    logits, labels = _data(1, 500, 3)
    assert fit_temperature(logits + shift, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_improves_an_over_confident_model_on_new_rows(method, classes):
    fit_rows, new_rows = _data(2, 4000, classes), _data(3, 4000, classes)
    before = calibration_report(*new_rows, input="logits", confidence_level=None)
    after = method().fit(*fit_rows).evaluate(*new_rows, confidence_level=None)
    assert after["nll"] < before["nll"] - 0.02
    assert after["ece"] < 0.5 * before["ece"]
    assert after["accuracy"] > before["accuracy"] - 0.02


@pytest.mark.parametrize("method", [VectorScaling, MatrixScaling])
def test_affine_methods_find_a_class_bias_that_temperature_cannot(method):
    generator = np.random.default_rng(4)
    true = 2.0 * generator.normal(size=(6000, 3)) + np.array([1.0, 0.0, -1.0])
    labels = _drawn(generator, true)
    given = 2.0 * (true - np.array([1.0, 0.0, -1.0]))
    fitted = method(regularization=1e-6).fit(given[:4000], labels[:4000])
    assert np.diff(fitted.bias) == pytest.approx([-1.0, -1.0], abs=0.25)
    only_t = (
        TemperatureScaling()
        .fit(given[:4000], labels[:4000])
        .evaluate(given[4000:], labels[4000:], confidence_level=None)
    )
    assert fitted.evaluate(given[4000:], labels[4000:], confidence_level=None)["nll"] < only_t["nll"] - 0.05


@pytest.mark.parametrize("method", [VectorScaling, MatrixScaling])
def test_strong_regularisation_is_temperature_scaling(method):
    logits, labels = _data(5, 1000, 4)
    strong = method(regularization=1e6).fit(logits, labels).transform(logits)
    assert strong == pytest.approx(TemperatureScaling().fit(logits, labels).transform(logits), abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("classes", [2, 3])
def test_separable_data_stay_finite(method, classes):
    labels = np.arange(30) % classes
    logits = 8.0 * np.eye(classes)[labels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        p = method().fit(logits, labels).transform(logits)
    assert np.isfinite(p).all() and (p >= 0).all()
    assert p.sum(axis=1) == pytest.approx(1.0)
    assert (p.argmax(axis=1) == labels).all()


def test_isotonic_against_scikit_learn():
    logits, labels = _data(7, 400, 2)
    p = softmax(logits)[:, 1]
    theirs = IsotonicRegression(out_of_bounds="clip").fit(p, labels).predict(p)
    ours = IsotonicCalibration().fit(logits, labels).transform(logits)[:, 1]
    assert ours == pytest.approx(np.clip(theirs, 1e-6, 1 - 1e-6), abs=1e-9)


def test_logistic_regression_against_scikit_learn():
    generator = np.random.default_rng(8)
    x = generator.normal(size=(500, 2))
    y = generator.random(500) < 1 / (1 + np.exp(-(x @ [1.0, -2.0] + 0.5)))
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y)
    ours = logistic_regression(x, y, ridge=1e-12)
    assert ours == pytest.approx([*theirs.coef_[0], theirs.intercept_[0]], abs=1e-4)


def test_beta_calibration_recovers_its_own_family():
    """A model whose log-odds are doubled needs a = b = 1/2, c = 0."""
    logits, labels = _data(9, 40_000, 2, temperature=2.0)
    a, b, c = BetaCalibration().fit(logits, labels).maps[0][0]
    assert (a, b, c) == pytest.approx((0.5, 0.5, 0.0), abs=0.06)


def test_histogram_by_hand():
    logits = np.log(np.array([[0.8, 0.2]] * 4 + [[0.3, 0.7]] * 4))
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 1])
    p = HistogramCalibration(num_bins=2).fit(logits, labels).transform(logits)
    # One virtual row of the bin's own probability: (1 + .2) / 5 and (3 + .7) / 5.
    assert p[[0, -1], 1] == pytest.approx([0.24, 0.74])


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_saved_methods_come_back_bit_for_bit(tmp_path, method, classes):
    logits, labels = _data(10, 300, classes)
    fitted = method().fit(logits, labels)
    fitted.save(tmp_path / "method.json")
    json.loads((tmp_path / "method.json").read_text())
    loaded = method.load(tmp_path / "method.json")
    assert np.array_equal(loaded.transform(logits), fitted.transform(logits))
    with pytest.raises(ValueError, match="rows are among"):
        loaded.evaluate(logits, labels)
    other = next(m for m in METHODS if m is not method)
    with pytest.raises(ValueError, match="load it with that class"):
        other.load(tmp_path / "method.json")
    state = fitted.state() | {"format_version": 99}
    with pytest.raises(ValueError, match="format version"):
        method.from_state(state)


@pytest.mark.parametrize("method", METHODS)
def test_fitted_rows_are_refused_in_any_order_and_mixture(method):
    logits, labels = _data(11, 400, 3)
    fitted = method().fit(logits[:200], labels[:200])
    order = np.random.default_rng(0).permutation(200)
    mixed = np.concatenate([order[:40], np.arange(200, 400)])
    for rows in (order, mixed):
        with pytest.raises(ValueError, match="has not seen"):
            fitted.evaluate(logits[rows], labels[rows])
    # float32 storage does not hide a row.
    with pytest.raises(ValueError, match="has not seen"):
        fitted.evaluate(torch.tensor(logits[:200], dtype=torch.float32), labels[:200])
    assert fitted.evaluate(logits[200:], labels[200:], confidence_level=None).settings["num_rows"] == 200


def test_fingerprints_of_large_splits_estimate_the_overlap():
    logits, labels = _data(12, 40_000, 3)
    fingerprint = SplitFingerprint.of(logits[:20_000], labels[:20_000])
    assert len(fingerprint.hashes) == 4096
    for start, share in ((0, 1.0), (10_000, 0.5), (20_000, 0.0)):
        rows = slice(start, start + 20_000)
        assert fingerprint.seen(row_hashes(logits[rows], labels[rows])) == pytest.approx(share, abs=0.04)
    order = np.random.default_rng(0).permutation(20_000)
    assert SplitFingerprint.of(logits[order], labels[order]).digest == fingerprint.digest
    assert SplitFingerprint.of(logits[1:20_000], labels[1:20_000]).digest != fingerprint.digest


@pytest.mark.parametrize("method", METHODS)
def test_misuse(method):
    logits, labels = _data(13, 50, 3)
    with pytest.raises(ValueError, match="not fitted"):
        method().transform(logits)
    with pytest.raises(ValueError, match="not fitted"):
        method().save("nowhere.json")
    fitted = method().fit(logits, labels)
    with pytest.raises(ValueError, match="fitted for 3 classes, got 2"):
        fitted.transform(logits[:, :2])
    with pytest.raises(ValueError, match="for 3 classes, got 7"):
        method().fit(logits, labels + 5)
    with pytest.raises(ValueError, match="50 rows but there are 49"):
        method().fit(logits, labels[1:])
    with pytest.raises(ValueError, match="has no row"):
        method().fit(logits[:0], labels[:0])


def test_torch_in_torch_out():
    logits, labels = _data(14, 100, 3)
    scaling = TemperatureScaling().fit(torch.tensor(logits), torch.tensor(labels))
    p = scaling.transform(torch.tensor(logits))
    assert isinstance(p, torch.Tensor)
    assert p.numpy() == pytest.approx(scaling.transform(logits))
    assert softmax(scaling.transform_logits(logits)) == pytest.approx(scaling.transform(logits))
    assert isinstance(scaling.transform_logits(torch.tensor(logits)), torch.Tensor)


def _bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_temperature_folded_into_a_classification_head(adapted):
    model = _bert()
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    tokens = torch.arange(24).reshape(4, 6)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    scaling = TemperatureScaling().fit(*_data(15, 500, 3, 3.0))
    scaling.fold_into_head(model)
    with torch.no_grad():
        after = model(input_ids=tokens).logits
    assert torch.allclose(after, before / scaling.temperature, atol=1e-6)


def test_folding_refuses_what_it_cannot_do():
    scaling = TemperatureScaling().fit(*_data(16, 100, 4))
    with pytest.raises(ValueError, match="3 outputs, but the temperature is for 4"):
        scaling.fold_into_head(_bert())
    with pytest.raises(ValueError, match="No linear layer"):
        scaling.fold_into_head(torch.nn.Sequential(torch.nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="not fitted"):
        TemperatureScaling().fold_into_head(_bert())
