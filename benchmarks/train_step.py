"""Cost of a training step against PEFT's LoRA with the same r, targets, model and batch.

Beside this package's methods run PEFT's own that are nearest to them: PVeRA and MonteCLoRA draw their updates, too.
Times are taken in one process, the methods in turn, and compared turn by turn; the medians of the ratios to LoRA are
the result. Peak memory is the peak resident size of a process of its own for each method (the allocator's peak on a
GPU).

    python benchmarks/train_step.py --output benchmarks/results/train_step.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe_machine
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    logging,
)

from peft_calib import BayesianLoraConfig, HyperLoraConfig
from peft_calib.demo.training import embedded_model


def bayesian(**fields) -> BayesianLoraConfig:
    return BayesianLoraConfig(num_train_examples=1000, **fields)


def bayesian_with_all(**fields) -> BayesianLoraConfig:
    return bayesian(flow="maf", conditional_noise="projected", **fields)


METHODS = {
    "lora": LoraConfig,
    "hyper-lora": HyperLoraConfig,
    "bayesian-lora": bayesian,
    "bayesian-lora with flow and noise": bayesian_with_all,
}
try:  # methods of recent versions of PEFT
    from peft import PveraConfig
    from peft.tuners.lora.config import MontecloraConfig
except ImportError:
    pass
else:
    METHODS["pvera"] = PveraConfig
    METHODS["monteclora"] = lambda **fields: LoraConfig(monteclora_config=MontecloraConfig(), **fields)
MODELS = ("minilm", "encoder-12x768")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    """One method on one model: a step is forward, backward and an AdamW update.

    Args:
        config_class: Makes the configuration.
        model: Name of the base model, or a function that builds it.
        rows: Rows of the batch.
        tokens: Tokens of a row.
        dtype: Precision of the base model.
    """

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
        self.model = get_peft_model(base, config).to(DEVICE).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(
            p.numel() for n, p in self.model.named_parameters() if p.requires_grad and "classifier" not in n
        )
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        ids = torch.randint(5, min(20_000, base.config.vocab_size), (rows, tokens), device=DEVICE)
        labels = ids if causal else torch.randint(base.config.num_labels, (rows,), device=DEVICE)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def backward(self) -> None:
        """Run a forward and its backward."""
        self.model(**self.batch).loss.backward()

    def step(self) -> float:
        """Run one step and return its seconds."""
        start = _now()
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return _now() - start


def _now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare_times(methods: dict[str, Callable], model: str, rows: int, tokens: int, rounds: int) -> dict[str, dict]:
    """Medians and quartiles of the ratios to LoRA, the methods taking steps in turn."""
    return take_turns({name: Arm(config_class, model, rows, tokens) for name, config_class in methods.items()}, rounds)


def take_turns(arms: dict[str, Arm], rounds: int) -> dict[str, dict]:
    """Have arms step in turn; medians and quartiles of the ratios to the arm "lora"."""
    for arm in arms.values():
        arm.step()
        arm.step()
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for method in names[turn % len(names) :] + names[: turn % len(names)]:  # no method is always the first
            seconds[method].append(arms[method].step())
    entry: dict = {method: {"trainable_parameters": arm.trainable} for method, arm in arms.items()}
    for method, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds["lora"], strict=True))
        entry[method] |= {
            "median_seconds": statistics.median(times),
            "median_ratio": statistics.median(ratios),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        }
    return entry


def peak_memory(method: str, model: str, rows: int, tokens: int, module: str = "train_step") -> int:
    """Bytes at the peak of a process that takes three steps with one of the `METHODS` of a module."""
    arguments = f"{model!r}, {rows}, {tokens}"
    code = f"import train_step, {module} as m; train_step.print_peak(m.METHODS[{method!r}], {arguments})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return int(run.stdout.split()[-1])


def peak_resident_size() -> int:
    """Bytes; from the kernel's own mark where there is one, since `ru_maxrss` starts at what the parent had."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_peak(config_class: Callable[..., PeftConfig], model: str, rows: int, tokens: int) -> None:
    logging.set_verbosity_error()
    arm = Arm(config_class, model, rows, tokens)
    for _ in range(3):
        arm.step()
    print(torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_resident_size())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--output", type=Path, help="JSON file; figures of other models in it are kept")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    for model in args.models:
        entry = compare_times(METHODS, model, args.rows, args.tokens, args.rounds)
        peaks = {method: peak_memory(method, model, args.rows, args.tokens) for method in METHODS}
        for method, peak in peaks.items():
            entry[method] |= {"peak_memory_bytes": peak, "peak_memory_ratio": peak / peaks["lora"]}
        batch = {"rows": args.rows, "tokens": args.tokens}
        results[model] = {"machine": describe_machine(), "batch": batch, "rounds": args.rounds, "methods": entry}
        for method, found in entry.items():
            memory = found["peak_memory_ratio"]
            print(f"{model}: {method}: step x{found['median_ratio']:.3f}, peak memory x{memory:.3f}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
