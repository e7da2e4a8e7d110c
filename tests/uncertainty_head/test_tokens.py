"""Token classification: the tokens that have a label are the items."""

import pytest
import torch
from classifiers import vary
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    LlamaConfig,
    LlamaForTokenClassification,
)

from peft_calib import EnsembleLoraConfig
from peft_calib.uncertainty_head import copy_head, extract_features

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TAGGERS = {
    "bert": lambda: BertForTokenClassification(BertConfig(vocab_size=50, num_labels=5, **SIZES)),
    "distilbert": lambda: DistilBertForTokenClassification(
        DistilBertConfig(vocab_size=50, num_labels=5, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    ),
    "llama": lambda: LlamaForTokenClassification(
        LlamaConfig(vocab_size=50, num_labels=5, num_key_value_heads=2, pad_token_id=0, **SIZES)
    ),
}
TARGETS = {"bert": ["query"], "distilbert": ["q_lin"], "llama": ["q_proj"]}


def tagger(family="bert", config=LoraConfig, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = {"task_type": "TOKEN_CLS", "r": 2, "target_modules": TARGETS[family]} | fields
        return vary(get_peft_model(TAGGERS[family](), config(**fields))).eval()


def sentences():
    """Two sentences with a special token at either end and a word of two pieces each; the second is shorter."""
    first = {"input_ids": [2, 7, 8, 9, 10, 3], "labels": [-100, 0, 1, -100, 2, -100]}
    second = {"input_ids": [2, 11, 12, 3, 0, 0], "labels": [-100, 4, -100, -100, -100, -100]}
    return [first | {"attention_mask": [1] * 6}, second | {"attention_mask": [1, 1, 1, 1, 0, 0]}]


@pytest.mark.parametrize("family", TAGGERS)
def test_labelled_tokens_are_items_with_row_and_token(family):
    model = tagger(family)
    found = extract_features(model, sentences(), batch_size=1)
    assert found.items.tolist() == [[0, 1], [0, 2], [0, 4], [1, 1]]
    assert found.labels.tolist() == [0, 1, 2, 4]
    batch = {name: torch.tensor([row[name] for row in sentences()]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**batch).logits
    assert torch.allclose(found.logits[0], logits[[0, 0, 0, 1], [1, 2, 4, 1]], atol=1e-5)
    assert torch.allclose(copy_head(model)(found.features), found.logits, atol=1e-5)


def test_the_items_do_not_depend_on_how_rows_are_dealt_into_batches():
    model = tagger()
    one, two = (extract_features(model, sentences(), batch_size=size) for size in (1, 2))
    assert torch.equal(one.items, two.items) and (one.hashes == two.hashes).all()
    assert torch.allclose(one.features, two.features, atol=1e-6)


def test_unlabelled_sentences_give_all_tokens_but_padding():
    data = [{name: value for name, value in row.items() if name != "labels"} for row in sentences()]
    found = extract_features(tagger(), data)
    assert found.items.tolist() == [[0, t] for t in range(6)] + [[1, t] for t in range(4)]


def test_members_read_the_same_tokens():
    model = tagger(config=EnsembleLoraConfig, num_members=2)
    found, copied = extract_features(model, sentences(), num_samples=2), copy_head(model, num_samples=2)
    assert found.features.shape[:2] == (2, 4) and len(copied.starts) == 2
    assert torch.allclose(copied(found.features), found.logits, atol=1e-5)


def test_sentences_without_any_label_are_refused():
    data = [row | {"labels": [-100] * 6} for row in sentences()]
    with pytest.raises(ValueError, match="hold no item"):
        extract_features(tagger(), data)


def test_a_tag_that_the_model_does_not_know_is_refused():
    data = sentences()
    data[1]["labels"][1] = 7
    with pytest.raises(ValueError, match=r"1 of 4 labels are no class of the model, which has 5.*7 at item 3"):
        extract_features(tagger(), data)
