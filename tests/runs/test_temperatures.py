"""A run's temperature has an interval, and is left off with a sentence where its rows do not support one."""

import json

import numpy as np
import pytest

from peft_calib.calibration import TemperatureScaling
from peft_calib.runs.tables import evaluation_markdown, evaluation_table
from peft_calib.runs.temperatures import class_temperature, shown, text_temperature


def overconfident(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.random((count, 1))).argmax(1)
    return logits * temperature, labels


def test_applied_and_left_off():
    fitted = class_temperature(*overconfident(400, 4.0))
    assert fitted.fit_result.low < 4 < fitted.fit_result.high
    assert fitted.temperature == fitted.fit_result.fitted
    calibrated = class_temperature(*overconfident(80, 1.0))
    assert calibrated.temperature == 1.0
    assert "holds 1" in calibrated.fit_result.reason


def test_too_few_rows_end_no_training():
    fitted = class_temperature(*overconfident(9, 4.0))
    assert (fitted.temperature, fitted.fit_result.applied) == (1.0, False)
    assert "it takes 10 rows, and there are 9" in fitted.fit_result.reason
    again = TemperatureScaling.from_state(json.loads(json.dumps(fitted.state())))
    assert again.temperature == 1.0
    np.testing.assert_allclose(again.transform([[2.0, 0.0, 0.0]]).sum(), 1)


def test_a_temperature_of_texts_has_an_interval_over_texts():
    tried = np.geomspace(0.1, 10, 81)
    rng = np.random.default_rng(0)
    best = np.exp(rng.normal(np.log(2.0), 0.4, size=60))
    losses = (np.log(tried)[None] - np.log(best)[:, None]) ** 2
    fit = text_temperature(tried, losses)
    assert fit.low < 2 < fit.high
    assert 1 < fit.low < fit.fitted < fit.high
    assert fit.applied
    assert not text_temperature(tried, losses[:9]).applied
    assert not text_temperature(tried, (np.log(tried)[None] - np.log(best / 2)[:, None]) ** 2).applied


@pytest.mark.parametrize("applied", [True, False])
def test_tables_say_it(applied):
    fit = {"fitted": 2.0, "low": 1.2, "high": 3.0, "applied": applied, "reason": "T = 2, fitted on 40 rows, is so."}
    score = {"accuracy": 0.5, "intervals": {"accuracy": [0.4, 0.6]}}
    variant = {"num_samples": 1, "temperature": 2.0 if applied else 1.0, "temperature_fit": fit}
    content = {
        "run": "r", "method": "lora", "data": "d", "rows": 10, "items": 10, "rows_left_out": 0,
        "variants": {"mean": {**variant, "before": score, "after": score}},
        "baseline": {"answer": "yes", "accuracy": 0.5, "verdict": "r is no better."},
    }  # fmt: skip
    text = evaluation_markdown(content, ["accuracy"])
    assert ("T = 2.00 [1.20, 3.00]" in text) == applied
    assert ("T left off" in text) == (not applied)
    assert ("fitted on 40 rows" in text) == (not applied)
    assert "most frequent class" in text
    assert "r is no better." in text
    assert evaluation_table(content, ["accuracy"]).row_count == 1
    del variant["temperature_fit"], content["baseline"]  # of an earlier release
    content["variants"] = {"mean": {**variant, "before": score, "after": score}}
    assert shown(None, variant["temperature"]) in evaluation_markdown(content, ["accuracy"])
