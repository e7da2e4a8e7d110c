"""What draws of BayesianLoRA cost and how much they vary: MiniLM on the demonstration's documentation sentences.

"adaptive": draws saved by stopping row by row. The same trained adapter predicts the same test rows with K = 16 draws
and adaptively with at most 16, at several tolerances and with several seeds.

"variance": how much a prediction from K draws depends on the seed. Two runs on the same rows, with and without the
divergence; some test rows are predicted with many seeds. Reported are the variance over the seeds of the predictive
mean (averaged over rows and classes) with independent and with antithetic draws, and that of the difference of the two
models' negative log-likelihoods when both use the same seed (common random numbers) and when they do not. Ratios have
95 % bootstrap intervals over the seeds.

    python benchmarks/draws.py adaptive --output benchmarks/results/adaptive_draws.json
    python benchmarks/draws.py variance --train-rows 350 --output benchmarks/results/draw_variance.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from harness import describe_machine, parser, trained, write

from peft_calib import predict, predict_dataset
from peft_calib.runs.loading import FinishedRun, read_record
from peft_calib.runs.rows import load_test_rows


def test_rows(run: FinishedRun, count: int | None) -> Dataset:
    """Some of the rows that a run has held out, encoded, with `labels`."""
    rows = load_test_rows(run.task, read_record(run.folder, run.task)).rows.shuffle(seed=0)
    return run.task.encode_prediction(rows.select(range(min(count or len(rows), len(rows)))), run.tokenizer)


def scores(prediction, labels: torch.Tensor) -> dict:
    chosen = prediction.probabilities[torch.arange(len(labels)), labels]
    return {
        "accuracy": round(float((prediction.predictions == labels).double().mean()), 4),
        "nll": round(float(-chosen.double().log().mean()), 4),
        "average_draws": round(prediction.average_num_samples, 3),
    }


def adaptive(args: argparse.Namespace, scratch: Path) -> dict:
    """Scores and draws a row with all draws and with as many as a row needs."""
    run = trained(scratch / "run", "bayesian-lora", max_train_rows=args.train_rows, epochs=args.epochs)
    rows = test_rows(run, args.test_rows)
    labels = torch.tensor(rows["labels"][:])
    common = {"processing_class": run.tokenizer, "batch_size": 64, "progress": False}
    result = {"epochs": args.epochs, "train_rows": args.train_rows, "test_rows": len(labels)}
    result["mean"] = scores(predict_dataset(run.model, rows, "mean", **common), labels)
    for seed in range(args.seeds):
        fixed, mirrored = (
            predict_dataset(run.model, rows, num_samples=16, seed=seed, antithetic=a, **common) for a in (False, True)
        )
        changed = int((mirrored.predictions != fixed.predictions).sum())
        entry = {"K = 16": scores(fixed, labels)}
        entry["K = 16, antithetic"] = scores(mirrored, labels) | {"rows_of_another_class": changed}
        for tolerance in (0.02, 0.05):
            options = {"num_samples": "auto", "tolerance": tolerance, "seed": seed, **common}
            adaptive = predict_dataset(run.model, rows, **options)
            changed = int((adaptive.predictions != fixed.predictions).sum())
            entry[f"tolerance {tolerance}"] = scores(adaptive, labels) | {"rows_of_another_class": changed}
            independent = predict_dataset(run.model, rows, antithetic=False, **options)
            entry[f"tolerance {tolerance}, independent draws"] = scores(independent, labels)
        result[f"seed {seed}"] = entry
        print(json.dumps(entry), flush=True)
    return result


def probabilities(run: FinishedRun, batch: dict, K: int, seeds: range, antithetic: bool) -> np.ndarray:
    """Predictive probabilities of every seed, float64 (seeds, rows, classes)."""
    asked = [predict(run.model, batch, num_samples=K, seed=seed, antithetic=antithetic) for seed in seeds]
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


def variance(args: argparse.Namespace, scratch: Path) -> dict:
    """Variances over the seeds, and their ratios."""
    runs = [
        trained(scratch / f"{weight}", "bayesian-lora", max_train_rows=args.train_rows, epochs=args.epochs,
                adapter={"kl_weight": weight})
        for weight in (1.0, 0.0)
    ]  # fmt: skip
    test, K = test_rows(runs[0], args.test_rows or 32), args.num_samples
    batch = runs[0].task.collator(runs[0].tokenizer)(list(test))
    labels = batch.pop("labels").numpy()
    first, others = range(args.seeds), range(args.seeds, 2 * args.seeds)
    independent = probabilities(runs[0], batch, K, first, antithetic=False)
    antithetic = probabilities(runs[0], batch, K, first, antithetic=True)
    same, different = (probabilities(runs[1], batch, K, seeds, antithetic=False) for seeds in (first, others))
    common_numbers, other_numbers = (nll(independent, labels) - nll(p, labels) for p in (same, different))
    found = {
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
    print(json.dumps(found, indent=2))
    return {"train_rows": args.train_rows, "rows": len(labels), "num_samples": K, "seeds": args.seeds, **found}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("part", choices=("adaptive", "variance"))
    options.add_argument("--epochs", type=float, default=8)
    options.add_argument("--train-rows", type=int)
    options.add_argument("--test-rows", type=int)
    options.add_argument("--num-samples", type=int, default=8, help="of variance")
    options.add_argument("--seeds", type=int, help="default: 2 of adaptive, 24 of variance")
    args = options.parse_args()
    args.seeds = args.seeds or {"adaptive": 2, "variance": 24}[args.part]
    with tempfile.TemporaryDirectory() as scratch:
        found = {"adaptive": adaptive, "variance": variance}[args.part](args, Path(scratch))
    write(args.output, {"machine": describe_machine(), **found})


if __name__ == "__main__":
    main()
