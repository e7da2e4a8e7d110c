"""Cost of a training step against PEFT's LoRA with the same r, targets, model and batch.

Beside this package's methods run PEFT's own that are nearest to them: PVeRA and MonteCLoRA draw their updates, too.
Times are those of the processor (the clock's on a GPU), taken in one process, the methods in turn, and compared turn
by turn; the medians of the ratios to LoRA are the result. "floor" is the base with a gradient to its inputs and no
adapter: what an adapter costs by itself is the distance from it, given as a share of LoRA's. Peak memory is the peak
resident size of a process of its own for each method (the allocator's peak on a GPU).

    python benchmarks/train_step.py --output benchmarks/results/train_step.json
    python benchmarks/train_step.py --methods curve --output benchmarks/results/curve_train_step.json

The methods "curve" are the parts of a CurveLoRA step, FLC(3,2) with r = 8 in all linear maps: one point a step; two
points and the diversity term; and one point with either perturbation of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import DEVICE, alone, describe_machine, kept, parser, resident_bytes, seconds, take_turns, write
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig
from peft_calib.runs.embedded import embedded_model

bayesian = partial(BayesianLoraConfig, num_train_examples=1000)
curve = partial(CurveLoraConfig, num_anchors=3, num_handles=2)
METHODS: dict[str, dict[str, Callable[..., PeftConfig]]] = {
    "all": {
        "lora": LoraConfig,
        "hyper-lora": HyperLoraConfig,
        "bayesian-lora": bayesian,
        "curve-lora": curve,
        "bayesian-lora with flow and noise": partial(bayesian, flow="maf", conditional_noise="projected"),
    },
    "curve": {
        "lora": LoraConfig,
        "one point": curve,
        "two points, diversity term": partial(curve, jsd_weight=0.2),
        "one point, local noise": partial(curve, flat_rho=0.25, flat_noise="local"),
        "one point, dense noise": partial(curve, flat_rho=0.25, flat_noise="dense"),
    },
}
try:  # methods of recent versions of PEFT
    from peft import PveraConfig
    from peft.tuners.lora.config import MontecloraConfig
except ImportError:
    pass
else:
    METHODS["all"]["pvera"] = PveraConfig
    METHODS["all"]["monteclora"] = lambda **fields: LoraConfig(monteclora_config=MontecloraConfig(), **fields)
MODELS = ("minilm", "encoder-12x768")
LLAMA_1B = dict(
    hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192
)


def build_base(model: str) -> nn.Module:
    """A base model by its name; "llama-1b" has random weights and 1.1 billion of them."""
    if model == "minilm":
        return AutoModelForSequenceClassification.from_pretrained(embedded_model(), num_labels=6)
    if model == "llama-1b":
        return LlamaForCausalLM(LlamaConfig(**LLAMA_1B, vocab_size=32000, max_position_embeddings=2048))
    return BertForSequenceClassification(BertConfig(num_labels=6))


class Arm:
    """One method on one model: a step is forward, backward and an AdamW update."""

    def __init__(
        self,
        config_class: Callable[..., PeftConfig],
        model: str | Callable[[], nn.Module],
        rows: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        with torch.device(DEVICE):  # a billion random weights take a while on a CPU
            base = (build_base(model) if isinstance(model, str) else model()).to(dtype)
        causal = isinstance(base, LlamaForCausalLM)
        config = config_class(r=8, target_modules="all-linear", task_type="CAUSAL_LM" if causal else "SEQ_CLS")
        self.model = self.adapted(base, config).to(DEVICE).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(
            p.numel() for n, p in self.model.named_parameters() if p.requires_grad and "classifier" not in n
        )
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        ids = torch.randint(5, min(20_000, base.config.vocab_size), (rows, tokens), device=DEVICE)
        labels = ids if causal else torch.randint(base.config.num_labels, (rows,), device=DEVICE)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def adapted(self, base: nn.Module, config: PeftConfig) -> nn.Module:
        return get_peft_model(base, config)

    def backward(self) -> None:
        self.model(**self.batch).loss.backward()

    def update(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> float:
        """Take a step, and say how many seconds it took."""
        return seconds(self.update)


class Floor(Arm):
    """No adapter: of the base the head alone is trained, and the gradient goes on to the inputs."""

    def adapted(self, base: nn.Module, config: PeftConfig) -> nn.Module:
        base.requires_grad_(False)
        base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        head = base.lm_head if isinstance(base, LlamaForCausalLM) else base.classifier
        head.requires_grad_(True)
        return base


def compare_times(arms: dict[str, Arm], rounds: int) -> dict[str, dict]:
    """Medians and quartiles of the ratios to LoRA, the arms taking steps in turn."""
    found = take_turns({name: arm.step for name, arm in arms.items()}, "lora", rounds)
    if "floor" in found:
        floor = found["floor"]["median_ratio"]
        for entry in found.values():
            entry["distance_from_floor"] = (entry["median_ratio"] - floor) / (1 - floor)
    return {name: {"trainable_parameters": arms[name].trainable, **entry} for name, entry in found.items()}


def arm_of(methods: str, method: str, model: str, batch: dict[str, int]) -> Arm:
    if method == "floor":
        return Floor(LoraConfig, model, **batch)
    return Arm(METHODS[methods][method], model, **batch)


def peak_bytes(methods: str, method: str, model: str, batch: dict[str, int]) -> int:
    """The most that this process has held after three steps with a method."""
    parser(None)  # silences the libraries
    arm = arm_of(methods, method, model, batch)
    for _ in range(3):
        arm.step()
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident_bytes("VmHWM")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", choices=METHODS, default="all")
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--rows", type=int, default=16)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    args = options.parse_args()
    results, batch = kept(args.output), {"rows": args.rows, "tokens": args.tokens}
    methods = ["floor", *METHODS[args.methods]]
    for model in args.models:
        entry = compare_times({name: arm_of(args.methods, name, model, batch) for name in methods}, args.rounds)
        calls = {name: f"peak_bytes({args.methods!r}, {name!r}, {model!r}, {batch})" for name in methods}
        peaks = {name: alone("train_step", call) for name, call in calls.items()}
        for name, found in entry.items():
            found |= {"peak_memory_bytes": peaks[name], "peak_memory_ratio": peaks[name] / peaks["lora"]}
            low, high = found["ratio_quartiles"]
            ratio = f"{found['median_ratio']:.3f} ({low:.3f} to {high:.3f})"
            share = f"{found['distance_from_floor']:.2f} of LoRA's distance from the floor"
            print(
                f"{model}: {name}: step x{ratio}, {share}, peak memory x{found['peak_memory_ratio']:.3f}", flush=True
            )
        arms = "arms" if args.methods == "curve" else "methods"  # as the files have it
        results[model] = {"machine": describe_machine(), "batch": batch, "rounds": args.rounds, arms: entry}
        write(args.output, results)


if __name__ == "__main__":
    main()
