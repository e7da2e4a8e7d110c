"""`Scorer`: what a predictor says, in whatever process and in whatever batches it is asked."""

import pickle
import tempfile

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import peft_calib
from peft_calib import Scorer

WORDS = "the weather was seen again today over a long river and some old trees near our house".split()
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]) for i in range(12)]
ROWS = Dataset.from_dict({"id": list(range(12)), "text": TEXTS})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model_folder):
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(adapter):
    return peft_calib.load(adapter, device="cpu", recalibrate=False).predict(TEXTS)


@pytest.fixture
def scorer(adapter):
    return Scorer(adapter, device="cpu", recalibrate=False, all_probabilities=True)


def assert_as(found, expected):
    names = expected.label_names
    assert list(found["predicted_label"]) == expected.labels_predicted
    for position, name in enumerate(names):
        column = np.asarray(found[f"probability_{name}"], np.float64)
        np.testing.assert_allclose(column, expected.probabilities[:, position].numpy(), atol=1e-6)
    np.testing.assert_allclose(np.asarray(found["entropy"]), expected.entropy.numpy(), atol=1e-5)


def test_a_data_set_is_mapped_and_keeps_its_columns(scorer, expected):
    found = ROWS.map(scorer, batched=True, batch_size=5, with_rank=True)
    assert found["id"][:] == list(range(12))
    assert_as(found, expected)


@pytest.mark.slow
def test_two_processes_say_what_one_says(scorer, expected):
    assert_as(ROWS.map(scorer, batched=True, with_rank=True, num_proc=2), expected)


def test_arrays_are_answered_as_lists_are(scorer, expected):
    batch = {"id": np.arange(12), "text": np.array(TEXTS, dtype=object)}
    assert_as(scorer(batch), expected)


def test_it_travels_without_weights(scorer, expected):
    scorer({"text": TEXTS[:2]})
    sent = pickle.dumps(scorer)
    assert len(sent) < 1_000
    assert_as(pickle.loads(sent)({"text": TEXTS}), expected)


def test_an_empty_batch_has_the_columns(scorer):
    found = scorer({"text": []})
    assert found["predicted_label"] == []
    assert set(found) == set(scorer({"text": TEXTS[:1]}))


def test_a_column_that_is_taken_is_refused(scorer):
    with pytest.raises(ValueError, match="prefix="):
        scorer({"text": TEXTS[:1], "entropy": [0.1]})


@pytest.mark.slow
def test_ray_data_deals_batches_to_two_workers(scorer, expected):
    """`map_batches` takes it as it is; rows come back with their columns, in some order of batches."""
    ray = pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")
    data = pytest.importorskip("ray.data")
    with tempfile.TemporaryDirectory(prefix="ray") as place:  # a short path: that of a socket has 107 bytes at most
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False, _temp_dir=place)
        try:
            data.DataContext.get_current().enable_progress_bars = False
            rows = data.from_items([{"id": number, "text": text} for number, text in enumerate(TEXTS)])
            answered = rows.map_batches(scorer, batch_size=5, concurrency=2).take_all()
        finally:
            ray.shutdown()
    answered.sort(key=lambda row: row["id"])
    assert [row["text"] for row in answered] == TEXTS
    assert_as({name: [row[name] for row in answered] for name in answered[0]}, expected)
