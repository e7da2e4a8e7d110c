"""Calibration of BayesianLoRA on real text: MiniLM on documentation sentences, against LoRA on the same rows.

Each method is trained by the stock Trainer with the same settings. `mean` is `.eval()`, `K draws` the mean of the
draws' probabilities. Intervals and paired tests come from `peft_calib.calibration`; nothing is recalibrated.

    python benchmarks/bayesian_calibration.py --output benchmarks/results/bayesian_calibration.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from peft import LoraConfig, PeftConfig
from transformers import DataCollatorWithPadding, logging

import peft_calib
from peft_calib import BayesianLoraConfig
from peft_calib.calibration import calibration_report, compare
from peft_calib.demo.data import TextData, load_text_data
from peft_calib.demo.training import FittedAdapter, TrainingSettings, predict_logits, train_adapter
from peft_calib.trainer_callbacks import RegularizerScheduleCallback
from peft_calib.tuners import Draw

SHOWN = ("accuracy", "nll", "brier", "ece")


def probabilities(fitted: FittedAdapter, data: TextData, settings: TrainingSettings, draw: Draw | None) -> np.ndarray:
    tuner = fitted.model.base_model
    if draw is not None:
        tuner.get_holder(tuner.model).draw = draw
    logits = predict_logits(fitted.model, fitted.tokenizer, data.test, settings).astype(np.float64)
    if draw is not None:
        tuner.get_holder(tuner.model).draw = None
    return torch.softmax(torch.from_numpy(logits), -1).numpy()


def of_draws(fitted: FittedAdapter, data: TextData, settings: TrainingSettings, num_samples: int) -> dict:
    draws = [probabilities(fitted, data, settings, Draw("sample", 1, 0, k)) for k in range(num_samples)]
    mean = np.mean(draws, axis=0)
    entropy = [-(p * np.log(np.clip(p, 1e-12, 1))).sum(-1) for p in (mean, *draws)]
    return {
        "mean": probabilities(fitted, data, settings, None),
        f"{num_samples} draws": mean,
        "mutual_information": float(np.mean(entropy[0] - np.mean(entropy[1:], axis=0))),
    }


def spread(fitted: FittedAdapter) -> dict:
    law = fitted.model.base_model.get_law()
    sd = torch.cat([stack.sd(torch.float32).detach().flatten() for stack in law.cores.values()])
    low, median, high = torch.quantile(sd, torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"start": law.config.init_sd, "median": median, "decile": low, "ninth_decile": high, "kl": float(law.kl())}


def bayesianized(fitted: FittedAdapter, data: TextData, settings: TrainingSettings, epochs: int) -> FittedAdapter:
    rows = data.train.map(
        lambda batch: dict(fitted.tokenizer(batch["text"], truncation=True, max_length=settings.max_length)),
        batched=True,
        remove_columns=["text"],
    )
    batches = torch.utils.data.DataLoader(
        rows.with_format("python"),
        batch_size=settings.batch_size,
        collate_fn=DataCollatorWithPadding(fitted.tokenizer),
    )
    model = peft_calib.bayesianize(fitted.model, batches, num_epochs=epochs)
    return FittedAdapter(model, fitted.tokenizer, 0, 0.0)


def run(data: TextData, settings: TrainingSettings, kl_weights: list[float], num_samples: int) -> dict:
    labels = np.asarray(data.test["label"])
    common = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    configs: dict[str, PeftConfig] = {"LoRA": LoraConfig(**common)}
    for weight in kl_weights:
        configs[f"BayesianLoRA, kl_weight {weight:g}"] = BayesianLoraConfig(
            **common, kl_weight=weight, num_train_examples=len(data.train)
        )
    predictions: dict[str, np.ndarray] = {}
    extra: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in configs.items():
            fitted = train_adapter(config, data, settings, scratch, callbacks=[RegularizerScheduleCallback()])
            extra[name] = {"trainable_parameters": fitted.trainable_parameters, "seconds": fitted.seconds}
            if name == "LoRA":
                predictions[name] = probabilities(fitted, data, settings, None)
                name, fitted = "bayesianize(LoRA)", bayesianized(fitted, data, settings, 4)
                extra[name] = {}
            found = of_draws(fitted, data, settings, num_samples)
            extra[name] |= {"mutual_information": found.pop("mutual_information"), "spread": spread(fitted)}
            predictions.update({f"{name}, {how}": p for how, p in found.items()})
            print(
                name,
                {
                    key: round(calibration_report(p, labels, confidence_level=None)[key], 3)
                    for p in found.values()
                    for key in SHOWN
                },
                flush=True,
            )
    entries = {}
    for name, p in predictions.items():
        report = calibration_report(p, labels).to_dict()
        entries[name] = {key: {"value": report[key], "interval": report["intervals"][key]} for key in SHOWN}
        entries[name]["ece"]["noise_floor"] = report["noise_floor"]["ece"]
        if name != "LoRA":
            entries[name]["against_lora"] = compare(predictions["LoRA"], p, labels, names=("LoRA", name)).verdict
    return {"methods": entries, "training": extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kl-weights", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results: dict = {"machine": describe_machine(), "epochs": args.epochs, "seeds": {}}
    for seed in args.seeds:
        data = load_text_data(max_train_rows=args.rows)
        results |= {"data": data.name, "train_rows": len(data.train), "test_rows": len(data.test)}
        settings = TrainingSettings(epochs=args.epochs, seed=seed)
        results["seeds"][str(seed)] = run(data, settings, args.kl_weights, args.num_samples)
        if args.output:
            args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
