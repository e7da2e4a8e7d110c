import pytest
from transformers import AutoModelForSequenceClassification

from peft_calib.runs import embedded as module
from peft_calib.runs.embedded import DOCUMENTATION, OUTSIDE, called, embedded_model, embedded_rows
from peft_calib.runs.sources import read_splits


def test_the_embedded_encoder_is_pretrained(minilm):
    assert AutoModelForSequenceClassification.from_pretrained(minilm).config.num_hidden_layers == 6
    assert called(minilm) == "all-MiniLM-L6-v2"
    assert called("roberta-base") == "roberta-base"


def test_without_the_demo_extra(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"peft-calib\[demo\]"):
        embedded_model()


def test_the_embedded_rows_are_a_source_like_others():
    rows = read_splits(DOCUMENTATION)["train"]
    assert len(rows) == 3500
    assert len(rows.features["label"].names) == 7
    outside = read_splits(OUTSIDE)["train"]
    assert (len(outside), outside.column_names) == (600, ["text"])
    assert not set(outside["text"][:]) & set(rows["text"][:])
    with pytest.raises(ValueError, match="embedded:documentation"):
        embedded_rows("embedded:nothing")
