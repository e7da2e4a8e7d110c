import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_calib import BayesianLoraConfig, HyperLoraConfig, predict
from peft_calib.demo import training as module
from peft_calib.demo.data import TextData
from peft_calib.demo.training import TrainingSettings, embedded_model, predict_draws, predict_logits, train_adapter


@pytest.fixture(scope="module")
def data() -> TextData:
    """Two classes that one word tells apart."""
    rng = random.Random(0)
    words = ["the", "weather", "was", "seen", "again", "today", "over", "a", "long", "river"]

    def split(count: int) -> Dataset:
        labels = [i % 2 for i in range(count)]
        texts = [" ".join([*rng.choices(words, k=rng.randint(3, 9)), ("awful", "lovely")[label]]) for label in labels]
        return Dataset.from_dict({"text": texts, "label": labels})

    return TextData("weather", split(96), split(32), split(32), ("bad", "good"))


@pytest.fixture(scope="module")
def settings(tiny_model_folder) -> TrainingSettings:
    return TrainingSettings(model=str(tiny_model_folder), epochs=2, batch_size=16, learning_rate=5e-3)


@pytest.mark.parametrize("config_class", [LoraConfig, HyperLoraConfig, BayesianLoraConfig])
def test_only_adapter_and_head_are_trained(data, settings, tmp_path, config_class):
    config = config_class(task_type="SEQ_CLS", r=2, target_modules="all-linear")
    fitted = train_adapter(config, data, settings, tmp_path)
    assert not fitted.model.training
    trainable = {name for name, value in fitted.model.named_parameters() if value.requires_grad}
    assert all("lora" in name or "modules_to_save" in name for name in trainable)
    assert fitted.trainable_parameters == sum(
        value.numel() for name, value in fitted.model.named_parameters() if name in trainable
    )
    original = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=2, ignore_mismatched_sizes=True
    )
    frozen = fitted.model.get_base_model().bert.embeddings.word_embeddings.weight
    assert torch.equal(frozen, original.bert.embeddings.word_embeddings.weight)
    assert fitted.model.config.id2label == {0: "bad", 1: "good"}


def test_training_learns_and_the_global_random_state_is_left_alone(data, minilm, tmp_path):
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    settings = TrainingSettings(epochs=2, batch_size=16, learning_rate=2e-3)
    fitted = train_adapter(
        LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]), data, settings, tmp_path
    )
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    logits = predict_logits(fitted.model, fitted.tokenizer, data.test, settings)
    assert np.mean(logits.argmax(axis=1) == data.test["label"][:]) > 0.9


def test_equal_seeds_give_equal_models(data, settings, tmp_path):
    config = HyperLoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    logits = []
    for name in ("first", "second"):
        fitted = train_adapter(config, data, settings, tmp_path / name)
        logits.append(predict_logits(fitted.model, fitted.tokenizer, data.test, settings))
    assert np.array_equal(*logits)


def test_logits_come_in_the_order_of_the_rows(data, tiny_model_folder):
    """Batches are sorted by length inside; row by row without padding must give the same."""
    settings = TrainingSettings(model=str(tiny_model_folder), batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder).train()
    done = []
    logits = predict_logits(model, tokenizer, data.test, settings, done.append)
    assert sum(done) == len(data.test)
    assert model.training  # the mode is put back
    model.eval()
    with torch.no_grad():
        singly = [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in data.test["text"][:]]
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.stack(singly), atol=1e-5)


def test_draws_come_in_the_order_of_the_rows(data, tiny_model_folder):
    settings = TrainingSettings(model=str(tiny_model_folder), batch_size=4, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder)
    model = get_peft_model(base, BayesianLoraConfig(r=2, target_modules=["query"], init="random", init_sd=0.9)).eval()
    done = []
    prediction = predict_draws(model, tokenizer, data.test, settings, 3, done.append)
    assert sum(done) == len(data.test) == len(prediction)
    for row, text in enumerate(data.test["text"][:5]):
        singly = predict(model, tokenizer(text, return_tensors="pt"), num_samples=3, seed=3)
        torch.testing.assert_close(
            prediction.sample_probabilities[:, row], singly.sample_probabilities[:, 0], rtol=0, atol=1e-5
        )
    assert prediction.num_forwards == 3


def test_sentence_pairs_are_encoded_as_pairs(tiny_model_folder):
    settings = TrainingSettings(model=str(tiny_model_folder))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder).eval()
    rows = Dataset.from_dict({"text": ["a river"], "text_pair": ["is long"], "label": [0]})
    with torch.no_grad():
        expected = model(**tokenizer("a river", "is long", return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(predict_logits(model, tokenizer, rows, settings), expected, atol=1e-6)


def test_the_embedded_encoder_is_pretrained(minilm):
    assert AutoModelForSequenceClassification.from_pretrained(minilm).config.num_hidden_layers == 6


def test_without_the_demo_extra(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"peft-calib\[demo\]"):
        embedded_model()


def test_texts_are_cut_to_the_positions_of_the_model(data, tmp_path, tiny_model_folder, tiny_classifier):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.save_pretrained(tmp_path / "short")
    tiny_classifier(vocab_size=len(tokenizer), max_position_embeddings=6).save_pretrained(tmp_path / "short")
    settings = TrainingSettings(model=str(tmp_path / "short"), epochs=1, batch_size=32)
    fitted = train_adapter(LoraConfig(task_type="SEQ_CLS", r=2), data, settings, tmp_path / "out")
    assert predict_logits(fitted.model, fitted.tokenizer, data.test, settings).shape == (32, 2)
