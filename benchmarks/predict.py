"""Cost of K draws in units of one deterministic forward, beside K forwards one after another and flipout.

There are two kinds of K forwards: "sequential" is ours with one draw a pass, which forms logits where they are read;
"sequential, all logits" is what libraries of sampled LoRA do, a plain forward a draw with the logits of every position
over the whole vocabulary, of which the answer tokens of the last position are then read.

All arms of a shape run in turn in one process; the medians of their ratios to the deterministic forward of the same
turn are the result. On a CPU the time is that of the processor, so that other programs of the machine do not count;
use one thread there. Flipout (Wen et al. 2018, arXiv 1803.04386; here as in BLoB) draws a sign for each row, token and
feature of every adapted layer, so it needs a forward of the whole model a sample.

    python benchmarks/predict.py --output benchmarks/results/predict.json
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from harness import DEVICE, describe_machine, parser, seconds, take_turns, write
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_calib import BayesianLoraConfig, draws, predict
from peft_calib.tuners.layer import FactorLinear

SHAPES = {"short prompt": (1, 8), "decode": (1, 1), "prompts": (4, 64)}
SIZES = {
    "12x384": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=8, intermediate_size=1024),
    "1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, intermediate_size=8192),
}
TARGETS = ["q_proj", "v_proj"]


def build(size: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], num_key_value_heads=8, vocab_size=32000, max_position_embeddings=256)
    return LlamaForCausalLM(config).to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32).eval()


def bayesian(size: str, **fields) -> PeftModel:
    config = BayesianLoraConfig(r=8, target_modules=TARGETS, init_sd=0.1, **fields)
    model = get_peft_model(build(size), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@contextmanager
def flipout(model: PeftModel, seed: int):
    """Sampled A with a random sign for each token and feature, as BLoB does it, in every adapted layer."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def perturb(layer: FactorLinear, args: tuple, output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        A, B = layer.factors("default")
        noise = torch.randn(A.shape, generator=generator, device=x.device, dtype=A.dtype) * 0.1
        signs_in = torch.empty_like(x).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        shape = (*x.shape[:-1], len(A))
        signs_out = torch.empty(shape, device=x.device, dtype=x.dtype).bernoulli_(0.5, generator=generator)
        hidden = ((x * signs_in).to(A.dtype) @ noise.t()) * signs_out.mul_(2).sub_(1).to(A.dtype)
        return output + (hidden @ B.t() * layer.scaling["default"]).to(output.dtype)

    layers = [m for m in model.modules() if isinstance(m, FactorLinear)]
    handles = [layer.register_forward_hook(perturb) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def interleaved(arms: dict[str, Callable[[], object]], unit: str, turns: int) -> dict:
    """Median ratio of every arm to the unit, with quartiles."""
    found = take_turns({name: partial(seconds, run) for name, run in arms.items()}, unit, turns)
    return {
        name: {
            "ratio": round(entry["median_ratio"], 3),
            "quartiles": [round(end, 3) for end in entry["ratio_quartiles"]],
            "median_seconds": round(entry["median_seconds"], 5),
        }
        for name, entry in found.items()
    }


def cost_of_draws(size: str, rows: int, tokens: int, K: int, turns: int) -> dict:
    """All ways to K draws, with all layers stochastic and with the last two."""
    model, last_two = bayesian(size), bayesian(size, layers_to_transform=_last(size, 2))
    ids = torch.randint(5, 8000, (rows, tokens), device=DEVICE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seeds = iter(range(10**9))  # a new seed each time, so that the law draws anew and no factors are kept

    def ask(which: PeftModel, how: str, **options):
        return lambda: predict(
            which, batch, how, num_samples=K, seed=next(seeds), label_tokens=[5, 6, 7, 8], **options
        )

    def run_flipout():
        for _ in range(K):
            with flipout(model, next(seeds)):
                predict(model, batch, "mean", label_tokens=[5, 6, 7, 8])

    def run_plain():
        p = 0
        for k in range(K):
            with torch.no_grad(), draws(model, 1, seed=0, first=k):
                p = p + model(**batch).logits[:, -1, [5, 6, 7, 8]].softmax(-1) / K

    arms = {
        "mean": ask(model, "mean"),
        "sample": ask(model, "sample"),
        "sequential": ask(model, "sample", memory_budget=1),
        "sequential, all logits": run_plain,
        "flipout": run_flipout,
        "late, last 2 layers": ask(last_two, "late"),
        "sample, last 2 layers": ask(last_two, "sample"),
    }
    result = interleaved(arms, "mean", turns)
    result["sample / sequential"] = round(result["sample"]["ratio"] / result["sequential"]["ratio"], 3)
    plain = result["sequential, all logits"]["ratio"]
    result["sample / sequential, all logits"] = round(result["sample"]["ratio"] / plain, 3)
    result["late: forwards reported"] = round(arms["late, last 2 layers"]().num_forwards, 3)
    return result


def _last(size: str, count: int) -> list[int]:
    depth = SIZES[size]["num_hidden_layers"]
    return list(range(depth - count, depth))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=15)
    options.add_argument("--draws", type=int, default=8)
    options.add_argument("--size", choices=SIZES, default="12x384")
    args = options.parse_args()
    results = {"machine": describe_machine(), "size": SIZES[args.size], "draws": args.draws, "turns": args.turns}
    for name, (rows, tokens) in SHAPES.items():
        entry = cost_of_draws(args.size, rows, tokens, args.draws, args.turns)
        results[f"{name}, B={rows}, T={tokens}"] = entry
        figures = {arm: v["ratio"] if isinstance(v, dict) else v for arm, v in entry.items()}
        print(name, figures, flush=True)
    write(args.output, results)


if __name__ == "__main__":
    main()
