"""Low-loss curves on real text: MiniLM with three LoRA anchors, straight lines, anchored and free curves.

For each seed: a linear classifier is fitted to the encoder's features and frozen, so that all anchors share one head;
the stock Trainer trains three LoRA adapters (anchors), anchored curves ALC(3,2) and a free curve FLC(3,2) on the same
rows. Asked are the directions of the CurveLoRA paper:

(a) the training loss has a barrier on straight lines between the anchors and none on curves;
(b) the log-likelihood on test rows of ALC is that of the ensemble of its anchors, DE(3), or better, and better than
    that of one anchor, MAP;
(c) the mutual information of ALC is higher than that of DE(3);
(d) the diversity term raises mutual information at equal log-likelihood and accuracy; the control is the same
    two-point objective at weight 0. Both are trained for half as many steps, i.e. at as many points.

"+ T" has a temperature fitted on calibration rows. "DE(3), equal compute" spreads the training of the curve over its
three members. Intervals of a seed are a paired bootstrap over test rows, those over the seeds Student's t. Nothing is
asserted: the table says where a direction fails. Seeds that the output file holds are not repeated.

    python benchmarks/curve_minilm.py --data trec=FOLDER --rows 200 --seeds 0 1 2 --output \
        benchmarks/results/curve_minilm.json

A FOLDER is one that `peft_calib.demo.load_text_data` reads; without `--data` the embedded sentences are used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from machine import describe_machine
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import peft_calib
from peft_calib import CurveLoraConfig, Prediction
from peft_calib.calibration import TemperatureScaling, calibration_report, log_probabilities
from peft_calib.demo.data import DOCUMENTATION, TextData, load_text_data
from peft_calib.demo.training import (
    FittedAdapter,
    TrainingSettings,
    embedded_model,
    predict_draws,
    predict_logits,
    train_adapter,
)

COMMON = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
CURVE = {**COMMON, "num_anchors": 3, "num_handles": 2}
#: A weight of the diversity term that has it computed and changes nothing: the control of the two-point objective.
NO_WEIGHT = 1e-12
POINTS = 13
RATE = 3e-3
MAP, DE, LONG, LIN, ALIGNED = "MAP", "DE(3)", "DE(3), equal compute", "Lin(3)", "Lin(3), balanced and aligned"
ALC, FLC, ZERO, FULL = "ALC(3,2)", "FLC(3,2)", "ALC(3,2), pair, lambda 0", "ALC(3,2), pair, lambda 1"


class Study:
    """One data set and seed: trains adapters on a base model with a frozen head, and scores them.

    Args:
        data: The rows.
        seed: Of everything.
        batch_size: Rows a step.
        folder: For the base model, the anchors and the Trainer.
    """

    def __init__(self, data: TextData, seed: int, batch_size: int, folder: Path) -> None:
        calibration = data.calibration.select(range(min(len(data.calibration), len(data.train))))
        self.data = replace(data, calibration=calibration)
        self.seed, self.batch_size, self.folder = seed, batch_size, folder
        self.labels = torch.tensor(data.test["label"][:])
        if not (folder / "base").exists():
            self.fit_head()

    def settings(self, seed: int = 0, epochs: float = 1) -> TrainingSettings:
        model = str(self.folder / "base")
        return TrainingSettings(model, epochs, RATE, self.batch_size, seed=100 * self.seed + seed)

    def fit_head(self) -> None:
        """Save the encoder with a classifier that logistic regression fits to its features."""
        tokenizer = AutoTokenizer.from_pretrained(embedded_model())
        names = self.data.label_names
        model = AutoModelForSequenceClassification.from_pretrained(embedded_model(), num_labels=len(names))
        head, model.classifier = model.classifier, torch.nn.Identity()
        features = predict_logits(model, tokenizer, self.data.train, self.settings())
        fitted = LogisticRegression(max_iter=5000).fit(features, self.data.train["label"][:])
        coefficients, offset = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
        if len(names) == 2:  # scikit-learn keeps the logit of the second class only
            coefficients, offset = torch.cat([-coefficients, coefficients]) / 2, torch.cat([-offset, offset]) / 2
        with torch.no_grad():
            head.weight.copy_(coefficients), head.bias.copy_(offset)
        model.classifier = head
        model.save_pretrained(self.folder / "base")
        tokenizer.save_pretrained(self.folder / "base")

    def train(self, config: PeftConfig, epochs: float, seed: int) -> FittedAdapter:
        return train_adapter(config, self.data, self.settings(seed, epochs), self.folder / "trainer")

    def anchors(self, name: str, epochs: float) -> list[str]:
        """Folders of three LoRA adapters that differ in their first A and the order of the rows."""
        folders = [str(self.folder / f"{name}-{index}") for index in range(3)]
        for index, folder in enumerate(folders):
            if not (Path(folder) / "adapter_config.json").exists():
                self.train(LoraConfig(**COMMON), epochs, index + 1).model.save_pretrained(folder)
        return folders

    def anchored(self, folders: list[str], **fields) -> CurveLoraConfig:
        fields = {**CURVE, **fields}
        return CurveLoraConfig(curve_mode="anchored", anchor_adapters=folders, sample_seed=self.seed, **fields)

    def line(self, folders: list[str], **fields) -> FittedAdapter:
        """Straight lines between anchors: nothing to train."""
        base = AutoModelForSequenceClassification.from_pretrained(self.folder / "base")
        model = get_peft_model(base, self.anchored(folders, num_handles=0, **fields)).eval()
        return FittedAdapter(model, AutoTokenizer.from_pretrained(self.folder / "base"), 0, 0.0)

    def result(
        self, name: str, build: Callable[[], FittedAdapter], num_samples: int | None = None, barrier: bool = False
    ) -> tuple[Prediction, float]:
        """Probabilities of a curve's points on the test rows, and its barrier; kept in the folder."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            fitted = build()
            count = num_samples or fitted.model.base_model.get_law().default_num_samples
            drawn = predict_draws(fitted.model, fitted.tokenizer, self.data.test, self.settings(), count)
            height = self.barrier(fitted) if barrier else float("nan")
            found = {
                "probabilities": drawn.sample_probabilities.contiguous(),
                "barrier": torch.tensor(height).double(),
            }
            save_file(found, path)
        found = load_file(path)
        probabilities = found["probabilities"]
        prediction = Prediction(sample_probabilities=probabilities, num_forwards=len(probabilities))
        return prediction, float(found["barrier"])

    def barrier(self, fitted: FittedAdapter) -> float:
        """Of the loss on the training rows."""
        texts = sorted(
            zip(map(len, self.data.train["text"]), range(len(self.data.train)), strict=True)
        )  # less padding
        rows = self.data.train.select([row for _, row in texts])
        encode = partial(fitted.tokenizer, truncation=True, max_length=self.settings().max_length)
        rows = rows.map(lambda batch: dict(encode(batch["text"])), batched=True, remove_columns="text")
        options = {"batch_size": 64, "processing_class": fitted.tokenizer}
        return peft_calib.loss_profile(fitted.model, rows, POINTS, **options).barrier


# --------------------------------------------------------------------- one seed


def run(study: Study, anchor_epochs: float, curve_epochs: float) -> dict:
    """All methods with one seed: scores and directions."""
    folders = study.anchors("anchor", anchor_epochs)
    configs = {
        ALC: study.anchored(folders),
        FLC: CurveLoraConfig(**CURVE, sample_seed=study.seed),
        ZERO: study.anchored(folders, jsd_weight=NO_WEIGHT),
        FULL: study.anchored(folders, jsd_weight=1.0),
    }
    found = {
        DE: study.result(DE, partial(study.line, folders), 3),
        LIN: study.result(LIN, partial(study.line, folders), barrier=True),
        ALIGNED: study.result(ALIGNED, partial(study.line, folders, gauge_align="procrustes"), barrier=True),
    }
    for name, config in configs.items():
        # a pair is two evaluations a step: as many in all
        epochs = curve_epochs / 2 if name in (ZERO, FULL) else curve_epochs
        found[name] = study.result(name, partial(study.train, config, epochs, 4), barrier=name in (ALC, FLC))
    long = study.anchors("long", anchor_epochs + curve_epochs / 3)
    found[LONG] = study.result(LONG, partial(study.line, long), 3)
    predictions = {name: prediction for name, (prediction, _) in found.items()}
    first = predictions[DE].sample_probabilities[:1]
    predictions[MAP] = Prediction(sample_probabilities=first, num_forwards=1)
    methods = {name: scores(prediction, study.labels) for name, prediction in predictions.items()}
    for name in (LIN, ALIGNED, ALC, FLC):
        methods[name]["barrier"] = found[name][1]
    methods[f"{MAP} + T"] = temperature_scaled(study, study.line(folders))
    return {"methods": methods, "differences": differences(predictions, study.labels)}


def temperature_scaled(study: Study, line: FittedAdapter) -> dict:
    """Scores of the first anchor with a temperature fitted on the calibration rows."""
    rows = (study.data.calibration, study.data.test)
    with peft_calib.curve_at(line.model, 0.0):
        calibration, test = (predict_logits(line.model, line.tokenizer, part, study.settings()) for part in rows)
    scaling = TemperatureScaling().fit(calibration, np.asarray(study.data.calibration["label"][:]))
    probabilities = (torch.from_numpy(test).double() / scaling.temperature).softmax(-1)
    prediction = Prediction(sample_probabilities=probabilities.unsqueeze(0).float(), num_forwards=1)
    return {**scores(prediction, study.labels), "temperature": scaling.temperature}


def of_rows(prediction: Prediction, labels: torch.Tensor) -> dict[str, np.ndarray]:
    """Log-likelihood, correctness and mutual information of each row."""
    chosen = prediction.probabilities.double().gather(1, labels.unsqueeze(1)).squeeze(1)
    return {
        "log_likelihood": log_probabilities(chosen).numpy(),
        "accuracy": (prediction.predictions == labels).double().numpy(),
        "mutual_information": prediction.mutual_information.double().numpy(),
    }


def scores(prediction: Prediction, labels: torch.Tensor) -> dict[str, float]:
    """Means over the rows and the calibration error; mutual information also of three points at a time."""
    found = {key: float(values.mean()) for key, values in of_rows(prediction, labels).items()}
    report = calibration_report(prediction.probabilities, labels, confidence_level=None)
    found["ece"] = report["ece"]
    draws = prediction.sample_probabilities
    if len(draws) >= 3:
        triples = [
            Prediction(sample_probabilities=draws[list(t)], num_forwards=3)
            for t in itertools.combinations(range(len(draws)), 3)
        ]
        found["mutual_information_of_three"] = statistics.mean(float(t.mutual_information.mean()) for t in triples)
    return found


def differences(predictions: dict[str, Prediction], labels: torch.Tensor) -> dict[str, dict]:
    """What the directions ask for, each with a 95 % interval of a paired bootstrap over the test rows."""
    rows = {name: of_rows(found, labels) for name, found in predictions.items()}
    asked = {
        "(b) LL, ALC - DE": (ALC, DE, "log_likelihood"),
        "(b) LL, ALC - DE of equal compute": (ALC, LONG, "log_likelihood"),
        "(b) LL, ALC - MAP": (ALC, MAP, "log_likelihood"),
        "(b) LL, FLC - MAP": (FLC, MAP, "log_likelihood"),
        "(c) MI, ALC - DE": (ALC, DE, "mutual_information"),
        "(c) MI, FLC - DE": (FLC, DE, "mutual_information"),
        "(d) MI, lambda 1 - lambda 0": (FULL, ZERO, "mutual_information"),
        "(d) LL, lambda 1 - lambda 0": (FULL, ZERO, "log_likelihood"),
        "(d) ACC, lambda 1 - lambda 0": (FULL, ZERO, "accuracy"),
    }
    return {name: paired(rows[a][key], rows[b][key]) for name, (a, b, key) in asked.items()}


def paired(a: np.ndarray, b: np.ndarray, resamples: int = 2000) -> dict:
    difference = a - b
    chosen = np.random.default_rng(0).integers(0, len(difference), (resamples, len(difference)))
    low, high = np.quantile(difference[chosen].mean(1), [0.025, 0.975])
    return {"value": float(difference.mean()), "interval": [float(low), float(high)]}


# --------------------------------------------------------------------- all seeds


def summarise(seeds: dict[str, dict]) -> dict:
    """Means of the methods' scores, and of the differences with a t interval over the seeds."""
    runs = list(seeds.values())
    first = runs[0]
    methods = {
        method: {key: statistics.mean(run["methods"][method][key] for run in runs) for key in found}
        for method, found in first["methods"].items()
    }
    found = {name: over_seeds([run["differences"][name]["value"] for run in runs]) for name in first["differences"]}
    barriers = {name: [run["methods"][name]["barrier"] for run in runs] for name in (LIN, ALIGNED, ALC, FLC)}
    for a, b in ((LIN, ALC), (LIN, FLC), (ALC, FLC), (LIN, ALIGNED)):
        pairs = zip(barriers[a], barriers[b], strict=True)
        found[f"(a) barrier, {a} - {b}"] = over_seeds([x - y for x, y in pairs])
    return {"methods": methods, "differences": dict(sorted(found.items()))}


def over_seeds(values: list[float]) -> dict:
    mean, count = statistics.mean(values), len(values)
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5 if count > 1 else float("nan")
    return {"mean": mean, "interval": [mean - half, mean + half] if count > 1 else None, "seeds": values}


def show(name: str, summary: dict) -> None:
    """Print the table and the directions."""
    columns = ("log_likelihood", "accuracy", "ece", "mutual_information", "mutual_information_of_three", "barrier")
    print(
        f"{name + ', mean of the seeds':32}" + "".join(f"{c:>10}" for c in ("LL", "ACC", "ECE", "MI", "MI of 3")),
        end="",
    )
    print(f"{'barrier':>10}")
    for method, found in summary["methods"].items():
        print(f"{method:32}" + "".join(f"{found[c]:10.3f}" if c in found else f"{'-':>10}" for c in columns))
    for difference, found in summary["differences"].items():
        bounds = "" if found["interval"] is None else "[{:+.4f}, {:+.4f}]".format(*found["interval"])
        each = " ".join(f"{value:+.4f}" for value in found["seeds"])
        print(f"{difference:52}{found['mean']:+.4f} {bounds}  ({each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=f"{DOCUMENTATION}={DOCUMENTATION}", metavar="NAME=FOLDER")
    parser.add_argument("--rows", type=int, default=200, help="training rows")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--anchor-epochs", type=float, default=4)
    parser.add_argument("--curve-epochs", type=float, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder that keeps what is trained, to go on after a break")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    recipe = {"rows": args.rows, "batch_size": args.batch_size}
    recipe |= {"anchor_epochs": args.anchor_epochs, "curve_epochs": args.curve_epochs}
    results: dict = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    name, _, place = args.data.partition("=")
    study = results.setdefault("data", {}).setdefault(name, {"recipe": recipe, "seeds": {}})
    if study["recipe"] != recipe:
        raise SystemExit(
            f"{args.output} holds runs on {name} with the recipe {study['recipe']}; give another --output."
        )
    results["machine"] = describe_machine()
    for seed in args.seeds:
        if str(seed) not in study["seeds"]:
            data = load_text_data(place, max_train_rows=args.rows, seed=seed)
            with tempfile.TemporaryDirectory() as scratch:
                folder = (args.work or Path(scratch)) / f"{name}-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                one = Study(data, seed, args.batch_size, folder)
                study["seeds"][str(seed)] = run(one, args.anchor_epochs, args.curve_epochs)
            study["test_rows"] = len(data.test)
        study["over the seeds"] = summarise(study["seeds"])
        if args.output:
            args.output.write_text(json.dumps(results, indent=2) + "\n")
    show(name, study["over the seeds"])


if __name__ == "__main__":
    main()
