"""Paired comparison: finds what is there, keeps quiet about what is not, corrects for many."""

import json

import numpy as np
import pytest

from peft_calib.calibration import compare, compare_many


def _data(seed: int, size: int):
    generator = np.random.default_rng(seed)
    z = 1.5 * generator.normal(size=(size, 3))
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    labels = (generator.random((size, 1)) > p.cumsum(axis=1)).sum(axis=1)
    return p, labels, generator


def _sharpened(p, power):
    q = p**power
    return q / q.sum(axis=1, keepdims=True)


def test_an_over_confident_model_is_found_out():
    p, labels, _ = _data(0, 2000)
    result = compare(p, _sharpened(p, 2.0), labels, names=("calibrated", "sharp"))
    for score in ("nll", "brier", "ece"):
        assert result[score].better == "a"
        assert result[score].high < 0
    assert result["accuracy"].better is None
    assert result["accuracy"].p_value == 1.0
    assert "calibrated is better than sharp in nll" in result.verdict
    assert "cannot tell them apart in accuracy" in result.verdict


def test_no_side_is_better_of_scores_that_have_none():
    """A model that is much too unsure has the smaller confidence gap, -0.2, and is no better for it."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 1000)
    predicted = np.where(generator.random(1000) < 0.8, labels, 1 - labels)[:, None] == [0, 1]
    unsure, right = np.where(predicted, 0.6, 0.4), np.where(predicted, 0.8, 0.2)
    scores = ["ece", "confidence_gap", "mean_confidence", "mean_entropy"]
    found = compare(unsure, right, labels, names=("unsure", "right"), scores=scores, num_resamples=100)
    assert [found[key].better for key in scores] == ["b", None, None, None]
    assert found["confidence_gap"].p_value < 0.05
    assert "right is better than unsure in ece" in found.verdict and "cannot tell" not in found.verdict
    assert "differ in confidence_gap (-0.2000" in found.verdict


def test_sides_are_symmetric():
    p, labels, _ = _data(1, 500)
    q = _sharpened(p, 1.7)
    forth, back = compare(p, q, labels), compare(q, p, labels)
    for a, b in zip(forth.differences, back.differences, strict=True):
        assert a.difference == pytest.approx(-b.difference)
        assert a.p_value == pytest.approx(b.p_value)
        assert {a.better, b.better} in ({"a", "b"}, {None})


def test_accuracy_is_better_when_it_is_larger():
    labels = np.arange(300) % 2
    right, wrong = np.eye(2)[labels] * 0.8 + 0.1, np.eye(2)[1 - labels] * 0.8 + 0.1
    assert compare(right, wrong, labels, num_resamples=100)["accuracy"].better == "a"
    assert compare(wrong, right, labels, num_resamples=100)["aurc"].better == "b"


def test_a_model_is_no_better_than_itself():
    p, labels, _ = _data(2, 300)
    result = compare(p, p, labels, num_resamples=100)
    assert all(d.better is None and d.p_value == 1.0 and d.low == d.high == 0 for d in result.differences)


def test_false_alarms_are_as_rare_as_promised():
    """Two equally good models, 300 data sets: at the 95 % level at most 5 % alarms, up to three standard errors."""
    alarms = 0
    for seed in range(300):
        p, labels, generator = _data(seed, 250)
        noise = [np.exp(0.4 * generator.normal(size=p.shape)) for _ in range(2)]
        a, b = (p * e / (p * e).sum(axis=1, keepdims=True) for e in noise)
        alarms += compare(a, b, labels, scores=["nll"], num_resamples=200, seed=seed)["nll"].better is not None
    assert alarms / 300 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_holm_correction():
    p, labels, _ = _data(3, 400)
    models = {"base": p, **{f"m{i}": _sharpened(p, 1 + 0.12 * i) for i in range(1, 4)}}
    results = compare_many(models, labels, baseline="base", scores=["nll"], num_resamples=400)
    assert [r.names for r in results] == [("m1", "base"), ("m2", "base"), ("m3", "base")]
    raw = np.array([r["nll"].p_value for r in results])
    order = np.argsort(raw)
    expected = np.minimum(np.maximum.accumulate(raw[order] * np.array([3, 2, 1])), 1.0)
    assert np.array([r["nll"].adjusted_p_value for r in results])[order] == pytest.approx(expected)
    assert len(compare_many(models, labels, scores=["nll"], num_resamples=50)) == 6


def test_plain_values():
    p, labels, _ = _data(4, 200)
    result = compare(p, _sharpened(p, 2), labels, num_resamples=50)
    assert json.loads(json.dumps(result.to_dict()))["scores"]["nll"]["better"] in ("a", "b", None)
    assert result.to_markdown().count("\n|") == 7


def test_bad_input():
    p, labels, _ = _data(5, 50)
    with pytest.raises(ValueError, match="paired one to one"):
        compare(p, p[:-1], labels)
    with pytest.raises(ValueError, match="same rows and classes"):
        compare(p, np.full((50, 4), 0.25), labels)
    with pytest.raises(ValueError, match="Unknown scores"):
        compare(p, p, labels, scores=["roc"])
    with pytest.raises(ValueError, match="at least two"):
        compare_many({"a": p}, labels)
    with pytest.raises(KeyError):
        compare(p, p, labels, num_resamples=20)["mce"]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 20, 60])
def test_a_handful_of_rows_announces_no_winner(size):
    """Two models of the same kind: at most one and a half times the promised rate, up to three standard errors."""
    scores, repeats = ("nll", "brier", "accuracy", "ece", "aurc"), 40
    winners = dict.fromkeys(scores, 0)
    for seed in range(repeats):
        generator = np.random.default_rng([size, seed])
        a, b = generator.dirichlet(np.ones(3), size), generator.dirichlet(np.ones(3), size)
        result = compare(a, b, generator.integers(0, 3, size), scores=scores, num_resamples=100, seed=seed)
        for d in result.differences:
            winners[d.score] += d.better is not None
            assert d.better is None or d.low * d.high > 0
    assert max(winners.values()) <= 40 * (0.075 + 3 * np.sqrt(0.075 * 0.925 / repeats)), winners
    if size <= 5:
        assert not any(winners.values())
        assert "cannot tell them apart" in result.verdict


def test_ten_clear_rows_are_enough():
    labels = np.arange(10) % 2
    sure, unsure = np.eye(2)[labels] * 0.8 + 0.1, np.full((10, 2), 0.5)
    assert compare(sure, unsure, labels, scores=["nll"], num_resamples=100)["nll"].better == "a"
