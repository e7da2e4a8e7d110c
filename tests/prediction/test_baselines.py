"""Monte Carlo dropout, deep ensembles and frozen draws in stock PEFT."""

import pytest
import torch
from families import ENCODER, FAMILIES, perturb
from peft import LoraConfig, get_peft_model
from stochastic_models import bayesian
from torch import nn
from transformers import DebertaConfig, DebertaForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

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


def test_dropout_of_a_convolution_masks_channels():
    """Its width is that of the channels here, so that a mask of the wrong dimension would fit, too."""

    class Convolving(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.out = nn.Conv2d(4, 3, 1), nn.Linear(3, 2)

        def forward(self, pixel_values):
            return {"logits": self.out(self.convolution(pixel_values).relu().mean((2, 3)))}

    generator = torch.Generator().manual_seed(0)
    model = get_peft_model(Convolving(), LoraConfig(r=2, target_modules=["convolution"], init_lora_weights=False))
    batch = {"pixel_values": torch.randn(3, 4, 4, 4, generator=generator)}
    p = predict(model.eval(), batch, num_samples=3, seed=1, dropout=0.5, task="classification")
    source = DropoutDraws(model, 0.5, 1)
    (layer,), weight = source.layers, source.layers[0].lora_A["default"].weight
    whole = weight.detach().clone()
    for k in range(3):
        weight.data = whole * source._mask(layer.in_features, 0, k, 1)[0].view(1, 4, 1, 1)
        alone = predict(model, batch, how="mean", task="classification").probabilities
        torch.testing.assert_close(p.sample_probabilities[k], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"use_dora": True, "lora_dropout": 0.1}])
def test_dropout_that_would_mask_nothing_is_refused(bert, fields):
    for how in ("sample", "late"):
        with pytest.raises(TypeError, match="does not pass that through its dropout"):
            predict(stock(bert, **fields), bert.batch(), how, num_samples=2, dropout=0.5)


SHARED_ROWS = {
    "positions before rows": (
        lambda: XLNetForSequenceClassification(
            XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=3)
        ),
        {"target_modules": ["layer_1", "layer_2"]},
    ),
    "a table of positions": (
        lambda: DebertaForSequenceClassification(
            DebertaConfig(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16)
        ),
        {"target_modules": ["in_proj", "pos_proj"]},
    ),
    "positions trained whole": (
        FAMILIES["bert"].build,
        {"target_modules": ["query"], "modules_to_save": ["position_embeddings"]},
    ),
}


@pytest.mark.parametrize("name", SHARED_ROWS)
def test_rows_that_are_not_those_of_all_functions(name):
    """Eight tokens are divided by two members: that a map's rows are divided says nothing."""
    build, fields = SHARED_ROWS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = build()
    model = get_peft_model(base, LoraConfig(r=4, **fields), "one")
    model.add_adapter("two", LoraConfig(r=4, **fields))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.normal_(std=0.5)
    ids = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    alone = []
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        alone.append(predict(model.eval(), batch, how="mean").probabilities)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    for how in ("sample", "late"):
        p = predict(model, batch, how, adapter_names=["one", "two"])
        torch.testing.assert_close(p.sample_probabilities, torch.stack(alone), rtol=0, atol=1e-6)
    masked = predict(model, batch, num_samples=2, dropout=0.3).sample_probabilities
    once = predict(model, batch, num_samples=2, dropout=0.3, memory_budget=1).sample_probabilities
    torch.testing.assert_close(masked, once, rtol=0, atol=1e-6)


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
