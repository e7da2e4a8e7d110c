"""An uncertainty head beside an adapter: `peft_calib.load` answers with it, from the forward that predicts."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peft_calib
from peft_calib import BayesianLoraConfig, CalibratedPrediction, UncertaintyHead, predict_to
from peft_calib.calibration import TemperatureScaling
from peft_calib.calibration.recalibrate import VectorScaling
from peft_calib.provenance.companions import attach_recalibration
from peft_calib.runs.predicting import predict_table

WORDS = "the weather was seen again today over a long river and some old trees near our house".split()
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]) for i in range(120)]
SMALL = {"lr": (1e-2,), "epochs": 3, "alpha": (0.1,), "beta": (0.01,), "folds": 2, "keep_base": False}


def _rows(tokenizer) -> Dataset:
    """Texts with labels that have nothing to do with them, so that errors are many."""
    labels = np.random.default_rng(0).integers(0, 3, len(TEXTS)).tolist()
    return Dataset.from_dict({**tokenizer(TEXTS), "labels": labels})


def _saved(folder: Path, base: Path, config, num_samples: int = 1, method=None) -> Path:
    """An adapter with a temperature, and with a head that travels with it."""
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config).eval()
    for name, parameter in model.named_parameters():
        if ("cores" in name and "mean" in name) or "modules_to_save.default.weight" in name:
            torch.nn.init.normal_(parameter, std=2.0, generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(base)
    head = UncertaintyHead.fit(model, None, _rows(tokenizer), tokenizer=tokenizer, num_samples=num_samples, **SMALL)
    head.attach(model)
    rng = np.random.default_rng(0)
    method = (method or TemperatureScaling)().fit(rng.normal(size=(40, 3)), rng.integers(0, 3, 40))
    count = None if num_samples == 1 else num_samples
    attach_recalibration(model, method.state(), num_samples=count, seed=0)
    model.save_pretrained(folder)
    return folder


def _lora() -> LoraConfig:
    return LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model_folder) -> Path:
    return _saved(tmp_path_factory.mktemp("adapters") / "lora", tiny_model_folder, _lora())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, tiny_model_folder) -> Path:
    config = BayesianLoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_sd=0.3, max_sd=1.0)
    return _saved(tmp_path_factory.mktemp("adapters") / "bayesian", tiny_model_folder, config, num_samples=3)


@pytest.fixture(scope="module")
def predictor(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft_calib.load(saved, device="cpu")


def _without(folder: Path, to: Path) -> peft_calib.Predictor:
    """The same adapter without its head."""
    shutil.copytree(folder, to)
    for path in to.glob("uncertainty_head.*"):
        path.unlink()
    return peft_calib.load(to, device="cpu")


@pytest.mark.parametrize("kind", ["saved", "drawn"])
def test_a_prediction_says_how_likely_it_is_wrong(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    predictor = peft_calib.load(folder, device="cpu")
    out = predictor.predict(TEXTS)
    head = UncertaintyHead.from_pretrained(folder, predictor.model)
    rows = Dataset.from_dict(dict(predictor.tokenizer(TEXTS)))
    said = head.predict(predictor.model, rows, tokenizer=predictor.tokenizer)
    torch.testing.assert_close(out.error_probability, said.error_probability, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.predictions, said.predicted)
    assert "P(error) by an uncertainty head" in repr(out)
    # all else is as without a head, bit for bit
    plain = _without(folder, tmp_path / "plain").predict(TEXTS)
    assert plain.error_probability is None and "uncertainty head" not in repr(plain)
    for name in ("probabilities", "entropy", "mutual_information", "sample_probabilities"):
        assert torch.equal(getattr(out, name), getattr(plain, name)), name
    assert (out.how, out.seed, out.num_forwards, out.temperature) == (
        plain.how, plain.seed, plain.num_forwards, plain.temperature
    )  # fmt: skip


def test_draws_of_another_seed_have_their_own_answer(drawn):
    predictor = peft_calib.load(drawn, device="cpu")
    first, second = (predictor.predict(TEXTS, seed=seed).error_probability for seed in (0, 1))
    assert not torch.equal(first, second)
    other = predictor.predict(TEXTS, num_samples=5)
    assert other.error_probability is None and other.error_head == "the uncertainty head was fitted for 3 draws"
    assert predictor.predict(TEXTS, how="mean").error_probability is None
    assert not predictor.gives_errors("mean", None) and predictor.gives_errors(None, None)


def test_labels_of_the_rows_are_kept_and_need_not_be_known(predictor):
    rows = Dataset.from_dict({"text": TEXTS[:4], "label": [0, 2, -100, 1]})
    out = predictor.predict(rows)
    assert out.labels.tolist() == [0, 2, -100, 1]
    assert torch.equal(out.error_probability, predictor.predict(TEXTS[:4]).error_probability)


def test_it_is_written_read_cut_and_joined(predictor, tmp_path):
    out = predictor.predict(TEXTS[:6])
    out.save(tmp_path)
    parts = [out.select(torch.arange(0, 2)), out.select(torch.arange(2, 6))]
    for other in (CalibratedPrediction.load(tmp_path), CalibratedPrediction.concatenate(parts)):
        assert torch.equal(other.error_probability, out.error_probability) and other.error_head == out.error_head
    assert out.to_dataset()["error_probability"][:] == out.error_probability.tolist()


def test_tables_and_shards_have_a_column(predictor, saved, tmp_path):
    rows = Dataset.from_dict({"text": TEXTS[:11]})
    out = predictor.predict(TEXTS[:11]).error_probability
    predict_to(tmp_path / "shards", predictor, rows, shard_rows=4, progress=False)
    files = f"{tmp_path}/shards/*.parquet"
    found = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_allclose(found["error_probability"][:], out.numpy(), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "shards" / "predictions.json").read_text())["error_head"]
    table = predict_table(saved, rows, tmp_path / "t.jsonl", prefix="m_", all_probabilities=True, progress=False)
    written = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["m_error_probability"] for line in written], out.numpy(), rtol=1e-4, atol=1e-5)
    assert list(written[0])[-4:] == ["m_error_probability", *(f"m_probability_LABEL_{i}" for i in range(3))]
    assert any("errors expected" in line for line in table.lines())
    scored = peft_calib.Scorer(saved, device="cpu")({"text": TEXTS[:11]})
    np.testing.assert_allclose(scored["error_probability"], out.numpy(), rtol=1e-4, atol=1e-5)


def test_folders_of_another_head_are_not_continued(predictor, saved, tmp_path):
    rows = Dataset.from_dict({"text": TEXTS[:8]})
    predict_to(tmp_path / "out", predictor, rows, shard_rows=4, progress=False)
    plain = _without(saved, tmp_path / "plain")
    with pytest.raises(ValueError, match="begun in another way"):
        predict_to(tmp_path / "out", plain, rows, shard_rows=4, progress=False)


def test_a_head_of_another_adapter_is_refused(saved, tiny_model_folder, tmp_path):
    other = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny_model_folder), _lora())
    other.save_pretrained(tmp_path)
    for path in saved.glob("uncertainty_head.*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match=r"fitted for another adapter than lies there now.*recalibrate=False"):
        peft_calib.load(tmp_path, device="cpu")
    assert peft_calib.load(tmp_path, device="cpu", recalibrate=False).predict(TEXTS[:2]).error_probability is None


def test_a_model_that_was_loaded_is_saved_with_its_head(predictor, saved, tmp_path):
    predictor.model.save_pretrained(tmp_path)
    for path in saved.glob("uncertainty_head.*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_where_a_method_may_change_predictions_the_head_is_silent(tiny_model_folder, tmp_path):
    folder = _saved(tmp_path / "vector", tiny_model_folder, _lora(), method=VectorScaling)
    out = peft_calib.load(folder, device="cpu").predict(TEXTS[:4])
    assert out.error_probability is None and "VectorScaling may predict other classes" in out.error_head


@pytest.mark.parametrize("kind", ["saved", "drawn"])
def test_a_base_in_half_precision_rounds_the_adapter_that_the_head_belongs_to(kind, request, tmp_path):
    """PEFT keeps `modules_to_save` in the base's data type, so that the live adapter has another digest."""
    folder = request.getfixturevalue(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rounded = peft_calib.load(folder, device="cpu", dtype=torch.bfloat16)
    said, exact = (one.predict(TEXTS).error_probability for one in (rounded, peft_calib.load(folder, device="cpu")))
    assert (said - exact).abs().median() < 0.05  # of a bfloat16 model, whose logits differ
    rounded.model.save_pretrained(tmp_path / "again")  # another adapter now, without the head of the first
    assert not (tmp_path / "again" / "uncertainty_head.json").exists()
    head = UncertaintyHead.from_pretrained(folder)
    with pytest.warns(UserWarning, match=r"bfloat16.*and were float32 .*its values are the same cannot be told"):
        head.bind(rounded.model)
    rounded.model.peft_config["default"].lora_alpha = 77
    with pytest.raises(ValueError, match="another adapter, or one that has been trained on"):
        head.bind(rounded.model)


def test_in_half_precision_the_folder_is_held_against_the_head(saved, tmp_path, tiny_model_folder):
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny_model_folder), _lora())
    model.save_pretrained(tmp_path)
    for name in ("uncertainty_head.json", "uncertainty_head.safetensors"):
        shutil.copy(saved / name, tmp_path)
    with pytest.raises(ValueError, match="fitted for another adapter than lies there now"):
        peft_calib.load(tmp_path, device="cpu", dtype=torch.bfloat16)
