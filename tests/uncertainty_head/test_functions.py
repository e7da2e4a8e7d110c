"""K functions: features and logits of each draw, heads that differ from draw to draw, adapters on the head itself."""

import pytest
import torch
from classifiers import CLASSIFIERS, classifier, rows, vary
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_calib
from peft_calib import BayesianLoraConfig, CurveLoraConfig, EnsembleLoraConfig, HyperLoraConfig
from peft_calib.uncertainty_head import copy_head, extract_features

LAWS = {
    "hyper": (HyperLoraConfig, {}, 1),
    "bayes": (BayesianLoraConfig, {"init_sd": 0.3}, 1),
    "curve": (CurveLoraConfig, {}, 1),
    "curve of heads": (CurveLoraConfig, {"curve_modules_to_save": True}, 3),
    "ensemble": (EnsembleLoraConfig, {"num_members": 3}, 3),
}


def adapted(law: str, family: str = "bert", **fields) -> nn.Module:
    """A classifier under one of our laws, with trained-looking values."""
    config, own, _ = LAWS[law]
    base = classifier(family, adapt=False)
    fields = {"target_modules": CLASSIFIERS[family][1], "task_type": "SEQ_CLS"} | own | fields
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return vary(get_peft_model(base, config(r=2, **fields))).eval()


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("law", LAWS)
def test_each_draw_has_its_features_its_logits_and_its_head(law, family):
    model, data, ways = adapted(law, family), rows(6), {"num_samples": 3, "seed": 5}
    found = extract_features(model, data, batch_size=4, **ways)
    drawn = peft_calib.predict_dataset(model, data, how="sample", batch_size=4, progress=False, **ways)
    assert torch.allclose(found.logits.softmax(-1), drawn.sample_probabilities, atol=1e-5)
    assert torch.allclose(found.probabilities.float(), drawn.probabilities, atol=1e-5)
    copied = copy_head(model, **ways)
    assert len(copied.starts) == LAWS[law][2]
    assert torch.allclose(copied(found.features), found.logits, atol=1e-4)


@pytest.mark.parametrize("law", LAWS)
def test_one_function_is_the_deterministic_model(law):
    model, data = adapted(law), rows(4)
    found = extract_features(model, data)
    assert len(found.features) == 1
    mean = peft_calib.predict_dataset(model, data, how="mean", progress=False)
    assert torch.allclose(found.probabilities.float(), mean.probabilities, atol=1e-5)


def test_all_members_are_read_where_no_number_is_given():
    model, data = adapted("ensemble"), rows(4)
    assert len(extract_features(model, data, num_samples=None).features) == 3


def test_one_shared_step_moves_the_heads_of_all_members():
    model = adapted("ensemble")
    copied = copy_head(model, num_samples=3)
    features = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    before = copied(features).detach()
    with torch.no_grad():
        copied.delta[copied.trained.index("bias")].add_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(copied(features) - before, torch.tensor([1.0, 2.0, 3.0]).expand(3, 4, 3), atol=1e-5)
    assert copied.squared_distance().item() == pytest.approx(14.0)


def test_reading_members_leaves_their_heads_as_they_were():
    model, data = adapted("ensemble"), rows(4)
    before = peft_calib.predict_dataset(model, data, how="sample", progress=False)
    copied = copy_head(model, num_samples=3)
    with torch.no_grad():
        for start in copied.starts:
            for value in start.values():
                value.zero_()
    after = peft_calib.predict_dataset(model, data, how="sample", progress=False)
    assert torch.equal(before.sample_probabilities, after.sample_probabilities)


@pytest.mark.parametrize("law", [law for law in LAWS if law != "curve of heads"])
def test_a_law_on_the_head_itself_becomes_part_of_its_weight(law):
    model, data = adapted(law, task_type=None, target_modules=["query", "classifier"]), rows(5)
    ways = {"num_samples": 3, "seed": 1}
    found, copied = extract_features(model, data, **ways), copy_head(model, **ways)
    assert len(copied.starts) == (1 if law == "hyper" else 3)
    assert torch.allclose(copied(found.features), found.logits, atol=1e-4)
    assert torch.allclose(copy_head(model)(found.features[:1]), copy_head(model)(found.features)[:1])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_bias": True}])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_lora_on_the_head_becomes_part_of_its_weight(family, options):
    targets = ["query", "classifier"] if family == "bert" else ["query", "classifier.dense", "classifier.out_proj"]
    base, data = classifier(family, adapt=False), rows(5)
    model = vary(get_peft_model(base, LoraConfig(r=2, target_modules=targets, **options))).eval()
    found, copied = extract_features(model, data), copy_head(model)
    assert torch.allclose(copied(found.features), found.logits, atol=1e-5)
    assert all(type(module) is not nn.Module for module in copied.modules())
    merged = model.merge_and_unload()
    assert torch.allclose(extract_features(merged, data).logits, found.logits, atol=1e-5)


def test_dropout_of_a_stock_lora_and_an_ensemble_of_adapters_are_functions_too():
    model, data = classifier("bert"), rows(5)
    masked = extract_features(model, data, dropout=0.3, num_samples=4)
    assert masked.features.shape[0] == 4 and not torch.equal(masked.features[0], masked.features[1])
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    members = extract_features(model, data, adapter_names=["default", "other"])
    copied = copy_head(model, adapter_names=["default", "other"])
    assert len(copied.starts) == 2 and torch.allclose(copied(members.features), members.logits, atol=1e-5)
    assert members.adapter != extract_features(model, data).adapter


def test_members_may_have_heads_of_several_layers():
    model, data = classifier("roberta"), rows(5)
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    members = extract_features(model, data, adapter_names=["default", "other"])
    copied = copy_head(model, adapter_names=["default", "other"])
    assert len(copied.starts) == 2 and torch.allclose(copied(members.features), members.logits, atol=1e-5)
    for k, name in enumerate(("default", "other")):
        model.set_adapter(name)
        assert torch.allclose(members.logits[k], extract_features(model, data).logits[0], atol=1e-5)


def test_draws_of_a_stock_lora_are_refused_with_a_way_out():
    with pytest.raises(TypeError, match=r"dropout=.*adapter_names="):
        extract_features(classifier("bert"), rows(3), num_samples=3)
