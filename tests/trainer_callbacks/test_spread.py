"""How far the posterior's standard deviations have moved, in numbers and in the Trainer's logs."""

import pytest
import torch
from small_trainer import adapted, trainer

from peft_calib import BayesianLoraConfig, HyperLoraConfig
from peft_calib.trainer_callbacks import PosteriorSpreadCallback, posterior_spread
from peft_calib.tuners.bayesian_lora.stacks import BoundedScale

CONFIG = dict(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")


@pytest.mark.parametrize("posterior", ["diagonal", "matrix_normal", "full"])
def test_ratio_is_that_of_the_scales(tiny_classifier, posterior):
    model = adapted(tiny_classifier, BayesianLoraConfig(posterior=posterior, init_sd=0.2, max_sd=1.0, **CONFIG))
    start = posterior_spread(model)
    assert start["posterior_sd_ratio"] == pytest.approx(1, abs=1e-6)
    assert start["posterior_sd_moved"] == 0
    scales = [module for module in model.modules() if isinstance(module, BoundedScale)]
    before = [scale(torch.float32) for scale in scales]
    with torch.no_grad():
        for scale in scales:
            scale.offset.fill_(-0.7 / scale.gain)
    ratios = torch.cat([(s(torch.float32) / b).flatten() for s, b in zip(scales, before, strict=True)])
    numbers = posterior_spread(model)
    assert numbers["posterior_sd_ratio"] == pytest.approx(ratios.median().item(), rel=1e-5)
    assert 0.4 < numbers["posterior_sd_ratio"] < 0.8
    assert numbers["posterior_sd_moved"] == 1


def test_half_of_the_entries(tiny_classifier):
    model = adapted(tiny_classifier, BayesianLoraConfig(**CONFIG))
    (scale,) = {m for m in model.modules() if isinstance(m, BoundedScale)}
    with torch.no_grad():
        scale.offset.view(-1)[: scale.offset.numel() // 2] = 3 / scale.gain
    numbers = posterior_spread(model)
    assert numbers["posterior_sd_moved"] == pytest.approx(0.5, abs=0.01)
    assert numbers["posterior_sd_ratio_p05"] == pytest.approx(1, abs=1e-6)
    assert numbers["posterior_sd_ratio_p95"] > 1.5


def test_noise_of_the_factors(tiny_classifier):
    config = BayesianLoraConfig(conditional_noise="matheron", learn_lambda=True, **CONFIG)
    assert posterior_spread(adapted(tiny_classifier, config))["posterior_noise_ratio"] == pytest.approx(1, abs=1e-6)


def test_every_training_log_has_it(tiny_classifier, tmp_path):
    model = adapted(tiny_classifier, BayesianLoraConfig(**CONFIG))
    run = trainer(model, tmp_path, [PosteriorSpreadCallback()], eval_strategy="steps", eval_steps=8)
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == 8
    ratios = [log["posterior_sd_ratio"] for log in logs]
    assert ratios == sorted(ratios)  # so early the KL pulls them up
    assert ratios[-1] == pytest.approx(posterior_spread(model)["posterior_sd_ratio"])
    assert not any("posterior_sd_ratio" in log for log in run.state.log_history if "loss" not in log)


def test_other_adapters_have_no_spread(tiny_classifier):
    assert posterior_spread(adapted(tiny_classifier, HyperLoraConfig(**CONFIG))) == {}
