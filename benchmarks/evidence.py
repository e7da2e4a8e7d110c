"""Is a method better than a LoRA with a temperature? Real data, several runs a method, intervals over rows and runs.

A cell is a data set with so many training rows, drawn by a seed of its own; a run is `peft-calib train` on it with
another seed (calibration rows, fresh head, adapter, order of the rows). All methods of a cell see the same rows with
the same seeds. Every run is measured after its temperature on the cell's test rows, and on rows of other origin where
the data have some. Cells, methods, settings and the decision rule are in `benchmarks/evidence/evidence.json`, written
before the runs; what is not finished goes on where it stood.

    python benchmarks/evidence.py run --data DIR --runs DIR
    python benchmarks/evidence.py table --runs DIR --output benchmarks/results/evidence.json
    python benchmarks/evidence.py page    # docs/evidence.md

Further protocols, `--protocol benchmarks/evidence/NAME.json`, have their results in `benchmarks/results/NAME.json`,
and the page tells those of all: moments around the members (`moments`), three members for fewer epochs
(`three_members`), two whole LoRAs (`two_loras`), the other laws and label smoothing (`methods`).

DIR holds a folder for each data set with `train.jsonl.gz` and the files that the protocol names, with columns `text`
and `label`; without `--data` there is only `documentation`, the embedded sentences. `--model` takes any encoder of the
Hub in the place of the embedded MiniLM.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from evidence_page import page
from harness import describe_machine, parser, write
from rich.console import Console

from peft_calib.calibration import TemperatureScaling, compare_groups, pool_comparisons
from peft_calib.calibration.resampling.groups import GroupComparison
from peft_calib.files import write_atomically
from peft_calib.prediction.sources import LawDraws
from peft_calib.runs.embedded import DOCUMENTATION, embedded_model, embedded_rows
from peft_calib.runs.evaluation import AFTER, evaluate_run
from peft_calib.runs.loading import FinishedRun, read_record
from peft_calib.runs.methods import ADAPTER
from peft_calib.runs.rows import TestData, load_run_rows, load_test_rows
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.training import train_run

PROTOCOL = Path(__file__).parent / "evidence" / "evidence.json"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
RESULTS = Path(__file__).parent / "results"
#: Results whose protocols the page tells, in its order.
ON_THE_PAGE = (
    "evidence.json",
    "moments.json",
    "three_members.json",
    "three_members_again.json",
    "three_members_more_steps.json",
    "two_loras.json",
)
#: Of a table of results.
PARTS = ("in distribution", "shifted")


def read_rows(folder: Path, name: str, least_words: int = 0) -> list[dict[str, Any]]:
    """Text and label of the rows of one file, those with fewer words left out."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [{"text": row["text"], "label": str(row["label"])} for row in map(json.loads, lines)]
    return [row for row in rows if len(row["text"].split()) >= least_words]


def embedded_data(place: Path) -> Path:
    """A folder as `--data` takes one, with the embedded sentences: half of them to train on, half to test."""
    rows = embedded_rows(DOCUMENTATION)
    names = rows.features["label"].names
    order = random.Random(0).sample(range(len(rows)), len(rows))
    (place / "documentation").mkdir(parents=True, exist_ok=True)
    for name, part in (("train", order[::2]), ("test", order[1::2])):
        lines = (json.dumps({"text": row["text"], "label": names[row["label"]]}) for row in rows.select(part))
        content = gzip.compress("\n".join(lines).encode(), mtime=0)
        (place / "documentation" / f"{name}.jsonl.gz").write_bytes(content)
    return place


def prepare(cell: str, protocol: dict[str, Any], data: Path, place: Path) -> None:
    """The cell's own files: training rows with their calibration share, test rows, and those of other origin."""
    about = protocol["cells"][cell]
    source = protocol["data"][about["data"]]
    draw = random.Random(about["draw"])
    tests = {
        "test": [row for name in source["test"] for row in read_rows(data / about["data"], name)],
        **{name: read_rows(data / folder, name) for name, folder in source.get("shifted", {}).items()},
    }
    known = {row["text"] for rows in tests.values() for row in rows}
    train = read_rows(data / about["data"], "train", source.get("least_words", 0))
    train = [row for row in train if row["text"] not in known]
    share = protocol["settings"]["calibration_fraction"]
    count = round(about["rows"] / (1 - share))
    sizes = {"train": count, **dict.fromkeys(tests, protocol["test_rows"])}
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": train, **tests}.items():
        draw.shuffle(rows)
        text = "".join(json.dumps(row) + "\n" for row in rows[: sizes[name]])
        write_atomically(place / f"{name}.jsonl", text)


def one_run(cell: str, method: str, seed: int, protocol: dict[str, Any], runs: Path, model: str) -> dict[str, Any]:
    """Probabilities after the temperature of one run on every set of rows of its cell."""
    about = protocol["methods"][method]
    if "run_of" in about:
        return rescaled(
            runs / "runs" / f"{cell}-{about['run_of']}-{seed}", about["posterior_scale"], runs / "cells" / cell
        )
    place = runs / "cells" / cell
    settings = {**protocol["settings"], **about, "seed": seed, "model": model}
    config = RunConfig.from_mapping({**settings, "data": str(place / "train.jsonl")})
    folder = runs / "runs" / f"{cell}-{method}-{seed}"
    if not (folder / "run.json").is_file():
        train_run(config, folder, console=Console(quiet=True))
    stages = json.loads((folder / "run.json").read_text())["stages"]
    found: dict[str, Any] = {"seconds": sum(stage["seconds"] for stage in stages.values())}
    for path in sorted(place.glob("*.jsonl")):
        if path.stem != "train":
            evaluation = evaluate_run(folder, data=str(path), progress=False)
            about = evaluation.content["variants"][evaluation.main_variant]
            order = np.argsort(evaluation.items["keys"], kind="stable")
            p = evaluation.probabilities(evaluation.main_variant, AFTER)[order]
            found["temperature"] = about["temperature"]
            found[path.stem] = {"p": np.round(p, 6).tolist(), "labels": evaluation.items["labels"][order].tolist()}
    return found


def rescaled(folder: Path, scale: float, place: Path) -> dict[str, Any]:
    """The same of a run whose draws lie further apart, or nearer, than those it was evaluated with."""
    finished = FinishedRun.load(folder)
    finished.model.peft_config[ADAPTER].posterior_scale = scale
    finished.model.base_model.invalidate_factors()
    count = LawDraws(finished.model, 0).default_num_samples

    def said(rows: Any) -> tuple[np.ndarray, np.ndarray]:
        prediction = finished.predict(rows, "sample", count, progress=False)
        return prediction.probabilities.numpy(), prediction.labels.numpy()

    scaling = TemperatureScaling().fit(
        *said(load_run_rows(finished.task.config)[1].calibration), input="probabilities"
    )
    found: dict[str, Any] = {"seconds": 0.0, "temperature": scaling.temperature}
    record = read_record(finished.folder, finished.task)
    for path in sorted(place.glob("*.jsonl")):
        if path.stem != "train":
            rows = load_test_rows(finished.task, record, TestData(str(path)))
            order = np.argsort(rows.keys.view(np.int64), kind="stable")
            p, labels = said(rows.rows.select(order))
            p = np.asarray(scaling.transform(p, input="probabilities"))
            found[path.stem] = {"p": np.round(p, 6).tolist(), "labels": labels.tolist()}
    return found


def run(args: argparse.Namespace, protocol: dict[str, Any]) -> None:
    data = args.data or embedded_data(args.runs / "data")
    for seed in range(protocol["seeds"]):
        for cell in args.cells or protocol["cells"]:
            if not (args.runs / "cells" / cell / "train.jsonl").is_file():
                prepare(cell, protocol, data, args.runs / "cells" / cell)
            for method in args.methods or protocol["methods"]:
                file = args.runs / "probabilities" / cell / f"{method}-{seed}.json"
                if not file.is_file():
                    found = one_run(cell, method, seed, protocol, args.runs, args.model)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(file, json.dumps(found) + "\n")
                    print(f"{cell} {method} {seed}: {found['seconds']:.0f} s", flush=True)


def compared(cell: Path, part: str, protocol: dict[str, Any]) -> list[GroupComparison] | None:
    """All methods with the baseline on one set of rows of a cell; None where there are none, or no finished runs."""
    groups: dict[str, list[np.ndarray]] = {}
    for method in protocol["methods"]:
        files = [cell / f"{method}-{seed}.json" for seed in range(protocol["seeds"])]
        if not all(file.is_file() for file in files):
            continue
        found = [json.loads(file.read_text()) for file in files]
        if part not in found[0]:
            return None
        labels = np.array(found[0][part]["labels"])
        if any(of[part]["labels"] != found[0][part]["labels"] for of in found):
            raise ValueError(f"{cell}: the runs of {method} were measured on other rows, or in another order")
        groups[method] = [np.array(of[part]["p"]) for of in found]
    if len(groups) < 2 or protocol["baseline"] not in groups:
        return None
    groups = {name: [p / p.sum(1, keepdims=True) for p in runs] for name, runs in groups.items()}
    return compare_groups(groups, labels, baseline=protocol["baseline"], paired=True, scores=protocol["scores"])


def told(pair: GroupComparison) -> dict[str, Any]:
    """Differences with their intervals, and how far the runs lie apart."""
    keys = ("difference", "low", "high", "a", "b", "run_sd_a", "run_sd_b")
    return {
        d.score: {key: round(getattr(d, key), 5) for key in keys}
        | {
            "error_rows": round(d.over_rows[0] ** 0.5, 6),
            "error_runs": round(sum(p for p, _ in d.over_runs) ** 0.5, 6),
        }
        for d in pair.differences
    }


def table(args: argparse.Namespace, protocol: dict[str, Any]) -> dict[str, Any]:
    """Every finished cell by itself, and the mean over cells of what is in distribution and of what is not."""
    shifted = sorted({name for source in protocol["data"].values() for name in source.get("shifted", {})})
    results: dict[str, Any] = {"protocol": protocol, "machine": describe_machine()}
    for title, parts in zip(PARTS, (["test"], shifted), strict=True):
        cells: dict[str, list[GroupComparison]] = {}
        sources = []  # cells of one data set draw their test rows from the same file
        for name in args.cells or protocol["cells"]:
            for part in parts:
                found = compared(args.runs / "probabilities" / name, part, protocol)
                if found is not None:
                    cells[f"{name} {part}"] = found
                    sources.append((protocol["cells"][name]["data"], part))
        if not cells:
            continue
        pooled = pool_comparisons(list(cells.values()), rows=sources)
        results[title] = {
            "mean over cells": {pair.names[0]: told(pair) for pair in pooled},
            "cells": {name: {pair.names[0]: told(pair) for pair in found} for name, found in cells.items()},
        }
        print(f"## {title}: {len(cells)} cells\n")
        for pair in pooled:
            print(pair.to_markdown())
    return results | {"decision": decided(results)}


def decided(results: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """The decision of the protocol, clause by clause, for every method; shifted rows where the cells have some."""
    here, there = (results.get(title, {}).get("mean over cells", {}) for title in PARTS)
    answers = {}
    for method, scores in here.items():
        clauses = {f"{score} lower": scores[score]["high"] < 0 for score in ("nll", "brier")}
        clauses["accuracy at most .005 lower"] = scores["accuracy"]["difference"] >= -0.005
        clauses["ece not higher"] = scores["ece"]["low"] <= 0
        if method in there:
            clauses["shifted nll not higher"] = there[method]["nll"]["low"] <= 0
        answers[method] = clauses
    return answers


def stored_results() -> list[dict[str, Any]]:
    """What the page is made of."""
    return [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in ON_THE_PAGE]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=("run", "table", "page"))
    options.add_argument("--protocol", type=Path, default=PROTOCOL)
    options.add_argument("--data", type=Path)
    options.add_argument("--runs", type=Path, default=Path("evidence-runs"))
    options.add_argument("--model", default=embedded_model())
    options.add_argument("--methods", nargs="+", help="of the protocol; all if not given")
    options.add_argument("--cells", nargs="+", help="of the protocol; all if not given")
    args = options.parse_args()
    protocol = json.loads(args.protocol.read_text(encoding="utf-8"))
    if args.what == "run":
        run(args, protocol)
    elif args.what == "table":
        write(args.output, table(args, protocol))
    else:
        write_atomically(PAGE, page(stored_results()))


if __name__ == "__main__":
    main()
