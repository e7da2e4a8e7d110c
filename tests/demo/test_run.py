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
from resamples import few_resamples
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peft_calib
from peft_calib import predict
from peft_calib.demo import run as module
from peft_calib.demo.run import demo_config, run_demo
from peft_calib.demo.table import Line, reliability_grid, result_table
from peft_calib.runs.evaluation import Evaluation

ADAPTERS = {
    "lora": "LORA",
    "hyperlora": "HYPERLORA",
    "bayesianlora": "BAYESIANLORA",
    "ensemblelora": "ENSEMBLELORA",
    "hyperlora-as-lora": "LORA",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_folder):
    """The whole demo on the embedded sentences, with a tiny encoder and few rows."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    settings = {"model": str(tiny_model_folder), "max_train_rows": 210, "epochs": 1, "learning_rate": 5e-3, "rank": 2}
    before = transformers.logging.get_verbosity(), datasets.is_progress_bar_enabled(), list(warnings.filters)
    random = torch.get_rng_state()
    stream = io.StringIO()
    with warnings.catch_warnings(), few_resamples():
        config, outside = demo_config(**settings)
        report = run_demo(config, folder, outside=outside, console=Console(file=stream, width=80))
    after = transformers.logging.get_verbosity(), datasets.is_progress_bar_enabled(), list(warnings.filters)
    assert before == after
    assert torch.equal(random, torch.get_rng_state())
    return folder, report, stream.getvalue(), config


def evaluation(folder, name) -> Evaluation:
    (place,) = (folder / "runs" / name / "evaluation").iterdir()
    return Evaluation(place, json.loads((place / "report.json").read_text()))


def base(config, num_labels=7):
    return AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=num_labels, ignore_mismatched_sizes=True
    )


@pytest.mark.slow
def test_what_is_written(run):
    folder, report, *_ = run
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    for name, kind in ADAPTERS.items():
        assert json.loads((folder / name / "adapter_config.json").read_text())["peft_type"] == kind
        assert (folder / name / "adapter_model.safetensors").is_file()
    for name in ("lora", "hyperlora", "bayesianlora", "ensemblelora"):
        assert (folder / "runs" / name / "run.json").is_file()
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".tmp")]


def test_what_is_reported(run):
    _, report, printed, *_ = run
    assert set(report["methods"]) == {"LoRA", "HyperLoRA", "BayesianLoRA", "EnsembleLoRA"}
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
            for value in (test["nll"], test["ece"], method[stage]["outside"]["auroc"]):
                assert f"{value:.3f}" in printed
        assert method["after"]["test"]["accuracy"] == method["before"]["test"]["accuracy"]
    assert report["export"]["max_abs_logit_difference"] < 1e-5


def test_the_row_of_the_uncertainty_head(run):
    """The same answers with `1 - P(error)` for their confidence: no score of all classes, its own ECE and OOD."""
    folder, report, printed, *_ = run
    found = evaluation(folder, "lora").content["variants"]["mean"]["head"]
    assert report["methods"]["LoRA"]["head"] == found
    assert "head" not in report["methods"]["HyperLoRA"]
    (line,) = [line.split() for line in printed.splitlines() if line.strip().startswith("its head")]
    ece, outside = found["error_probability"]["ece"], found["outside"]
    interval = "{:.2f}-{:.2f}".format(*found["error_probability"]["intervals"]["ece"])
    accuracy = report["methods"]["LoRA"]["before"]["test"]["accuracy"]
    numbers = (accuracy, ece), (outside["mean_confidence"], outside["auroc"])
    assert line[2:] == [*(f"{v:.3f}" for v in numbers[0]), interval, *(f"{v:.3f}" for v in numbers[1])]
    assert "Its head: the same answers" in " ".join(printed.split())
    assert peft_calib.load(folder / "lora").predict(["Return the rows."]).error_probability is not None


def test_draws_are_reported(run):
    folder, report, printed, config = run
    draws = report["draws"]
    assert draws["num_samples"] == draws["num_forwards"] == 8
    assert "8 draws cost 8.0 forwards" in printed
    found = evaluation(folder, "bayesianlora").content["variants"]["sample"]
    assert draws["mutual_information"] == {
        "test": found["mutual_information"],
        "outside": found["outside"]["mutual_information"],
    }
    for name, value in draws["mutual_information"].items():
        assert value > 0
        assert f"{name} {value:.3f}" in printed
    assert draws["before"]["test"]["nll"] != report["methods"]["BayesianLoRA"]["before"]["test"]["nll"]
    model = PeftModel.from_pretrained(base(config), folder / "bayesianlora")
    assert draws["median_sd"] == pytest.approx(float(model.base_model.get_law().core_sd().median()))
    assert draws["median_sd"] != draws["initial_sd"]


def test_exported_adapter_needs_no_peft_calib(run):
    """Stock PEFT alone, in a process of its own, gives the probabilities of the HyperLoRA adapter."""
    folder, *_, config = run
    text = "Return the rows in the order of their labels."
    script = (
        "import json, sys\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification as Auto, AutoTokenizer\n"
        "base = Auto.from_pretrained(sys.argv[1], num_labels=7, ignore_mismatched_sizes=True)\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "batch = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[3], return_tensors='pt')\n"
        "print(json.dumps([model(**batch).logits.softmax(-1).tolist(), 'peft_calib' in sys.modules]))\n"
    )
    command = [sys.executable, "-c", script, config.model, str(folder / "hyperlora-as-lora"), text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    probabilities, imported = json.loads(done.stdout)
    assert not imported
    model = PeftModel.from_pretrained(base(config), folder / "hyperlora")
    batch = AutoTokenizer.from_pretrained(config.model)(text, return_tensors="pt")
    np.testing.assert_allclose(probabilities, predict(model, batch, "mean").probabilities, rtol=1e-5, atol=1e-6)


def test_the_table_fits_a_terminal(run):
    folder, report, *_ = run
    found = evaluation(folder, "lora")
    stream = io.StringIO()
    lines = [Line("LoRA", found, "mean")] * 2
    Console(file=stream, width=80).print(result_table(lines, "title", report["most_frequent_class"]))
    text = stream.getvalue()
    assert text.count("+ temperature") == 2
    assert "OOD" in text
    assert "…" not in text
    content = json.loads(json.dumps(found.content))
    del content["variants"]["mean"]["outside"]
    stream = io.StringIO()
    lines = [Line("LoRA", Evaluation(found.folder, content), "mean")]
    Console(file=stream, width=80).print(result_table(lines, None, report["most_frequent_class"]))
    assert "OOD" not in stream.getvalue()


def test_the_picture_has_a_panel_for_each_line_and_one_legend(run):
    lines = [Line("LoRA", evaluation(run[0], "lora"), "mean")] * 5
    figure = reliability_grid(lines)
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == 5
    assert [len(axes.lines) for axes in shown] == [3] * 5  # the diagonal, before, after
    assert [axes.get_legend() for axes in shown] == [None] * 5
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["before its temperature", "after its temperature"]
    width, height = figure.get_size_inches()
    assert height < width <= 12  # fits a screen


def test_a_finished_run_is_not_overwritten_by_accident(run):
    folder, report, _, config = run
    with pytest.raises(FileExistsError, match="--overwrite"):
        run_demo(config, folder, console=Console(file=io.StringIO()))
    assert json.loads((folder / "report.json").read_text()) == report


def test_an_interrupted_run_leaves_the_finished_one_as_it_was(run, tmp_path, monkeypatch):
    *_, config = run
    (tmp_path / "report.json").write_text("{}")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, tmp_path, overwrite=True, console=Console(file=io.StringIO()))
    assert (tmp_path / "report.json").read_text() == "{}"  # what was there stands until its successor is finished
    unfinished = tmp_path / "never-finished"
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, unfinished, console=Console(file=io.StringIO()))
    assert not (unfinished / "report.json").exists()


@pytest.mark.parametrize("given", ["train", "test"])
def test_rows_to_test_on_are_held_out_only_where_the_source_has_none(tmp_path, given, tiny_model_folder):
    (tmp_path / f"{given}.jsonl").write_text("".join(f'{{"text": "t {i}", "label": {i % 2}}}\n' for i in range(40)))
    config, outside = demo_config(str(tmp_path), str(tiny_model_folder))
    assert config.test_fraction == (0.2 if given == "train" else 0.0)
    assert outside is None
