"""Calibration of BayesianLoRA on real text: MiniLM on small classification sets, against LoRA on the same rows.

Every method is trained by the stock Trainer with the same settings, for several seeds (of the rows, the head and the
order). "mean" is `.eval()`, "draws" the mean of the draws' probabilities; "+ T" is a temperature fitted on calibration
rows that nothing else has seen. Intervals and paired tests come from `peft_calib.calibration`. Runs that the output
file holds already are not repeated, so that a study may be made in parts.

    python benchmarks/bayesian_calibration.py --data trec=FOLDER sst2=FOLDER --rows trec=500 sst2=1000 \
        --output benchmarks/results/bayesian_calibration.json

A FOLDER is one that `peft-calib train` reads; without `--data` the embedded sentences are used.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from harness import describe_machine, kept, parser, spread_of, trained, write

from peft_calib.calibration import compare
from peft_calib.runs.evaluation import AFTER, BEFORE, Evaluation, evaluate_run
from peft_calib.runs.folder import read_json
from peft_calib.runs.loading import FinishedRun
from peft_calib.runs.methods import ADAPTER

SCORES = ("accuracy", "nll", "brier", "ece")


def spread(run: FinishedRun) -> dict:
    """Where the posterior's standard deviations ended, in units of the prior's, and the divergence in nats."""
    law = run.model.base_model.get_law(ADAPTER)
    low, median, high = np.quantile(law.core_sd().numpy(), [0.1, 0.5, 0.9]).tolist()
    start = law.config.init_sd
    return {"start": start, "median": median, "decile": low, "ninth_decile": high, "kl": float(law.kl())}


def entry(found: Evaluation, variant: str, reference: Evaluation | None = None) -> dict:
    """Scores with intervals before and after a temperature, and a paired comparison with LoRA's on the same rows."""
    about = found.content["variants"][variant]
    result = {"plain": _scores(about[BEFORE]), "temperature": about["temperature"]}
    result["with temperature"] = _scores(about[AFTER])
    result["noise_floor_of_ece"] = about[BEFORE]["noise_floor"]["ece"]["mean"]
    if variant == "sample":
        result |= {key: about[key] for key in ("mutual_information", "num_forwards")}
    if reference is not None:
        pair = (reference.probabilities("mean", BEFORE), found.probabilities(variant, BEFORE))
        against = compare(*pair, found.items["labels"], names=("LoRA", "this"))
        result["against_lora"] = {
            s: {"difference": -against[s].difference, "interval": [-against[s].high, -against[s].low]} for s in SCORES
        }
    return result


def _scores(report: dict) -> dict:
    return {key: {"value": report[key], "interval": report["intervals"][key]} for key in SCORES}


def measured(folder: Path, method: str, settings: dict) -> tuple[FinishedRun, Evaluation, float]:
    """A run trained and evaluated, and the seconds of its training."""
    run = trained(folder, method, **settings)
    seconds = read_json(run.folder.finished)["stages"][ADAPTER]["seconds"]
    return run, evaluate_run(folder, progress=False), seconds


def study(settings: dict, kl_weights: list[float], num_samples: int) -> tuple[dict, dict]:
    """All methods on one data set with one seed, and the numbers of rows."""
    with tempfile.TemporaryDirectory() as scratch:
        run, lora, seconds = measured(Path(scratch) / "lora", "lora", settings)
        rows = read_json(run.folder.finished)["rows"] | {"test": lora.content["rows"]}
        methods = {"LoRA": {**entry(lora, "mean"), "seconds": seconds}}
        for weight in kl_weights:
            name = "BayesianLoRA" if weight == 1 else f"BayesianLoRA, kl_weight {weight:g}"
            further = {"adapter": {"kl_weight": weight}, "num_samples": num_samples}
            run, found, seconds = measured(Path(scratch) / f"{weight}", "bayesian-lora", settings | further)
            mean = entry(found, "mean", lora)
            methods[f"{name}, mean"] = {**mean, "seconds": seconds, "spread": spread(run)}
            methods[f"{name}, {num_samples} draws"] = entry(found, "sample", lora)
    return methods, rows


def summary(runs: dict[str, dict]) -> dict:
    """Mean over the seeds and, in brackets, least and greatest; differences to LoRA are of the same seed."""
    methods: dict[str, dict] = {}
    for method in next(iter(runs.values())):
        found = [run[method] for run in runs.values()]
        for kind in ("plain", "with temperature"):
            name = method if kind == "plain" else f"{method} + T"
            methods[name] = {score: spread_of([f[kind][score]["value"] for f in found]) for score in SCORES}
        if "against_lora" in found[0]:
            methods[method]["minus LoRA"] = {
                s: spread_of([f["against_lora"][s]["difference"] for f in found]) for s in SCORES
            }
    return methods


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", nargs="+", default=["documentation=documentation"], metavar="NAME=FOLDER")
    options.add_argument("--rows", nargs="+", default=[], metavar="NAME=N", help="training rows; all when not named")
    options.add_argument("--epochs", type=float, default=10)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--kl-weights", type=float, nargs="+", default=[1.0])
    options.add_argument("--num-samples", type=int, default=8)
    args = options.parse_args()
    results = kept(args.output) | {"machine": describe_machine(), "epochs": args.epochs}
    rows = {name: int(count) for name, _, count in (text.partition("=") for text in args.rows)}
    for name, _, place in (text.partition("=") for text in args.data):
        about = results.setdefault("data", {}).setdefault(name, {"seeds": {}})
        for seed in args.seeds:
            if str(seed) in about["seeds"]:
                continue
            settings = {"data": place, "max_train_rows": rows.get(name), "epochs": args.epochs, "seed": seed}
            about["seeds"][str(seed)], about["rows"] = study(settings, args.kl_weights, args.num_samples)
            about["mean, least and greatest over the seeds"] = summary(about["seeds"])
            for method, found in about["seeds"][str(seed)].items():
                print(name, seed, method, {s: round(v["value"], 3) for s, v in found["plain"].items()}, flush=True)
            write(args.output, results)


if __name__ == "__main__":
    main()
