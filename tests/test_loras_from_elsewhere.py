"""A LoRA that another tool trained: from its folder to a served, calibrated probability."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_served import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_calib
from peft_calib import predict_served
from peft_calib.draws_index import write_draws_index
from peft_calib.provenance.splits import read_split

PAGE = Path(__file__).parents[1] / "docs" / "elsewhere.md"
WORDS = ("day", "night")


def prompts(count: int, seed: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    words = "the sun moon lamp work sleep bright dark long short".split()
    texts = [f"{' '.join(rng.choice(words, 5))} {seed} {row} is it" for row in range(count)]
    return texts, [WORDS[int(label)] for label in rng.integers(0, 2, count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_decoder_folder) -> Path:
    """What TRL's SFTTrainer leaves."""
    trl = pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("elsewhere")
    texts, labels = prompts(16, seed=0)
    rows = Dataset.from_dict({"prompt": texts, "completion": [f" {label}" for label in labels]})
    args = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        bf16=False,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(tiny_decoder_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder_folder)
    tokenizer.eos_token = tokenizer.sep_token
    trainer = trl.SFTTrainer(base, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()
    return folder


def as_left_by(tool: str, trained: Path, place: Path) -> Path:
    """The same adapter among what other tools write beside it, and as they write its configuration."""
    shutil.copytree(trained, place, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((place / "adapter_config.json").read_text())
    if tool == "Axolotl":
        (place / "axolotl_config.yaml").write_text("adapter: lora\n")
        (place / "debug.log").write_text("")
    elif tool == "LLaMA-Factory":
        (place / "trainer_state.json").write_text("{}")
        (place / "all_results.json").write_text("{}")
        config["inference_mode"] = False
    elif tool == "Unsloth":
        names = "|".join(sorted({name.rpartition(".")[2] for name in config["target_modules"]}))
        config["target_modules"] = rf"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:{names}).*?)"
        config["auto_mapping"] = {"base_model_class": "LlamaForCausalLM", "parent_library": "x", "unsloth_fixed": True}
        config["a_field_of_tomorrow"] = None
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("tool", ["TRL", "Axolotl", "LLaMA-Factory", "Unsloth"])
def test_from_a_folder_to_a_served_calibrated_probability(tool, trained, tmp_path, tiny_decoder_folder):
    folder = as_left_by(tool, trained, tmp_path / "lora")
    with pytest.warns(UserWarning, match="has no temperature"):
        plain = peft_calib.load(folder, device="cpu", label_tokens=WORDS)
    texts, labels = prompts(120, seed=1)
    found = plain.calibrate(texts, labels)
    assert found.artefact.ways["mean"].integer("num_samples") == 1
    found.save(tmp_path / "calibrated")
    again = peft_calib.load(tmp_path / "calibrated", device="cpu")
    fresh, _ = prompts(5, seed=2)
    out = again.predict(fresh)
    assert torch.equal(out.probabilities, found.predict(fresh).probabilities)
    assert out.label_names == WORDS and out.temperature is not None
    assert len(next(iter(read_split(tmp_path / "calibrated").calibrated_on.values()))) == 120
    served = tmp_path / "served"
    shutil.copytree(tmp_path / "calibrated", served / "draw-0")
    write_draws_index(served, ["draw-0"], None)
    with serving(tiny_decoder_folder, served) as url:
        there = predict_served(url, fresh, adapter=tmp_path / "calibrated", draws=["draw-0"])
    assert there.temperature == out.temperature
    torch.testing.assert_close(there.probabilities, out.probabilities, rtol=0, atol=1e-5)


def test_it_is_calibrated_and_not_by_chance(trained):
    """Labels drawn from the model at T = 3 are found at T = 3."""
    plain = peft_calib.load(trained, device="cpu", label_tokens=WORDS, recalibrate=False)
    texts, _ = prompts(600, seed=3)
    p = plain.predict(texts).probabilities
    flatter = torch.softmax(p.log() / 3, -1)[:, 1].numpy()
    labels = (np.random.default_rng(0).uniform(size=600) < flatter).astype(int)
    fitted = plain.calibrate(texts, labels.tolist()).predict(texts[:2]).temperature
    direct = peft_calib.calibration.TemperatureScaling().fit(p.log().numpy(), labels)
    assert fitted == pytest.approx(direct.temperature, rel=1e-6)


def test_refusals(trained):
    predictor = peft_calib.load(trained, device="cpu", label_tokens=WORDS, recalibrate=False)
    texts, labels = prompts(40, seed=4)
    with pytest.raises(ValueError, match="give labels="):
        predictor.calibrate(texts)
    with pytest.raises(ValueError, match="40 rows and 39 labels"):
        predictor.calibrate(texts, labels[1:])
    with pytest.raises(ValueError, match="Row 3 has the label 'noon'"):
        predictor.calibrate(texts, [*labels[:3], "noon", *labels[4:]])
    with pytest.raises(ValueError, match="at least"):
        predictor.calibrate(texts[:5], labels[:5])
    with pytest.raises(ValueError, match="no draws"):
        predictor.calibrate(texts, labels, num_samples=4)
    assert predictor.predict(texts).temperature is None


def test_the_page_runs_as_printed(trained, tmp_path, tiny_decoder_folder, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "lora-from-elsewhere")
    texts, labels = prompts(60, seed=5)
    names = {"peft_calib": peft_calib, "held_out": texts, "labels": labels, "texts": prompts(4, seed=6)[0]}
    with pytest.warns(UserWarning, match="has no temperature"):
        exec(blocks[0].replace('[" yes", " no"]', repr(list(WORDS))), names)
    exec(blocks[1], names)
    here = names["out"]
    shutil.copytree("calibrated", "served/draw-0")
    write_draws_index(tmp_path / "served", ["draw-0"], None)
    with serving(tiny_decoder_folder, tmp_path / "served") as url:
        exec(blocks[2].replace("http://localhost:8000/v1", url).replace('"mine"', '"draw-0"'), names)
    torch.testing.assert_close(names["out"].probabilities, here.probabilities, rtol=0, atol=1e-5)
