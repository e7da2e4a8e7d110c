"""Cost of a CurveLoRA training step and of its parts, against PEFT's LoRA of the same rank on the same batch.

FLC(3,2) with r = 8 in all linear maps: one point a step; two points and the diversity term; and one point with either
perturbation of the weights. All arms are in one process and take steps in turn; ratios to LoRA are formed turn by turn
and their medians reported. Peak memory is that of a process of its own for each arm.

    python benchmarks/curve_train_step.py --output benchmarks/results/curve_train_step.json
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from machine import describe_machine
from peft import LoraConfig
from train_step import MODELS, compare_times, peak_memory
from transformers import logging

from peft_calib import CurveLoraConfig

curve = partial(CurveLoraConfig, num_anchors=3, num_handles=2)
METHODS = {
    "lora": LoraConfig,
    "one point": curve,
    "two points, diversity term": partial(curve, jsd_weight=0.2),
    "one point, local noise": partial(curve, flat_rho=0.25, flat_noise="local"),
    "one point, dense noise": partial(curve, flat_rho=0.25, flat_noise="dense"),
}
LIMITS = {"one point": 1.10, "two points, diversity term": 2.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
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
        peaks = {name: peak_memory(name, model, args.rows, args.tokens, "curve_train_step") for name in METHODS}
        for name, peak in peaks.items():
            entry[name] |= {"peak_memory_bytes": peak, "peak_memory_ratio": peak / peaks["lora"]}
            if name in LIMITS:
                entry[name]["limit_of_ratio"] = LIMITS[name]
        batch = {"rows": args.rows, "tokens": args.tokens}
        results[model] = {"machine": describe_machine(), "batch": batch, "rounds": args.rounds, "arms": entry}
        for name, found in entry.items():
            low, high = found["ratio_quartiles"]
            ratio = f"{found['median_ratio']:.3f} ({low:.3f} to {high:.3f})"
            print(f"{model}: {name}: step x{ratio}, peak memory x{found['peak_memory_ratio']:.3f}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
