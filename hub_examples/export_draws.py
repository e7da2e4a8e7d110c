"""Write K draws of an adapter as ordinary LoRAs, check every one of them, and print the command that serves them.

    python hub_examples/export_draws.py --adapter runs/bayesian/adapter --draws draws --num-samples 8
    python hub_examples/export_draws.py --offline

A server that knows LoRA then answers like the posterior: the client averages over its K model names, as
`serve_draws.py ask` does.
"""

from pathlib import Path

import torch
import typer
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_calib
from peft_calib.demo import tiny_language_model


def offline_adapter(folder: Path) -> str:
    """A posterior whose draws differ, on a tiny language model."""
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model(folder / "tiny"))
    config = peft_calib.BayesianLoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], num_train_examples=100
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():  # as if it had been trained
        if parameter.requires_grad and "mean" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def main(
    adapter: str = "runs/bayesian/adapter",
    draws: Path = Path("draws"),
    num_samples: int = 8,
    seed: int = 0,
    offline: bool = False,
) -> None:
    """Export, load each folder by stock PEFT, and compare its logits with those of the draw."""
    if offline:
        adapter, num_samples = offline_adapter(draws.parent / "made"), 3
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    base = model.peft_config["default"].base_model_name_or_path
    batch = AutoTokenizer.from_pretrained(base)("Is the sky blue? Answer yes or no:", return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    peft_calib.export_lora(model, draws, num_samples=num_samples, seed=seed)

    with torch.no_grad(), peft_calib.draws(model, num_samples=num_samples, seed=seed):
        expected = model(**inputs).logits  # draw k in row k
    for k in range(num_samples):
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), draws / f"draw-{k}").eval()
        with torch.no_grad():
            difference = (stock(**inputs).logits[0] - expected[k]).abs().max().item()
        if difference > 1e-4 * expected.abs().max().item():
            raise SystemExit(f"draw-{k} differs from the draw by {difference:.2e}")
        print(f"draw-{k} is draw {k}: logits within {difference:.1e}")
    spread = expected[:, -1].softmax(-1).std(0).max().item()
    print(f"largest standard deviation of a probability over the draws: {spread:.4f}\n\nServe them with\n")
    print(f"  python hub_examples/serve_draws.py serve --base {base} --draws {draws} --engine vllm")


if __name__ == "__main__":
    typer.run(main)
