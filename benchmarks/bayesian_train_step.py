"""Cost of BayesianLoRA: a training step and peak memory against LoRA, PVeRA and MonteCLoRA, and K draws in one pass.

All methods take steps in turn in one process; ratios are formed round by round and their medians reported.

    python benchmarks/bayesian_train_step.py --output benchmarks/results/bayesian_train_step.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import train_step
from machine import describe_machine
from peft import LoraConfig, PveraConfig
from peft.tuners.lora.config import MontecloraConfig
from train_step import Arm, _now
from transformers import logging

from peft_calib import BayesianLoraConfig
from peft_calib.tuners import Draw


def monteclora(**fields) -> LoraConfig:
    return LoraConfig(monteclora_config=MontecloraConfig(), **fields)


def bayesian(**fields) -> BayesianLoraConfig:
    return BayesianLoraConfig(num_train_examples=1000, **fields)


def bayesian_flow(**fields) -> BayesianLoraConfig:
    return BayesianLoraConfig(num_train_examples=1000, flow="maf", conditional_noise="projected", **fields)


METHODS = {
    "lora": LoraConfig,
    "bayesian-lora": bayesian,
    "bayesian-lora with flow and noise": bayesian_flow,
    "pvera": PveraConfig,
    "monteclora": monteclora,
}
train_step.METHODS = METHODS


def compare_steps(model: str, rows: int, tokens: int, rounds: int) -> dict:
    arms = {method: Arm(method, model, rows, tokens) for method in METHODS}
    for arm in arms.values():
        arm.step()
        arm.step()
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    names = list(METHODS)
    for index in range(rounds):
        for method in names[index % len(names) :] + names[: index % len(names)]:  # no method is always first
            seconds[method].append(arms[method].step())
    entry = {"median_seconds": {m: statistics.median(times) for m, times in seconds.items()}, "median_ratio": {}}
    entry["ratio_quartiles"], entry["trainable_parameters"] = {}, {m: arm.trainable for m, arm in arms.items()}
    for method in names[1:]:
        ratios = sorted(a / b for a, b in zip(seconds[method], seconds["lora"], strict=True))
        entry["median_ratio"][method] = statistics.median(ratios)
        entry["ratio_quartiles"][method] = [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]]
    return entry


def compare_draws(model: str, rows: int, tokens: int, num_samples: int, rounds: int) -> dict:
    """K draws in one pass against the same K draws one at a time, and against K deterministic forwards."""
    arm = Arm("bayesian-lora", model, rows, tokens)
    network = arm.model.eval()
    holder = network.base_model.get_holder(network.get_base_model())
    batch = {key: value for key, value in arm.batch.items() if key != "labels"}
    repeated = {key: value.repeat(num_samples, 1) for key, value in batch.items()}

    def timed(draws: list[Draw | None], inputs: dict) -> float:
        start = _now()
        for draw in draws:
            holder.draw = draw
            network(**inputs)
        holder.draw = None
        return _now() - start

    together, apart, mean = [], [], []
    with torch.inference_mode():
        for seed in range(-1, rounds):
            one_pass = timed([Draw("sample", num_samples, seed)], repeated)
            one_by_one = timed([Draw("sample", 1, seed, k) for k in range(num_samples)], batch)
            deterministic = timed([None] * num_samples, batch)
            if seed >= 0:  # the first round warms up
                together.append(one_pass), apart.append(one_by_one), mean.append(deterministic)
    return {
        "num_samples": num_samples,
        "one_pass_over_one_at_a_time": statistics.median(a / b for a, b in zip(together, apart, strict=True)),
        "one_at_a_time_over_deterministic": statistics.median(a / b for a, b in zip(apart, mean, strict=True)),
    }


def peak_memory(method: str, model: str, rows: int, tokens: int) -> int:
    code = f"import bayesian_train_step, train_step as t; t.print_peak({method!r}, {model!r}, {rows}, {tokens})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return int(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--models", nargs="+", default=list(train_step.MODELS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = {"machine": describe_machine(), "batch": {"rows": args.rows, "tokens": args.tokens}}
    results["rounds"] = args.rounds
    # first: a child process starts with the peak of its parent, which is small before any model is built here
    peaks = {m: {x: peak_memory(x, m, args.rows, args.tokens) for x in METHODS} for m in args.models}
    for model in args.models:
        entry = compare_steps(model, args.rows, args.tokens, args.rounds)
        entry["peak_memory_bytes"] = peaks[model]
        entry["peak_memory_ratio"] = {m: peaks[model][m] / peaks[model]["lora"] for m in METHODS if m != "lora"}
        entry["draws"] = compare_draws(model, 4, args.tokens, 8, max(3, args.rounds // 5))
        results[model] = entry
        for method, ratio in entry["median_ratio"].items():
            print(f"{model}: {method}: step x{ratio:.3f}, peak memory x{entry['peak_memory_ratio'][method]:.3f}")
        print(f"{model}: {entry['draws']}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
