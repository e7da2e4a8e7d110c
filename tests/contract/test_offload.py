"""Bases whose weights lie elsewhere until they are used (Accelerate's offload): what works, and what is refused."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from families import FAMILIES, logits, perturb
from peft import PeftModel, get_peft_model
from transformers import BertForSequenceClassification

from peft_calib import export_lora, predict

BERT = FAMILIES["bert"]
BATCH = BERT.batch()
ENCODER_ON_DISK = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
WHOLE = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=torch.device("cpu")),
}


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    BERT.build().save_pretrained(folder)
    return folder


def from_disk(saved_base, tmp_path) -> torch.nn.Module:
    options = {"device_map": ENCODER_ON_DISK, "offload_folder": str(tmp_path / "offload")}
    return BertForSequenceClassification.from_pretrained(saved_base, **options).eval()


def lies_on_meta(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


def predicted(model: PeftModel, how: str = "sample") -> torch.Tensor:
    return predict(model, BATCH, how=how, num_samples=2, seed=1).sample_probabilities


def test_an_adapter_on_a_base_that_lies_on_disk(principal, saved_base, tmp_path):
    """It is the adapter of the base in memory: trained, drawn from, saved, exported and merged."""
    config = {"target_modules": list(BERT.targets)}
    model = perturb(get_peft_model(from_disk(saved_base, tmp_path), principal.config(**config)))
    expected = perturb(principal.adapt(BERT))
    assert any("encoder" in name for name in lies_on_meta(model))
    assert not any(p.is_meta for p in principal.law(model).parameters())
    assert torch.equal(logits(model, BATCH), logits(expected, BATCH))
    for how in ("sample", "late"):
        torch.testing.assert_close(predicted(model, how), predicted(expected, how), rtol=0, atol=1e-6)
    model.train()(**BATCH).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in principal.law(model).parameters())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(BERT.build(), tmp_path / "adapter")
    assert torch.equal(logits(again, BATCH), logits(expected, BATCH))
    stock = PeftModel.from_pretrained(BERT.build(), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(logits(stock, BATCH), logits(expected, BATCH), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), BATCH), logits(expected, BATCH), rtol=1e-5, atol=1e-5)


def test_a_device_map_over_model_and_adapter(principal, tmp_path):
    model, expected = (perturb(principal.adapt(BERT)) for _ in range(2))
    places = {f"base_model.model.{name}": place for name, place in ENCODER_ON_DISK.items()}
    places[f"base_model.model.{principal.tuner.holder_name}"] = "cpu"
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert lies_on_meta(model)
    assert torch.equal(logits(model, BATCH), logits(expected, BATCH))
    torch.testing.assert_close(predicted(model), predicted(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", WHOLE)
def test_a_law_that_is_offloaded_is_refused(where, principal, tmp_path):
    model = perturb(principal.adapt(BERT)).eval()
    WHOLE[where](model, tmp_path)
    with pytest.raises(RuntimeError, match=r"law lie on the meta device.*Offload the base model first"):
        model(**BATCH)
