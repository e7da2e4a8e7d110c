"""`peft_calib.load`: texts in, calibrated probabilities out; what is no text, no adapter or another one is told."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import peft_calib
from peft_calib import BayesianLoraConfig, CalibratedPrediction, Prediction, fetching, predict_dataset
from peft_calib.artefact import ARTEFACT_FILE, Artefact, Inputs, read_artefact
from peft_calib.base_models import seeded_base
from peft_calib.calibration import TemperatureScaling, log_probabilities
from peft_calib.calibration.recalibrate import VectorScaling
from peft_calib.identity import folder_digest
from peft_calib.provenance.companions import attach_recalibration

BEFORE = Path(__file__).parent / "data" / "before" / "runs"
TEXTS = ["the weather was awful", "a lovely long river near our house and some old trees", "lovely", "again today"]
NAMES = ("low", "fair", "high")


def temperature(value: float, num_classes: int = 3) -> dict:
    """The state of a temperature that was fitted on some rows."""
    rng = np.random.default_rng(0)
    scaling = TemperatureScaling().fit(rng.normal(size=(40, num_classes)), rng.integers(0, num_classes, 40))
    state = scaling.state()
    state["parameters"]["temperature"] = value
    del state["fit"], state["seal"]  # of another value
    return state


@pytest.fixture(scope="module")
def bayesian(tmp_path_factory, tiny_model_folder) -> Path:
    """An adapter that was saved with a temperature of its mean and one of its draws."""
    folder = tmp_path_factory.mktemp("adapters") / "bayesian"
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, **names)
    config = BayesianLoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_sd=0.3, max_sd=1.0)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if ("cores" in name and "mean" in name) or "modules_to_save.default.weight" in name:
            torch.nn.init.normal_(parameter, std=2.0)  # B starts at zero, where all draws are alike
    attach_recalibration(model, temperature(1.0), num_samples=None, seed=0)
    attach_recalibration(model, temperature(2.5), num_samples=None, seed=0)  # the later one counts
    attach_recalibration(model, temperature(0.5), num_samples=3, seed=0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(bayesian):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a folder that is complete needs no word
        return peft_calib.load(bayesian, device="cpu")


@pytest.fixture
def stock(tmp_path, tiny_model_folder):
    """Save a LoRA as other tools do."""

    def save(task: str | None = "SEQ_CLS", auto=AutoModelForSequenceClassification, folder=tiny_model_folder) -> Path:
        modules = ["q_proj", "v_proj"] if auto is AutoModelForCausalLM else ["query", "value"]
        config = LoraConfig(task_type=task, r=2, target_modules=modules, init_lora_weights=False)
        get_peft_model(auto.from_pretrained(folder), config).save_pretrained(tmp_path / "lora")
        return tmp_path / "lora"

    return save


# --------------------------------------------------------------------- what it answers


@pytest.mark.parametrize(("how", "count", "value"), [("mean", None, 2.5), ("sample", 3, 0.5), ("late", 3, 0.5)])
def test_the_temperature_of_each_way_is_applied(predictor, tiny_model_folder, how, count, value):
    out = predictor.predict(TEXTS, how=how)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    rows = Dataset.from_dict(dict(tokenizer(TEXTS)))
    said = predict_dataset(predictor.model, rows, how, count, processing_class=tokenizer, progress=False)
    logits = log_probabilities(said.probabilities.double().numpy())
    expected = torch.softmax(torch.from_numpy(logits) / value, -1)
    torch.testing.assert_close(out.probabilities, expected, atol=1e-4, rtol=0)  # in another order of the rows
    assert isinstance(out, Prediction)
    assert (out.temperature, out.label_names, out.how, out.num_samples) == (value, NAMES, how, count or 1)
    assert out.labels_predicted == [NAMES[i] for i in expected.argmax(-1)]
    draws = said.sample_probabilities.double().log().div(value).softmax(-1)
    torch.testing.assert_close(out.sample_probabilities.double(), draws, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.entropy, torch.special.entr(expected).sum(-1), atol=1e-4, rtol=0)
    spread = torch.special.entr(draws.mean(0)).sum(-1) - torch.special.entr(draws).sum(-1).mean(0)
    torch.testing.assert_close(out.mutual_information, spread, atol=1e-4, rtol=0)
    assert f"T = {value:g}" in repr(out)


def test_the_draws_are_chosen_when_nothing_is_said(predictor):
    out = predictor.predict(TEXTS)
    assert (out.how, out.num_samples, out.temperature) == ("sample", 3, 0.5)
    assert float(out.mutual_information.max()) > 1e-7  # the draws differ, by how much hangs on a random encoder
    more = predictor.predict(TEXTS, num_samples=5)
    assert (more.num_samples, more.recalibration) == (5, "T = 0.5, fitted with 3 draws")
    assert not torch.equal(predictor.predict(TEXTS, seed=1).probabilities, out.probabilities)
    assert predictor.predict(TEXTS, how="linear").temperature is None
    plain = peft_calib.load(predictor.folder, device="cpu", recalibrate=False)
    assert plain.main_way == "sample"  # by its law, without a temperature that says so


def test_the_answers_are_in_the_order_of_the_texts(predictor):
    whole = predictor.predict(TEXTS)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(
            predictor.predict([text]).probabilities[0], whole.probabilities[row], atol=1e-4, rtol=0
        )


def test_another_method_than_a_temperature(tmp_path, tiny_model_folder):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    rng = np.random.default_rng(0)
    method = VectorScaling().fit(rng.normal(size=(60, 3)), rng.integers(0, 3, 60))
    attach_recalibration(model, method.state(), num_samples=None, seed=0)
    model.save_pretrained(tmp_path)
    out = peft_calib.load(tmp_path, device="cpu").predict(TEXTS)
    plain = peft_calib.load(tmp_path, device="cpu", recalibrate=False).predict(TEXTS)
    expected = method.transform(log_probabilities(plain.probabilities.numpy()))
    np.testing.assert_allclose(out.probabilities.numpy(), expected, atol=1e-12)
    assert (out.temperature, out.recalibration) == (None, "VectorScaling")


def test_a_model_that_was_loaded_is_saved_complete(predictor, bayesian, tmp_path):
    predictor.model.save_pretrained(tmp_path)
    assert (tmp_path / ARTEFACT_FILE).read_text() == (bayesian / ARTEFACT_FILE).read_text()
    out = peft_calib.load(tmp_path, device="cpu").predict(TEXTS)
    assert torch.equal(out.probabilities, predictor.predict(TEXTS).probabilities)


def test_it_is_written_read_cut_and_joined(predictor, tmp_path):
    out = predictor.predict(TEXTS)
    out.save(tmp_path)
    again = CalibratedPrediction.load(tmp_path)
    joined = CalibratedPrediction.concatenate([out.select(torch.tensor([0, 1])), out.select(torch.tensor([2, 3]))])
    for other in (again, joined):
        assert torch.equal(other.probabilities, out.probabilities)
        assert torch.equal(other.mutual_information, out.mutual_information)
        assert (other.label_names, other.temperature) == (NAMES, 0.5)
    assert out.to_dataset()["predicted_label"][:] == out.labels_predicted


# --------------------------------------------------------------------- what it takes


def test_rows_of_a_table_with_labels_and_without(predictor):
    expected = predictor.predict(TEXTS)
    assert expected.labels is None
    labels = ["fair", "high", None, "unknown"]
    for rows in (
        Dataset.from_dict({"text": TEXTS, "label": labels}),
        [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)],
        {"text": TEXTS, "label": [1, 2, -1, None]},
    ):
        out = predictor.predict(rows)
        assert torch.equal(out.probabilities, expected.probabilities)
        assert out.labels.tolist() == [1, 2, -100, -100]
    assert predictor.predict({"text": TEXTS, "label": [None] * 4}).labels is None
    tokens = Dataset.from_dict(dict(predictor.tokenizer(TEXTS)))
    assert torch.equal(predictor.predict(tokens).probabilities, expected.probabilities)


def test_what_is_too_long_is_cut_as_in_training_and_counted(bayesian):
    short = peft_calib.load(bayesian, device="cpu", max_length=6)
    long = ["one two three four five six seven eight", "one two", "one two three four"]
    with pytest.warns(UserWarning, match="1 of 3 texts are longer than 6 tokens"):
        out = short.predict(long)
    assert out.num_cut == 1
    cut = short.predict(["one two three four"]).probabilities[0]
    torch.testing.assert_close(out.probabilities[0], cut, atol=1e-4, rtol=0)


def test_pairs(bayesian, tmp_path):
    folder = shutil.copytree(bayesian, tmp_path / "pairs")
    found = read_artefact(folder)
    changed = Artefact(found.classes, None, Inputs(text_columns=("question", "answer")), None, None, found.adapters)
    changed.write(folder)
    with pytest.warns(UserWarning, match="has no temperature"):
        predictor = peft_calib.load(folder, device="cpu")
    pairs = [("how was it", "awful"), ("and then", "a long river")]
    out = predictor.predict(pairs, how="mean")
    table = {"answer": [b for _, b in pairs], "question": [a for a, _ in pairs]}
    assert torch.equal(predictor.predict(table, how="mean").probabilities, out.probabilities)
    with pytest.raises(ValueError, match=r"trained on pairs of texts \(question, answer\)"):
        predictor.predict(TEXTS)
    with pytest.raises(ValueError, match="has no column 'answer'"):
        predictor.predict({"question": TEXTS})


# --------------------------------------------------------------------- adapters of others, and of before


def test_a_stock_lora_has_no_temperature_which_is_said(stock):
    folder = stock()
    with pytest.warns(UserWarning, match="has no temperature"):
        predictor = peft_calib.load(folder, device="cpu")
    out = predictor.predict(TEXTS)
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    batch = predictor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(out.probabilities.float(), model(**batch).logits.softmax(-1), atol=1e-4, rtol=0)
    assert (out.temperature, out.how, out.recalibration) == (None, "mean", "no temperature is stored")
    assert out.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    named = peft_calib.load(folder, device="cpu", label_names=NAMES, recalibrate=False).predict(TEXTS)
    assert named.labels_predicted == [NAMES[i] for i in out.predictions]
    with pytest.raises(ValueError, match="num_samples means nothing"):
        predictor.predict(TEXTS, num_samples=4)
    with pytest.raises(ValueError, match="a head of 3 classes, and 2 are named"):
        peft_calib.load(folder, label_names=["a", "b"])


def test_a_language_model_answers_with_tokens(stock, tiny_decoder_folder):
    folder = stock("CAUSAL_LM", AutoModelForCausalLM, tiny_decoder_folder)
    with pytest.raises(ValueError, match="which tokens of the language model stand for the classes"):
        peft_calib.load(folder)
    with pytest.raises(ValueError, match="not one"):
        peft_calib.load(folder, label_tokens=["unbelievable yes", "no"])
    with pytest.warns(UserWarning, match="has no temperature"):
        predictor = peft_calib.load(folder, device="cpu", label_tokens=["yes", "no"])
    out = predictor.predict(TEXTS)
    rows = Dataset.from_dict(dict(predictor.tokenizer(TEXTS)))
    options = {"label_tokens": ["yes", "no"], "processing_class": predictor.tokenizer, "progress": False}
    said = predict_dataset(predictor.model, rows, "mean", **options)
    torch.testing.assert_close(out.probabilities.float(), said.probabilities, atol=1e-4, rtol=0)
    assert out.label_names == ("yes", "no")


def test_a_multiple_choice_adapter_asks_as_its_task_does(stock, tiny_decoder_folder):
    from peft_calib.runs.settings import RunConfig
    from peft_calib.runs.tasks import TASK_CLASSES

    folder = stock("CAUSAL_LM", AutoModelForCausalLM, tiny_decoder_folder)
    rows = Dataset.from_list(
        [{"q": text, "c": ["awful", "lovely", "old"][: 2 + i % 2], "a": i % 2} for i, text in enumerate(TEXTS)]
    )
    settings = {"question_column": "q", "choices_column": ["c"], "label_column": "a", "batch_size": 2}
    config = RunConfig("rows", str(tiny_decoder_folder), "multiple-choice", **settings)
    task = TASK_CLASSES["multiple-choice"].learn(config, rows)
    predictor = None
    task.described(AutoTokenizer.from_pretrained(tiny_decoder_folder), None).write(folder)
    with pytest.warns(UserWarning, match="has no temperature"):
        predictor = peft_calib.load(folder, device="cpu")
    encoded = task.encode_prediction(task.canonical(rows, "rows", "test"), predictor.tokenizer)
    order = np.argsort([len(ids) for ids in encoded["input_ids"]], kind="stable")
    answers = task.answer_tokens(predictor.tokenizer)
    options = {"label_tokens": answers, "processing_class": predictor.tokenizer, "batch_size": 4, "progress": False}
    said = predict_dataset(predictor.model, encoded.select(order), "mean", **options)
    out = predictor.predict(rows)
    assert out.label_names == ("A", "B", "C")
    assert torch.equal(out.select(torch.from_numpy(order)).probabilities, said.probabilities.double())
    assert out.labels.tolist() == [0, 1, 0, 1]
    prompts = [task.prompt(row["q"], row["c"]) for row in rows]
    assert torch.equal(predictor.predict(prompts).probabilities, out.probabilities)


@pytest.mark.parametrize("method", ["bayesian-lora", "hyper-lora", "lora"])
def test_adapters_of_an_earlier_version(method, tmp_path, monkeypatch):
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # their base model is named by a relative path
    predictor = peft_calib.load(f"{method}/adapter", device="cpu")
    assert set(predictor.artefact.ways) == {"mean"}
    out = predictor.predict(TEXTS)
    assert out.label_names == ("bad", "good")
    fitted = json.loads(Path(method, "adapter", "recalibration.json").read_text())["parameters"]["temperature"]
    assert (out.how, out.temperature) == ("mean", fitted)
    if method == "bayesian-lora":  # whoever says how many draws wants draws
        assert predictor.predict(TEXTS, num_samples=2).recalibration == "no temperature is stored for how='sample'"
    with pytest.warns(UserWarning, match="has no temperature"):
        assert peft_calib.load("bayesian-lora/lora").predict(TEXTS).temperature is None


def test_an_adapter_of_the_hub(bayesian, predictor, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(bayesian.parent)

    monkeypatch.setattr(fetching, "snapshot_download", fetch)
    found = peft_calib.load("someone/adapters", subfolder="bayesian", revision="v1", device="cpu")
    assert (asked["name"], asked["revision"]) == ("someone/adapters", "v1")
    assert not any("pt" in pattern or "bin" in pattern for pattern in asked["allow_patterns"])
    assert torch.equal(found.predict(TEXTS).probabilities, predictor.predict(TEXTS).probabilities)


# --------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("texts", "kind", "message"),
    [
        ([], ValueError, "no text was given"),
        ({"text": []}, ValueError, "no text was given"),
        ("a text", TypeError, r"one text: 'a text'. Write predict\(\[text\]\)"),
        (["a", 3], TypeError, r"Row 1 is '3' \(int\); a text is expected"),
        (["a", None], TypeError, "Row 1 is 'None'"),
        ([("a", "b"), "c"], TypeError, "Row 1 is 'c' .*; a pair of texts"),
        ([("a", "b", "c")], TypeError, "Row 0 is"),
        (7, TypeError, "got int"),
        (iter(["a"]), TypeError, "is a stream"),
        (IterableDataset.from_generator(lambda: iter([])), TypeError, "is a stream"),
        ({"words": ["a"]}, ValueError, "has no column 'text'; it has words"),
        ({"text": ["a", " "]}, ValueError, "row 1 has no text"),
    ],
)
def test_what_is_no_text_is_refused(predictor, texts, kind, message):
    with pytest.raises(kind, match=message):
        predictor.predict(texts)


def test_an_adapter_that_changed_since_is_refused(bayesian, stock, tmp_path):
    # one of this package knows itself what it was
    folder = shutil.copytree(bayesian, tmp_path / "edited")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    with pytest.raises(ValueError, match=r"lora_alpha|other weights"):
        peft_calib.load(folder)
    # a plain LoRA does not
    folder = stock()
    described = Artefact(NAMES, adapters={".": folder_digest(folder)}).with_way("mean", 1, 0, temperature(2.0))
    described.write(folder)
    assert peft_calib.load(folder, device="cpu").predict(TEXTS).temperature == 2.0
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"predictor\.json was fitted for other weights.*Fit it again"):
        peft_calib.load(folder)
    assert peft_calib.load(folder, device="cpu", recalibrate=False).predict(TEXTS).temperature is None


def test_another_base_model_is_refused(bayesian, tiny_model_folder, tiny_classifier, tmp_path):
    for name, seed, sizes in (("other", 1, {}), ("larger", 0, {"hidden_size": 48})):
        AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / name)
        vocabulary = len(AutoTokenizer.from_pretrained(tiny_model_folder))
        base = tiny_classifier(seed=seed, vocab_size=vocabulary, max_position_embeddings=128, **sizes)
        base.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"is not the one that the adapter .* was trained on"):
        peft_calib.load(bayesian, base_model=tmp_path / "other")
    assert peft_calib.load(bayesian, base_model=tmp_path / "other", recalibrate=False).artefact.ways == {}
    with pytest.raises(ValueError, match=r"slot|does not fit|size"):
        peft_calib.load(bayesian, base_model=tmp_path / "larger")
    with pytest.raises(FileNotFoundError, match=r"base model 'no/such', .* base_model="):
        peft_calib.load(bayesian, base_model="no/such")


def test_what_is_no_adapter_for_texts_is_refused(stock, tmp_path, tiny_model_folder):
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_config\.json in it"):
        peft_calib.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder here"):
        peft_calib.load("someone/nothing")
    with pytest.raises(ValueError, match="have no 'O' outside of entities"):
        peft_calib.load(stock("TOKEN_CLS", AutoModelForTokenClassification))
    shutil.rmtree(tmp_path / "lora")
    with pytest.raises(ValueError, match="does not say its task"):
        peft_calib.load(stock(None))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", 2),
        ("classes", ["a"]),
        ("label_tokens", [1, 1, 2]),
        ("inputs", {"choices_columns": [], "text_columns": ["a", "b", "c"]}),
        ("inputs", {"choices_columns": [], "max_length": 0}),
        ("adapters", {"../elsewhere": "sha256:0"}),
        ("ways", {"other": {"num_samples": 1}}),
        ("seed", -1),
    ],
)
def test_a_damaged_artefact_is_named(bayesian, tmp_path, field, value):
    folder = shutil.copytree(bayesian, tmp_path / "damaged")
    file = folder / ARTEFACT_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=r"predictor\.json"):
        peft_calib.load(folder)


def test_what_is_fresh_in_the_base_model_follows_the_seed(tiny_model_folder, tmp_path):
    """A part that the checkpoint lacks and nobody trains, as the pooler of a model for masked words."""
    body = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder)
    tensors = {name: value for name, value in body.state_dict().items() if "pooler" not in name}
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(base)
    fresh = seeded_base(lambda: AutoModelForSequenceClassification.from_pretrained(base), tokenizer, 11)
    model = get_peft_model(fresh, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    artefact = attach_recalibration(model, temperature(2.0), num_samples=None, seed=0)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="made fresh at loading"):
        peft_calib.load(tmp_path / "adapter")
    replace(artefact, seed=11).write(tmp_path / "adapter")  # as a run does
    found = peft_calib.load(tmp_path / "adapter", device="cpu").model
    pooler = "bert.pooler.dense.weight"
    assert torch.equal(found.get_base_model().get_parameter(pooler), model.get_base_model().get_parameter(pooler))
