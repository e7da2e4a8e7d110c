"""Folders that earlier versions wrote are read as they were: adapters and runs of each method, kept as they were then.

What they answered is kept beside them in `expected.json`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from peft_calib import load, predict
from peft_calib.calibration import TemperatureScaling
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.exporting import export_run
from peft_calib.trainer_callbacks.adapter_state import digest_of_folder
from peft_calib.trainer_callbacks.recalibration import RECALIBRATION_FILE, load_recalibration

BEFORE = Path(__file__).parent / "data" / "before"
RUNS = ("lora", "hyper-lora", "bayesian-lora", "curve-lora", "ensemble")


@pytest.mark.parametrize("method", ["hyper", "bayesian", "curve"])
def test_an_adapter_gives_the_answers_it_gave(method, tiny_classifier):
    folder = BEFORE / "adapters" / method
    expected = json.loads((folder / "expected.json").read_text())
    model = PeftModel.from_pretrained(tiny_classifier(), folder).eval()
    batch = {"input_ids": torch.arange(3, 27).view(4, 6)}
    with torch.no_grad():
        logits = model(**batch).logits.double()
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]).double(), rtol=1e-4, atol=1e-5)
    if "draws" in expected:
        said = predict(model, batch, num_samples=3, seed=5).probabilities.double()
        torch.testing.assert_close(said, torch.tensor(expected["draws"]).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", RUNS)
def test_a_run_has_the_scores_it_had(method, tmp_path, monkeypatch):
    shutil.copytree(BEFORE / "runs", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # its settings name data and model by relative paths
    expected = json.loads((tmp_path / method / "expected.json").read_text())
    found = evaluate_run(method, progress=False).content
    assert found["rows"] == expected["rows"]
    assert list(found["variants"]) == list(expected["variants"])
    for variant, then in expected["variants"].items():
        now = found["variants"][variant]
        assert (now["temperature"], now["num_samples"]) == (then["temperature"], then["num_samples"])
        for stage in ("before", "after"):
            assert {key: now[stage][key] for key in then[stage]} == pytest.approx(then[stage], rel=1e-4)


@pytest.mark.parametrize("method", RUNS)
def test_a_run_is_exported(method, tmp_path, monkeypatch):
    shutil.copytree(BEFORE / "runs", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    several = {"num_samples": 2} if method == "ensemble" else {}
    export_run(method, tmp_path / "out", **several)
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))


def test_a_recalibration_file_of_before_goes_with_its_adapter_alone(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(BEFORE / "adapters" / "bayesian", folder)
    generator = np.random.default_rng(0)
    state = TemperatureScaling().fit(generator.normal(size=(100, 3)), generator.integers(0, 3, 100)).state()
    (folder / RECALIBRATION_FILE).write_text(json.dumps({**state, "adapter": digest_of_folder(folder)}))
    assert load_recalibration(folder).temperature == state["parameters"]["temperature"]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    with pytest.raises(ValueError, match="another configuration"):
        load_recalibration(folder)


@pytest.mark.parametrize("file", ["temperature.json", "adapter/recalibration.json"])
def test_a_temperature_that_was_changed_by_hand_is_refused_by_all_that_read_it(file, tmp_path, monkeypatch):
    shutil.copytree(BEFORE / "runs", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "bayesian-lora" / file
    content = json.loads(place.read_text())
    state = content["mean"] if file == "temperature.json" else content
    was = state["parameters"]["temperature"]
    state["parameters"]["temperature"] = 3.25
    place.write_text(json.dumps(content))
    for read in (lambda: evaluate_run("bayesian-lora", progress=False), lambda: load("bayesian-lora", device="cpu")):
        with pytest.raises(ValueError, match=r"changed by hand.*train again") as told:
            read()
        assert all(part in str(told.value) for part in (file, "3.25", repr(was)))
    assert load("bayesian-lora", device="cpu", recalibrate=False).predict(["a text"]).temperature is None
