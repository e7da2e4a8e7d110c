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

A FOLDER is one that `peft-calib train` reads; without `--data` the embedded sentences are used.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from harness import describe_machine, kept, of_rows, parser, point_scores, print_scores, write
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from scipy import stats
from sklearn.linear_model import LogisticRegression

import peft_calib
from peft_calib import CurveLoraConfig, Prediction, predict_dataset
from peft_calib.calibration import TemperatureScaling, calibration_report, log_probabilities
from peft_calib.console import own_random_state, progress_bars
from peft_calib.demo import demo_config
from peft_calib.provenance.splits import SplitRecord
from peft_calib.runs.folder import RunFolder
from peft_calib.runs.methods import Stage
from peft_calib.runs.rows import load_run_rows, load_test_rows
from peft_calib.runs.stage import load_base, load_tokenizer, run_stage
from peft_calib.runs.training import material_of

COMMON = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
CURVE = {**COMMON, "num_anchors": 3, "num_handles": 2}
#: A weight of the diversity term that has it computed and changes nothing: the control of the two-point objective.
NO_WEIGHT = 1e-12
POINTS = 13
RATE = 3e-3
MAP, DE, LONG, LIN, ALIGNED = "MAP", "DE(3)", "DE(3), equal compute", "Lin(3)", "Lin(3), balanced and aligned"
ALC, FLC, ZERO, FULL = "ALC(3,2)", "FLC(3,2)", "ALC(3,2), pair, lambda 0", "ALC(3,2), pair, lambda 1"


class Study:
    """One data set and seed: trains adapters on a base model with a frozen head, and scores them."""

    def __init__(self, data: str, rows: int, seed: int, batch_size: int, folder: Path) -> None:
        settings = {"max_train_rows": rows, "batch_size": batch_size, "learning_rate": RATE, "warmup": 0.0}
        self.config, _ = demo_config(data, **settings, seed=seed)
        self.task, found = load_run_rows(self.config)
        self.rows = replace(found, calibration=found.calibration.select(range(len(found.train))))
        self.test = load_test_rows(self.task, SplitRecord()).rows
        self.seed, self.folder, self.labels = seed, RunFolder(folder), torch.tensor(self.test["label"][:])
        self.tokenizer = load_tokenizer(self.config)
        if not (folder / "base").exists():
            self.fit_head()
        self.task = replace(self.task, config=replace(self.config, model=str(folder / "base")))

    def base(self) -> torch.nn.Module:
        with own_random_state():
            return load_base(self.task, self.tokenizer)

    def predict(self, model: torch.nn.Module, rows: datasets.Dataset, how: str = "sample", **options) -> Prediction:
        encoded = self.task.encode_prediction(rows, self.tokenizer)
        options = {"processing_class": self.tokenizer, "batch_size": 64, "progress": False, **options}
        return predict_dataset(model, encoded, how, **options)

    def fit_head(self) -> None:
        """Save the encoder with a classifier that logistic regression fits to its features."""
        model = self.base().eval()
        head, model.classifier = model.classifier, torch.nn.Identity()
        encoded = self.task.encode_prediction(self.rows.train, self.tokenizer)
        collate = self.task.collator(self.tokenizer)
        with torch.no_grad():
            batches = [collate(encoded.select(range(i, min(i + 64, len(encoded)))).to_list())
                       for i in range(0, len(encoded), 64)]  # fmt: skip
            features = torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches])
        fitted = LogisticRegression(max_iter=5000).fit(features.numpy(), self.rows.train["label"][:])
        coefficients, offset = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
        if len(coefficients) == 1:  # scikit-learn keeps the logit of the second class only
            coefficients, offset = torch.cat([-coefficients, coefficients]) / 2, torch.cat([-offset, offset]) / 2
        with torch.no_grad():
            head.weight.copy_(coefficients), head.bias.copy_(offset)
        model.classifier = head
        model.save_pretrained(self.folder.path / "base")
        self.tokenizer.save_pretrained(self.folder.path / "base")

    def train(self, name: str, config: PeftConfig, epochs: float, seed: int) -> Path:
        """A stage of a run under the frozen head; one that the folder holds is kept."""
        task = replace(self.task, config=replace(self.task.config, epochs=epochs))
        with progress_bars(Console(quiet=True)) as progress:
            run_stage(Stage(name, 100 * self.seed + seed, config), material_of(task, self.rows), self.folder, progress)
        return self.folder.adapter(name)

    def trained(self, name: str, config: PeftConfig, epochs: float) -> PeftModel:
        return PeftModel.from_pretrained(self.base(), self.train(name, config, epochs, 4)).eval()

    def anchors(self, name: str, epochs: float) -> list[str]:
        """Folders of three LoRA adapters that differ in their first A and the order of the rows."""
        return [str(self.train(f"{name}-{k}", LoraConfig(**COMMON), epochs, k + 1)) for k in range(3)]

    def anchored(self, folders: list[str], **fields) -> CurveLoraConfig:
        fields = {**CURVE, **fields}
        return CurveLoraConfig(curve_mode="anchored", anchor_adapters=folders, sample_seed=self.seed, **fields)

    def line(self, folders: list[str], **fields) -> PeftModel:
        """Straight lines between anchors: nothing to train."""
        return get_peft_model(self.base(), self.anchored(folders, num_handles=0, **fields)).eval()

    def result(
        self, model: PeftModel, num_samples: int | None = None, barrier: bool = False
    ) -> tuple[Prediction, float]:
        """Probabilities of a curve's points on the test rows, and its barrier."""
        drawn = self.predict(model, self.test, num_samples=num_samples)
        return drawn, self.barrier(model) if barrier else float("nan")

    def barrier(self, model: PeftModel) -> float:
        rows = self.task.encode_prediction(self.rows.train, self.tokenizer)
        options = {"batch_size": 64, "processing_class": self.tokenizer}
        return peft_calib.loss_profile(model, rows, POINTS, **options).barrier


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
        DE: study.result(study.line(folders), 3),
        LIN: study.result(study.line(folders), barrier=True),
        ALIGNED: study.result(study.line(folders, gauge_align="procrustes"), barrier=True),
    }
    for name, config in configs.items():
        # a pair is two evaluations a step: as many in all
        epochs = curve_epochs / 2 if name in (ZERO, FULL) else curve_epochs
        found[name] = study.result(study.trained(name, config, epochs), barrier=name in (ALC, FLC))
    long = study.anchors("long", anchor_epochs + curve_epochs / 3)
    found[LONG] = study.result(study.line(long), 3)
    predictions = {name: prediction for name, (prediction, _) in found.items()}
    first = predictions[DE].sample_probabilities[:1]
    predictions[MAP] = Prediction(sample_probabilities=first, num_forwards=1)
    methods = {name: scores(prediction, study.labels) for name, prediction in predictions.items()}
    for name in (LIN, ALIGNED, ALC, FLC):
        methods[name]["barrier"] = found[name][1]
    methods[f"{MAP} + T"] = temperature_scaled(study, study.line(folders))
    return {"methods": methods, "differences": differences(predictions, study.labels)}


def temperature_scaled(study: Study, line: PeftModel) -> dict:
    """Scores of the first anchor with a temperature fitted on the calibration rows."""
    with peft_calib.curve_at(line, 0.0):
        parts = [study.predict(line, rows, "mean") for rows in (study.rows.calibration, study.test)]
    calibration, test = (log_probabilities(part.probabilities.double().numpy()) for part in parts)
    scaling = TemperatureScaling().fit(calibration, np.asarray(study.rows.calibration["label"][:]))
    probabilities = (torch.from_numpy(test) / scaling.temperature).softmax(-1)
    prediction = Prediction(sample_probabilities=probabilities.unsqueeze(0).float(), num_forwards=1)
    return {**scores(prediction, study.labels), "temperature": scaling.temperature}


def scores(prediction: Prediction, labels: torch.Tensor) -> dict[str, float]:
    """Means over the rows, and the calibration error."""
    report = calibration_report(prediction.probabilities, labels, confidence_level=None)
    return {**point_scores(prediction.sample_probabilities, labels), "ece": report["ece"]}


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
    return {name: paired(rows[a][key].numpy(), rows[b][key].numpy()) for name, (a, b, key) in asked.items()}


def paired(a: np.ndarray, b: np.ndarray, resamples: int = 2000) -> dict:
    difference = a - b
    chosen = np.random.default_rng(0).integers(0, len(difference), (resamples, len(difference)))
    low, high = np.quantile(difference[chosen].mean(1), [0.025, 0.975])
    return {"value": float(difference.mean()), "interval": [float(low), float(high)]}


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
    interval = list(stats.ttest_1samp(values, 0).confidence_interval(0.95)) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "interval": interval, "seeds": values}


def show(name: str, summary: dict) -> None:
    """Print the table and the directions."""
    print_scores(f"{name}, mean of the seeds", summary["methods"])
    for difference, found in summary["differences"].items():
        bounds = "" if found["interval"] is None else "[{:+.4f}, {:+.4f}]".format(*found["interval"])
        each = " ".join(f"{value:+.4f}" for value in found["seeds"])
        print(f"{difference:52}{found['mean']:+.4f} {bounds}  ({each})")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", default="documentation=documentation", metavar="NAME=FOLDER")
    options.add_argument("--rows", type=int, default=200, help="training rows")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--anchor-epochs", type=float, default=4)
    options.add_argument("--curve-epochs", type=float, default=8)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--work", type=Path, help="folder that keeps what is trained, to go on after a break")
    args = options.parse_args()
    datasets.disable_progress_bars()
    recipe = {key: getattr(args, key) for key in ("rows", "batch_size", "anchor_epochs", "curve_epochs")}
    results = kept(args.output)
    name, _, place = args.data.partition("=")
    about = results.setdefault("data", {}).setdefault(name, {"recipe": recipe, "seeds": {}})
    if about["recipe"] != recipe:
        raise SystemExit(
            f"{args.output} holds runs on {name} with the recipe {about['recipe']}; give another --output."
        )
    results["machine"] = describe_machine()
    for seed in args.seeds:
        if str(seed) not in about["seeds"]:
            with tempfile.TemporaryDirectory() as scratch:
                folder = (args.work or Path(scratch)) / f"{name}-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                study = Study(place, args.rows, seed, args.batch_size, folder)
                about["seeds"][str(seed)] = run(study, args.anchor_epochs, args.curve_epochs)
            about["test_rows"] = len(study.test)
        about["over the seeds"] = summarise(about["seeds"])
        write(args.output, results)
    show(name, about["over the seeds"])


if __name__ == "__main__":
    main()
