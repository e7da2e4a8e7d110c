"""How much a prediction from K draws depends on the seed: independent against antithetic draws, and differences.

MiniLM with BayesianLoRA is trained twice on the same rows, with and without the divergence. Then some test rows are
predicted with many seeds. Reported are the variance over the seeds of the predictive mean (averaged over rows and
classes) with independent and with antithetic draws, and that of the difference of the two models' negative
log-likelihoods when both use the same seed (common random numbers) and when they do not. Ratios have 95 % bootstrap
intervals over the seeds.

    python benchmarks/draw_variance.py --output benchmarks/results/draw_variance.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from transformers import logging

from peft_calib import BayesianLoraConfig, predict
from peft_calib.demo.data import load_text_data
from peft_calib.demo.training import FittedAdapter, TrainingSettings, train_adapter
from peft_calib.trainer_callbacks import RegularizerScheduleCallback

COMMON = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def probabilities(fitted: FittedAdapter, batch: dict, K: int, seeds: range, antithetic: bool) -> np.ndarray:
    """Predictive probabilities of every seed, float64 (seeds, rows, classes)."""
    asked = [predict(fitted.model, batch, num_samples=K, seed=seed, antithetic=antithetic) for seed in seeds]
    return torch.stack([p.probabilities.double() for p in asked]).numpy()


def mean_variance(p: np.ndarray) -> float:
    return float(p.var(axis=0, ddof=1).mean())


def nll(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean negative log-likelihood of every seed."""
    return -np.log(p[:, np.arange(len(labels)), labels]).mean(axis=1)


def ratio(a: np.ndarray, b: np.ndarray, statistic: Callable[[np.ndarray], float]) -> dict:
    """`statistic(a) / statistic(b)` with an interval from resampling the seeds of each."""
    rng = np.random.default_rng(0)
    drawn = [
        statistic(a[rng.integers(len(a), size=len(a))]) / statistic(b[rng.integers(len(b), size=len(b))])
        for _ in range(1000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": statistic(a) / statistic(b), "interval": [float(low), float(high)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-rows", type=int, default=350)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = load_text_data(max_train_rows=args.train_rows)
    settings, fitted = TrainingSettings(epochs=args.epochs), []
    with tempfile.TemporaryDirectory() as scratch:
        for weight in (1.0, 0.0):
            config = BayesianLoraConfig(**COMMON, kl_weight=weight)
            fitted.append(train_adapter(config, data, settings, scratch, [RegularizerScheduleCallback()]))
    test = data.test.shuffle(seed=0).select(range(args.rows))
    batch = dict(
        fitted[0].tokenizer(test["text"][:], padding=True, truncation=True, max_length=64, return_tensors="pt")
    )
    labels, K = np.asarray(test["label"][:]), args.num_samples
    first, others = range(args.seeds), range(args.seeds, 2 * args.seeds)
    independent = probabilities(fitted[0], batch, K, first, antithetic=False)
    antithetic = probabilities(fitted[0], batch, K, first, antithetic=True)
    same, different = (probabilities(fitted[1], batch, K, seeds, antithetic=False) for seeds in (first, others))
    common_numbers, other_numbers = (nll(independent, labels) - nll(p, labels) for p in (same, different))
    results = {
        "machine": describe_machine(),
        "train_rows": len(data.train),
        "rows": args.rows,
        "num_samples": K,
        "seeds": args.seeds,
        "variance of the predictive mean": {
            "independent": mean_variance(independent),
            "antithetic": mean_variance(antithetic),
            "antithetic / independent": ratio(antithetic, independent, mean_variance),
        },
        "variance of the predictive NLL": {
            "independent": float(nll(independent, labels).var(ddof=1)),
            "antithetic": float(nll(antithetic, labels).var(ddof=1)),
        },
        "variance of the difference of two models' NLL": {
            "same seed": float(common_numbers.var(ddof=1)),
            "different seeds": float(other_numbers.var(ddof=1)),
            "same / different": ratio(common_numbers, other_numbers, lambda x: float(x.var(ddof=1))),
        },
    }
    print(json.dumps({name: value for name, value in results.items() if name.startswith("variance")}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
