"""Quantised bases, through PEFT's own backend: bitsandbytes, torchao and HQQ on the CPU, and GGUF files."""

from functools import partial

import pytest
import torch
from families import FAMILIES, logits, perturb
from llama_cpp_server import write_base
from methods import METHODS
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from quantized import quantized
from transformers import AutoModelForCausalLM

from peft_calib import HyperLoraConfig, export_lora
from peft_calib.tuners.layer import FactorLinear


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
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
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


def hqq_base():
    """A tiny Llama whose linear maps are held in four bits, as `HqqConfig` leaves them."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = FAMILIES["llama"].build()
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "lm_head" not in name:
            how = {"compute_dtype": torch.float32, "device": "cpu"}
            new = HQQLinear(module, BaseQuantizeConfig(nbits=4, group_size=32), **how)
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)
    return model


@pytest.mark.parametrize("name", ["hyper", "bayesian", "curve", "ensemble"])
def test_base_quantised_by_hqq(name, tmp_path):
    pytest.importorskip("hqq", reason="hqq is not installed")
    batch, start = FAMILIES["llama"].batch(), logits(hqq_base(), FAMILIES["llama"].batch())
    model = get_peft_model(hqq_base(), METHODS[name].config(target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model, batch), start)
    _is_trained_saved_and_exported(model, hqq_base, batch, tmp_path)
    merged = [PeftModel.from_pretrained(hqq_base(), tmp_path / path).merge_and_unload() for path in ("own", "lora")]
    torch.testing.assert_close(*(logits(one, batch) for one in merged), rtol=1e-4, atol=1e-4)  # as a LoRA's merge is


def _is_trained_saved_and_exported(model, base, batch, folder):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    expected = logits(model, batch)
    assert not torch.allclose(expected, logits(base(), batch), atol=1e-3)
    model.save_pretrained(folder / "own")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), folder / "own"), batch), expected)
    stock = PeftModel.from_pretrained(base(), export_lora(model, folder / "lora"))
    torch.testing.assert_close(logits(stock, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    folder = tmp_path_factory.mktemp("gguf")
    write_base(FAMILIES["llama"].build(head_dim=8, tie_word_embeddings=False), folder / "base.gguf")
    return folder


@pytest.mark.parametrize("name", ["hyper", "bayesian", "curve", "ensemble"])
def test_base_read_from_a_gguf_file(name, gguf_folder, tmp_path):
    def base():
        return AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="base.gguf", dtype=torch.float32)

    batch = FAMILIES["llama"].batch()
    config = METHODS[name].config(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base(), config)
    _is_trained_saved_and_exported(model, base, batch, tmp_path)
    # the configuration names the folder, so whoever loads says which file in it, for a LoRA as for ours
    with pytest.raises(ValueError, match="model_type"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "own")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "own", gguf_file="base.gguf", dtype=torch.float32)
    assert torch.equal(logits(again, batch), logits(model, batch))
    expected = logits(model, batch)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected, rtol=1e-5, atol=1e-5)
