"""What one LoRA loses that answers in the place of many draws: `distill` on real data, student against teacher.

Teachers are runs of `peft-calib train` on cells of `evidence.py`: two members, a BayesianLoRA whose 8 draws are
averaged, and, to tell what the unlabelled rows do alone, one LoRA that teaches itself. Each student learns from 1,000
rows of the same data set without their labels, none of which its teacher was trained, calibrated or is tested on, and
answers the cell's test rows in one forward. Both are measured as they answer and with a temperature of their own,
fitted on the run's calibration rows; intervals are a paired bootstrap over the test rows. Cells that the output holds
are not repeated.

    python benchmarks/distill.py --data DIR --runs DIR --output benchmarks/results/distill.json
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from evidence import PROTOCOL, prepare, read_rows
from harness import describe_machine, kept, parser, write
from rich.console import Console

from peft_calib import distill, distillation_of, predict_dataset
from peft_calib.calibration import TemperatureScaling, compare
from peft_calib.runs.embedded import embedded_model
from peft_calib.runs.loading import FinishedRun
from peft_calib.runs.rows import load_run_rows
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.training import train_run

CELLS = ("trec-0", "sst2-0", "ag_news-0")
TEACHERS: dict[str, dict[str, Any]] = {
    "members": {"method": "ensemble-lora", "members": 2},
    "bayesian-lora": {"method": "bayesian-lora"},
    "lora": {"method": "lora"},
}
DRAWS = {"members": 2, "bayesian-lora": 8, "lora": 1}
ROWS, SEED, WITHIN = 1000, 0, 0.01


def teacher_of(cell: str, name: str, protocol: dict[str, Any], data: Path, runs: Path) -> FinishedRun:
    """A finished run on the rows of a cell."""
    place, folder = runs / "cells" / cell, runs / "runs" / f"{cell}-{name}-{SEED}"
    if not (place / "train.jsonl").is_file():
        prepare(cell, protocol, data, place)
    settings = {**protocol["settings"], **TEACHERS[name], "seed": SEED, "model": embedded_model()}
    if not (folder / "run.json").is_file():
        config = RunConfig.from_mapping({**settings, "data": str(place / "train.jsonl")})
        train_run(config, folder, console=Console(quiet=True))
    return FinishedRun.load(folder)


def unlabelled(cell: str, protocol: dict[str, Any], data: Path, place: Path) -> list[dict[str, Any]]:
    """Rows of the cell's data set which stand in none of its files; their labels are not looked at."""
    known = {json.loads(line)["text"] for file in place.glob("*.jsonl") for line in file.open(encoding="utf-8")}
    name = protocol["cells"][cell]["data"]
    source = protocol["data"][name]
    rows = [row for row in read_rows(data / name, "train", source.get("least_words", 0)) if row["text"] not in known]
    return random.Random(SEED).sample(rows, min(ROWS, len(rows)))


def measured(cell: str, name: str, protocol: dict[str, Any], data: Path, runs: Path) -> dict[str, Any]:
    """One student against its teacher."""
    run, place = teacher_of(cell, name, protocol, data, runs), runs / "cells" / cell
    tokenizer, draws = run.tokenizer, DRAWS[name]

    def encoded(rows: Dataset, where: str) -> Dataset:
        return run.task.encode_prediction(run.task.canonical(rows, where, "train"), tokenizer)

    begun = time.process_time()
    rows = encoded(Dataset.from_list(unlabelled(cell, protocol, data, place)), cell)
    names = list(run.adapter_names) if name == "lora" else None
    student = distill(run.model, rows, num_samples=draws, seed=SEED, processing_class=tokenizer, adapter_names=names)
    seconds = time.process_time() - begun
    test = encoded(load_dataset("json", data_files=str(place / "test.jsonl"), split="train"), "test")
    calibration = run.task.encode_prediction(load_run_rows(run.task.config)[1].calibration, tokenizer)
    found: dict[str, Any] = {"rows": len(rows), "cpu_seconds": round(seconds, 1)}
    found["distillation"] = vars(distillation_of(student))
    answers = {}
    for who, model, how in (("teacher", run.model, "mean" if names else "sample"), ("student", student, "mean")):
        options = {"batch_size": 64, "processing_class": tokenizer, "progress": False}
        on_test = predict_dataset(model, test, how, draws if how == "sample" else None, SEED, **options)
        held = predict_dataset(model, calibration, how, draws if how == "sample" else None, SEED, **options)
        scaling = TemperatureScaling().fit(held.probabilities, held.labels, input="probabilities")
        after = scaling.transform(on_test.probabilities, input="probabilities")
        answers[who] = (np.asarray(on_test.probabilities, np.float64), np.asarray(after, np.float64))
        found[f"{who}_forwards"], found[f"{who}_temperature"] = on_test.num_forwards, scaling.temperature
    labels = np.asarray(on_test.labels)
    for number, which in enumerate(("as they answer", "with a temperature each")):
        pair = compare(answers["student"][number], answers["teacher"][number], labels, names=("student", "teacher"))
        keys = ("a", "b", "difference", "low", "high")
        found[which] = {d.score: {k: round(getattr(d, k), 4) for k in keys} for d in pair.differences}
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--runs", type=Path, default=Path("evidence-runs"))
    options.add_argument("--cells", nargs="+", default=CELLS)
    options.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS))
    args = options.parse_args()
    protocol = json.loads(PROTOCOL.read_text(encoding="utf-8"))
    results = {"machine": describe_machine(), "students": kept(args.output).get("students", {})}
    for name in args.teachers:
        for cell in args.cells:
            key = f"{cell}, {name}"
            if key not in results["students"]:
                results["students"][key] = measured(cell, name, protocol, args.data, args.runs)
                print(key, json.dumps(results["students"][key]["as they answer"]["nll"]), flush=True)
                write(args.output, results)
    gaps = {key: found["as they answer"]["nll"]["difference"] for key, found in results["students"].items()}
    results["within"] = {"nats": WITHIN, "held": sorted(k for k, gap in gaps.items() if gap <= WITHIN)}
    results["within"]["missed"] = {key: gap for key, gap in gaps.items() if gap > WITHIN}
    print(results["within"])
    write(args.output, results)


if __name__ == "__main__":
    main()
