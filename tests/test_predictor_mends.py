"""`peft_calib.load` of what others made: heads of every name, runs and files of before, prompts, other bases."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import peft_calib
from peft_calib import predict_dataset
from peft_calib.artefact import Artefact, Inputs, read_artefact
from peft_calib.base_models import base_fingerprint
from peft_calib.calibration import log_probabilities
from peft_calib.identity import folder_digest
from peft_calib.predictor import CalibratedPrediction, Predictor
from peft_calib.predictor.loading import _head_rows
from peft_calib.runs.loading import FinishedRun
from peft_calib.runs.predicting import predict_table

BEFORE = Path(__file__).parent / "data" / "before" / "runs"
TEXTS = ["the weather was awful", "a lovely long river near our house", "lovely", "again today"]
RUNS = ("lora", "hyper-lora", "bayesian-lora", "curve-lora", "ensemble")


def quietly(folder, **options) -> Predictor:
    """The predictor of an adapter without a temperature."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return peft_calib.load(folder, device="cpu", **options)


@pytest.fixture
def distilbert(tmp_path, minilm) -> Path:
    """A stock LoRA of DistilBERT, whose `pre_classifier` is saved beside its classifier."""
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm)
    sizes = {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 64}
    base = tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(**sizes, vocab_size=len(tokenizer), num_labels=3)
    )
    for part in (tokenizer, base):
        part.save_pretrained(tmp_path / "base")
    base = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def decoder_lora(tmp_path, tiny_decoder_folder) -> Path:
    base = tf.AutoModelForCausalLM.from_pretrained(tiny_decoder_folder)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Runs of an earlier version, in the folder in which they were made."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return tmp_path / "before"


# --------------------------------------------------------------------- heads


def test_the_head_is_the_layer_of_that_name_and_no_other(distilbert):
    names = set(load_file(distilbert / "adapter_model.safetensors"))
    assert "base_model.model.pre_classifier.weight" in names  # 16 rows, and last in the file
    plain = quietly(distilbert)
    assert plain.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    model = tf.AutoModelForSequenceClassification.from_pretrained(distilbert)
    batch = plain.tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = model.eval()(**batch).logits.softmax(-1)
    torch.testing.assert_close(plain.predict(TEXTS).probabilities.float(), expected, atol=1e-4, rtol=0)
    Artefact(("low", "fair", "high"), adapters={".": folder_digest(distilbert)}).write(distilbert)
    assert set(quietly(distilbert).predict(TEXTS).labels_predicted) <= {"low", "fair", "high"}


def test_the_head_is_the_highest_layer_of_that_name(tmp_path):
    """Attention has an `out_proj` of its own, which an adapter may train whole."""
    tensors = {
        "base_model.model.classifier.dense.weight": torch.zeros(8, 8),
        "base_model.model.classifier.out_proj.weight": torch.zeros(5, 8),
        "base_model.model.encoder.layers.0.self_attn.out_proj.weight": torch.zeros(8, 8),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert _head_rows(tmp_path) == 5


def test_names_that_are_given_twice_are_refused(distilbert, decoder_lora):
    with pytest.raises(ValueError, match="give the name 'a' to more than one class"):
        peft_calib.load(distilbert, label_names=["a", "b", "a"])
    with pytest.raises(ValueError, match="more than one class"):
        peft_calib.load(decoder_lora, label_tokens=["yes", "no"], label_names=["a", "a"])


def test_weights_in_a_pickle_say_how_they_are_saved_again(distilbert):
    (distilbert / "adapter_model.safetensors").rename(distilbert / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only adapter_model\.safetensors is read.*safe_serialization=True"):
        peft_calib.load(distilbert)


def test_a_row_without_a_text_is_told_without_a_flag(distilbert):
    with pytest.raises(ValueError, match=r"row 1 has no text .*leave such rows out$"):
        quietly(distilbert).predict({"text": ["a", " "]})


def test_calibrated_predictions_are_not_stacked(distilbert):
    out = quietly(distilbert).predict(TEXTS)
    with pytest.raises(TypeError, match="num_samples= as many draws as you want"):
        CalibratedPrediction.stack_draws([out, out])


# --------------------------------------------------------------------- prompts


def test_a_long_prompt_keeps_its_end_where_a_token_answers(decoder_lora):
    predictor = quietly(decoder_lora, label_tokens=["yes", "no"], max_length=8)
    tokenizer, question = predictor.tokenizer, "is the river near our house"
    texts = [f"{'some old trees and ' * 9}{question}", question]
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 8 tokens"):
        out = predictor.predict(texts)
    words = tokenizer(question, add_special_tokens=False)["input_ids"]
    tokenizer.truncation_side = "left"
    ids = tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    tokenizer.truncation_side = "right"
    assert all(str(words)[1:-1] in str(row) for row in ids)  # the whole question is there
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    said = predict_dataset(
        predictor.model, rows, "mean", label_tokens=["yes", "no"], processing_class=tokenizer, progress=False
    )
    torch.testing.assert_close(out.probabilities.float(), said.probabilities, atol=1e-4, rtol=0)


# --------------------------------------------------------------------- what a file says of other weights


def test_a_file_without_a_temperature_is_held_against_its_adapter_too(distilbert, tmp_path):
    Artefact(("low", "fair", "high"), inputs=Inputs(max_length=4), adapters={".": folder_digest(distilbert)}).write(
        distilbert
    )
    assert quietly(distilbert).artefact.inputs.max_length == 4
    weights = distilbert / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match=r"predictor\.json was made for other weights"):
        peft_calib.load(distilbert)
    with pytest.warns(UserWarning, match="was made for other weights"):
        peft_calib.load(distilbert, recalibrate=False)


def test_another_base_is_refused_without_a_temperature_too(distilbert, tmp_path):
    known = quietly(distilbert)
    base = base_fingerprint(known.model)
    Artefact(("low", "fair", "high"), base=base, adapters={".": folder_digest(distilbert)}).write(distilbert)
    quietly(distilbert)
    other = shutil.copytree(tmp_path / "base", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({n: v + 0.1 for n, v in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"was trained on: it has other weights"):
        peft_calib.load(distilbert, base_model=other)
    with pytest.warns(UserWarning, match="was trained on: it has other weights"):
        peft_calib.load(distilbert, base_model=other, recalibrate=False)


# --------------------------------------------------------------------- runs of an earlier version


@pytest.mark.parametrize("method", RUNS)
def test_a_run_of_an_earlier_version_answers_as_the_run_itself(method, place):
    stored = json.loads((place / method / "temperature.json").read_text())
    run, predictor = FinishedRun.load(method), quietly(method)
    found = predictor.artefact
    assert (found.classes, found.inputs, found.seed) == (("bad", "good"), run.task.inputs(), 0)
    assert predictor.main_way == ("sample" if "sample" in stored else "mean")
    rows = run.task.canonical(Dataset.from_dict({"text": TEXTS, "label": ["bad"] * 4}), "rows", "test")
    for how, fields in stored.items():
        said = run.predict(rows, how, fields["num_samples"], progress=False)
        logits = log_probabilities(said.probabilities.double().numpy()) / fields["parameters"]["temperature"]
        out = predictor.predict(TEXTS, how=how)
        assert out.num_samples == fields["num_samples"]
        np.testing.assert_allclose(out.probabilities, torch.from_numpy(logits).softmax(-1), atol=1e-4)


def test_the_command_and_load_agree_on_a_run_of_an_earlier_version(place):
    for method, draws in (("curve-lora", 5), ("ensemble", 2)):
        direct = quietly(method).predict(TEXTS)
        told = predict_table(method, {"text": TEXTS}, f"{method}.csv", progress=False)
        assert (direct.num_samples, told.prediction.num_samples) == (draws, draws)
        assert torch.equal(direct.probabilities, told.prediction.probabilities)


def test_length_and_base_model_are_heard_where_the_base_has_moved(place):
    Path("model").rename("moved")
    long = ["the weather was awful and the river was long"]
    told = predict_table(
        "curve-lora", {"text": long}, "cut.csv", progress=False, max_length=3, base_model="moved", how="mean"
    )
    assert told.prediction.num_cut == 1
    whole = quietly("curve-lora", base_model="moved").predict(["the weather was"], how="mean")
    torch.testing.assert_close(told.prediction.probabilities, whole.probabilities, atol=1e-6, rtol=0)
    with pytest.raises(FileNotFoundError, match="base_model="):
        quietly("curve-lora")


def test_a_run_of_an_earlier_version_is_saved_as_an_adapter_of_now(place, tmp_path):
    predictor = quietly("curve-lora")
    predictor.model.save_pretrained(tmp_path / "saved")
    again = read_artefact(tmp_path / "saved" / "adapter")
    assert list(again.adapters) == ["."]
    out = quietly(tmp_path / "saved" / "adapter").predict(TEXTS)
    assert torch.equal(out.probabilities, predictor.predict(TEXTS).probabilities)


def test_a_multiple_choice_run_of_an_earlier_version_answers_with_letters(decoder_lora, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(decoder_lora, run / "adapter")
    columns = {"question_column": "q", "choices_column": ["c"], "label_column": "a", "text_column": ["text"]}
    settings = {
        "task": "multiple-choice",
        "prompt": "{question} {choices}",
        "max_length": 16,
        "batch_size": 2,
        "seed": 3,
    }
    labels = {"names": ["A", "B", "C"], "values": [["A", 0], ["B", 1], ["C", 2]]}
    content = {"format_version": 1, "settings": columns | settings, "labels": labels}
    (run / "config.json").write_text(json.dumps(content))
    (run / "run.json").write_text(json.dumps({"adapters": ["adapter"]}))
    predictor = quietly(run)
    found = predictor.artefact
    assert found.inputs == Inputs(("q",), "a", 16, 4, ("c",), settings["prompt"])
    assert found.label_tokens == tuple(predictor.tokenizer.convert_tokens_to_ids(["a", "b", "c"]))
    assert (found.seed, list(found.adapters)) == (3, ["adapter"])
    out = predictor.predict([{"q": text, "c": ["old", "lovely", "awful"], "a": 1} for text in TEXTS])
    assert (out.label_names, out.labels.tolist()) == (("A", "B", "C"), [1] * 4)
