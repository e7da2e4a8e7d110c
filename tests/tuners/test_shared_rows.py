"""Maps right above the trunk answer rows that are repeated for the draws once, with the same numbers."""

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from peft_calib import EnsembleLoraConfig, predict
from peft_calib.tuners import layer
from peft_calib.tuners.shared_rows import mark_repeated, rows_once

LAYERS, MEMBERS, ROWS = 4, 3, 6


def members(family="bert"):
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS" if family == "bert" else "CAUSAL_LM"}
    config = EnsembleLoraConfig(num_members=MEMBERS, layers="last_half", seed=0, **fields)
    return get_peft_model(FAMILIES[family].build(num_hidden_layers=LAYERS), config)


def rows_of_maps(model, call):
    """Rows that the frozen map in each adapted layer was given."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, layer.FactorLinear):

            def look(_, args, name=name):
                seen[name.partition("layer.")[2] or name.partition("layers.")[2]] = len(args[0])

            handles.append(module.base_layer.register_forward_pre_hook(look))
    call()
    for handle in handles:
        handle.remove()
    return seen


def gradients(model, batch):
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_query_key_and_value_of_the_first_block_are_asked_once():
    model, batch = members(), FAMILIES["bert"].batch(ROWS)
    predict(model, batch)
    training = {**batch, "labels": torch.arange(ROWS) % 3}
    for call in (lambda: predict(model, batch), lambda: model.train()(**training)):
        seen = rows_of_maps(model, call)
        once = {name for name, rows in seen.items() if rows == ROWS}
        assert once == {f"2.attention.self.{name}" for name in ("query", "key", "value")}
        assert set(seen.values()) == {ROWS, MEMBERS * ROWS}


def test_behind_a_norm_nothing_changes():
    model, batch = members("llama"), FAMILIES["llama"].batch(ROWS)
    predict(model, batch)
    assert set(rows_of_maps(model, lambda: predict(model, batch)).values()) == {MEMBERS * ROWS}


def test_probabilities_and_gradients_stay(monkeypatch):
    model = members()
    batch = {**FAMILIES["bert"].batch(ROWS), "labels": torch.arange(ROWS) % 3}
    gradients(model, batch)  # in the first forward of a model one function runs alone, to count rows
    with FlopCounterMode(display=False) as counted:
        found = gradients(model, batch)
    p = predict(model.eval(), batch).sample_probabilities
    monkeypatch.setattr(layer, "rows_once", lambda _: None)
    with FlopCounterMode(display=False) as counted_before:
        expected = gradients(model, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(p, predict(model.eval(), batch).sample_probabilities, rtol=0, atol=1e-6)
    assert counted.get_total_flops() < counted_before.get_total_flops()


def test_a_layer_of_another_method_is_asked_for_every_row():
    model, batch = members(), FAMILIES["bert"].batch(ROWS)
    query = model.base_model.model.bert.encoder.layer[2].attention.self.query
    query.base_layer = get_peft_model(
        torch.nn.Sequential(query.base_layer), LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5)
    )
    predict(model, batch)
    assert rows_of_maps(model, lambda: predict(model, batch))["2.attention.self.query"] == MEMBERS * ROWS


@pytest.mark.parametrize(
    "change", [lambda x: x.add_(1), lambda x: x.requires_grad_(), lambda x: x * 1.0, lambda x: x[:]]
)
def test_what_was_changed_is_not_taken_for_repeated(change):
    once = torch.rand(2, 3)
    repeated = mark_repeated(once.repeat(2, 1), once)
    assert rows_once(repeated) is once
    assert rows_once(change(repeated)) is None


def test_nothing_is_noted_where_nobody_counts_writes_or_nothing_is_repeated():
    once = torch.rand(2, 3)
    assert rows_once(mark_repeated(once.clone(), once)) is None
    with torch.inference_mode():
        assert rows_once(mark_repeated(once.repeat(2, 1), once)) is None


def test_rows_that_were_written_later_are_not_those_that_are_repeated():
    once = torch.rand(2, 3)
    repeated = mark_repeated(once.repeat(2, 1), once)
    once.zero_()
    assert rows_once(repeated) is None
