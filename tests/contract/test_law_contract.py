"""What the holder, checkpointing, saving and prediction may rely on, for every law."""

import gc
import random

import numpy as np
import pytest
import torch
from families import FAMILIES, logits, perturb
from operations import Operations
from peft import LoraConfig, PeftModel
from torch import nn

from peft_calib import draws, export_lora
from peft_calib.tuners import Train
from peft_calib.tuners.laws import laws_of

LLAMA = FAMILIES["llama"]


def checkpointed(model: PeftModel, reentrant: bool = False) -> PeftModel:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()


def gradients(model: nn.Module, *batches: dict) -> dict[str, torch.Tensor]:
    """Of a loss over one forward for each batch, by one backward."""
    model.zero_grad()
    sum(model(**batch, labels=batch["input_ids"]).loss for batch in batches).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def other_batch() -> dict:
    ids = LLAMA.batch()["input_ids"].flip(1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ----------------------------------------------------------------- what it says of itself


def test_it_is_found_and_answers_for_itself(adapt, method):
    model = adapt(LLAMA)
    (law,) = laws_of(model)
    assert law is method.law(model)
    assert list(laws_of(model, active=True)) == [law]
    with model.disable_adapter():
        assert list(laws_of(model, active=True)) == []
    model.add_adapter("second", method.config(target_modules=list(LLAMA.targets)))
    assert len(list(laws_of(model))) == 2
    assert list(laws_of(model, active=True)) == [law]
    own = {id(p) for p in law.parameters()}
    assert all(id(p) in own for p in law.spread_parameters())
    for ratio in law.scales().values():
        torch.testing.assert_close(ratio, torch.ones_like(ratio))
    assert law.num_draws is None or law.num_draws >= 1
    assert isinstance(law.method, str)


def test_stochastic_says_whether_training_forwards_differ(adapt, method):
    model, batch = perturb(adapt(LLAMA)).train(), LLAMA.batch()
    first, second = (model(**batch).logits.detach() for _ in range(2))
    assert torch.equal(first, second) != method.law(model).stochastic


def test_equal_questions_get_equal_answers_outside_training(adapt, method):
    model, batch = perturb(adapt(LLAMA)), LLAMA.batch()
    assert torch.equal(logits(model, batch), logits(model, batch))
    with torch.no_grad(), draws(model, num_samples=2, seed=3):
        first, again = model(**batch).logits, model(**batch).logits
    assert torch.equal(first, again)


def test_a_linear_map_inside_a_law_is_not_adapted(adapt, method):
    model = adapt(FAMILIES["bert"])
    model.add_adapter("second", method.config(target_modules="all-linear", r=2))
    names = [slot.name for slot in method.law(model, "second").slots]
    assert names
    assert not any(method.tuner.holder_name in name for name in names)


# ----------------------------------------------------------------- gradients and random numbers


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(adapt, reentrant):
    expected = gradients(perturb(adapt(LLAMA)).train(), LLAMA.batch())
    got = gradients(checkpointed(perturb(adapt(LLAMA)), reentrant), LLAMA.batch())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()) + 1e-9)


def test_two_forwards_before_one_backward(adapt, method):
    """Without checkpointing right for every law; with it right, or refused where the recomputation draws anew."""
    batches = LLAMA.batch(), other_batch()
    expected = gradients(perturb(adapt(LLAMA)).train(), *batches)
    one_by_one = perturb(adapt(LLAMA)).train()
    for batch in batches:
        one_by_one(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in one_by_one.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)
    model = checkpointed(perturb(adapt(LLAMA)))
    if not method.law(model).stochastic:
        for name, value in gradients(model, *batches).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        return
    with pytest.raises(RuntimeError, match="drawn other factors for another forward"):
        gradients(model, *batches)
    gc.collect()
    gradients(model, batches[0])  # backward after each forward goes on
    gradients(model, batches[1])


def test_operations_do_not_grow_with_depth(method):
    counts = []
    for layers in (6, 12, 24):
        config = method.config(target_modules="all-linear")
        base = FAMILIES["bert"].build(num_hidden_layers=layers)
        law = next(laws_of(method.tuner(base, config, "default")))
        with Operations() as counter:
            law(Train()).per_slot(law.slots)
        counts.append(len(counter.names))
    assert counts[0] == counts[1] == counts[2]


def test_global_random_states_are_left_alone(adapt, method):
    torch.manual_seed(3)
    FAMILIES["bert"].build()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    model = adapt(FAMILIES["bert"]).train()
    model(**FAMILIES["bert"].batch()).logits.sum().backward()
    logits(model, FAMILIES["bert"].batch())
    model.merge_adapter()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


# ----------------------------------------------------------------- saving and export


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_under_another_name_is_bit_equal(family, adapt, method, tmp_path, low_cpu_mem_usage):
    model = perturb(adapt(family, adapter_name="first"))
    model.train()(**family.batch())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        family.build(), tmp_path / "first", "elsewhere", low_cpu_mem_usage=low_cpu_mem_usage
    )
    saved, loaded = method.law(model, "first").state_dict(), method.law(again, "elsewhere").state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    # loaded tensors lie in memory of their own, so that the logits are equal too
    assert torch.equal(logits(again, family.batch()), logits(model, family.batch()))


def test_export_is_the_deterministic_function(family, adapt, tmp_path):
    model = perturb(adapt(family))
    expected = logits(model, family.batch())
    stock = PeftModel.from_pretrained(family.build(), export_lora(model, tmp_path / "lora"))
    assert type(stock.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(stock, family.batch()), expected, rtol=1e-5, atol=1e-5)
