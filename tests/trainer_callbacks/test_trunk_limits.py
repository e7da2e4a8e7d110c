"""Where kept states of a trunk would be wrong without a word: each is refused, or its step computes its own states."""

import random

import numpy as np
import pytest
import torch
import transformers as tf
from peft import get_peft_model
from test_trunk import CONFIG, Noise, Pad, run, token_rows
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_calib import EnsembleLoraConfig
from peft_calib.trainer_callbacks import TrunkCacheCallback
from peft_calib.tuners.trunk_cache import CannotCacheError, TrunkCache, rows_of


def cached(base, batch, **fields):
    """A model and the cache of a batch's rows, checked as the callback does."""
    model = get_peft_model(base, EnsembleLoraConfig(**{**CONFIG, "seed": 0, **fields}))
    root = model.get_base_model()
    cache = TrunkCache(root, [row for row, _ in rows_of(batch)])
    cache.check(root, batch)
    return model, root, cache


def padded(side="right"):
    return Pad(side)([token_rows()[i] for i in range(8)])


def test_rows_sorted_by_length_are_held_against_a_padded_batch(tiny_classifier, tmp_path):
    """The first rows have no padding among themselves; a later batch has, and BERT's positions count it."""
    rows = token_rows(64).to_list()
    rows.sort(key=lambda row: len(row["input_ids"]))
    assert len({len(row["input_ids"]) for row in rows[:8]}) < len({len(row["input_ids"]) for row in rows})
    rows = [{**row, "input_ids": row["input_ids"][:3]} for row in rows[:8]] + rows[8:]
    callback = TrunkCacheCallback()
    run(tiny_classifier, tmp_path, callback, collate=Pad("left"), rows=rows, max_steps=1)
    assert "padding" in callback.reason


class MeanOfAll(tf.BertForSequenceClassification):
    """A head that reads all positions, padding as well."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.classifier(states.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def test_a_head_that_reads_padding(tiny_classifier):
    base = MeanOfAll(tiny_classifier(num_labels=2).config)
    with pytest.raises(CannotCacheError, match="read at padding"):
        cached(base, padded())
    full = {name: value[:, :3] if value.dim() > 1 else value for name, value in padded().items()}
    cached(MeanOfAll(base.config), full)


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_whose_loss_reads_padding(side):
    """A causal model answers for the first token behind left padding from a state at padding."""
    base = tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    batch = padded(side)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    if side == "left":
        with pytest.raises(CannotCacheError, match="loss reads states at padding"):
            cached(base, batch, **options)
        return
    _, root, cache = cached(base, batch, **options)
    assert cache.read(root, batch) is not None
    batch["labels"] = batch["input_ids"]  # padding is learned, too
    assert cache.read(root, batch) is None


def test_layers_of_a_decoder_are_not_kept():
    small = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = tf.BartConfig(vocab_size=64, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **small)
    batch = {"input_ids": torch.randint(3, 64, (4, 6)), "labels": torch.randint(3, 64, (4, 6))}
    with pytest.raises(CannotCacheError, match="decoder"):
        cached(tf.BartForConditionalGeneration(config), batch, task_type=None, target_modules=["q_proj"], layers=1)


def _embeddings(model):
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight.mul_(1.5)


def _unfreeze(model):
    model.get_base_model().get_input_embeddings().weight.requires_grad_(True)


def _adapt(model):
    model.add_adapter("second", EnsembleLoraConfig(seed=0, layers="all", **CONFIG))


@pytest.mark.parametrize("change", [_embeddings, _unfreeze, _adapt])
def test_changes_below_are_noticed(tiny_classifier, change):
    batch = padded()
    model, root, cache = cached(tiny_classifier(num_labels=2), batch)
    assert cache.read(root, batch) is not None
    change(model)
    assert cache.read(root, batch) is None


def test_two_caches_in_one_folder(tiny_classifier, tmp_path):
    """Two runs that keep their states in one folder do not write into each other's."""
    root = get_peft_model(tiny_classifier(num_labels=2), EnsembleLoraConfig(seed=0, **CONFIG)).get_base_model()
    rows = [row for row, _ in rows_of(padded())]
    first = TrunkCache(root, rows, max_bytes=1, folder=tmp_path)
    before = first.states.clone()
    second = TrunkCache(root, rows[::-1], max_bytes=1, folder=tmp_path)
    assert first.states.equal(before)
    assert not second.states.equal(before)


class Draws(Noise):
    """Draws from the other generators as well."""

    def __call__(self, rows):
        random.random()
        np.random.rand()  # noqa: NPY002
        return super().__call__(rows)


def test_what_a_collator_draws_is_given_back(tiny_classifier, tmp_path):
    def losses(callback):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        found = run(tiny_classifier, tmp_path, callback, collate=Draws(), max_steps=3)[0]
        return found, random.random(), np.random.rand()  # noqa: NPY002

    assert losses(TrunkCacheCallback()) == losses(None)
