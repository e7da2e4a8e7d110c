"""A temperature has an interval, is left off where the rows do not support it, and takes whatever a model answers."""

import json
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from peft_calib.calibration import (
    BetaCalibration,
    HistogramCalibration,
    IsotonicCalibration,
    MatrixScaling,
    TemperatureScaling,
    VectorScaling,
    calibration_report,
    log_probabilities,
)
from peft_calib.calibration.inputs import softmax
from peft_calib.calibration.recalibrate import FEWEST_ROWS

METHODS = [
    TemperatureScaling,
    VectorScaling,
    MatrixScaling,
    IsotonicCalibration,
    HistogramCalibration,
    BetaCalibration,
]


def _drawn(generator, p):
    return (generator.random((*p.shape[:-1], 1)) > p.cumsum(axis=-1)).sum(axis=-1).clip(max=p.shape[-1] - 1)


def _data(seed, shape, classes=3, temperature=2.0):
    generator = np.random.default_rng(seed)
    logits = 2.0 * generator.normal(size=(*np.atleast_1d(shape), classes))
    flat = softmax(logits.reshape(-1, classes)).reshape(logits.shape)
    return temperature * logits, _drawn(generator, flat)


@pytest.mark.parametrize(("classes", "temperature"), [(2, 1.0), (2, 2.5), (10, 0.6)])
def test_the_interval_covers_the_temperature(classes, temperature):
    """150 data sets of 60 rows: at least 95 % less three standard errors; and it is no wider than it must be."""
    inside, widths = 0, []
    for seed in range(150):
        fit = TemperatureScaling().fit(*_data(seed, 60, classes, temperature)).fit_result
        inside += fit.low <= temperature <= fit.high
        widths.append(np.log(fit.high / fit.low))
    assert inside / 150 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 150)
    assert np.median(widths) < 2.0


def test_the_interval_is_that_of_the_likelihood_ratio():
    """Two classes, one margin, independent rows: the log-odds are 4 / T, so the ends are those of a share."""
    logits, labels = np.tile([[4.0, 0.0]], (100, 1)), np.arange(100) >= 80

    def excess(T):
        q = 1.0 / (1.0 + np.exp(-4.0 / T))
        loss = -(80 * np.log(q) + 20 * np.log(1 - q))
        least = -(80 * np.log(0.8) + 20 * np.log(0.2))
        # the scatter of the rows is the model's, but for the unbiased estimate
        return 2 * (loss - least) - student.ppf(0.975, 99) ** 2 * 100 / 99

    fit = TemperatureScaling().fit(logits, labels.astype(int)).fit_result
    assert excess(fit.low) == pytest.approx(0.0, abs=1e-3)
    assert excess(fit.high) == pytest.approx(0.0, abs=1e-3)
    assert fit.fitted == pytest.approx(4.0 / np.log(4.0))


def test_a_calibrated_model_is_left_alone():
    logits, labels = _data(0, 300, temperature=1.0)
    scaling = TemperatureScaling().fit(logits, labels)
    fit = scaling.fit_result
    assert fit.low < 1.0 < fit.high and fit.fitted != 1.0
    assert not fit.applied and scaling.temperature == 1.0
    assert f"T = {fit.fitted:.4g}, fitted on 300 rows, is left off" in fit.reason and "holds 1" in fit.reason
    assert np.array_equal(scaling.transform(logits), softmax(logits))


def test_bounds_are_reported_in_the_result_and_not_as_warnings():
    right, labels = 3.0 * np.eye(3)[np.arange(60) % 3], np.arange(60) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        careful = TemperatureScaling().fit(right, labels)
        hopeless = TemperatureScaling().fit(right, (labels + 1) % 3)
        flat = TemperatureScaling().fit(np.ones((60, 3)), labels)
    assert (careful.fit_result.at_bound, careful.fit_result.fitted) == ("low", 0.01)
    assert careful.temperature == 1.0 and "lower bound 0.01" in careful.fit_result.reason
    # Labels against the logits: nothing is better than a uniform answer, and that the rows do say.
    assert (hopeless.fit_result.at_bound, hopeless.temperature) == ("high", 1000.0)
    assert hopeless.fit_result.low > 1.0 and "upper bound 1000" in hopeless.fit_result.reason
    assert (flat.temperature, flat.fit_result.at_bound) == (1.0, None)
    assert "no temperature changes anything" in flat.fit_result.reason


@pytest.mark.parametrize("classes", [2, 40])
def test_too_few_rows_are_refused(classes):
    logits, labels = _data(1, FEWEST_ROWS, classes)
    TemperatureScaling().fit(logits, labels)
    scaling = TemperatureScaling()
    with pytest.raises(ValueError, match=f"at least {FEWEST_ROWS} labelled held-out rows, .* there are 9"):
        scaling.fit(logits[1:], labels[1:])
    ignored = np.where(np.arange(FEWEST_ROWS) == 3, -100, labels)
    with pytest.raises(ValueError, match="there are 9"):
        scaling.fit(logits, ignored)
    with pytest.raises(ValueError, match="not fitted"):
        scaling.transform(logits)


def test_tokens_of_one_sequence_count_together():
    """The same row ten times over is one row: the interval knows, if it is told which rows belong together."""
    logits, labels = _data(2, 50, temperature=1.5)
    alone = TemperatureScaling().fit(logits, labels).fit_result
    copies, marks = np.repeat(logits[:, None], 10, axis=1), np.repeat(labels[:, None], 10, axis=1)
    together = TemperatureScaling().fit(copies, marks).fit_result
    apart = TemperatureScaling().fit(copies.reshape(500, 3), marks.reshape(500)).fit_result
    assert together.fitted == pytest.approx(alone.fitted, rel=1e-6)
    assert np.log(together.high / together.low) > 0.8 * np.log(alone.high / alone.low)
    assert np.log(apart.high / apart.low) < 0.5 * np.log(alone.high / alone.low)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_what_a_model_answers(method):
    logits, labels = _data(3, (30, 4), classes=4)
    labels[:, -1] = -100
    plain = method().fit(logits[:, :3].reshape(-1, 4), labels[:, :3].reshape(-1))
    expected = plain.transform(logits.reshape(-1, 4)).reshape(logits.shape)
    tensor, hidden = torch.tensor(logits), torch.zeros(30, 4, 8)
    answers = {
        "array": logits,
        "list": logits.tolist(),
        "tensor": tensor,
        "output": TokenClassifierOutput(loss=torch.tensor(0.5), logits=tensor, hidden_states=(hidden,)),
        "mapping": {"loss": 0.5, "logits": logits},
        "logits first": (logits, hidden.numpy()),
        "after a loss": (torch.tensor(0.5), tensor, (hidden, hidden)),
        "alone in a tuple": (tensor,),
    }
    for name, answer in answers.items():
        fitted = method().fit(answer, labels if name != "tensor" else torch.tensor(labels))
        found = fitted.transform(answer)
        assert np.shape(found) == logits.shape, name
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-12, err_msg=name)
        assert isinstance(found, torch.Tensor) == (name in ("tensor", "output", "after a loss", "alone in a tuple"))
    report = plain.evaluate(*_data(4, (30, 4), classes=4), confidence_level=None)
    assert report.settings["num_rows"] == 120


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_and_one_logit_a_row(method, dtype):
    logits, labels = _data(5, 200, classes=2)
    difference = torch.tensor(logits[:, 1] - logits[:, 0]).to(dtype)
    two = np.stack([np.zeros(200), difference.double().numpy()], axis=1)
    expected = method().fit(two, labels).transform(two)
    np.testing.assert_allclose(method().fit(difference, labels).transform(difference).numpy(), expected)
    output = SequenceClassifierOutput(logits=torch.tensor(two).to(dtype))
    np.testing.assert_allclose(method().fit(output, labels).transform(output).numpy(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_with_exact_zeros(method):
    logits, labels = _data(6, 900, temperature=4.0)
    p = softmax(logits)
    p[p < 0.002] = 0.0
    keep = np.flatnonzero((p > 0).sum(axis=1) > 1)[:400]  # equal rows by the dozen would count as rows seen before
    p, labels = p[keep], labels[keep]
    p /= p.sum(axis=1, keepdims=True)
    assert (p == 0.0).any() and (p[np.arange(400), labels] == 0.0).any()
    fitted = method().fit(p[:200], labels[:200], input="probabilities")
    found = fitted.transform(p[200:], input="probabilities")
    assert np.isfinite(found).all()
    report = fitted.evaluate(p[200:], labels[200:], input="probabilities", confidence_level=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of labels that were given probability 0
        assert report["nll"] < calibration_report(p[200:], labels[200:], confidence_level=None)["nll"]
    same = method().fit(log_probabilities(p[:200]), labels[:200]).transform(log_probabilities(p[200:]))
    assert np.array_equal(same, found)
    with pytest.raises(ValueError, match="second softmax"):
        method().fit(p[:200], labels[:200])


@pytest.mark.parametrize("method", METHODS)
def test_masked_classes_stay_at_zero(method):
    """A class at -inf is not there: fit and answer are those of the other classes."""
    logits, labels = _data(7, 300, classes=3)
    wide = np.concatenate([logits[:, :1], np.full((300, 1), -np.inf), logits[:, 1:]], axis=1)
    marks = np.array([0, 2, 3])[labels]
    masked = method().fit(wide, marks)
    found = masked.transform(wide)
    assert (found[:, 1] == 0.0).all() and np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    if method is TemperatureScaling:
        alone = method().fit(logits, labels)
        assert masked.temperature == pytest.approx(alone.temperature, rel=1e-9)
        np.testing.assert_allclose(found[:, [0, 2, 3]], alone.transform(logits))
        assert np.isneginf(masked.transform_logits(wide)[:, 1]).all()
    with pytest.raises(ValueError, match="NaN or infinity, first in row 4"):
        method().fit(np.where(np.arange(300)[:, None] == 4, -np.inf, wide), marks)


def test_a_label_said_to_be_impossible_costs_what_a_probability_of_zero_costs():
    logits, labels = _data(8, 60, classes=3)
    logits[5, labels[5]] = -np.inf
    fit = TemperatureScaling().fit(logits, labels).fit_result
    assert np.isfinite([fit.fitted, fit.low, fit.high]).all() and fit.fitted > 2.0


def test_the_floor_of_logarithms_is_one_and_the_same():
    tiny = np.finfo(np.float32).tiny
    p = np.array([[1.0, 0.0], [0.25, 0.75], [1e-40, 1.0]])
    expected = np.log(np.maximum(p, tiny))
    assert np.array_equal(log_probabilities(p), expected)
    assert np.array_equal(log_probabilities(torch.tensor(p)).numpy(), expected)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = log_probabilities(torch.tensor([[1.0, 0.0]], dtype=dtype))
        assert found.isfinite().all() and float(found[0, 1]) == pytest.approx(np.log(tiny), rel=0.01)
    np.testing.assert_allclose(softmax(log_probabilities(p)), p, atol=1e-37)


def test_choice_and_interval_are_in_the_file(tmp_path):
    for data in (_data(9, 300), _data(9, 300, temperature=1.0)):
        scaling = TemperatureScaling().fit(*data)
        scaling.save(tmp_path / "t.json")
        content = json.loads((tmp_path / "t.json").read_text())
        assert content["parameters"] == {"temperature": scaling.temperature}
        assert set(content["fit"]) == {"fitted", "low", "high", "num_rows", "applied", "at_bound", "reason"}
        assert TemperatureScaling.load(tmp_path / "t.json").fit_result == scaling.fit_result


def test_a_file_of_an_earlier_version_loads():
    state = TemperatureScaling().fit(*_data(10, 300)).state()
    del state["fit"]
    old = TemperatureScaling.from_state(state)
    assert old.fit_result is None and old.temperature == state["parameters"]["temperature"]
    assert TemperatureScaling.from_state(old.state()).temperature == old.temperature


@pytest.mark.parametrize(
    ("field", "value"),
    [("applied", "yes"), ("fitted", None), ("low", 5.0), ("num_rows", 1.5), ("at_bound", "left"), ("applied", False)],
)
def test_a_changed_fit_is_refused(field, value):
    state = TemperatureScaling().fit(*_data(11, 300)).state()
    with pytest.raises(ValueError, match="saved temperature"):
        TemperatureScaling.from_state({**state, "fit": {**state["fit"], field: value}})
    with pytest.raises(ValueError, match="must hold"):
        TemperatureScaling.from_state({**state, "fit": {}})
    # An old temperature that was saved again.
    assert TemperatureScaling.from_state({**state, "fit": None}).fit_result is None


@pytest.mark.parametrize("version", [True, 1.0, "1", None])
def test_a_version_that_is_no_whole_number_is_refused(version):
    state = TemperatureScaling().fit(*_data(11, 300)).state()
    with pytest.raises(ValueError, match="format version"):
        TemperatureScaling.from_state({**state, "format_version": version})


def test_class_ids_are_no_logits():
    labels = np.arange(40) % 2
    for method in METHODS:
        for ids in (labels, labels.tolist(), torch.tensor(labels), labels[:, None], np.eye(2, dtype=int)[labels]):
            with pytest.raises(ValueError, match="probabilities"):
                method().fit(ids, labels)
            with pytest.raises(ValueError, match="probabilities"):
                method().fit(*_data(12, 60, classes=2)).transform(ids)


def test_a_fit_at_a_bound_can_be_saved_and_read(tmp_path):
    """The end of the interval is the bound too, to the last bit."""
    logits, labels = np.tile([[3.0, 0.0], [0.0, 3.0]], (8, 1)), np.tile([1, 0], 8)
    for wrong_way in (labels, 1 - labels):
        scaling = TemperatureScaling().fit(logits, wrong_way)
        assert scaling.fit_result.at_bound is not None
        scaling.save(tmp_path / "temperature.json")
        assert TemperatureScaling.load(tmp_path / "temperature.json").fit_result == scaling.fit_result
