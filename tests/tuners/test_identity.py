"""One digest for an adapter, live or saved; what changes its function changes it, what only trains it does not."""

import json

import pytest
import torch
from families import logits, perturb
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig, export_lora
from peft_calib.identity import METADATA_KEY, adapter_digest, folder_digest

CONFIGS = {
    "hyper": (HyperLoraConfig, {"use_rslora": True}),
    "bayesian": (BayesianLoraConfig, {"alpha_pattern": {"query": 6}}),
    "curve": (CurveLoraConfig, {"curve_modules_to_save": True}),
    "lora": (LoraConfig, {"rank_pattern": {"query": 2}}),
}


def adapted(bert, name, dtype=torch.float32):
    config, fields = CONFIGS[name]
    config = config(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "dense"], **fields)
    return perturb(get_peft_model(bert.build().to(dtype), config, adapter_name="mine"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_and_its_folder_have_one_digest(bert, tmp_path, name, dtype):
    model = adapted(bert, name, dtype)
    model.save_pretrained(tmp_path)
    digest = folder_digest(tmp_path / "mine")
    assert adapter_digest(model, "mine") == digest == adapter_digest(torch.nn.ModuleDict({"m": model})["m"])
    again = PeftModel.from_pretrained(bert.build().to(dtype), tmp_path / "mine")
    assert adapter_digest(again) == digest
    perturb(model, seed=6)
    assert adapter_digest(model, "mine") != digest
    if name != "lora":
        with safe_open(tmp_path / "mine" / "adapter_model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt", METADATA_KEY: digest}


@pytest.mark.parametrize(
    ("name", "field", "value", "counts"),
    [
        ("hyper", "lora_alpha", 16, True),
        ("hyper", "init", "authors", True),
        ("hyper", "seed", 9, False),  # A is saved
        ("hyper", "lora_dropout", 0.3, False),
        ("bayesian", "max_sd", 2.0, True),
        ("bayesian", "kl_weight", 0.1, False),
        ("curve", "eval_t", 0.5, True),
        ("curve", "jsd_weight", 0.4, False),
        ("lora", "use_rslora", True, True),
        ("lora", "inference_mode", False, False),
    ],
)
def test_fields_that_enter_the_function_count(bert, tmp_path, name, field, value, counts):
    adapted(bert, name).save_pretrained(tmp_path)
    folder = tmp_path / "mine"
    before = folder_digest(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    assert (folder_digest(folder) != before) is counts
    if counts and name != "lora":
        with pytest.raises(ValueError, match=f"adapter_config.json: {field} is .* was saved with"):
            PeftModel.from_pretrained(bert.build(), folder)


def test_a_start_that_peft_takes_from_the_base_when_it_loads_counts(bert, tmp_path):
    config = LoraConfig(r=4, target_modules=["dense"], init_lora_weights="pissa")
    model = perturb(get_peft_model(bert.build(), config))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert.build(), tmp_path)
    assert adapter_digest(model) == folder_digest(tmp_path) == adapter_digest(again)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**written, "init_lora_weights": True}))
    plain = PeftModel.from_pretrained(bert.build(), tmp_path)
    assert not torch.allclose(logits(plain, bert.batch()), logits(again, bert.batch()), atol=1e-3)
    assert folder_digest(tmp_path) == adapter_digest(plain) != adapter_digest(again)


def test_a_tensor_of_the_base_is_refused_and_the_base_is_as_it_was(bert, tmp_path):
    adapted(bert, "bayesian").save_pretrained(tmp_path)
    file = tmp_path / "mine" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "bert.encoder.layer.1.attention.self.value.weight"
    save_file({**tensors, f"base_model.model.{name}": torch.zeros(32, 32)}, file, metadata={"format": "pt"})
    for forget in (False, True):  # with the record, and as a folder of an earlier version
        if forget:
            config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
            (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps({**config, "identity": None}))
        base = bert.build()
        with pytest.raises(ValueError, match=name), pytest.warns() if forget else pytest.MonkeyPatch.context():
            PeftModel.from_pretrained(base, tmp_path / "mine")
        fresh = bert.build()
        assert base.state_dict().keys() == fresh.state_dict().keys()
        assert all(torch.equal(value, base.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_an_adapter_of_add_adapter_is_exported_whatever_its_name(bert, tmp_path):
    model = bert.build()
    model.add_adapter(HyperLoraConfig(r=4, lora_alpha=8, target_modules=["query"]), "mine")
    perturb(model, scale=0.2)
    wrapped = torch.nn.Sequential(model)
    export_lora(wrapped, tmp_path / "lora")
    got = logits(PeftModel.from_pretrained(bert.build(), tmp_path / "lora"), bert.batch())
    torch.testing.assert_close(got, logits(model, bert.batch()), rtol=1e-5, atol=1e-6)
