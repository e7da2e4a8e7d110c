"""What `calibrate_posterior` does to BayesianLoRA on rows it has not seen: its draws against its own mean.

The cells of `evidence.py`, one run each. Scale and temperature are chosen on the run's calibration rows; the mean has
the temperature of the same rows. Both predict the cell's test rows and those of other origin, as does the posterior as
it was trained (scale 1, its own temperature).

    python benchmarks/posterior_scale.py --data DIR --runs DIR --output benchmarks/results/posterior_scale.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from evidence import PROTOCOL, prepare
from harness import describe_machine, kept, parser, write
from rich.console import Console
from scipy import stats

from peft_calib import calibrate_posterior
from peft_calib.calibration import log_probabilities
from peft_calib.methods.posterior_calibration import Candidate
from peft_calib.runs.embedded import embedded_model
from peft_calib.runs.loading import FinishedRun
from peft_calib.runs.methods import ADAPTER
from peft_calib.runs.rows import load_run_rows
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.training import train_run

DRAWS, SEED = 8, 0


def trained(cell: str, protocol: dict[str, Any], data: Path, runs: Path) -> FinishedRun:
    """A BayesianLoRA of `peft-calib train` on the cell's rows."""
    place, folder = runs / "cells" / cell, runs / "runs" / f"{cell}-bayesian-lora-{SEED}"
    if not (place / "train.jsonl").is_file():
        prepare(cell, protocol, data, place)
    settings = {**protocol["settings"], "method": "bayesian-lora", "seed": SEED, "model": embedded_model()}
    config = RunConfig.from_mapping({**settings, "data": str(place / "train.jsonl")})
    if not (folder / "run.json").is_file():
        train_run(config, folder, console=Console(quiet=True))
    return FinishedRun.load(folder)


def row_nll(run: FinishedRun, path: Path, tried: Candidate) -> np.ndarray:
    """Negative log-likelihood of every row, with the scale and temperature of a candidate."""
    run.model.peft_config[ADAPTER].posterior_scale = tried.scale
    run.model.base_model.invalidate_factors()
    rows = run.task.canonical(load_dataset("json", data_files=str(path), split="train"), str(path), "train")
    labels = np.array(rows["label"])
    how = "sample" if tried.scale else "mean"
    prediction = run.predict(rows, how, DRAWS, seed=SEED, progress=False)
    logits = np.asarray(log_probabilities(prediction.probabilities), np.float64) / tried.temperature
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return -logits[np.arange(len(labels)), labels]


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Mean of `a - b` over the rows, with a 95 % interval."""
    gap = a - b
    half = float(stats.sem(gap) * stats.t.ppf(0.975, len(gap) - 1))
    return {"difference": float(gap.mean()), "low": float(gap.mean()) - half, "high": float(gap.mean()) + half}


def measured(run: FinishedRun, place: Path) -> dict[str, Any]:
    """The choice on the calibration rows, and what it does on every other set of rows."""
    calibration = run.task.encode_prediction(load_run_rows(run.task.config)[1].calibration, run.tokenizer)
    found = calibrate_posterior(
        run.model, calibration, num_samples=DRAWS, seed=SEED, processing_class=run.tokenizer, batch_size=64
    )
    mean, raw = (next(c for c in found.candidates if c.scale == scale) for scale in (0.0, 1.0))
    chosen = next(c for c in found.candidates if c.scale == found.scale)
    result: dict[str, Any] = {"scale": found.scale, "reason": found.reason}
    for path in sorted(place.glob("*.jsonl")):
        if path.stem != "train":
            nll = {name: row_nll(run, path, c) for name, c in (("mean", mean), ("chosen", chosen), ("raw", raw))}
            result[path.stem] = {
                "rows": len(nll["mean"]),
                "mean": float(nll["mean"].mean()),
                "chosen": difference(nll["chosen"], nll["mean"]),
                "as trained": difference(nll["raw"], nll["mean"]),
            }
    return result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--runs", type=Path, default=Path("evidence-runs"))
    options.add_argument("--cells", nargs="+")
    args = options.parse_args()
    protocol = json.loads(PROTOCOL.read_text(encoding="utf-8"))
    results = {"machine": describe_machine(), "draws": DRAWS, "cells": kept(args.output).get("cells", {})}
    for cell in args.cells or protocol["cells"]:
        if cell not in results["cells"]:
            results["cells"][cell] = measured(
                trained(cell, protocol, args.data, args.runs), args.runs / "cells" / cell
            )
            print(cell, json.dumps(results["cells"][cell]), flush=True)
            write(args.output, results)
    parts = [part for cell in results["cells"].values() for part in cell.values() if isinstance(part, dict)]
    results["worst"] = {name: max(part[name]["difference"] for part in parts) for name in ("chosen", "as trained")}
    print(results["worst"])
    write(args.output, results)


if __name__ == "__main__":
    main()
