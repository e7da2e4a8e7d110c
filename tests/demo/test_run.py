import io
import json
import subprocess
import sys
import warnings

import datasets
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_calib.demo.data import load_text_data
from peft_calib.demo.run import run_demo
from peft_calib.demo.training import TrainingSettings, predict_draws, predict_logits

ADAPTERS = {
    "lora": "LORA",
    "hyperlora": "HYPERLORA",
    "bayesianlora": "BAYESIANLORA",
    "hyperlora-as-lora": "LORA",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_folder):
    """The whole demo on the embedded sentences, with a tiny encoder and few rows."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    data = load_text_data("documentation", max_train_rows=210)
    settings = TrainingSettings(model=str(tiny_model_folder), epochs=1, learning_rate=5e-3)
    before = transformers.logging.get_verbosity(), datasets.is_progress_bar_enabled(), list(warnings.filters)
    stream = io.StringIO()
    with warnings.catch_warnings():
        report = run_demo(data, settings, folder, rank=2, console=Console(file=stream, width=80))
    after = transformers.logging.get_verbosity(), datasets.is_progress_bar_enabled(), list(warnings.filters)
    assert before == after
    return folder, report, stream.getvalue(), data, settings


def test_what_is_written(run):
    folder, report, *_ = run
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    for name, kind in ADAPTERS.items():
        assert json.loads((folder / name / "adapter_config.json").read_text())["peft_type"] == kind
        assert (folder / name / "adapter_model.safetensors").is_file()
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".tmp")]


def test_what_is_reported(run):
    _, report, printed, *_ = run
    assert set(report["methods"]) == {"LoRA", "HyperLoRA", "BayesianLoRA"}
    assert report["data"]["rows"] == {"train": 210, "calibration": 700, "test": 1750, "outside": 600}
    for name, method in report["methods"].items():
        assert method["trainable_parameters"] > 0
        assert name in printed
        for stage in ("before", "after"):
            test = method[stage]["test"]
            assert test["settings"]["num_rows"] == 1750
            assert {"accuracy", "nll", "brier", "ece", "mce", "ace"} <= set(test)
            assert test["intervals"]["ece"][0] <= test["intervals"]["ece"][1]
            assert 0 <= method[stage]["outside"]["auroc"] <= 1
            assert f"{test['nll']:.3f}" in printed
        assert method["after"]["test"]["accuracy"] == method["before"]["test"]["accuracy"]
    assert report["export"]["max_abs_logit_difference"] < 1e-5


def test_draws_are_reported(run):
    folder, report, printed, data, settings = run
    draws = report["draws"]
    assert draws["num_samples"] == draws["num_forwards"] == 8
    assert "8 draws cost 8.0 forwards" in printed
    assert set(draws["mutual_information"]) == {"test", "outside"}
    base = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=7, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, folder / "bayesianlora")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    again = [predict_draws(model, tokenizer, rows, settings, 8) for rows in (data.test, data.outside)]
    for name, prediction in zip(("test", "outside"), again, strict=True):
        value = draws["mutual_information"][name]
        assert value > 0
        assert value == pytest.approx(float(prediction.mutual_information.mean()), rel=1e-3)
        assert f"{name} {value:.3f}" in printed
    nll = -again[0].probabilities.double()[torch.arange(len(data.test)), data.test["label"][:]].log().mean()
    assert draws["before"]["test"]["nll"] == pytest.approx(float(nll), rel=1e-4)
    assert draws["before"]["test"]["nll"] != report["methods"]["BayesianLoRA"]["before"]["test"]["nll"]
    assert draws["median_sd"] == pytest.approx(float(model.base_model.get_law().core_sd().median()))
    assert draws["median_sd"] != draws["initial_sd"]


def test_exported_adapter_needs_no_peft_calib(run):
    """Stock PEFT alone, in a process of its own, gives the logits of the HyperLoRA adapter."""
    folder, *_, settings = run
    text = "Return the rows in the order of their labels."
    script = (
        "import json, sys\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification as Auto, AutoTokenizer\n"
        "base = Auto.from_pretrained(sys.argv[1], num_labels=7, ignore_mismatched_sizes=True)\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "batch = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[3], return_tensors='pt')\n"
        "print(json.dumps([model(**batch).logits.tolist(), 'peft_calib' in sys.modules]))\n"
    )
    command = [sys.executable, "-c", script, settings.model, str(folder / "hyperlora-as-lora"), text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, imported = json.loads(done.stdout)
    assert not imported
    base = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=7, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, folder / "hyperlora")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    expected = predict_logits(model, tokenizer, datasets.Dataset.from_dict({"text": [text]}), settings)
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_a_finished_run_is_not_overwritten_by_accident(run, tmp_path):
    folder, report, _, data, settings = run
    with pytest.raises(FileExistsError, match="--overwrite"):
        run_demo(data, settings, folder, console=Console(file=io.StringIO()))
    assert json.loads((folder / "report.json").read_text()) == report


def test_an_interrupted_run_leaves_the_finished_one_as_it_was(run, tmp_path, monkeypatch):
    from peft_calib.demo import run as module

    *_, data, settings = run
    (tmp_path / "report.json").write_text("{}")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(data, settings, tmp_path, overwrite=True, console=Console(file=io.StringIO()))
    assert (tmp_path / "report.json").read_text() == "{}"  # what was there stands until its successor is finished
    unfinished = tmp_path / "never-finished"
    with pytest.raises(KeyboardInterrupt):
        run_demo(data, settings, unfinished, console=Console(file=io.StringIO()))
    assert not (unfinished / "report.json").exists()
