"""transformers' own add_adapter / load_adapter, without a PeftModel."""

import re
import warnings

import pytest
import torch
from families import FAMILIES, logits, perturb
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_calib import (
    BayesianLoraConfig,
    BayesianLoraModel,
    CurveLoraConfig,
    CurveLoraModel,
    HyperLoraConfig,
    HyperLoraModel,
)
from peft_calib.edits import accept_edits
from peft_calib.tuners.holder import FactorHolder

METHODS = {
    "hyper": (HyperLoraConfig, HyperLoraModel, {}),
    "bayesian": (BayesianLoraConfig, BayesianLoraModel, {"num_train_examples": 100}),
    "curve": (CurveLoraConfig, CurveLoraModel, {}),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=["bert", "gpt2", "llama", "t5", "vit"])
def native(request, method):
    family, (config, tuner, fields) = FAMILIES[request.param], method
    model = family.build()
    model.add_adapter(config(r=4, target_modules=list(family.targets), **fields), "mine")
    return family, model, tuner


def test_starts_at_base_and_trains(native):
    family, model, tuner = native
    batch = family.batch()
    assert torch.equal(logits(model, batch), logits(family.build(), batch))
    model.train()
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(f"{tuner.prefix}law.mine." in n for n in trainable)
    model(**batch).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("adapter_name", ["mine", "other"])
def test_save_and_load_under_a_name(native, tmp_path, adapter_name):
    family, model, tuner = native
    expected = logits(perturb(model, scale=0.2), family.batch())
    assert not torch.equal(expected, logits(family.build(), family.batch()))
    model.save_pretrained(tmp_path)
    again = family.build()
    again.load_adapter(str(tmp_path), adapter_name=adapter_name)
    assert torch.equal(logits(again, family.batch()), expected)
    assert not any(p.requires_grad for p in tuner.get_holder(again).parameters())


def test_load_trainable(native, tmp_path):
    family, model, tuner = native
    perturb(model).save_pretrained(tmp_path)
    again = family.build()
    again.load_adapter(str(tmp_path), adapter_name="mine", is_trainable=True)
    again.train()(**family.batch()).logits.square().mean().backward()
    assert all(p.grad is not None for p in tuner.get_holder(again).parameters())


def test_auto_model_finds_the_adapter(tmp_path):
    bert = FAMILIES["bert"]
    base = bert.build()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    model.add_adapter(HyperLoraConfig(r=4, target_modules=["query"], init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    again = type(base).from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


def changed_head_survives(config, folder):
    bert = FAMILIES["bert"]
    model = bert.build()
    model.add_adapter(config, "mine")
    perturb(model, scale=0.5)
    model.save_pretrained(folder)
    again = bert.build()
    again.load_adapter(str(folder), adapter_name="other")
    return torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


def test_changed_head_is_saved_and_loaded(tmp_path):
    fields = {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    if not changed_head_survives(LoraConfig(**fields), tmp_path / "lora"):
        pytest.skip("this transformers loses a stock LoRA's head too (5.17 does)")
    assert changed_head_survives(HyperLoraConfig(**fields), tmp_path / "hyper")


def test_two_adapters_one_deleted(native):
    family, model, tuner = native
    batch = family.batch()
    first = logits(perturb(model, scale=0.2), batch)
    config_cls = next(config for config, cls, _ in METHODS.values() if cls is tuner)
    config = config_cls(r=2, target_modules=list(family.targets), init_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(config, "second")
        second = logits(model, batch)
        assert not torch.equal(first, second)
        model.set_adapter("mine")
        assert torch.equal(logits(model, batch), first)
        model.disable_adapters()
        assert torch.equal(logits(model, batch), logits(family.build(), batch))
        model.enable_adapters()
        assert torch.equal(logits(model, batch), first)
        model.delete_adapter("mine")
    assert list(tuner.get_holder(model).laws) == ["second"]
    model.set_adapter("second")
    assert torch.equal(logits(model, batch), second)


def test_one_holder_and_one_pair_of_hooks():
    family, model = FAMILIES["bert"], FAMILIES["bert"].build()
    model.add_adapter(HyperLoraConfig(r=4, target_modules=list(family.targets)), "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(HyperLoraConfig(r=2, target_modules="all-linear"), "second")
    assert sum(isinstance(m, FactorHolder) for m in model.modules()) == 1
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1


def test_other_architecture_is_refused_here_too(tmp_path):
    bert = FAMILIES["bert"]
    model = bert.build()
    model.add_adapter(HyperLoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="slot table has 2 slots, the model offers 3"):
        bert.build(num_hidden_layers=3).load_adapter(str(tmp_path))


def _saved_by_native(method, folder):
    family, (config, _, fields) = FAMILIES["bert"], method
    model = family.build()
    model.add_adapter(config(r=4, target_modules=list(family.targets), **fields), "mine")
    perturb(model, scale=0.2).save_pretrained(folder)
    return family, logits(model, family.batch())


@pytest.mark.parametrize("change", ["base weight", "other values", "whole numbers", "missing", "not a number"])
def test_load_adapter_refuses_changed_weights(method, tmp_path, change):
    family, _ = _saved_by_native(method, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    # a frozen draw that is missing is drawn again, bit by bit
    numbers = [key for key, value in tensors.items() if value.is_floating_point() and value.any()]
    name = next(key for key in numbers if "anchor" not in key)
    if change == "base weight":
        base = family.build()
        name = next(key for key, _ in base.named_parameters() if key.endswith("LayerNorm.bias"))
        tensors[f"base_model.model.{name}"] = torch.ones_like(base.get_parameter(name))
    elif change == "missing":
        del tensors[name]
    else:
        old = tensors[name]
        new = {"other values": 2 * old, "whole numbers": (9 * old).int(), "not a number": old * float("nan")}
        tensors[name] = new[change]
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=re.escape(name.removeprefix("base_model.model."))) as caught:
        family.build().load_adapter(str(tmp_path), adapter_name="other")
    assert "adapter_model.safetensors" in str(caught.value)


def test_load_adapter_takes_half_precision_accepted_on_purpose(method, tmp_path):
    family, expected = _saved_by_native(method, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    halves = {key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})
    accept_edits(tmp_path)
    again = family.build()
    again.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.allclose(logits(again, family.batch()), expected, atol=2e-2)
