"""What PEFT offers around a LoRA, with every law: it works, or is refused in words that say what to do instead."""

import json

import pytest
import torch
from families import FAMILIES, logits, perturb
from peft import (
    LoraConfig,
    PeftModel,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from peft_calib import draws, export_lora

BERT, LLAMA = FAMILIES["bert"], FAMILIES["llama"]


def test_the_base_models_state_dict_is_that_of_the_base_model(adapt, method):
    base, other = BERT.build().state_dict(), BERT.build(seed=1).state_dict()
    model = adapt(BERT, task_type="SEQ_CLS")
    model.add_adapter("second", method.config(target_modules=["query"]))
    found = get_base_model_state_dict(model)
    assert found.keys() == base.keys() and all(torch.equal(found[name], base[name]) for name in base)
    assert set_base_model_state_dict(model, other) == ([], [])
    found = get_base_model_state_dict(model)
    assert found.keys() == other.keys() and all(torch.equal(found[name], other[name]) for name in other)


def test_status_names_adapters_layers_and_parameters(adapt, method):
    model = adapt(BERT)
    model.add_adapter("second", method.config(target_modules=["query"]))
    status = get_model_status(model)
    assert status.available_adapters == ["default", "second"] and status.active_adapters == ["default"]
    assert status.enabled is True and status.merged_adapters == []
    assert status.trainable_params == sum(p.numel() for p in method.law(model).parameters())
    layers = get_layer_status(model)
    assert {layer.name for layer in layers} >= {f"model.{slot.name}" for slot in method.law(model).slots}
    assert all(layer.enabled and layer.active_adapters == ["default"] for layer in layers)


# ----------------------------------------------------------------- what is refused


def with_biases(model):
    """The tensors of an adapter that trains biases, other ones than those of the base model."""
    with torch.no_grad():
        for name, parameter in perturb(model).named_parameters():
            if name.endswith(".bias") and parameter.requires_grad:
                parameter += 0.5
    return get_peft_model_state_dict(model)


@pytest.mark.parametrize("bias", ["all", "only"])
def test_biases_that_are_loaded_are_trained_and_saved(adapt, method, bias, tmp_path):
    bias = bias if bias == "all" else f"{method.config().peft_type.value.lower()}_only"
    model = adapt(BERT, bias=bias)
    state = with_biases(model)
    expected = logits(model, BERT.batch())
    again = adapt(BERT)
    with pytest.warns(UserWarning, match=f"From now on it does: its configuration has bias='{bias}'"):
        set_peft_model_state_dict(again, state)
    assert torch.equal(logits(again, BERT.batch()), expected)
    names = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (again, model)]
    assert again.peft_config["default"].bias == bias and names[0] == names[1]
    again.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), tmp_path), BERT.batch()), expected)


def test_biases_are_refused_beside_another_adapter(adapt, method):
    state = with_biases(adapt(BERT, bias="all"))
    model = adapt(BERT)
    model.add_adapter("second", method.config(target_modules=["query"]))
    before = BERT.build().state_dict()
    with pytest.raises(ValueError, match=r"query\.base_layer\.bias, which .* where the configuration's `bias` trains"):
        set_peft_model_state_dict(model, state)
    found = get_base_model_state_dict(model)
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_biases_are_refused_from_a_file_whose_configuration_has_none(adapt, tmp_path):
    adapt(BERT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "identity": None}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.bert.embeddings.LayerNorm.bias"
    save_file({**tensors, name: torch.ones(32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"LayerNorm\.bias, which .* where the configuration's `bias` trains"):
        PeftModel.from_pretrained(BERT.build(), tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_dora": True}, "takes no use_dora: DoRA's magnitudes belong to one pair of factors"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "takes no target_parameters: a law adapts linear modules"),
        ({"init_lora_weights": "pissa"}, "takes no init_lora_weights: it is called init_weights here"),
        ({"use_qalora": True}, "takes no use_qalora: it is LoRA's own; train a LoRA"),
    ],
)
def test_options_of_lora_alone_are_refused_by_name(option, message, method):
    with pytest.raises(TypeError, match=message):
        method.config(**option)


def test_laws_are_not_added(adapt, method):
    model = adapt(BERT)
    model.add_adapter("second", method.config(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"is no weighted sum of default, second.*export_lora"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


def test_exports_are_added_exactly(adapt, method, tmp_path):
    models = [perturb(adapt(BERT), seed=seed) for seed in (1, 2)]
    stock = None
    for name, model in zip("ab", models, strict=True):
        folder = export_lora(model, tmp_path / name)
        if stock is None:
            stock = PeftModel.from_pretrained(BERT.build(), folder, name)
        else:
            stock.load_adapter(folder, name)
    stock.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="cat")
    stock.set_adapter("mean")
    weights = [dict(model.merge_and_unload().named_parameters()) for model in models]
    for name, parameter in stock.merge_and_unload().named_parameters():
        torch.testing.assert_close(parameter, (weights[0][name] + weights[1][name]) / 2, rtol=1e-5, atol=1e-6)


def test_only_a_lora_is_rescaled(adapt):
    model = adapt(BERT)
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 0.5),
    ):
        pass


# ----------------------------------------------------------------- hot swap of draws


def drawn(model: PeftModel, index: int, batch: dict) -> torch.Tensor:
    with draws(model, 2, seed=0), torch.no_grad():
        return model(**batch).logits.chunk(2)[index]


def test_draws_are_swapped_while_serving(method, tmp_path):
    model = perturb(method.adapt(LLAMA))
    if not method.law(model).varies:
        pytest.skip("all its draws are one function")
    export_lora(model, tmp_path, num_samples=2)
    served = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "draw-0")
    for index in (1, 0):
        hotswap_adapter(served, tmp_path / f"draw-{index}", "default")
        torch.testing.assert_close(
            logits(served, LLAMA.batch()), drawn(model, index, LLAMA.batch()), rtol=0, atol=1e-5
        )
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        hotswap_adapter(model, tmp_path / "draw-0", "default")


def test_draws_with_trained_heads_are_switched_instead(method, tmp_path):
    """PEFT swaps no trained head, of LoRAs neither; both draws are loaded and switched, head and all."""
    model = perturb(method.adapt(BERT, task_type="SEQ_CLS"))
    if not method.law(model).varies:
        pytest.skip("all its draws are one function")
    export_lora(model, tmp_path, num_samples=2)
    served = PeftModel.from_pretrained(BERT.build(), tmp_path / "draw-0", "draw-0")
    with pytest.raises(KeyError, match="classifier"):
        hotswap_adapter(served, tmp_path / "draw-1", "draw-0")
    served = PeftModel.from_pretrained(BERT.build(), tmp_path / "draw-0", "draw-0")
    served.load_adapter(tmp_path / "draw-1", "draw-1")
    for index in (1, 0):
        served.set_adapter(f"draw-{index}")
        torch.testing.assert_close(logits(served, BERT.batch()), drawn(model, index, BERT.batch()), rtol=0, atol=1e-5)


# ----------------------------------------------------------------- which modules, and what is trained beside them


def test_modules_are_left_out_by_name(adapt, method):
    model = adapt(BERT, exclude_modules=["key", "bert.encoder.layer.0.attention.self.query"])
    names = [slot.name for slot in method.law(model).slots]
    assert "bert.encoder.layer.1.attention.self.query" in names
    assert not any(name.endswith("key") or name.endswith("layer.0.attention.self.query") for name in names)


def trained(model: PeftModel, batch: dict) -> PeftModel:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(**batch).logits.square().mean().backward()
    optimizer.step()
    return model


def test_embeddings_of_some_tokens_are_trained_beside(adapt, tmp_path):
    batch = LLAMA.batch()
    token = int(batch["input_ids"][0, 0])
    model = trained(adapt(LLAMA, trainable_token_indices=[token]), batch)
    table = model.get_input_embeddings().token_adapter.get_merged_weights(["default"])
    moved = (table != LLAMA.build().get_input_embeddings().weight).any(1)
    assert moved.nonzero().flatten().tolist() == [token]
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.build(), tmp_path), batch), expected)
    stock = PeftModel.from_pretrained(LLAMA.build(), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(logits(stock, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected, rtol=1e-5, atol=1e-5)


def test_resized_embeddings_are_saved_beside(method, tmp_path):
    def resized():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = LLAMA.build()
            base.resize_token_embeddings(66)
        return base

    batch = LLAMA.batch()
    batch["input_ids"][0, 0] = 65
    model = perturb(get_peft_model(resized(), method.config(target_modules=["q_proj"])))
    with torch.no_grad():
        model.get_input_embeddings().weight[65].fill_(0.1)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert torch.equal(logits(PeftModel.from_pretrained(resized(), tmp_path), batch), expected)


@pytest.mark.parametrize("config_class", ["ours", LoraConfig])
def test_a_tied_head_is_adapted_with_the_same_warning_as_a_lora(config_class, method, tmp_path):
    make = method.config if config_class == "ours" else config_class
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(LLAMA.build(tie_word_embeddings=True), make(r=4, target_modules=["lm_head"]))
    expected = logits(perturb(model), LLAMA.batch())
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        again = PeftModel.from_pretrained(LLAMA.build(tie_word_embeddings=True), tmp_path)
    assert torch.equal(logits(again, LLAMA.batch()), expected)


def test_a_refused_merge_leaves_heads_and_factors_as_they_were(method):
    model = perturb(method.adapt(BERT, task_type="SEQ_CLS"))
    if not method.law(model).varies:
        pytest.skip("all its draws are one function")
    before = [drawn(model, index, BERT.batch()) for index in range(2)]
    with draws(model, 2), pytest.raises(ValueError, match="no single pair of factors"):
        model.merge_and_unload()
    assert all(torch.equal(drawn(model, index, BERT.batch()), before[index]) for index in range(2))
