"""Calibration of BayesianLoRA on real text: MiniLM on small classification sets, against LoRA on the same rows.

Every method is trained by the stock Trainer with the same settings, for several seeds (of the rows, the head and the
order). "mean" is `.eval()`, "draws" the mean of the draws' probabilities; "+ T" is a temperature fitted on calibration
rows that nothing else has seen. Intervals and paired tests come from `peft_calib.calibration`. Runs that the output
file holds already are not repeated, so that a study may be made in parts.

    python benchmarks/bayesian_calibration.py --data trec=FOLDER sst2=FOLDER --rows trec=500 sst2=1000 \
        --output benchmarks/results/bayesian_calibration.json

A FOLDER is one that `peft_calib.demo.load_text_data` reads; without `--data` the embedded sentences are used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
from machine import describe_machine
from peft import LoraConfig
from transformers import logging

from peft_calib import BayesianLoraConfig
from peft_calib.calibration import TemperatureScaling, calibration_report, compare, log_probabilities
from peft_calib.demo.data import DOCUMENTATION, TextData, load_text_data
from peft_calib.demo.training import (
    FittedAdapter,
    TrainingSettings,
    predict_draws,
    predict_logits,
    train_adapter,
)
from peft_calib.trainer_callbacks import RegularizerScheduleCallback

SCORES = ("accuracy", "nll", "brier", "ece")
COMMON = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def logits_of(fitted: FittedAdapter, data: TextData, settings: TrainingSettings) -> list[np.ndarray]:
    """Logits of the deterministic model on the calibration and the test rows."""
    return [predict_logits(fitted.model, fitted.tokenizer, rows, settings) for rows in (data.calibration, data.test)]


def logits_of_draws(
    fitted: FittedAdapter, data: TextData, settings: TrainingSettings, num_samples: int
) -> tuple[list[np.ndarray], dict]:
    """Logarithms of the draws' mean probabilities on both, and what the draws disagree on."""
    found = [
        predict_draws(fitted.model, fitted.tokenizer, rows, settings, num_samples)
        for rows in (data.calibration, data.test)
    ]
    facts = {"mutual_information": float(found[1].mutual_information.mean()), "num_forwards": found[1].num_forwards}
    return [log_probabilities(p.probabilities.double().numpy()) for p in found], facts


def spread(fitted: FittedAdapter) -> dict:
    """Where the posterior's standard deviations ended, in units of the prior's, and the divergence in nats."""
    law = fitted.model.base_model.get_law()
    low, median, high = np.quantile(law.core_sd().numpy(), [0.1, 0.5, 0.9]).tolist()
    start = law.config.init_sd
    return {"start": start, "median": median, "decile": low, "ninth_decile": high, "kl": float(law.kl())}


def entry(logits: list[np.ndarray], data: TextData, reference: np.ndarray | None) -> dict:
    """Scores with intervals before and after a temperature, and a paired comparison with LoRA's test logits."""
    calibration_labels, labels = (np.asarray(rows["label"][:]) for rows in (data.calibration, data.test))
    scaling = TemperatureScaling().fit(logits[0], calibration_labels)
    report = calibration_report(logits[1], labels, input="logits")
    scaled = scaling.evaluate(logits[1], labels)
    result = {"plain": _scores(report), "temperature": scaling.temperature, "with temperature": _scores(scaled)}
    result["noise_floor_of_ece"] = report.floor["ece"][0]
    if reference is not None:
        against = compare(reference, logits[1], labels, names=("LoRA", "this"), input="logits")
        result["against_lora"] = {
            s: {"difference": -against[s].difference, "interval": [-against[s].high, -against[s].low]} for s in SCORES
        }
    return result


def _scores(report) -> dict:
    return {key: {"value": report[key], "interval": list(report.intervals[key])} for key in SCORES}


def run(data: TextData, settings: TrainingSettings, kl_weights: list[float], num_samples: int) -> dict:
    """All methods on one data set with one seed."""
    with tempfile.TemporaryDirectory() as scratch:
        fitted = train_adapter(LoraConfig(**COMMON), data, settings, scratch)
        logits = logits_of(fitted, data, settings)
        reference = logits[1]
        methods = {"LoRA": {**entry(logits, data, None), "seconds": round(fitted.seconds, 1)}}
        for weight in kl_weights:
            name = "BayesianLoRA" if weight == 1 else f"BayesianLoRA, kl_weight {weight:g}"
            config = BayesianLoraConfig(**COMMON, kl_weight=weight)
            fitted = train_adapter(config, data, settings, scratch, [RegularizerScheduleCallback()])
            facts = {"seconds": round(fitted.seconds, 1), "spread": spread(fitted)}
            methods[f"{name}, mean"] = {**entry(logits_of(fitted, data, settings), data, reference), **facts}
            logits, facts = logits_of_draws(fitted, data, settings, num_samples)
            methods[f"{name}, {num_samples} draws"] = {**entry(logits, data, reference), **facts}
    return methods


def summary(runs: dict[str, dict]) -> dict:
    """Mean over the seeds and, in brackets, least and greatest; differences to LoRA are of the same seed."""
    methods: dict[str, dict] = {}
    for method in next(iter(runs.values())):
        found = [run[method] for run in runs.values()]
        for kind in ("plain", "with temperature"):
            name = method if kind == "plain" else f"{method} + T"
            methods[name] = {score: _range([f[kind][score]["value"] for f in found]) for score in SCORES}
        if "against_lora" in found[0]:
            methods[method]["minus LoRA"] = {
                s: _range([f["against_lora"][s]["difference"] for f in found]) for s in SCORES
            }
    return methods


def _range(values: list[float]) -> list[float]:
    return [round(v, 4) for v in (statistics.mean(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[f"{DOCUMENTATION}={DOCUMENTATION}"], metavar="NAME=FOLDER")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME=N", help="training rows; all when not named")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kl-weights", type=float, nargs="+", default=[1.0])
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results: dict = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    results |= {"machine": describe_machine(), "epochs": args.epochs}
    rows = {name: int(count) for name, _, count in (text.partition("=") for text in args.rows)}
    for name, _, place in (text.partition("=") for text in args.data):
        study = results.setdefault("data", {}).setdefault(name, {"seeds": {}})
        for seed in args.seeds:
            if str(seed) in study["seeds"]:
                continue
            data = load_text_data(place, max_train_rows=rows.get(name), seed=seed)
            study["rows"] = {split: len(getattr(data, split)) for split in ("train", "calibration", "test")}
            settings = TrainingSettings(epochs=args.epochs, seed=seed)
            study["seeds"][str(seed)] = run(data, settings, args.kl_weights, args.num_samples)
            study["mean, least and greatest over the seeds"] = summary(study["seeds"])
            for method, found in study["seeds"][str(seed)].items():
                print(name, seed, method, {s: round(v["value"], 3) for s, v in found["plain"].items()}, flush=True)
            if args.output:
                args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
