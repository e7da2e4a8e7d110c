"""PEFT's contract for a tuner, for every law and on every architecture family.

`pytest tests/contract --law my_package.my_module:MyConfig` runs it for a law from outside.
"""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from families import FAMILIES, logits, perturb
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_calib.tuners.holder import FactorHolder
from peft_calib.tuners.layer import FactorLinear

# ----------------------------------------------------------------- start, training, merging


def test_starts_at_the_base_function(family, adapt):
    batch = family.batch()
    assert torch.equal(logits(adapt(family), batch), logits(family.build(), batch))


def test_random_start_differs_moderately(family, adapt):
    batch = family.batch()
    change = logits(adapt(family, init_weights=False), batch) - logits(family.build(), batch)
    assert 1e-5 < change.abs().max() < 10


def test_every_law_parameter_is_named_trainable_and_learns(family, adapt, method):
    model = perturb(adapt(family, adapter_name="mine"))
    batch = family.batch()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(method.tuner.prefix in name and ".mine." in name for name in trainable)
    assert {n for n, _ in model.named_parameters() if method.tuner.prefix in n} == set(trainable)
    before = {name: p.detach().clone() for name, p in trainable.items()}
    model.train()
    model(**batch).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable.values())
    torch.optim.SGD(trainable.values(), lr=0.5).step()
    assert all(not torch.equal(p, before[name]) for name, p in trainable.items())


@pytest.mark.parametrize("train_mode", [False, True])
def test_merge_and_unmerge(family, adapt, train_mode):
    batch, model = family.batch(), perturb(adapt(family))
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if ".base_layer.weight" in n}
    expected = logits(model, batch)
    model.train(train_mode)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name in weights:
            torch.testing.assert_close(parameter, weights[name], rtol=0, atol=1e-7)


def test_unmerge_takes_out_what_was_merged(bert, adapt):
    model = perturb(adapt(bert))
    layer = next(m for m in model.modules() if isinstance(m, FactorLinear))
    before = layer.get_base_weight().clone()
    model.merge_adapter()
    perturb(model, seed=9)  # the generator moves on while merged
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_weight(), before, rtol=0, atol=1e-7)


def test_safe_merge_refuses_nan_and_leaves_the_base_intact(bert, adapt, method):
    model = adapt(bert)
    layer = next(m for m in model.modules() if isinstance(m, FactorLinear))
    before = layer.get_base_weight().clone()
    with torch.no_grad():
        for parameter in method.law(model).parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_weight(), before)


def test_merge_and_unload_leaves_nothing_behind(family, adapt):
    batch, model = family.batch(), perturb(adapt(family))
    expected = logits(model, batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-5, atol=1e-5)
    assert_clean(merged, family.build())


def test_unload_gives_the_base_back(family, adapt):
    batch, model = family.batch(), perturb(adapt(family))
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, batch), logits(family.build(), batch))
    assert_clean(unloaded, family.build())
    assert set(unloaded.state_dict()) == set(family.build().state_dict())


def assert_clean(model: nn.Module, fresh: nn.Module) -> None:
    assert not any(isinstance(m, (BaseTunerLayer, FactorHolder)) for m in model.modules())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in fresh.named_modules()]
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called


# ----------------------------------------------------------------- several adapters


def test_second_adapter_switches_and_sums(bert, adapt, method):
    batch, model = bert.batch(), perturb(adapt(bert))
    first = logits(model, batch)
    model.add_adapter("other", method.config(r=2, target_modules=["query"], init_weights=False))
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("other")
    second = logits(model, batch)
    assert not torch.allclose(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    model.base_model.set_adapter(["default", "other"])
    base = logits(bert.build(), batch)
    both = logits(model, batch)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, base)


def test_inactive_law_is_frozen_and_active_one_trains(bert, adapt, method):
    model = adapt(bert)
    model.add_adapter("other", method.config(target_modules=["query"]))
    laws = method.holder(model).laws
    assert all(p.requires_grad for p in laws["default"].parameters())
    assert not any(p.requires_grad for p in laws["other"].parameters())
    model.set_adapter("other")
    assert not any(p.requires_grad for p in laws["default"].parameters())
    assert all(p.requires_grad for p in laws["other"].parameters())
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in laws.parameters())
    model.set_requires_grad("default")
    assert all(p.requires_grad for p in laws["default"].parameters())


def test_disabled_adapter_costs_nothing_and_is_frozen(bert, adapt, method):
    batch, model = bert.batch(), perturb(adapt(bert))
    expected = logits(model, batch)
    calls = count_calls(method.holder(model).laws["default"])
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(bert.build(), batch))
        assert not any(p.requires_grad for p in method.holder(model).parameters())
        assert calls == []
    assert all(p.requires_grad for p in method.holder(model).parameters())
    assert torch.equal(logits(model, batch), expected)


def count_calls(module: nn.Module) -> list:
    calls: list = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_deleted_law_is_gone_from_memory_and_every_dict(bert, adapt, method):
    batch, model = bert.batch(), perturb(adapt(bert))
    model.add_adapter("other", method.config(target_modules=["query", "key"]))
    model.set_adapter("other")
    logits(model, batch)
    law = weakref.ref(method.holder(model).laws["other"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("other")
    gc.collect()
    assert law() is None
    assert list(method.holder(model).laws) == ["default"]
    for layer in (m for m in model.modules() if isinstance(m, FactorLinear)):
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "other" not in getattr(layer, name)
    assert not any(".other." in name for name in model.state_dict())
    logits(model, batch)


def test_deleting_the_last_adapter_removes_the_hooks(bert, adapt, method):
    model = adapt(bert)
    base = model.get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert torch.equal(logits(base, bert.batch()), logits(bert.build(), bert.batch()))
    tuner = model.base_model  # PeftModel itself cannot go on without an adapter
    tuner.peft_config["again"] = method.config(target_modules=["query"], init_weights=False)
    tuner.inject_adapter(base, "again")
    tuner.set_adapter("again")
    assert not torch.equal(logits(base, bert.batch()), logits(bert.build(), bert.batch()))


def test_adapter_added_in_eval_mode_is_in_eval_mode(bert, adapt, method):
    model = adapt(bert).eval()
    model.add_adapter("other", method.config(target_modules=["query", "intermediate.dense"], lora_dropout=0.5))
    assert not any(m.training for m in model.base_model.modules())
    model.set_adapter("other")
    perturb(model)
    batch = bert.batch()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_mixed_batch_picks_the_adapter_of_each_row(bert, adapt, method):
    model = perturb(adapt(bert))
    model.add_adapter("other", method.config(target_modules=["query"], init_weights=False))
    batch = bert.batch(rows=3)
    names = ["other", "__base__", "default"]
    mixed = logits(model, {**batch, "adapter_names": names})
    for row, name in enumerate(names):
        if name == "__base__":
            alone = logits(bert.build(), batch)[row]
        else:
            model.set_adapter(name)
            alone = logits(model, batch)[row]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-6)
    model.eval()
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**batch, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(**batch, adapter_names=["other"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**batch, adapter_names=names)


def test_mixed_batch_with_beam_search_in_an_encoder_decoder(adapt):
    from families import FAMILIES

    t5 = FAMILIES["t5"]
    model = perturb(adapt(t5)).eval()
    ids = t5.batch()["input_ids"]
    alone = model.generate(input_ids=ids, num_beams=2, max_new_tokens=3)
    mixed = model.generate(input_ids=ids, num_beams=2, max_new_tokens=3, adapter_names=["default"] * 2)
    assert torch.equal(alone, mixed)


def test_a_stock_lora_beside_it_is_refused_by_peft_mixed_model(bert, method):
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(bert.build(), method.config(target_modules=["query"]), mixed=True)


# ----------------------------------------------------------------- copies


def test_copies_and_pickles_are_independent(bert, adapt):
    batch, model = bert.batch(), perturb(adapt(bert)).train()
    model(**batch)  # a live generation must not stand in the way
    expected = logits(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, batch), expected)
        twin.train()(**batch).logits.sum().backward()
        assert all(p.grad is None for p in model.parameters())
        perturb(twin)
        assert not torch.equal(logits(twin, batch), expected)
    assert torch.equal(logits(model, batch), expected)


def test_config_object_can_be_used_for_several_models(bert, tmp_path, method):
    config = method.config(r=4, target_modules=["query"])
    first = get_peft_model(bert.build(), config)
    second = get_peft_model(bert.build(num_hidden_layers=3), config)
    assert first.peft_config["default"] is config  # PEFT writes to the object it was given, and expects to find it
    for model, layers in ((first, 2), (second, 3), (first, 2)):
        perturb(model).save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(bert.build(num_hidden_layers=layers), tmp_path)
        assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


# ----------------------------------------------------------------- targets and sizes


def test_layers_to_transform_reduces_the_parameters(bert, adapt, method):
    if getattr(method.config(), "layers", "all") != "all":
        pytest.skip("it names its layers itself")

    def count(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert count(adapt(bert, layers_to_transform=[0])) < count(adapt(bert))


def test_layers_know_their_sizes(family, adapt):
    for layer in (m for m in adapt(family).modules() if isinstance(m, FactorLinear)):
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.get_base_weight().shape
        assert sorted(delta.shape) == sorted((layer.in_features, layer.out_features))


def test_rank_and_alpha_patterns(bert, adapt, method):
    model = adapt(bert, lora_alpha=8, rank_pattern={"query": 2}, alpha_pattern={"layer.0.*key": 32})
    for slot in method.holder(model).laws["default"].slots:
        r = 2 if slot.name.endswith("query") else 4
        alpha = 32 if slot.name == "bert.encoder.layer.0.attention.self.key" else 8
        assert (slot.r, slot.scaling) == (r, alpha / r)


def test_rslora_scaling(bert, adapt, method):
    assert all(
        s.scaling == 8 / 2 for s in method.holder(adapt(bert, use_rslora=True, lora_alpha=8)).laws["default"].slots
    )


def test_all_linear_and_modules_to_save(bert, method):
    if getattr(method.config(), "layers", "all") != "all":
        pytest.skip("it names its layers itself")
    config = method.config(task_type="SEQ_CLS", target_modules="all-linear")
    model = get_peft_model(bert.build(), config)
    names = {slot.name for slot in method.holder(model).laws["default"].slots}
    assert len(names) == 2 * 6 + 1
    assert not any("classifier" in name for name in names)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in n for n in trainable)  # PEFT's copy, or the law's


# ----------------------------------------------------------------- dtypes


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_base(bert, autocast_adapter_dtype, method):
    config = method.config(r=4, target_modules=["query", "dense"])
    base = bert.build().to(torch.bfloat16)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for p in method.holder(model).parameters()} == {expected}
    batch = bert.batch()
    assert logits(model, batch).dtype == torch.bfloat16
    assert torch.equal(logits(model, batch), logits(bert.build().to(torch.bfloat16), batch))
    model.train()(**batch).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in method.holder(model).parameters())


def test_double_precision_base(bert, adapt, method):
    model = get_peft_model(bert.build().double(), method.config(r=4, target_modules=["query"], init_weights=False))
    assert {p.dtype for p in method.holder(model).parameters()} == {torch.float64}
    assert logits(model, bert.batch()).dtype == torch.float64


def test_autocast(bert, adapt, method):
    model, batch = perturb(adapt(bert)), bert.batch()
    expected = logits(model, batch)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch).logits
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in method.holder(model).parameters())
    if not method.law(model).stochastic:
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert torch.equal(logits(model, batch), expected)  # the bfloat16 factors are not reused outside autocast


def test_merges_beside_a_head_of_several_layers(method):
    roberta = FAMILIES["roberta"]  # whose head has no weight of its own
    model = perturb(get_peft_model(roberta.build(), method.config(task_type="SEQ_CLS", target_modules=["query"])))
    expected = logits(model, roberta.batch())
    torch.testing.assert_close(logits(model.merge_and_unload(), roberta.batch()), expected, rtol=0, atol=1e-5)
