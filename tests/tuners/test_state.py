"""What is saved is the whole adapter and nothing else; loading is strict."""

import json
import math
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, logits, perturb
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from processes import run_code
from safetensors.torch import load_file, save_file

import peft_calib
from peft_calib import BayesianLoraConfig, HyperLoraConfig


@pytest.fixture
def saved(bert, tmp_path):
    """A trained adapter with a trained head, its folder and its logits."""
    config = HyperLoraConfig(r=4, target_modules=["query", "dense"], task_type="SEQ_CLS")
    model = perturb(get_peft_model(bert.build(), config))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter", logits(model, bert.batch())


def test_law_is_stored_once_and_nothing_else(saved):
    model, folder, _ = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    law = model.base_model.get_law("default")
    prefix = "base_model.model.calib_hyper.hyperlora_law."
    assert {k.removeprefix(prefix) for k in tensors if k.startswith(prefix)} == set(law.state_dict())
    assert {k for k in tensors if not k.startswith(prefix)} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("adapter_name", ["default", "other", "law", "heads"])
def test_reload_is_bit_equal(saved, bert, low_cpu_mem_usage, adapter_name):
    _, folder, expected = saved
    model = PeftModel.from_pretrained(bert.build(), folder, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, bert.batch()), expected)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.base_model.get_law(adapter_name).training is False


def test_reload_trainable_goes_on_training(saved, bert):
    _, folder, expected = saved
    model = PeftModel.from_pretrained(bert.build(), folder, is_trainable=True)
    assert torch.equal(logits(model, bert.batch()), expected)
    model.train()(**bert.batch()).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.base_model.get_law("default").parameters())


def test_load_as_second_adapter(saved, bert, adapt):
    _, folder, expected = saved
    model = adapt(bert, adapter_name="first", init_weights=False)
    model.load_adapter(folder, "second")
    assert not torch.equal(logits(model, bert.batch()), expected)
    model.set_adapter("second")
    assert torch.equal(logits(model, bert.batch()), expected)


def test_reload_in_a_new_process(saved, bert, tmp_path):
    _, folder, expected = saved
    bert.build().save_pretrained(tmp_path / "base")
    code = f"""
import sys, torch, peft_calib
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
from families import FAMILIES, logits
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(folder)!r}, adapter_name="elsewhere")
torch.save(logits(model, FAMILIES["bert"].batch()), {str(tmp_path / "logits.pt")!r})
"""
    run_code(code)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_auto_model(bert, tmp_path):
    base = bert.build()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    config = HyperLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


@pytest.mark.parametrize("fields", [{"save_frozen_a": False}, {"a_mode": "fixed", "save_frozen_a": False}])
def test_frozen_a_drawn_again_from_the_seed(bert, adapt, tmp_path, fields):
    model = perturb(adapt(bert, **fields))
    model.save_pretrained(tmp_path)
    assert not any("_A_" in k and "heads" not in k for k in load_file(tmp_path / "adapter_model.safetensors"))
    for low in (False, True):
        again = PeftModel.from_pretrained(bert.build(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


def test_fixed_a_is_saved_by_default(bert, adapt, tmp_path):
    model = perturb(adapt(bert, a_mode="fixed"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "seed": 99}))
    again = PeftModel.from_pretrained(bert.build(), tmp_path)
    assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


def test_blending_state_is_saved(bert, adapt, tmp_path):
    model = adapt(bert, noise_mode_a="add", noise_mode_b="add", noise_alpha=0.9, noise_anneal=True, init="authors")
    model.base_model.get_law("default").set_progress(3, 10)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert.build(), tmp_path)
    assert again.base_model.get_law("default").alpha.item() == pytest.approx(0.9 * 0.7)
    assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


def test_half_precision_reload_keeps_every_bit(bert, tmp_path):
    base = bert.build().to(torch.bfloat16)
    model = perturb(get_peft_model(base, HyperLoraConfig(r=4, target_modules=["query"])))
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(bert.build().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_heads_that_peft_adds_to_the_config(bert, tmp_path, task):
    import transformers as tf

    cls = {"TOKEN_CLS": tf.BertForTokenClassification, "QUESTION_ANS": tf.BertForQuestionAnswering}[task]

    def base():
        torch.manual_seed(0)
        return cls(tf.BertConfig(**{**bert.settings, "num_labels": 2})).eval()

    def head(model):
        with torch.no_grad():
            output = model.eval()(**bert.batch())
        return output[0]

    model = perturb(get_peft_model(base(), HyperLoraConfig(task_type=task, target_modules=["query"])))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(head(again), head(model))
    assert not torch.equal(head(again), head(base()))


@pytest.mark.parametrize("trainable", [True, False])
def test_loading_an_adapter_leaves_the_others_as_they_were(saved, bert, trainable):
    _, folder, _ = saved
    model = PeftModel.from_pretrained(bert.build(), folder, is_trainable=trainable)
    model.load_adapter(folder, "second", is_trainable=not trainable)
    laws = model.base_model.get_holder(model.get_base_model()).laws
    assert {p.requires_grad for p in laws["default"].parameters()} == {trainable}


def test_all_biases_beside_a_module_saved_whole(bert, tmp_path):
    config = HyperLoraConfig(target_modules=["query"], modules_to_save=["classifier"], bias="all")
    model = perturb(get_peft_model(bert.build(), config))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert.build(), tmp_path)
    assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))


# ----------------------------------------------------------------- strictness


def edit(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


LAW = "base_model.model.calib_hyper.hyperlora_law."


def edit_config(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))


def drop(tensors):
    del tensors[LAW + "trunk.layers.0.weight"]


def add(tensors):
    tensors[LAW + "trunk.layers.7.weight"] = torch.zeros(2)


def add_elsewhere(tensors):
    tensors["base_model.model.nobody.weight"] = torch.zeros(2)


def reshape(tensors):
    tensors[LAW + "trunk.layers.0.weight"] = tensors[LAW + "trunk.layers.0.weight"][:, :-1].contiguous()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"missing tensor calib_hyper.hyperlora_law.default.trunk.layers.0.weight"),
        (add, r"unexpected tensor calib_hyper.hyperlora_law.default.trunk.layers.7.weight"),
        (add_elsewhere, r"unexpected tensor nobody.weight"),
        (reshape, r"trunk.layers.0.weight has shape \(64, 63\), expected \(64, 64\)"),
    ],
)
def test_wrong_tensors_of_an_earlier_version_are_refused_by_name(saved, bert, change, message, low_cpu_mem_usage):
    _, folder, _ = saved
    edit(folder, change)
    edit_config(folder, identity=None)  # folders saved now say which tensors they had: see test_identity.py
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(bert.build(), folder, low_cpu_mem_usage=low_cpu_mem_usage)


def test_truncated_file_is_refused_before_the_model_is_touched(saved, bert):
    _, folder, _ = saved
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    base = bert.build()
    with pytest.raises(ValueError, match="truncated or damaged"):
        PeftModel.from_pretrained(base, folder)
    assert set(base.state_dict()) == set(bert.build().state_dict())


def test_pickled_weights_are_refused(saved, bert):
    _, folder, _ = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="never pickle"):
        PeftModel.from_pretrained(bert.build(), folder)


def test_other_architecture_is_refused_and_left_as_it_was(saved, bert):
    _, folder, _ = saved
    base = bert.build(num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"slot table has 9 slots, the model offers 13, and slot \d+ is"):
        PeftModel.from_pretrained(base, folder)
    fresh = bert.build(num_hidden_layers=3)
    assert [n for n, _ in base.named_modules()] == [n for n, _ in fresh.named_modules()]
    assert not base._forward_pre_hooks


def test_failed_second_adapter_leaves_the_first_intact(saved, bert, adapt):
    _, folder, _ = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    edit_config(folder, slot_table=config["slot_table"][1:], identity=None)
    edit(folder, lambda tensors: None)  # written without our metadata, as by an earlier version
    model = perturb(adapt(bert))
    expected = logits(model, bert.batch())
    with pytest.raises(ValueError, match="slot table"):
        model.load_adapter(folder, "second")
    assert torch.equal(logits(model, bert.batch()), expected)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nothing_like_it"], "not found in the base model"),
        (["word_embeddings"], "is a Embedding, which is not supported.* embeddings and convolutions are not"),
        (["query", "LayerNorm"], "is a LayerNorm, which is not supported"),
    ],
)
def test_bad_targets_are_refused_and_the_model_left_alone(bert, targets, message):
    base = bert.build()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, HyperLoraConfig(target_modules=targets))
    assert [n for n, _ in base.named_modules()] == [n for n, _ in bert.build().named_modules()]


def test_conv_target_is_refused():
    base = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1))
    with pytest.raises(ValueError, match="is a Conv1d, which is not supported"):
        get_peft_model(base, HyperLoraConfig(target_modules=["0"]))


def test_target_inside_multihead_attention_is_refused():
    base = torch.nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="reads the weight without calling"):
        get_peft_model(base, HyperLoraConfig(target_modules=["out_proj"]))


# ----------------------------------------------------------------- out to plain LoRA


def stock_logits(folder, base_folder, out):
    """Load an exported folder in a process that has never imported this package."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
from families import FAMILIES, logits
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({str(base_folder)!r})
model = PeftModel.from_pretrained(base, {str(folder)!r})
torch.save(logits(model, FAMILIES["bert"].batch()), {str(out)!r})
assert not any(name.startswith("peft_calib") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    return torch.load(out)


def test_export_serves_without_this_package(saved, bert, tmp_path):
    model, _, expected = saved
    bert.build().save_pretrained(tmp_path / "base")
    folder = peft_calib.export_lora(model, tmp_path / "lora")
    got = stock_logits(folder, tmp_path / "base", tmp_path / "out.pt")
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"query": 2, "q_proj": 2, "q": 2, "c_fc": 3}}]
)
def test_export_has_one_rank_and_one_scale_and_the_generated_factors(family, adapt, tmp_path, fields):
    model = perturb(adapt(family, lora_alpha=6, alpha_pattern={"value": 3, "k_proj": 3}, **fields))
    expected = logits(model, family.batch())
    tensors = load_file(peft_calib.export_lora(model, tmp_path) / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    scale = config["lora_alpha"] / config["r"]
    for slot, A, B in model.base_model.get_factors():
        exported = [tensors[f"base_model.model.{slot.name}.lora_{side}.weight"] for side in "AB"]
        assert torch.equal(exported[0][: slot.r], A) and not exported[0][slot.r :].any()
        assert exported[1].shape[1] == config["r"] and not exported[1][:, slot.r :].any()
        same = torch.equal if math.frexp(slot.scaling / scale)[0] == 0.5 else torch.allclose
        assert same(exported[1][:, : slot.r] * scale, B * slot.scaling)
        if slot.scaling == scale:
            assert torch.equal(exported[1][:, : slot.r], B)
    stock = PeftModel.from_pretrained(family.build(), tmp_path)
    assert isinstance(stock.peft_config["default"], LoraConfig)
    got = logits(stock, family.batch())
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_peft_conversion_is_exact(family, adapt, tmp_path):
    from peft import save_as_lora

    model = perturb(adapt(family, r=4))
    expected = logits(model, family.batch())
    save_as_lora(tmp_path, model, rank=4)
    got = logits(PeftModel.from_pretrained(family.build(), tmp_path), family.batch())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_export_replaces_an_adapter_but_nothing_else(saved, tmp_path):
    model, *_ = saved
    peft_calib.export_lora(model, tmp_path / "lora")
    (tmp_path / "lora" / "stale").write_text("")
    peft_calib.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora" / "stale").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is no adapter folder"):
        peft_calib.export_lora(model, tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").exists()


@pytest.mark.parametrize("spelling", ["absolute", ".", "link"])
@pytest.mark.parametrize("num_samples", [None, 1])
def test_export_does_not_replace_the_adapter_itself(bert, tmp_path, monkeypatch, spelling, num_samples):
    folder = tmp_path / "adapter"
    model = get_peft_model(bert.build(), BayesianLoraConfig(target_modules=["query"]))
    model.save_pretrained(folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    place = {"absolute": folder, ".": ".", "link": tmp_path / "link"}[spelling]
    with pytest.raises(ValueError, match=r"is no plain LoRA|exists and is no folder"):
        peft_calib.export_lora(model, place, num_samples=num_samples)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_export_of_equal_draws_is_refused(bert, adapt, tmp_path):
    model = perturb(adapt(bert))
    with pytest.raises(ValueError, match="3 equal folders"):
        peft_calib.export_lora(model, tmp_path / "draws", num_samples=3)
    assert not (tmp_path / "draws").exists()
    peft_calib.export_lora(perturb(adapt(bert, a_mode="random", seed=0)), tmp_path / "draws", num_samples=3)


def test_export_errors(saved, bert):
    model, folder, _ = saved
    with pytest.raises(ValueError, match="There is no adapter 'nobody'"):
        peft_calib.export_lora(model, folder, adapter_name="nobody")
    with pytest.raises(TypeError, match=r"takes a model with a peft_calib adapter.*which has none"):
        peft_calib.export_lora(bert.build(), folder)


@pytest.mark.parametrize("seed", [None, 4])
def test_random_a_needs_a_seed_to_become_one_adapter(bert, adapt, tmp_path, seed):
    model = perturb(adapt(bert, a_mode="random", **{"seed": seed} if seed is not None else {}))
    actions = [
        lambda: peft_calib.export_lora(model, tmp_path / "lora"),
        lambda: model.merge_adapter(),
    ]
    for action in actions:
        if seed is None:
            with pytest.raises(ValueError, match="Set seed in the config"):
                action()
        else:
            action()


def test_trained_bias_is_saved_and_not_exported(bert, tmp_path):
    model = get_peft_model(bert.build(), HyperLoraConfig(target_modules=["query"], bias="hyperlora_only"))
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(bert.build(), tmp_path / "adapter")
    assert torch.equal(logits(again, bert.batch()), logits(model, bert.batch()))
    with pytest.raises(ValueError, match="trains biases"):
        peft_calib.export_lora(model, tmp_path / "lora")


def test_state_dict_functions_under_another_name(bert, adapt):
    model = perturb(adapt(FAMILIES["bert"], adapter_name="mine"))
    state = get_peft_model_state_dict(model, adapter_name="mine")
    assert all(".mine" not in key for key in state)


def test_a_file_that_is_no_peft_configuration_is_what_peft_says(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"words": "none of ours"}')
    with pytest.raises(TypeError, match=r"adapter_config\.json.*missing required keys.*Restore the folder"):
        HyperLoraConfig.from_pretrained(tmp_path)
