"""Draws that are served answer as the predictor does: the same tokens, classes and temperature."""

import importlib.util
import json
import re
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from test_predictor import NAMES, TEXTS, temperature
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import peft_calib
from peft_calib import BayesianLoraConfig, predict_served
from peft_calib.artefact import read_artefact
from peft_calib.calibration import SelectiveThreshold
from peft_calib.calibration.recalibrate import load_state
from peft_calib.provenance.companions import attach_recalibration
from peft_calib.provenance.stored_decision import FittedTo, StoredDecision, recalibration_of

SCRIPT = Path(__file__).parents[1] / "hub_examples" / "serve_draws.py"
KINDS = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
ANSWERS = ["day", "rain", "night"]


@contextmanager
def serving(base: Path, draws: Path):
    """The address of the example's server, which answers as vLLM does."""
    spec = importlib.util.spec_from_file_location("serve_draws_here", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    server = example.make_server(example.Draws(str(base), draws))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory, tiny_decoder_folder):
    """Base model, adapter with temperatures, its exported draws, and a server of these."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder_folder)
    tokenizer.save_pretrained(folder / "base")
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    options = {**names, "pad_token_id": tokenizer.pad_token_id} if request.param == "SEQ_CLS" else {}
    torch.manual_seed(0)
    KINDS[request.param].from_pretrained(tiny_decoder_folder, **options).save_pretrained(folder / "base")
    base = KINDS[request.param].from_pretrained(folder / "base")
    config = BayesianLoraConfig(
        task_type=request.param, r=2, target_modules=["q_proj", "v_proj"], init_sd=0.5, max_sd=1.0
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if ("cores" in name and "mean" in name) or "modules_to_save.default.weight" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    tokens = [tokenizer.convert_tokens_to_ids(word) for word in ANSWERS] if request.param == "CAUSAL_LM" else None
    attach_recalibration(model, temperature(2.5), num_samples=None, seed=0, label_tokens=tokens)
    attach_recalibration(model, temperature(0.5), num_samples=3, seed=0, label_tokens=tokens)
    model.save_pretrained(folder / "adapter")
    peft_calib.export_lora(model.eval(), folder / "draws", num_samples=3, seed=0)
    with serving(folder / "base", folder / "draws") as url:
        yield folder, url


@pytest.mark.parametrize("place", ["adapter", "draws"])
def test_the_server_and_the_predictor_say_the_same(served, place):
    folder, url = served
    here = peft_calib.load(folder / "adapter", device="cpu").predict(TEXTS)
    there = predict_served(url, TEXTS, adapter=folder / place, prompts_per_request=3)
    assert there.temperature == here.temperature == 0.5
    assert (there.label_names, there.recalibration) == (here.label_names, "T = 0.5")
    torch.testing.assert_close(there.probabilities, here.probabilities, rtol=0, atol=1e-5)
    torch.testing.assert_close(there.mutual_information, here.mutual_information, rtol=0, atol=1e-6)
    assert there.mutual_information.max() > 1e-4


def test_exported_draws_and_the_mean_are_adapters_of_their_own(served):
    folder, _ = served
    here = peft_calib.load(folder / "adapter", device="cpu")
    draws = peft_calib.load(folder / "draws", device="cpu").predict(TEXTS)
    torch.testing.assert_close(draws.probabilities, here.predict(TEXTS).probabilities, rtol=0, atol=1e-5)
    mean = peft_calib.load(folder / "draws" / "mean", device="cpu").predict(TEXTS)
    assert mean.temperature == 2.5
    torch.testing.assert_close(mean.probabilities, here.predict(TEXTS, how="mean").probabilities, rtol=0, atol=1e-5)


def with_a_rule(folder: Path, place: Path) -> SelectiveThreshold:
    """A rule for the three draws of seed 0 beside an adapter, as peft-calib decide writes it."""
    p, labels = np.random.default_rng(0).dirichlet([1, 1, 1], 300), np.random.default_rng(1).integers(0, 3, 300)
    stored = read_artefact(folder / "adapter")
    rule = SelectiveThreshold(target_coverage=0.5).fit(p, labels)
    way = recalibration_of(load_state(stored.ways["sample"]))
    to = FittedTo("sample", 3, seed=0, recalibration=way, label_tokens=stored.label_tokens)
    StoredDecision(rule, to, tuple(stored.adapters.values()), stored.base, {}).write(place)
    return rule


def test_the_rules_of_exported_draws_are_applied(served, tmp_path):
    folder, url = served
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    rule = with_a_rule(folder, tmp_path / "adapter")
    here = peft_calib.load(tmp_path / "adapter", device="cpu")
    peft_calib.export_lora(here.model, tmp_path / "draws", num_samples=3, seed=0)
    there, expected = predict_served(url, TEXTS, adapter=tmp_path / "draws"), here.predict(TEXTS)
    assert torch.equal(there.answered, expected.answered) and there.decision == expected.decision == rule.promise()
    unknown = predict_served(url, TEXTS, adapter=tmp_path / "adapter")
    assert unknown.answered is None and "does not say of which seed" in unknown.decision
    some = predict_served(url, TEXTS, adapter=tmp_path / "draws", draws=["draw-0", "draw-1"])
    assert some.answered is None and "other draws are asked" in some.decision
    stored = json.loads((tmp_path / "draws/predictor.json").read_text())
    stored["ways"]["sample"]["parameters"]["temperature"] = 0.75
    del stored["digest"]
    (tmp_path / "draws/predictor.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"another recalibration: T = 0.5 .*, and T = 0.75 now") as caught:
        predict_served(url, TEXTS, adapter=tmp_path / "draws")
    assert "\n" not in str(caught.value)


def test_fewer_draws_are_told(served, tmp_path):
    folder, url = served
    out = predict_served(url, TEXTS, adapter=folder / "adapter", draws=["draw-0", "draw-2"])
    assert (out.num_samples, out.recalibration) == (2, "T = 0.5, fitted with 3 draws")
    alone = predict_served(url, TEXTS, adapter=folder / "draws" / "mean", draws=["mean"])
    assert alone.temperature == 2.5
    model = peft_calib.load(folder / "adapter", device="cpu").model
    peft_calib.export_lora(model, tmp_path / "two", num_samples=2)
    assert read_artefact(tmp_path / "two").ways["sample"].integer("fitted_num_samples") == 3
    two = peft_calib.load(tmp_path / "two", device="cpu").predict(TEXTS)
    some = predict_served(url, TEXTS, adapter=folder / "adapter", draws=["draw-0", "draw-1"])
    torch.testing.assert_close(two.probabilities, some.probabilities, rtol=0, atol=1e-5)


def test_a_model_that_was_trained_on_keeps_no_temperature(served, tmp_path):
    folder, _ = served
    model = peft_calib.load(folder / "adapter", device="cpu").model
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "cores" in name).add_(0.1)
    found = read_artefact(peft_calib.export_lora(model, tmp_path / "draws", num_samples=2))
    assert not found.ways and found.label_tokens == read_artefact(folder / "adapter").label_tokens


def test_long_texts_are_cut_as_in_training(served, tmp_path):
    folder, url = served
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter/predictor.json").read_text())
    stored["inputs"]["max_length"] = 6
    del stored["digest"]  # as the error of a changed file says
    (tmp_path / "adapter/predictor.json").write_text(json.dumps(stored))
    long = ["a lovely long river near our house and some old trees"]
    with pytest.warns(UserWarning, match="1 of 1 texts were cut"):
        there = predict_served(url, long, adapter=tmp_path / "adapter")
    with pytest.warns(UserWarning, match="were cut"):
        here = peft_calib.load(tmp_path / "adapter", device="cpu").predict(long)
    torch.testing.assert_close(there.probabilities, here.probabilities, rtol=0, atol=1e-5)
    assert there.num_cut == 1


def test_what_does_not_fit_is_one_line(served, tmp_path):
    folder, url = served

    def refused(message: str, kind: type[Exception] = ValueError, **options) -> None:
        with pytest.raises(kind, match=message) as caught:
            predict_served(**{"base_url": url, "texts": TEXTS, "adapter": folder / "adapter", **options})
        assert "\n" not in str(caught.value)

    refused("cannot be reached", ConnectionError, base_url="http://127.0.0.1:9/v1")
    refused("does not serve draw-7", draws=["draw-0", "draw-7"])
    refused("another model's", base_model=tmp_path / "other")
    refused("leave labels out", labels=["a", "b"])
    refused("held against an adapter's", adapter=None, base_model="x")
    refused("holds no adapter", FileNotFoundError, adapter=tmp_path)
    refused("nothing to predict", texts=[])
    of_other = Path(shutil.copytree(folder / "adapter", tmp_path / "of another base"))
    shutil.copytree(folder / "base", tmp_path / "another")
    config = json.loads((of_other / "adapter_config.json").read_text())
    for place, message, kind in (("another", "another model's", ValueError), ("gone", "gone", Exception)):
        config["base_model_name_or_path"] = str(tmp_path / place)
        (of_other / "adapter_config.json").write_text(json.dumps(config))
        refused(message, kind, adapter=of_other)
    refused("text", TypeError, texts=[3])
    shutil.copytree(folder / "draws", tmp_path / "draws")
    shutil.copytree(tmp_path / "draws/draw-0", tmp_path / "draws/draw-1", dirs_exist_ok=True)
    refused("other weights", adapter=tmp_path / "draws")
    refused("no predictor.json", adapter=folder / "draws/draw-0")


def test_a_classifier_needs_no_adapter_for_plain_answers(served):
    folder, url = served
    raw = predict_served(url, TEXTS, None if classifies(folder) else ANSWERS)
    here = peft_calib.load(folder / "adapter", device="cpu", recalibrate=False)
    assert raw.sample_probabilities.shape == (3, len(TEXTS), 3)
    if classifies(folder):
        expected = here.predict(TEXTS, num_samples=3, how="sample").probabilities
        torch.testing.assert_close(raw.probabilities.double(), expected, rtol=0, atol=1e-5)


def blocks() -> list[str]:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def test_the_page_runs_as_printed(served, tmp_path, monkeypatch):
    folder, url = served
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "adapter", "runs/bayesian/adapter")
    shutil.copytree(folder / "draws/mean", "any-lora")
    names = {
        "peft_calib": peft_calib,
        "texts": TEXTS,
        "model": peft_calib.load(folder / "adapter", device="cpu").model,
    }
    ran = 0
    for block in blocks():
        if "export_gguf" in block and (classifies(folder) or importlib.util.find_spec("gguf") is None):
            continue  # llama.cpp has no head of classes
        exec(block.replace("http://localhost:8000/v1", url), names)
        ran += 1
    assert ran >= 1 and len(names["out"].labels_predicted) == len(TEXTS)


def test_a_server_of_the_other_kind_is_told(served):
    folder, url = served
    with pytest.raises(ValueError, match="asked without labels" if classifies(folder) else "--runner pooling"):
        predict_served(url, TEXTS, ANSWERS if classifies(folder) else None)


def classifies(folder: Path) -> bool:
    return json.loads((folder / "adapter/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
