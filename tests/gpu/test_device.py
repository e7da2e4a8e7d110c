"""What must be the same on every device. The CPU stands in for it everywhere; with `-m gpu` an accelerator answers.

`benchmarks/gpu_check.py` runs this file on machines with little more than torch and transformers, so it uses nothing
of the other tests but their conftest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model

import peft_calib
from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig
from peft_calib.calibration import (
    CalibrationAccumulator,
    TemperatureScaling,
    calibration_report,
    draw_uncertainty,
)

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
LAWS = {
    "hyper": HyperLoraConfig,
    "hyper, random A": lambda **fields: HyperLoraConfig(a_mode="random", **fields),
    "bayesian": lambda **fields: BayesianLoraConfig(num_train_examples=20, init="random", **fields),
    "bayesian, flow": lambda **fields: BayesianLoraConfig(
        num_train_examples=20, init="random", flow="maf", conditional_noise="projected", **fields
    ),
    "curve": CurveLoraConfig,
    "curve, two points": lambda **fields: CurveLoraConfig(jsd_weight=0.2, **fields),
}


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    return request.param


@pytest.fixture(params=list(LAWS))
def law(request) -> Callable:
    return LAWS[request.param]


@pytest.fixture
def adapted(tiny_classifier) -> Callable[..., PeftModel]:
    """A classifier with a law whose parameters are no longer those of the start; equal calls give equal models."""

    def build(law: Callable, dtype: torch.dtype = torch.float32) -> PeftModel:
        base = tiny_classifier().to(dtype)
        config = law(task_type="SEQ_CLS", r=4, target_modules=["query", "value", "dense"])
        for name in ("seed", "sample_seed"):
            if hasattr(config, name):
                setattr(config, name, 5)
        model = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return build


def batch(device: str = "cpu", labels: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (4, 7), generator=generator)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows |= {"labels": torch.tensor([0, 2, 1, 2])} if labels else {}
    return {name: tensor.to(device) for name, tensor in rows.items()}


def gradients(model: PeftModel, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    for module in model.modules():  # dropout is torch's and differs between devices
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = model(**batch(device)).loss
    loss.backward()
    return float(loss), {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def test_a_training_step_is_that_of_the_cpu(adapted, law, device):
    here, there = adapted(law), adapted(law).to(device)
    expected_loss, expected = gradients(here, "cpu")
    found_loss, found = gradients(there, device)
    assert found_loss == pytest.approx(expected_loss, rel=1e-4)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_checkpointed_blocks_have_the_same_gradients(adapted, law, device):
    _, expected = gradients(adapted(law).to(device), device)
    model = adapted(law).to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    _, found = gradients(model, device)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_draws_are_those_of_the_cpu(adapted, law, device):
    rows = batch(device, labels=False)
    for how in ("sample", "late"):
        here = peft_calib.predict(adapted(law).eval(), batch(labels=False), how=how, num_samples=3, seed=4)
        there = peft_calib.predict(adapted(law).to(device).eval(), rows, how=how, num_samples=3, seed=4)
        found = there.sample_probabilities.cpu()
        torch.testing.assert_close(found, here.sample_probabilities.cpu(), rtol=0, atol=2e-5)


def test_saved_there_and_loaded_here(adapted, law, device, tiny_classifier, tmp_path):
    model = adapted(law).to(device).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_classifier(), tmp_path).eval()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].cpu()), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch()).logits, model(**batch(device)).logits.cpu(), rtol=0, atol=2e-5)


def test_export_and_merge_are_the_model(adapted, law, device, tiny_classifier, tmp_path):
    model = adapted(law).to(device).eval()
    with torch.no_grad():
        expected = model(**batch(device)).logits.cpu()
        peft_calib.export_lora(model, tmp_path / "lora")
        stock = PeftModel.from_pretrained(tiny_classifier(), tmp_path / "lora").eval()
        torch.testing.assert_close(stock(**batch()).logits, expected, rtol=0, atol=5e-5)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(**batch(device)).logits.cpu(), expected, rtol=0, atol=5e-5)


def test_random_state_of_every_device_is_left_alone(adapted, law, device):
    model = adapted(law).to(device)
    before = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])]
    gradients(model, device)
    peft_calib.predict(model.eval(), batch(device, labels=False), num_samples=2)
    after = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("way", ["base in bfloat16", "autocast"])
def test_half_precision_trains_what_single_precision_trains(adapted, law, device, way):
    _, expected = gradients(adapted(law).to(device), device)
    model = adapted(law, torch.bfloat16 if way == "base in bfloat16" else torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=way == "autocast"):
        _, found = gradients(model, device)
    assert set(found) == set(expected)
    flat = [torch.cat([g[name].flatten() for name in sorted(expected)]) for g in (found, expected)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.95


def test_a_step_through_the_optimiser_moves_the_function(adapted, law, device):
    """A fused optimiser bumps no version of a parameter: factors kept from before the step would be stale."""
    model = adapted(law).to(device)
    rows = batch(device, labels=False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, fused=True)
    with torch.no_grad():
        before = model.eval()(**rows).logits
    gradients(model, device)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(**rows).logits
        model.base_model.invalidate_factors()
        torch.testing.assert_close(after, model(**rows).logits, rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_scores_take_tensors_of_any_device(kind, dtype, device):
    logits, labels = _logits(300)
    here = (logits if kind == "logits" else torch.softmax(logits, dim=-1)).to(dtype)
    mask = torch.arange(300) % 3 > 0
    options = {"input": kind, "mask": mask, "confidence_level": None}
    expected = calibration_report(here, labels, **options).scores
    there = here.to(device).requires_grad_()
    options["mask"] = mask.to(device)
    assert calibration_report(there, labels.to(device), **options).scores == pytest.approx(expected, nan_ok=True)
    accumulator = CalibrationAccumulator(input=kind)
    for part in (slice(0, 120), slice(120, None)):
        accumulator.update(there[part], labels[part].to(device), mask=options["mask"][part])
    assert accumulator.compute()["ece"] == pytest.approx(expected["ece"], abs=1e-12)
    assert draw_uncertainty(there.detach()[None].expand(3, -1, -1), input=kind)


def test_temperature_takes_logits_of_any_device(device):
    logits, _ = _logits(300)
    labels = torch.distributions.Categorical(logits=logits / 2).mode
    labels[::3] = 1
    here, there = (TemperatureScaling().fit(logits.to(d), labels.to(d)) for d in ("cpu", device))
    assert there.temperature == here.temperature
    assert 1 < here.temperature < 100


def _logits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 5, (size,), generator=generator)
