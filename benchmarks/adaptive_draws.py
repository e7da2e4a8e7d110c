"""Draws saved by stopping row by row: MiniLM with BayesianLoRA on the demonstration's documentation sentences.

The same trained adapter predicts the same test rows with K = 16 draws and adaptively with at most 16, at several
tolerances and with several seeds.

    python benchmarks/adaptive_draws.py --output benchmarks/results/adaptive_draws.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from machine import describe_machine
from transformers import logging

from peft_calib import BayesianLoraConfig, predict_dataset
from peft_calib.demo.data import load_text_data
from peft_calib.demo.training import TrainingSettings, train_adapter


def scores(prediction, labels: torch.Tensor) -> dict:
    chosen = prediction.probabilities[torch.arange(len(labels)), labels]
    return {
        "accuracy": round(float((prediction.predictions == labels).double().mean()), 4),
        "nll": round(float(-chosen.double().log().mean()), 4),
        "average_draws": round(prediction.average_num_samples, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--train-rows", type=int)
    parser.add_argument("--test-rows", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data, settings = load_text_data(max_train_rows=args.train_rows), TrainingSettings(epochs=args.epochs)
    config = BayesianLoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS", num_train_examples=len(data.train)
    )
    with tempfile.TemporaryDirectory() as folder:
        fitted = train_adapter(config, data, settings, folder)
    rows = data.test.map(lambda row: fitted.tokenizer(row["text"], truncation=True, max_length=settings.max_length))
    rows = rows.shuffle(seed=0).select(range(min(args.test_rows or len(rows), len(rows))))
    labels = torch.tensor(rows["label"][:])
    common = {"processing_class": fitted.tokenizer, "batch_size": 64, "progress": False}
    result = {
        "machine": describe_machine(),
        "epochs": args.epochs,
        "train_rows": len(data.train),
        "test_rows": len(labels),
    }
    result["mean"] = scores(predict_dataset(fitted.model, rows, "mean", **common), labels)
    for seed in range(args.seeds):
        fixed, mirrored = (
            predict_dataset(fitted.model, rows, num_samples=16, seed=seed, antithetic=a, **common)
            for a in (False, True)
        )
        changed = int((mirrored.predictions != fixed.predictions).sum())
        entry = {"K = 16": scores(fixed, labels)}
        entry["K = 16, antithetic"] = scores(mirrored, labels) | {"rows_of_another_class": changed}
        for tolerance in (0.02, 0.05):
            options = {"num_samples": "auto", "tolerance": tolerance, "seed": seed, **common}
            adaptive = predict_dataset(fitted.model, rows, **options)
            changed = int((adaptive.predictions != fixed.predictions).sum())
            entry[f"tolerance {tolerance}"] = scores(adaptive, labels) | {"rows_of_another_class": changed}
            independent = predict_dataset(fitted.model, rows, antithetic=False, **options)
            entry[f"tolerance {tolerance}, independent draws"] = scores(independent, labels)
        result[f"seed {seed}"] = entry
        print(json.dumps(entry), flush=True)
    if args.output:
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
