"""Scale of a posterior's spread and temperature, chosen together, and stored with the adapter."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gauss_lora import GaussLoraConfig
from peft import LoraConfig, PeftModel, get_peft_model

from peft_calib import BayesianLoraConfig, calibrate_posterior, predict, predict_dataset
from peft_calib.provenance.splits import record_split
from peft_calib.trainer_callbacks import load_recalibration
from peft_calib.tuners import Draw, Mean, Sample

TARGETS = ["query", "value", "intermediate.dense", "output.dense"]


def wide(tiny_classifier, posterior_scale: float = 1.0, **fields) -> PeftModel:
    """A posterior far from zero and wide: its draws disagree."""
    config = BayesianLoraConfig(
        task_type="SEQ_CLS", target_modules=TARGETS, num_train_examples=50, init_sd=0.9, sample_seed=0, lora_alpha=400,
        posterior_scale=posterior_scale, **fields,
    )  # fmt: skip
    model = get_peft_model(tiny_classifier(), config).eval()
    law = model.base_model.get_law()
    with torch.no_grad():
        for stack in law.cores.values():
            for name, parameter in stack.named_parameters():
                if "mean" in name:
                    parameter.copy_(0.6 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(150)
    return model


def rows_of(count: int, seed: int = 0, labels: torch.Tensor | None = None) -> list[dict]:
    ids = torch.randint(3, 64, (count, 6), generator=torch.Generator().manual_seed(seed))
    found = torch.zeros(count, dtype=torch.long) if labels is None else labels
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(ids, found, strict=True)]


def answered_by(model: PeftModel, count: int, seed: int, **how) -> list[dict]:
    """Rows whose labels are drawn from what the model says of them: that prediction is the best there is."""
    said = predict_dataset(model, rows_of(count, seed), batch_size=64, progress=False, **how).probabilities.double()
    return rows_of(count, seed, torch.multinomial(said, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1))


@pytest.mark.parametrize("kind", ["bayesian", "gauss"])
def test_draws_lie_apart_by_the_scale(tiny_classifier, kind):
    def factors(scale: float, draw: Draw) -> torch.Tensor:
        if kind == "bayesian":
            # small cores, whose factors are linear in the normals; full ones are multiplied out first
            law = wide(tiny_classifier, scale, inducing_rows=4, inducing_cols=4).base_model.get_law()
        else:
            sizes = {"target_modules": TARGETS, "num_train_examples": 50, "sample_seed": 0}
            config = GaussLoraConfig(task_type="SEQ_CLS", posterior_scale=scale, **sizes)
            law = get_peft_model(tiny_classifier(), config).base_model.get_law()
        with torch.no_grad():
            return next(iter(law(draw).groups.values()))[0]

    mean, one = factors(1.0, Mean()), factors(1.0, Sample(3, seed=5))
    assert torch.equal(factors(0.0, Sample(3, seed=5)), mean)
    assert (one - mean).abs().max() > 1e-3
    half = factors(0.5, Sample(3, seed=5))
    torch.testing.assert_close(half - mean, 0.5 * (one - mean), rtol=1e-4, atol=1e-6)


def test_training_does_not_know_the_scale(tiny_classifier):
    batch = {"input_ids": torch.arange(3, 15).view(2, 6), "labels": torch.tensor([0, 1])}

    def loss(scale: float) -> torch.Tensor:
        model = wide(tiny_classifier, scale).train()
        torch.manual_seed(0)  # of the base model's dropout
        return model(**batch).loss

    losses = [loss(scale) for scale in (0.0, 1.0, 2.0)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[1], losses[2])


def test_the_scale_that_made_the_labels_is_found(tiny_classifier, tmp_path):
    model = wide(tiny_classifier)
    rows = answered_by(model, 4000, 3, num_samples=8)
    found = calibrate_posterior(model, rows, num_samples=8, batch_size=64)
    assert found.scale in (0.5, 1.0, 2.0)
    by_scale = {c.scale: c for c in found.candidates}
    assert list(by_scale) == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0]
    assert by_scale[found.scale].nll == min(c.nll for c in found.candidates)
    assert by_scale[found.scale].lower > 0
    assert by_scale[0.0].gain == 0
    assert "is applied" in found.reason
    assert model.peft_config["default"].posterior_scale == found.scale

    # NLL of the rows by the public way of predicting
    said = predict_dataset(model, rows, num_samples=8, batch_size=64, progress=False)
    p = np.asarray(found.scaling.transform(said.probabilities, input="probabilities"))
    nll = -np.log(p[np.arange(len(rows)), said.labels]).mean()
    assert nll == pytest.approx(by_scale[found.scale].nll, rel=1e-5)

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["posterior_scale"] == found.scale
    stored = json.loads((tmp_path / "predictor.json").read_text())["ways"]["sample"]
    assert (stored["num_samples"], stored["posterior_scale"]) == (8, found.scale)
    assert load_recalibration(tmp_path).temperature == found.temperature
    again = PeftModel.from_pretrained(tiny_classifier(), tmp_path).eval()
    batch = {"input_ids": torch.arange(3, 15).view(2, 6)}
    said, told = (predict(one, batch, num_samples=3).probabilities for one in (again, model))
    assert torch.equal(said, told)


def test_draws_that_do_not_help_are_left_off(tiny_classifier):
    model = wide(tiny_classifier)
    rows = answered_by(model, 300, 4, how="mean")
    found = calibrate_posterior(model, rows, num_samples=4, batch_size=64)
    assert found.scale == 0.0
    assert "the mean is used" in found.reason
    batch = {"input_ids": torch.arange(3, 15).view(2, 6)}
    prediction = predict(model, batch)
    assert prediction.num_samples == 1  # one forward is enough from now on
    torch.testing.assert_close(prediction.probabilities, predict(model, batch, how="mean").probabilities)
    several = predict(model, batch, num_samples=3)
    assert float(several.mutual_information.abs().max()) < 1e-6


def test_what_is_no_posterior_is_refused(tiny_classifier):
    lora = get_peft_model(tiny_classifier(), LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS))
    with pytest.raises(TypeError, match=r"LORA.*have no scale"):
        calibrate_posterior(lora, rows_of(20))


@pytest.mark.parametrize("scales", [[], [0.0], [-1.0], [float("nan")], ["1"]])
def test_impossible_scales_are_refused(tiny_classifier, scales):
    with pytest.raises(ValueError, match="scales must be positive"):
        calibrate_posterior(wide(tiny_classifier), rows_of(20), scales=scales)


def test_rows_that_were_trained_on_are_refused_and_the_scale_stays(tiny_classifier):
    model = wide(tiny_classifier, posterior_scale=2.0)
    rows = rows_of(40)
    record_split(model, trained_on=rows)
    with pytest.raises(ValueError, match="trained on"):
        calibrate_posterior(model, rows, batch_size=64)
    with pytest.raises(ValueError, match="at least 10"):
        calibrate_posterior(model, rows_of(5, seed=9), batch_size=64)
    assert model.peft_config["default"].posterior_scale == 2.0


def test_a_negative_scale_is_no_configuration():
    with pytest.raises(ValueError, match="posterior_scale must not be negative"):
        BayesianLoraConfig(posterior_scale=-0.5)
