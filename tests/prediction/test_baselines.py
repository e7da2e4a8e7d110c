"""Monte Carlo dropout, deep ensembles and frozen draws in stock PEFT."""

import pytest
import torch
from families import FAMILIES, perturb
from peft import LoraConfig, get_peft_model
from stochastic_models import bayesian

from peft_calib import export_lora, load_frozen, predict, predict_frozen
from peft_calib.prediction.baselines import DropoutDraws


def stock(family, seed=0, names=("default",), **fields):
    config = {"r": 4, "target_modules": list(family.targets), **fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            family.build(), LoraConfig(**config, fan_in_fan_out="c_attn" in family.targets), names[0]
        )
        for name in names[1:]:
            model.add_adapter(name, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_dropout_batched_is_sequential(name):
    family = FAMILIES[name]
    model, batch = stock(family), family.batch(3)
    p = predict(model, batch, num_samples=4, seed=1, dropout=0.3)
    one = predict(model, batch, num_samples=4, seed=1, dropout=0.3, memory_budget=1)
    torch.testing.assert_close(p.sample_probabilities, one.sample_probabilities, rtol=0, atol=1e-6)
    assert p.mutual_information.min() > 0
    late = predict(model, batch, "late", num_samples=4, seed=1, dropout=0.3)
    torch.testing.assert_close(late.sample_probabilities, p.sample_probabilities, rtol=0, atol=1e-6)


def test_dropout_draw_is_a_lora_with_masked_columns(bert):
    model, batch = stock(bert), bert.batch(3)
    p = predict(model, batch, num_samples=3, seed=1, dropout=0.4)
    source = DropoutDraws(model, 0.4, 1)
    masks = [source._mask(layer.in_features, i, 2, 1)[0] for i, layer in enumerate(source.layers)]
    kept = torch.cat(masks)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert abs((kept == 0).float().mean() - 0.4) < 0.1
    with torch.no_grad():
        for layer, mask in zip(source.layers, masks, strict=True):
            layer.lora_A["default"].weight.mul_(mask)
    expected = predict(model, batch, how="mean").probabilities
    torch.testing.assert_close(p.sample_probabilities[2], expected, rtol=0, atol=1e-6)


def test_dropout_leaves_the_model_and_the_random_state(bert):
    model, batch = stock(bert, lora_dropout=0.5).train(), bert.batch()
    before, state = predict(model, batch, how="mean").probabilities, torch.get_rng_state()
    predict(model, batch, num_samples=3, dropout=0.5)
    assert torch.equal(predict(model, batch, how="mean").probabilities, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_ensemble_is_its_members(bert):
    names = ["one", "two", "three"]
    model = stock(bert, names=names, modules_to_save=["classifier"])
    batch = bert.batch(3)
    p = predict(model, batch, num_samples=3, adapter_names=names)
    for k, name in enumerate(names):
        model.set_adapter(name)
        expected = predict(model, batch, how="mean").probabilities
        torch.testing.assert_close(p.sample_probabilities[k], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(predict_frozen(model, batch, names).probabilities, p.probabilities)
    one = predict_frozen(model, batch, names, memory_budget=1)
    torch.testing.assert_close(one.sample_probabilities, p.sample_probabilities, rtol=0, atol=1e-6)


def test_frozen_draws_are_the_draws(family, tmp_path):
    model, batch = bayesian(family), family.batch(3)
    expected = predict(model, batch, num_samples=3, seed=4)
    export_lora(model, tmp_path / "draws", num_samples=3, seed=4)
    frozen = load_frozen(family.build(), tmp_path / "draws")
    p = predict_frozen(frozen, batch)
    torch.testing.assert_close(p.sample_probabilities, expected.sample_probabilities, rtol=0, atol=1e-5)
    frozen.set_adapter("mean")
    mean = predict(frozen, batch, how="mean")
    torch.testing.assert_close(mean.probabilities, predict(model, batch, how="mean").probabilities, rtol=0, atol=1e-5)


def test_frozen_draws_with_a_trained_head(bert, tmp_path):
    model = perturb(bayesian(bert, task_type="SEQ_CLS"))
    export_lora(model, tmp_path / "draws", num_samples=2)
    frozen = load_frozen(bert.build(seed=9), tmp_path / "draws")  # another head, which the export replaces
    model_again = load_frozen(bert.build(), tmp_path / "draws")
    assert predict_frozen(frozen, bert.batch()).num_samples == 2
    torch.testing.assert_close(
        predict_frozen(model_again, bert.batch()).probabilities,
        predict(model, bert.batch(), num_samples=2).probabilities,
    )


def test_frozen_late(bert, tmp_path):
    model = bayesian(bert, overrides={"num_hidden_layers": 4}, layers_to_transform=[3], targets=["query"])
    export_lora(model, tmp_path / "draws", num_samples=3)
    frozen = load_frozen(bert.build(num_hidden_layers=4), tmp_path / "draws")
    late, sample = (predict_frozen(frozen, bert.batch(3), how=how) for how in ("late", "sample"))
    torch.testing.assert_close(late.sample_probabilities, sample.sample_probabilities, rtol=0, atol=1e-6)
    assert late.num_forwards < 2 < sample.num_forwards


def test_bad_input(bert, tmp_path):
    model, batch = stock(bert), bert.batch()
    for dropout in (0.0, 1.0, 2, "a"):
        with pytest.raises(ValueError, match="dropout must be"):
            predict(model, batch, dropout=dropout)
    with pytest.raises(TypeError, match="no active stock LoRA"):
        predict(bayesian(bert), batch, dropout=0.1)
    with pytest.raises(ValueError, match="one of them"):
        predict(model, batch, dropout=0.1, adapter_names=["default"])
    with pytest.raises(ValueError, match="adapter_names must be"):
        predict(model, batch, adapter_names=["nobody"])
    with pytest.raises(ValueError, match="adapter_names must be"):
        predict_frozen(model, batch)
    with pytest.raises(ValueError, match="there are 1"):
        predict(model, batch, num_samples=2, adapter_names=["default"])
    with pytest.raises(ValueError, match="no mean adapter"):
        predict(model, batch, "mean", adapter_names=["default"])
    with pytest.raises(TypeError, match="PeftModel"):
        predict(bert.build(), batch, adapter_names=["default"])
    with pytest.raises(ValueError, match="no exported draws"):
        load_frozen(bert.build(), tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        predict(model, batch, dropout=0.1)
