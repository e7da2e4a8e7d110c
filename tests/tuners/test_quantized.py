"""Quantised bases, through PEFT's own backend: bitsandbytes on the CPU."""

from functools import partial

import pytest
import torch
from families import FAMILIES, logits, perturb
from methods import METHODS
from peft import PeftModel, get_peft_model
from quantized import quantized

from peft_calib import HyperLoraConfig, export_lora
from peft_calib.tuners.layer import FactorLinear

pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")


def quantize(model, kind):
    """Replace the linear maps of a tiny Llama, as from_pretrained does with a quantisation config."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "lm_head" not in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], quantized(module, kind))
    setattr(model, f"is_loaded_in_{kind}", True)
    return model


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantised_base(tmp_path, kind):
    llama = FAMILIES["llama"]
    sizes = {"hidden_size": 64, "intermediate_size": 128}

    def base():
        return quantize(llama.build(**sizes), kind)

    batch = llama.batch()
    start = logits(base(), batch)
    config = HyperLoraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"])
    model = get_peft_model(base(), config)
    layer = next(m for m in model.modules() if isinstance(m, FactorLinear))
    assert layer.quantization_backend.backend_name == f"bnb {kind}"
    # training comes first: bitsandbytes on a CPU repacks 4-bit weights in evaluation and then stops the gradient
    model.train()(**batch).logits.square().mean().backward()
    assert any(p.grad.abs().max() > 0 for p in model.base_model.get_law().parameters())
    assert torch.equal(logits(model, batch), start)
    expected = logits(perturb(model, scale=0.3), batch)
    assert not torch.allclose(expected, start, atol=1e-3)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(again, batch), expected)
    stock = PeftModel.from_pretrained(base(), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(logits(stock, batch), expected, rtol=1e-5, atol=1e-5)
    # merged before any evaluation, for the reason above; requantising costs what it costs a stock LoRA
    merged = [PeftModel.from_pretrained(base(), path).merge_and_unload() for path in (tmp_path, tmp_path / "lora")]
    torch.testing.assert_close(*(logits(m, batch) for m in merged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_base_quantised_by_torchao_in_place(name):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    method, bert = METHODS[name], FAMILIES["bert"]
    base = bert.build()
    quantize_(base, Int8WeightOnlyConfig())
    batch = bert.batch()
    start = logits(base, batch)
    config = method.config(target_modules=["query", "intermediate.dense"], task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    torch.testing.assert_close(logits(model, batch), start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(**batch, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    trained = logits(model, batch)
    assert not torch.allclose(trained, start, atol=1e-3)
    for merge in (model.merge_adapter, partial(model.merge_adapter, safe_merge=True), model.merge_and_unload):
        with pytest.raises(ValueError, match="nobody knows how a merged weight would be quantised again"):
            merge()
        assert torch.equal(logits(model, batch), trained)  # no weight was touched
