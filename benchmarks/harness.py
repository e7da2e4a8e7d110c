"""What the benchmarks share: arguments, machine, arms in turn, processes of their own, JSON, runs to measure on."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import logging

import peft_calib
from peft_calib.calibration import log_probabilities

if TYPE_CHECKING:  # where there is little more than torch and transformers, the benchmarks of steps run without it
    from peft_calib.runs.loading import FinishedRun

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def training_arguments(folder: str, epochs: float, *, use_cpu: bool = True) -> Any:
    """The stock Trainer's arguments of a training that is measured: nothing is saved, logged or shown."""
    from transformers import TrainingArguments

    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True}
    rows = {"num_train_epochs": epochs, "per_device_train_batch_size": 32, "learning_rate": 2e-3}
    return TrainingArguments(folder, use_cpu=use_cpu, **rows, **quiet)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with the script's docstring for its help, and `--output`; the libraries are made silent."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--output", type=Path, help="JSON file; figures of other cases in it are kept")
    return found


def kept(output: Path | None) -> dict[str, Any]:
    """What an earlier call has written."""
    return json.loads(output.read_text()) if output is not None and output.exists() else {}


def write(output: Path | None, results: dict[str, Any]) -> None:
    """Write the figures with the machine they are of; nothing without a file."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def seconds(run: Callable[[], object]) -> float:
    """Of one call: the processor's own on a CPU, so that other programs do not count; on a GPU until it is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    now = time.process_time if DEVICE == "cpu" else time.perf_counter
    start = now()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return now() - start


def take_turns(arms: dict[str, Callable[[], float]], unit: str, turns: int) -> dict[str, dict[str, Any]]:
    """Median seconds of arms in turn after a first call, and ratios to one of them formed turn by turn."""
    for run in arms.values():
        run()
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # no arm is always the first
            seconds[name].append(arms[name]())
    found = {}
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds[unit], strict=True))
        found[name] = {
            "median_seconds": statistics.median(times),
            "median_ratio": statistics.median(ratios),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        }
    return found


def alone(module: str, expression: str) -> Any:
    """What an expression over a benchmark's module gives in a process of its own, whose memory is nobody else's."""
    code = f"import json, {module}; print(json.dumps({module}.{expression}))"
    line = [sys.executable, "-c", code]
    run = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def drawn_labels(generator: np.random.Generator, p: np.ndarray) -> np.ndarray:
    """One label a row from its distribution."""
    return (generator.random((len(p), 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=p.shape[1] - 1)


def trained(folder: Path, method: str, data: str = "documentation", **settings: Any) -> FinishedRun:
    """A run as `peft-calib train` makes it, on the embedded encoder, with the settings of the demonstration."""
    from rich.console import Console

    from peft_calib.demo import demo_config
    from peft_calib.runs.folder import RunFolder
    from peft_calib.runs.loading import FinishedRun
    from peft_calib.runs.training import train_in

    config, _ = demo_config(data, method=method, **settings)
    train_in(config, RunFolder(folder), Console(quiet=True))
    return FinishedRun.load(folder)


def of_rows(prediction: peft_calib.Prediction, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Log-likelihood, correctness and mutual information of each row, float64."""
    chosen = prediction.probabilities.double().gather(1, labels.unsqueeze(1)).squeeze(1)
    return {
        "log_likelihood": log_probabilities(chosen),
        "accuracy": (prediction.predictions == labels).double(),
        "mutual_information": prediction.mutual_information.double(),
    }


def point_scores(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Of the mean of K functions' probabilities (K, N, C); mutual information also of three of them at a time."""

    def of(draws: torch.Tensor) -> dict[str, float]:
        prediction = peft_calib.Prediction(sample_probabilities=draws, num_forwards=len(draws))
        return {key: float(values.mean()) for key, values in of_rows(prediction, labels).items()}

    found = of(probabilities)
    if len(probabilities) >= 3:
        triples = itertools.combinations(range(len(probabilities)), 3)
        three = [of(probabilities[list(t)])["mutual_information"] for t in triples]
        found["mutual_information_of_three"] = statistics.mean(three)
    return found


def print_scores(title: str, methods: dict[str, dict[str, float]]) -> None:
    """One line a method, with the scores of `point_scores` and what curves have beside."""
    columns = {"log_likelihood": "LL", "accuracy": "ACC", "ece": "ECE", "mutual_information": "MI"}
    columns |= {"mutual_information_of_three": "MI of 3", "barrier": "barrier"}
    print(f"{title:32}" + "".join(f"{name:>10}" for name in columns.values()))
    for method, found in methods.items():
        print(f"{method:32}" + "".join(f"{found[key]:10.3f}" if key in found else f"{'-':>10}" for key in columns))


def spread_of(values: list[float]) -> list[float]:
    """Mean, least and greatest, to four digits."""
    return [round(v, 4) for v in (statistics.mean(values), min(values), max(values))]


def resident_bytes(mark: str) -> int:
    """Resident size of this process, now (`"VmRSS"`) or at its peak (`"VmHWM"`).

    From the kernel's own marks where there are some, since `ru_maxrss` starts at what the parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{mark}:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_machine() -> dict:
    """Processor, threads, accelerator and the versions that matter; no host names or paths."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        # ours from the module: where the package runs from a checkout it is not installed
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"peft_calib": peft_calib.__version__},
    }
