"""Everything that only an accelerator can tell, in one run of at most six minutes: `make gpu`.

Five parts, each of which begins only while there is time left for it and writes its figures when it ends:

- tests: what `tests/` marks with `gpu`;
- steps: time and peak memory of a training step of every method against PEFT's LoRA, a 12 x 768 encoder and a Llama of
  a billion parameters, base in bfloat16, the methods in turn;
- traffic: copies between host and device in a forward and its backward, and how often the host waits for the device;
- predict: K draws in units of one forward (`predict.py`);
- compiled: a step through `torch.compile`, against LoRA's compiled step.

Where there is no accelerator the same parts run with the CPU in its place (`device.StandIn`) on small models, which
shows that the script runs, and nothing else.

    python benchmarks/gpu_check.py --output-dir benchmarks/results/gpu
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import predict
import torch
import train_step
from device import Cuda, StandIn
from harness import describe_machine
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, logging

from peft_calib import CurveLoraConfig

METHODS = {name: train_step.METHODS["all"][name] for name in ("lora", "hyper-lora", "bayesian-lora")}
METHODS |= {"curve-lora": CurveLoraConfig, "curve-lora, two points": partial(CurveLoraConfig, jsd_weight=0.2)}
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
#: Name of a base model: how it is built, rows and tokens of its batch.
BASES: dict[str, tuple[str | Callable, int, int]] = {
    "encoder-12x768": ("encoder-12x768", 32, 128),
    "llama-1b": ("llama-1b", 4, 256),
}
SMALL_BASES: dict[str, tuple[str | Callable, int, int]] = {
    "encoder": (lambda: BertForSequenceClassification(BertConfig(**SMALL)), 2, 8),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), 2, 8),
}
DEVICE = Cuda() if torch.cuda.is_available() else StandIn()
ROOT = Path(__file__).parents[1]


def run_tests(small: bool, seconds: float) -> dict:
    """Outcomes of the tests that need an accelerator; on the stand-in they are collected only."""
    # without the project's own settings: the image's pytest may be older than they ask for
    options = ["-q", "-c", "/dev/null", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    options += ["--collect-only"] if small else ["-m", "gpu", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / "gpu")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
    lines = run.stdout.strip().splitlines() or [run.stderr.strip()[-500:]]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if failures:
        print(run.stdout[-6000:])
    return {"summary": re.sub(r" in [\d.]+s.*", "", lines[-1]), "failures": failures, "exit_status": run.returncode}


def steps(small: bool, seconds: float, rounds: int = 30) -> dict:
    """Step time and peak memory of every method on every base, in turn."""
    results = {}
    for name, (base, rows, tokens) in (SMALL_BASES if small else BASES).items():
        arms, peaks = {}, {}
        for method, config in METHODS.items():
            with DEVICE.peak() as peak:
                arms[method] = arm = train_step.Arm(config, base, rows, tokens, DEVICE.dtype)
                for _ in range(3):
                    arm.step()
            peaks[method] = peak["bytes"]
        entry = train_step.compare_times(arms, 2 if small else rounds)
        for method, bytes_ in peaks.items():
            entry[method] |= {"peak_memory_bytes": bytes_, "peak_memory_ratio": bytes_ / peaks["lora"]}
        results[name] = {"batch": {"rows": rows, "tokens": tokens}, "dtype": str(DEVICE.dtype), "methods": entry}
        del arms, arm
        torch.cuda.empty_cache()
    return results


def traffic(small: bool, seconds: float) -> dict:
    """What crosses in a forward and its backward, beside what crosses for LoRA."""
    base, rows, tokens = next(iter((SMALL_BASES if small else BASES).values()))
    results = {}
    for method, config in METHODS.items():
        arm = train_step.Arm(config, base, rows, tokens, DEVICE.dtype)
        arm.step()
        arm.step()
        with DEVICE.traffic(arm.model, arm.batch) as found:
            arm.backward()
        results[method] = dict(found)
        del arm
        torch.cuda.empty_cache()
    return results


def draws(small: bool, seconds: float) -> dict:
    """K draws in units of one deterministic forward, for as many shapes as there is time for."""
    if small:
        predict.SIZES["small"] = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=8, intermediate_size=32)
    results, start, size, longest = {}, time.monotonic(), "small" if small else "1b", 0.0
    for name, (rows, tokens) in predict.SHAPES.items():
        if time.monotonic() - start + longest > seconds:
            results[name] = "left out: no time"
            continue
        began = time.monotonic()
        results[name] = predict.cost_of_draws(size, rows, tokens, 8, 1 if small else 7)
        longest = max(longest, time.monotonic() - began)
        torch.cuda.empty_cache()
    return results


def compiled(small: bool, seconds: float) -> dict:
    """Compiled steps against LoRA's, and how many graphs each took."""
    base, rows, tokens = next(iter((SMALL_BASES if small else BASES).values()))
    start, times = time.monotonic(), {}
    results: dict[str, dict] = {}
    for method in ("lora", "bayesian-lora", "hyper-lora", "curve-lora"):
        if times and 1.3 * (time.monotonic() - start) / len(times) > seconds - (time.monotonic() - start):
            results[method] = {"left_out": "no time"}
            continue
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        arm = train_step.Arm(METHODS[method], base, rows, tokens, DEVICE.dtype)
        arm.model = torch.compile(arm.model, backend="eager" if small else "inductor")
        for _ in range(3):
            arm.step()
        times[method] = statistics.median(arm.step() for _ in range(2 if small else 30))
        results[method] = {
            "median_seconds": times[method],
            "ratio_to_compiled_lora": times[method] / times["lora"],
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        }
        del arm
        torch.cuda.empty_cache()
    return results


#: Parts in order, with the seconds each may take.
PARTS: dict[str, tuple[Callable, int]] = {
    "tests": (run_tests, 110),
    "steps": (steps, 80),
    "traffic": (traffic, 30),
    "predict": (draws, 60),
    "compiled": (compiled, 70),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, default=350, help="seconds for the whole run")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    small, begun = DEVICE.kind == "cpu", time.monotonic()
    machine = describe_machine() | {"device": DEVICE.name}
    file = args.output_dir / (re.sub(r"[^a-z0-9]+", "-", DEVICE.name.lower()).strip("-") + ".json")
    results = {"machine": machine, "parts": {}}
    for name in args.parts:
        function, share = PARTS[name]
        left = args.limit - (time.monotonic() - begun)
        began = time.monotonic()
        if left < share / 2:
            outcome = {"left_out": "no time"}
        else:
            try:
                outcome = function(small, min(share, left))
            except Exception as error:  # what the other parts found must not be lost
                traceback.print_exc()
                outcome = {"error": f"{type(error).__name__}: {error}"}
        results["parts"][name] = outcome
        print(f"== {name}, {time.monotonic() - began:.0f} s\n{json.dumps(outcome, indent=1)}", flush=True)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
    wrong = [name for name, found in results["parts"].items() if "error" in found or found.get("exit_status")]
    print(
        f"{file.name}: {len(args.parts) - len(wrong)} of {len(args.parts)} parts ended well; failed: {wrong or 'none'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
