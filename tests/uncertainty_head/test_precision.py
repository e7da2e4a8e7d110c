"""Bases in half precision, under autocast and quantised: features and the copied head are float32 all the same."""

import pytest
import torch
from classifiers import CLASSIFIERS, classifier, rows, vary
from peft import LoraConfig, get_peft_model
from quantized import quantized

from peft_calib.uncertainty_head import copy_head, extract_features
from peft_calib.uncertainty_head.reading import QUANTISED, TOLERANCES


def gap(model) -> float:
    """How far the copied head is from the model, as a share of the largest logit or of 1."""
    found, copied = extract_features(model, rows(16)), copy_head(model)
    assert found.features.dtype == found.logits.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in copied.starts[0].values())
    return float((copied(found.features) - found.logits).abs().max() / found.logits.abs().max().clamp_min(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_base_in_half_precision_is_reproduced_within_its_rounding(family, dtype):
    assert gap(classifier(family).to(dtype)) < TOLERANCES[dtype] / 4


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_autocast_changes_the_model_but_not_the_copy(family):
    model = classifier(family)
    expected = copy_head(model)(torch.ones(1, 2, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert 0 < gap(model) < TOLERANCES[torch.bfloat16]
        again = copy_head(model)(torch.ones(1, 2, 16))
    assert again.dtype == torch.float32 and torch.equal(again, expected)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantised_base_under_a_lora_has_an_exact_head(kind):
    pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    model = classifier("bert", adapt=False, hidden_size=64, intermediate_size=64)
    layers = {name: module for name, module in model.bert.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in layers.items():
        model.bert.set_submodule(name, quantized(module, kind))
    setattr(model, f"is_loaded_in_{kind}", True)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    assert gap(vary(get_peft_model(model, config)).eval()) < 1e-5


def test_a_quantised_head_is_dequantised():
    bnb = pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    model = classifier("bert", adapt=False)
    head = bnb.nn.Linear8bitLt(16, 3, True, has_fp16_weights=False)
    head.weight = bnb.nn.Int8Params(model.classifier.weight.data.clone(), requires_grad=False)
    model.classifier = head.to("cpu")
    model.eval()
    assert gap(model) < QUANTISED
    assert head.weight.dtype == torch.int8
