"""Features are what the head is given, where it reads; a copy of the head answers on them as the model."""

import copy

import pytest
import torch
from classifiers import CLASSIFIERS, classifier, rows
from datasets import Dataset
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    Gemma2Config,
    Gemma2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from peft_calib import predict_dataset
from peft_calib.identity import adapter_digest
from peft_calib.uncertainty_head import copy_head, extract_features


def state_of(model: nn.Module) -> dict:
    """All that a call might leave changed."""
    modules = {
        name: (module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks), set(module.__dict__))
        for name, module in model.named_modules()
    }
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return {"modules": modules, "tensors": tensors, "grads": grads, "generator": torch.get_rng_state()}


def same_state(before: dict, after: dict) -> bool:
    tensors = all(torch.equal(before["tensors"][name], value) for name, value in after["tensors"].items())
    rest = all(before[part] == after[part] for part in ("modules", "grads"))
    return tensors and rest and torch.equal(before["generator"], after["generator"])


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_copied_head_answers_on_the_features_as_the_model(family):
    model, data = classifier(family), rows()
    found = extract_features(model, data, batch_size=5)
    expected = predict_dataset(model, data, how="mean", batch_size=5, progress=False)
    assert found.features.shape[:2] == (1, len(data)) and found.features.dtype == torch.float32
    assert torch.allclose(found.probabilities.float(), expected.probabilities, atol=1e-6)
    assert torch.allclose(copy_head(model)(found.features), found.logits, atol=1e-5)
    assert torch.equal(found.labels, expected.labels)
    assert found.adapter == adapter_digest(model)


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("left", [False, True])
def test_a_decoder_is_read_at_its_last_token_that_is_no_padding(family, left):
    model, data = classifier(family), rows(left=left)
    found = extract_features(model, data)
    batch = {name: torch.tensor([row[name] for row in data]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = model.get_base_model().model(**batch).last_hidden_state
    last = [max(t for t, token in enumerate(row["input_ids"]) if token != 1) for row in data]
    assert torch.allclose(found.features[0], states[torch.arange(len(data)), last], atol=1e-6)


def test_a_decoder_without_a_padding_token_is_read_at_the_last_token_row_by_row():
    model = classifier("llama")
    model.get_base_model().config.pad_token_id = None
    data = [{name: value for name, value in row.items() if name == "input_ids"} for row in rows(4)]
    found = extract_features(model, data, batch_size=1)
    with torch.no_grad():
        states = [model.get_base_model().model(torch.tensor([row["input_ids"]])).last_hidden_state for row in data]
    assert torch.allclose(found.features[0], torch.cat([state[:, -1] for state in states]), atol=1e-6)


@pytest.mark.parametrize("family", ["roberta", "llama"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_are_as_they_were(family, training):
    model = classifier(family).train(training)
    before = state_of(model)
    extract_features(model, rows(4))
    copied = copy_head(model)
    with torch.no_grad():
        copied.delta[0].add_(1.0)
    assert same_state(before, state_of(model))


def test_a_data_set_a_loader_and_a_batch_give_the_same_features():
    model, data = classifier("bert"), rows(6)
    batch = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
    whole = extract_features(model, batch)
    for given in (data, Dataset.from_list(data), torch.utils.data.DataLoader([batch], batch_size=None)):
        found = extract_features(model, given, batch_size=4)
        assert torch.allclose(found.features, whole.features, atol=1e-6)
        assert (found.hashes == whole.hashes).all()


def test_unlabelled_rows_have_neither_labels_nor_hashes():
    data = [{"input_ids": row["input_ids"]} for row in rows(3)]
    found = extract_features(classifier("bert"), data)
    assert found.labels is None and found.hashes is None
    with pytest.raises(ValueError, match="no labels"):
        _ = found.errors


def test_hooks_of_the_head_are_not_copied():
    model, seen = classifier("roberta"), []
    model.classifier.register_forward_hook(lambda *_: seen.append(1))
    model.classifier.modules_to_save["default"].dense.register_forward_pre_hook(lambda *_: seen.append(1))
    found = extract_features(model, rows(3))
    assert len(seen) == 2
    copy_head(model)(found.features)
    assert len(seen) == 2


def test_the_copy_is_of_the_active_adapters_head():
    from peft import LoraConfig

    model, data = classifier("bert"), rows(5)
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    first = extract_features(model, data)
    model.set_adapter("other")
    other = extract_features(model, data)
    assert not torch.allclose(first.logits, other.logits) and first.adapter != other.adapter
    assert torch.allclose(copy_head(model)(other.features), other.logits, atol=1e-5)


def test_a_model_without_an_adapter_has_a_head_too():
    found = extract_features(classifier("roberta", adapt=False), rows(3))
    assert found.adapter is None and found.logits.shape == (1, 3, 3)


TINY = {"vocab_size": 50, "pad_token_id": 1}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}


def test_pictures_and_encoder_decoders_have_heads_too():
    image = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **LAYERS)).eval()
    pictures = [{"pixel_values": torch.full((3, 8, 8), float(i)), "labels": i % 3} for i in range(4)]
    assert extract_features(image, pictures).features.shape == (1, 4, 16)
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, num_labels=3, eos_token_id=2, **TINY, **sides)
    data = [row | {"input_ids": [*row["input_ids"][:-1], 2], "attention_mask": [1] * 9} for row in rows(4)]
    assert extract_features(BartForSequenceClassification(config).eval(), data).features.shape == (1, 4, 16)


# ------------------------------------------------------------------------------------------- what is refused, and how


def test_a_soft_cap_of_a_real_model_and_one_input_for_each_choice_are_refused():
    capped = Gemma2Config(num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, **LAYERS, **TINY)
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM: they differ by .*soft cap"):
        extract_features(Gemma2ForCausalLM(capped).eval(), rows(4), label_tokens=[5, 6, 7])
    choices = [{"input_ids": [[5, 6, 7], [8, 9, 10]], "labels": 0} for _ in range(3)]
    with pytest.raises(ValueError, match=r"one input an item.*multiple choice"):
        extract_features(BertForMultipleChoice(BertConfig(**LAYERS, **TINY)).eval(), choices)


class Scaled(nn.Module):
    """A classifier that halves its logits after the head."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.classifier = inner, inner.classifier

    def forward(self, **batch):
        return {"logits": self.inner(**batch)["logits"] / 2}


def test_logits_changed_after_the_head_are_refused():
    with pytest.raises(ValueError, match=r"does not reproduce the logits.*soft cap"):
        extract_features(Scaled(classifier("bert", adapt=False)), rows(3))


def test_another_module_than_the_head_is_refused():
    model = classifier("bert")
    with pytest.raises(ValueError, match="answers with 16 numbers an item, the model with 3"):
        extract_features(model, rows(3), head_module="bert.pooler.dense")
    with pytest.raises(ValueError, match=r"has no module 'nowhere'.*'classifier'"):
        extract_features(model, rows(3), head_module="nowhere")
    with pytest.raises(ValueError, match="was called 0 times"):
        extract_features(model, rows(3), head_module="classifier.original_module", check=False)


def test_a_model_without_a_classification_head_is_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"no classification head by one of the names classifier.*'0'"):
        extract_features(model, [{"input": torch.ones(3)}])
    with pytest.raises(ValueError, match="answers with numbers"):
        extract_features(classifier("bert", num_labels=1), rows(3, num_labels=1))


@pytest.mark.parametrize(
    ("label", "message"), [(3, "no class of the model, which has 3"), (-100, "no class"), (0.5, "whole numbers")]
)
def test_labels_out_of_range_are_refused(label, message):
    data = rows(3)
    data[1]["labels"] = label
    if isinstance(label, float):
        for row in data:
            row["labels"] = float(row["labels"])
    with pytest.raises(ValueError, match=message):
        extract_features(classifier("bert"), data)


def test_answers_that_are_not_finite_are_refused():
    for family in ("bert", "llama"):
        model = copy.deepcopy(classifier(family))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.inf)
        with pytest.raises(ValueError, match="not finite"):
            extract_features(model, rows(3), check=False)


def test_a_disabled_adapter_is_refused():
    model = classifier("bert")
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        extract_features(model, rows(3))
