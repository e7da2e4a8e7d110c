"""The linearised predictive against finite differences, where it is exact, and how its error falls."""

import pytest
import torch
import transformers as tf
from families import ENCODER, FAMILIES, Family
from peft import get_peft_model
from stochastic_models import bayesian

from peft_calib import EnsembleLoraConfig, predict
from peft_calib.prediction.engine import BatchPredictor
from peft_calib.prediction.linear import linear_logits
from peft_calib.prediction.sources import LawDraws
from peft_calib.tuners import Mean, Sample


def logits_along(model, batch, k, step, seed=0):
    """Logits of the base model with mean update + step * (update of draw k - mean update), without our layers."""
    source = LawDraws(model, seed)
    layers, changed = source.layers(), []
    for layer in layers:
        index = layer.factor_slots["default"].index
        updates = []
        for draw in (Mean(), Sample(seed=seed, first=k)):
            with torch.no_grad(), source.answering(draw):
                A, B = layer.holder.generation("default").pairs[index]
                updates.append(layer.scaling["default"] * (B @ A))
        changed.append(updates[0] + step * (updates[1] - updates[0]))
    with torch.no_grad(), model.disable_adapter():
        for layer, update in zip(layers, changed, strict=True):
            layer.get_base_layer().weight += update.T if layer.fan_in_fan_out else update
        logits = model(**batch).logits
        for layer, update in zip(layers, changed, strict=True):
            layer.get_base_layer().weight -= update.T if layer.fan_in_fan_out else update
    return logits


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_against_finite_differences(name):
    family = FAMILIES[name]
    model, batch = bayesian(family, dtype=torch.float64), family.batch(3)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    tokens = (
        {"label_tokens": [4, 9, 30]} if name == "gpt2" else {}
    )  # Llama's norm computes in float32, too coarse for differences
    source = LawDraws(model, 0)
    predictor = BatchPredictor(source, "linear", 3, 0, **tokens)
    items = predictor.prepare(batch)
    got = linear_logits(source, predictor.head, items, 0, 3)

    def read(logits):
        return logits[:, -1, [4, 9, 30]] if tokens else logits

    h = 1e-4
    for k in range(3):
        slope = (read(logits_along(model, batch, k, h)) - read(logits_along(model, batch, k, -h))) / (2 * h)
        expected = read(logits_along(model, batch, k, 0.0)) + slope
        torch.testing.assert_close(got[k], expected, rtol=0, atol=1e-7)
        assert slope.abs().max() > 1e-4


def test_exact_where_the_model_is_linear_in_the_update():
    family = Family(tf.BertForSequenceClassification, tf.BertConfig, ENCODER, ("classifier",))
    model, batch = bayesian(family, r=2), family.batch(3)
    linear, sample = (predict(model, batch, how, num_samples=4) for how in ("linear", "sample"))
    assert sample.mutual_information.min() > 1e-6
    torch.testing.assert_close(linear.sample_probabilities, sample.sample_probabilities, rtol=0, atol=1e-6)
    assert linear.num_forwards == 1 + 3


def test_error_falls_with_the_square_of_the_spread(bert):
    def error(sd):
        model = bayesian(bert, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.base_model.get_law().spread_parameters():
                parameter.fill_(0.0)
        law = model.base_model.get_law()
        gain = law.config.variance_lr_multiplier
        with torch.no_grad():
            for parameter in law.spread_parameters():
                parameter.fill_(torch.log(torch.tensor(sd)).item() / gain)
        sample = predict(model, bert.batch(4), num_samples=4)
        linear = predict(model, bert.batch(4), "linear", num_samples=4)
        mean = predict(model, bert.batch(4), "mean")
        spread = (sample.sample_probabilities - mean.probabilities).abs().mean()
        return (sample.sample_probabilities - linear.sample_probabilities).abs().mean(), spread

    (far, wide), (near, narrow) = error(1.0), error(0.2)
    assert far < 0.5 * wide  # it explains most of what the draws do
    assert near / far < (narrow / wide) ** 1.5


def test_half_precision_is_expanded_in_float32(bert):
    batch, models = bert.batch(3), [bayesian(bert, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    half, whole = (predict(model, batch, "linear", num_samples=4).sample_probabilities for model in models)
    torch.testing.assert_close(half, whole, rtol=0, atol=0.02)


def test_refusals(llama, bert):
    members = get_peft_model(bert.build(), EnsembleLoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ValueError, match="each draw here has a classifier of its own, which is none"):
        predict(members, bert.batch(), "linear")
    with pytest.raises(ValueError, match="label_tokens"):
        predict(bayesian(llama, overrides={"vocab_size": 100}), llama.batch(), "linear")
    with pytest.raises(ValueError, match="auto"):
        predict(bayesian(bert), bert.batch(), "linear", num_samples="auto")
    model = bayesian(bert).train()
    before = torch.get_rng_state()
    predict(model, bert.batch(), "linear")
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and all(p.grad is None for p in model.parameters())
