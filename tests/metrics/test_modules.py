"""The bundled `evaluate` modules, loaded as a user loads them: from a folder, offline."""

import runpy
import warnings
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml

import peft_calib
from peft_calib.calibration import ConformalSets, SelectiveThreshold, calibration_report
from peft_calib.calibration.scores.table import KEYS
from peft_calib.metrics.page import parse_rows, safely

NAMES = ["calibration", "decision", "selective_prediction", "uncertainty"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))


def _load(name: str) -> evaluate.EvaluationModule:
    return evaluate.load(peft_calib.metric_path(name))


def _data(name: str, size: int = 60):
    generator = np.random.default_rng(0)
    shape = (size, 4, 3) if name == "uncertainty" else (size, 3)
    p = generator.dirichlet(np.ones(3), shape[:-1])
    return p, generator.integers(0, 3, size)


def _floats(result: dict) -> dict[str, float]:
    return {key: value for key, value in result.items() if isinstance(value, (int, float))}


@pytest.mark.parametrize("name", NAMES)
def test_known_answers(name):
    cases = runpy.run_path(str(Path(peft_calib.metric_path(name)) / "tests.py"))["test_cases"]
    metric = _load(name)
    for case in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            result = metric.compute(predictions=case["predictions"], references=case["references"], **case["options"])
        for key, value in case["result"].items():
            assert result[key] == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_batches_give_the_numbers_of_one_call(name, keep_in_memory):
    p, y = _data(name)
    sure = {"calibration_predictions": np.eye(3)[np.arange(90) % 3], "calibration_references": np.arange(90) % 3}
    options = {"calibration": {"confidence_level": None}, "decision": {"risk": 0.1, **sure}}.get(name, {})
    at_once = _load(name).compute(predictions=p, references=y, **options)
    metric = evaluate.load(peft_calib.metric_path(name), keep_in_memory=keep_in_memory)
    for part in np.array_split(np.arange(len(y)), 4):
        metric.add_batch(predictions=p[part], references=y[part])
    assert _floats(metric.compute(**options)) == pytest.approx(_floats(at_once), abs=1e-12)
    metric.add(prediction=p[0], reference=y[0])
    metric.add(prediction=p[1], reference=y[1])
    metric.compute(**options)


def test_the_calibration_module_is_the_report():
    p, y = _data("calibration")
    result = _load("calibration").compute(predictions=p, references=y, num_resamples=50)
    np.testing.assert_equal(result, calibration_report(p, y, num_resamples=50).to_dict())  # NaN equals NaN
    assert set(KEYS) < set(result)


def test_the_decision_module_reads_a_rule_and_refuses_its_own_rows(tmp_path):
    p, y = _data("decision", 400)
    ConformalSets(alpha=0.2, score="aps").fit(p[:200], y[:200]).save(tmp_path / "sets.json")
    metric = _load("decision")
    result = metric.compute(predictions=p[200:], references=y[200:], rule=str(tmp_path / "sets.json"))
    fitted = {"calibration_predictions": p[:200], "calibration_references": y[:200], "alpha": 0.2, "score": "aps"}
    again = metric.compute(predictions=p[200:], references=y[200:], **fitted)
    np.testing.assert_equal(again, result)  # NaN, the accuracy of no singletons, equals NaN
    assert result["band_low"] <= result["coverage"] and "hold the label" in result["promise"]
    with pytest.raises(ValueError, match="it has not seen"):
        metric.compute(predictions=p[:200], references=y[:200], rule=str(tmp_path / "sets.json"))
    for options, message in (({}, "none of these"), ({"rule": "r.json", "risk": 0.1}, "not both")):
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=p[200:], references=y[200:], **options)


def test_the_decision_module_refuses_what_a_threshold_takes_no_notice_of(tmp_path):
    metric, names = _load("decision"), ["a", "b"] * 100
    sure, right = np.full(200, 0.9), np.ones(200, np.int64)
    fitted = {"calibration_predictions": sure, "calibration_references": right, "risk": 0.4}
    for given in ({"groups": names}, {"calibration_groups": names}):
        with pytest.raises(ValueError, match="A threshold goes by no groups"):
            metric.compute(predictions=sure * 0.9, references=right, **fitted, **given)
    SelectiveThreshold(risk=0.4).fit(sure, right).save(tmp_path / "rule.json")
    with pytest.raises(ValueError, match="not both"):
        metric.compute(
            predictions=sure, references=right, rule=str(tmp_path / "rule.json"), calibration_references=right
        )


def test_the_decision_page_splits_its_rows():
    app = runpy.run_path(str(Path(peft_calib.metric_path("decision")) / "app.py"))
    heading, body = safely(app["measure"], app["example"](), None, {"input": "probabilities"})
    assert "at most 10 % is wrong" in heading and "hold the label" in body and body.count("<tr>") > 15
    assert "cannot be measured" in safely(app["measure"], "0.9,0.1,0\n0.2,0.8,1", None, {"input": "probabilities"})[0]


@pytest.mark.parametrize(
    "convert",
    [lambda x: x.tolist(), lambda x: x.astype(np.float32), torch.tensor, lambda x: torch.tensor(x).bfloat16()],
    ids=["lists", "float32", "torch", "bfloat16"],
)
def test_every_kind_of_input(convert):
    p, y = _data("calibration")
    metric = _load("calibration")
    direct = metric.compute(predictions=convert(p), references=torch.tensor(y), confidence_level=None)
    assert direct["nll"] == pytest.approx(calibration_report(p, y, confidence_level=None)["nll"], rel=0.02)


def test_binary_and_logits():
    metric = _load("calibration")
    logits, labels = [2.0, -1.0, 0.5], [1, 0, 0]
    for _ in range(2):
        expected = calibration_report(logits, labels, input="logits", confidence_level=None)["nll"]
        assert (
            metric.compute(predictions=logits, references=labels, input="logits", confidence_level=None)["nll"]
            == expected
        )
        metric.add_batch(predictions=logits, references=labels)
        assert metric.compute(input="logits", confidence_level=None)["nll"] == pytest.approx(expected, abs=1e-12)


def test_bad_input_is_refused_with_a_message():
    metric = _load("calibration")
    with pytest.raises(ValueError, match='input="logits"'):
        metric.compute(predictions=[[2.0, -1.0]], references=[0])
    with pytest.raises(ValueError, match="3 rows but there are 2"):
        metric.compute(predictions=[[0.5, 0.5]] * 3, references=[0, 1])
    metric.add_batch(predictions=[[0.5, 0.5], [1.0]], references=[0, 0])
    with pytest.raises(ValueError, match="ragged"):
        metric.compute()


def test_references_whose_decimals_would_be_cut_off_are_refused():
    """Arrow makes 0 of 0.7 without a word."""
    metric = _load("calibration")
    with pytest.raises(ValueError, match=r"whole numbers .* got 0\.7"):
        metric.add_batch(predictions=[[0.9, 0.1], [0.2, 0.8]], references=[1.0, 0.7])
    with pytest.raises(ValueError, match="whole numbers"):
        metric.add(prediction=[0.9, 0.1], reference=0.4)
    metric.add_batch(predictions=[[0.9, 0.1], [0.2, 0.8]], references=np.array([0.0, 1.0]))
    assert metric.compute(confidence_level=None)["accuracy"] == 1.0


def test_combined_with_each_other():
    p, y = _data("calibration")
    combined = evaluate.combine(
        [peft_calib.metric_path("calibration"), peft_calib.metric_path("selective_prediction")]
    )
    result = combined.compute(predictions=p, references=y)
    expected = calibration_report(p, y, confidence_level=None)
    assert result["ece"] == pytest.approx(expected["ece"], abs=1e-12)
    assert result["selective_prediction_aurc"] == pytest.approx(result["calibration_aurc"], abs=1e-12)


def test_paths():
    with pytest.raises(ValueError, match="calibration, decision, selective_prediction, uncertainty"):
        peft_calib.metric_path("accuracy")
    assert Path(peft_calib.metric_path("calibration")).is_absolute()


@pytest.mark.parametrize("name", NAMES)
def test_module_metadata_and_card(name):
    metric, folder = _load(name), Path(peft_calib.metric_path(name))
    assert metric.description and metric.citation and metric.reference_urls
    assert "Args:" in metric.inputs_description
    front_matter = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "app_file", "pinned", "tags"} <= set(
        front_matter
    )
    assert {"evaluate", "metric"} <= set(front_matter["tags"])
    assert (folder / front_matter["app_file"]).is_file()
    assert "peft-calib" in (folder / "requirements.txt").read_text().split()


def test_without_the_package_the_module_names_it(tmp_path):
    """What `evaluate` says where peft_calib is not installed."""
    source = (Path(peft_calib.metric_path("calibration")) / "calibration.py").read_text()
    folder = tmp_path / "calibration"
    folder.mkdir()
    (folder / "calibration.py").write_text(source.replace("from peft_calib.", "from peft_calib_not_installed."))
    with pytest.raises(ImportError, match="pip install peft_calib_not_installed"):
        evaluate.load(str(folder))


def test_rows_as_text():
    assert parse_rows("0.9,0.1,0\n\n0.3,0.7,1\n") == ([[0.9, 0.1], [0.3, 0.7]], [0, 1])
    assert parse_rows("p,label\n0.9,1\n0.2,0") == ([0.9, 0.2], [1, 0])
    assert parse_rows('{"predictions": [[0.9, 0.1]], "references": [0]}') == ([[0.9, 0.1]], [0])
    for text, message in (
        ("", "nothing to read"),
        ("a,b,label", "only a header"),
        ("0.9,0.1,0\n0.3,1", "Line 2 has 2 columns"),
        ("0.9,0.1,0\n0.3,x,1", "Line 2 holds something"),
        ("0.9,0.1,0.5", "whole number"),
        ("{bad", "not valid JSON"),
        ("[1, 2]", "must be an object"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_rows(text)


def test_errors_on_the_page_are_text_and_markup_is_not_run(tmp_path):
    def refuse(predictions, references, settings):
        raise ValueError("<script>alert(1)</script>")

    heading, body = safely(refuse, "0.5,0.5,0", None, {})
    assert "<script>" not in heading and body == ""
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    heading, _ = safely(refuse, "", str(tmp_path / "binary.csv"), {})
    assert "not a text file" in heading
