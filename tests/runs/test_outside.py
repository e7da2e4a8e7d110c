"""Rows of other origin: what a run's confidence says of them, against scikit-learn and scipy."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import peft_calib, write_csv, write_jsonl
from datasets import Dataset
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

from peft_calib.calibration import TemperatureScaling
from peft_calib.prediction import Prediction
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.folder import RunFolder
from peft_calib.runs.loading import load_task
from peft_calib.runs.outside import outside_report
from peft_calib.runs.rows import load_outside_rows
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.tasks import TASK_CLASSES


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, rows, 3, generator=generator, dtype=torch.float64) * s for rows, s in ((40, 1), (30, 2))]
    return [Prediction(sample_probabilities=z.softmax(-1), num_forwards=4.0) for z in logits]


def test_numbers_match_scikit_learn_and_scipy(predictions):
    scaling = TemperatureScaling().fit(np.eye(3)[np.arange(60) % 3] * 4, np.arange(60) // 2 % 3)
    report = outside_report(*predictions, scaling)
    truth = np.repeat([0, 1], [40, 30])
    for stage, temperature in (("before", 1.0), ("after", scaling.temperature)):
        scaled = [p.probabilities.double().numpy() ** (1 / temperature) for p in predictions]
        inside, outside = (p / p.sum(1, keepdims=True) for p in scaled)
        score = -np.concatenate([inside.max(1), outside.max(1)])
        assert report[stage]["auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-9)
        assert report[stage]["mean_confidence"] == pytest.approx(outside.max(1).mean())
        assert report[stage]["mean_entropy"] == pytest.approx(entropy(outside, axis=1).mean())
    draws = [p.sample_probabilities.numpy() for p in predictions]
    information = [entropy(p.mean(0), axis=-1) - entropy(p, axis=-1).mean(0) for p in draws]
    assert report["mutual_information"] == pytest.approx(information[1].mean())
    auroc = roc_auc_score(truth, np.concatenate(information))
    assert report["auroc_of_mutual_information"] == pytest.approx(auroc)


def test_one_draw_has_nothing_to_disagree_on(predictions):
    single = [Prediction(sample_probabilities=p.sample_probabilities[:1], num_forwards=1.0) for p in predictions]
    scaling = TemperatureScaling().fit(np.eye(3)[np.arange(60) % 3] * 4, np.arange(60) // 2 % 3)
    assert set(outside_report(*single, scaling)) == {"before", "after"}


def test_evaluate_takes_texts_without_labels(trained, test_file, tmp_path, capsys):
    other = write_csv(tmp_path / "tweets.csv", [(f"words of another kind {i}",) for i in range(20)], ("text",))
    run = tmp_path / "run"  # without what other tests evaluated of it, with fewer resamples
    shutil.copytree(trained["bayesian-lora"], run, ignore=shutil.ignore_patterns("evaluation"))
    assert peft_calib("evaluate", run, "--data", test_file, "--outside", other) is None
    assert "AUROC" in capsys.readouterr().out
    plain = evaluate_run(run, data=test_file, progress=False)
    found = evaluate_run(run, data=test_file, outside=other, progress=False)
    assert found.folder != plain.folder
    assert found.content["outside"] == {"data": str(other), "rows": 20, "rows_cut": 0}
    assert "outside" not in plain.content["variants"]["sample"]
    sample, mean = (found.content["variants"][name] for name in ("sample", "mean"))
    assert sample["outside"]["mutual_information"] >= 0
    assert "mutual_information" not in mean["outside"]
    for key in ("before", "after"):
        assert mean[key] == plain.content["variants"]["mean"][key]
    assert "outside: confidence" in (found.folder / "report.md").read_text()
    assert json.loads((found.folder / "report.json").read_text()) == found.content


def test_labels_of_rows_of_other_origin_are_not_read(trained, test_file, tmp_path):
    task = load_task(RunFolder(trained["lora"]))
    rows = [{"text": f"words {i}", "label": "no class of the run"} for i in range(5)]
    assert len(load_outside_rows(task, rows, None).rows) == 5
    with pytest.raises(ValueError, match="no column 'text'"):
        load_outside_rows(task, [{"words": "a"}], None)


@pytest.mark.parametrize("task", ["multiple-choice", "token-cls"])
def test_every_task_with_classes_reads_them(tmp_path, tiny_decoder_folder, task):
    config = RunConfig(data="rows.jsonl", model=str(tiny_decoder_folder), task=task)
    rows = {
        "multiple-choice": {"question": "which?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}},
        "token-cls": {"tokens": ["a", "river"]},
    }[task]
    labels = {"multiple-choice": {"label": "1"}, "token-cls": {"tags": ["x", "y"]}}[task]
    learned = TASK_CLASSES[task].learn(config, Dataset.from_list([rows | labels] * 3))
    source = write_jsonl(tmp_path / "outside.jsonl", [rows] * 4)
    assert len(load_outside_rows(learned, source, None).rows) == 4


def test_texts_without_classes_have_no_confidence():
    config = RunConfig(data="rows.jsonl", model="m", task="causal-lm")
    with pytest.raises(ValueError, match="causal-lm has none"):
        load_outside_rows(TASK_CLASSES["causal-lm"](config), [{"text": "a"}], None)
