"""Several labels a text, and a number a text: from a CSV file to a decision at the defaults, on real data.

Labels: 20 Newsgroups, whose twenty groups make twenty labels of which a post has one to three (`LABELS`): what is
common to several groups (computers, hardware, sport, politics, ...) and what a group is about. Numbers: sentiment of
movie-review snippets as rated by twenty people from -4 to 4 (Hutto & Gilbert, 2014; MIT licence), with product reviews
as rows of another kind.

    python benchmarks/kinds_of_answer.py labels NEWSGROUPS_FOLDER --out FOLDER
    python benchmarks/kinds_of_answer.py numbers RATINGS_FOLDER --out FOLDER

The first folder holds `train.jsonl.gz` and `test.jsonl.gz` with `text` and `label` (the number of the group, in
alphabetical order); the second the tables `movieReviewSnippets_GroundTruth.txt` and
`amazonReviewSnippets_GroundTruth.txt` of the authors. Writes `benchmarks/results/kinds_of_answer.json`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

from peft_calib.demo import embedded_model
from peft_calib.runs.deciding import decide
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.predicting import predict_table
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.training import train_run

RESULT = Path(__file__).parent / "results" / "kinds_of_answer.json"
#: The groups in alphabetical order, each with its labels.
LABELS = {
    "alt.atheism": "religion",
    "comp.graphics": "computers|graphics",
    "comp.os.ms-windows.misc": "computers|windows",
    "comp.sys.ibm.pc.hardware": "computers|hardware",
    "comp.sys.mac.hardware": "computers|hardware",
    "comp.windows.x": "computers|windows",
    "misc.forsale": "for sale",
    "rec.autos": "recreation|cars",
    "rec.motorcycles": "recreation|motorcycles",
    "rec.sport.baseball": "recreation|sport|baseball",
    "rec.sport.hockey": "recreation|sport|hockey",
    "sci.crypt": "science|cryptography",
    "sci.electronics": "science|electronics",
    "sci.med": "science|medicine",
    "sci.space": "science|space",
    "soc.religion.christian": "religion",
    "talk.politics.guns": "politics|guns",
    "talk.politics.mideast": "politics|mideast",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
#: Rows to train on (a fifth of them to calibrate on), to decide over and to report on.
SIZES = {"labels": (1000, 1500, 1500), "numbers": (1000, 1000, 1000)}
#: Characters of a post that are read, for the time they take on a CPU.
READ = 300


def newsgroups(folder: Path) -> dict[str, list[dict]]:
    """Rows of the labels: those of the first file to train on and to decide over, of the second to report on."""
    names = list(LABELS.values())
    found = {}
    for split in ("train", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        found[split] = [{"text": row["text"][:READ], "labels": names[row["label"]]} for row in rows]
    first, second, third = SIZES["labels"]
    order = random.Random(0).sample(range(len(found["train"])), first + second)
    chosen = random.Random(1).sample(range(len(found["test"])), third)
    return {
        "train": [found["train"][i] for i in order[:first]],
        "decide": [found["train"][i] for i in order[first:]],
        "test": [found["test"][i] for i in chosen],
    }


def ratings(folder: Path) -> dict[str, list[dict]]:
    """Rows of the numbers; snippets of one review stay together."""
    tables = {}
    for name in ("movieReviewSnippets", "amazonReviewSnippets"):
        lines = (folder / f"{name}_GroundTruth.txt").read_text(encoding="latin-1").splitlines()
        parts = [line.split("\t", 2) for line in lines if line.strip()]
        tables[name] = [{"review": p[0].split("_")[0], "text": p[2], "rating": p[1]} for p in parts]
    reviews: dict[str, list[dict]] = {}
    for row in tables["movieReviewSnippets"]:
        reviews.setdefault(row["review"], []).append(row)
    names = sorted(reviews)
    random.Random(0).shuffle(names)
    rows = [row for name in names for row in reviews[name]]
    first, second, third = SIZES["numbers"]
    other = random.Random(1).sample(tables["amazonReviewSnippets"], third)
    ends = (first, first + second, first + second + third)
    return {
        "train": rows[: ends[0]],
        "decide": rows[ends[0] : ends[1]],
        "test": rows[ends[1] : ends[2]],
        "other": other,
    }


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def studied(kind: str, tables: dict[str, list[dict]], out: Path) -> dict[str, Any]:
    """Train, decide and evaluate at the defaults; what is reported."""
    out.mkdir(parents=True, exist_ok=True)
    files = {name: str(write_csv(out / f"{name}.csv", rows)) for name, rows in tables.items()}
    own = {"task": "multi-label", "label_column": "labels"} if kind == "labels" else {}
    own = own or {"task": "regression", "label_column": "rating"}
    run = out / "run"
    if not (run / "run.json").is_file():
        train_run(RunConfig(data=files["train"], model=str(embedded_model()), **own), run)
    made = decide(run, files["decide"], overwrite=True, progress=False)
    found = {"rows": {name: len(rows) for name, rows in tables.items()}, "rule": made.to_dict()["rules"]}
    for name in ("test", "other"):
        if name in files:
            content = evaluate_run(run, data=files[name], progress=False).content
            (variant,) = content["variants"].values()
            shown = ("told", "verdict", *content["metrics"])
            found[name] = {
                "before": variant.get("before"), "after": variant["after"],
                "baseline": {key: content["baseline"][key] for key in shown if key in content["baseline"]},
                "recalibration": variant["temperature_fit"]["reason"],
                "decision": variant["decision"],
            }  # fmt: skip
    table = predict_table(run, files["test"], out / "predicted.csv", overwrite=True, progress=False)
    found["predicted"] = table.lines()[:-1]
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("kind", choices=tuple(SIZES))
    asked.add_argument("folder", type=Path)
    asked.add_argument("--out", type=Path, required=True)
    given = asked.parse_args()
    tables = newsgroups(given.folder) if given.kind == "labels" else ratings(given.folder)
    found = studied(given.kind, tables, given.out)
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    RESULT.write_text(json.dumps({**known, given.kind: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
