"""A watch on real texts: MiniLM fine-tuned on 300 rows, then tweets to airlines, reviews of kitchens, new questions.

    python benchmarks/watch_text.py --place features --output benchmarks/results/watch_text.json

Takes the logits that `uncertainty_head.py --place features` keeps of every run (`pool` are rows unseen by it). Of the
pool, in another order for every cut, 300 rows fit the temperature, 700 are the reference and 500 a stream like it; the
other streams are the cell's test sets. 5 cuts of each of 4 runs. The measured accuracy, which no watch knows, stands
beside what is expected of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from harness import kept, parser, write
from safetensors.numpy import load_file

from peft_calib.calibration import TemperatureScaling, Watch

CELLS = ("sst2-0", "trec-0", "ag_news-0")
RUNS, CUTS = 4, 5
TEMPERATURE, REFERENCE = 300, 1000
#: In `features`, and no rows to test on.
OTHERS = ("head", "own", "pool")
ESTIMATES = ("confidence", "threshold", "class_shares")


def rows_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels."""
    tensors = load_file(path)
    return tensors["logits"][0].astype(np.float64), tensors["labels"]


def cut(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """What one watch says of every stream."""
    generator = np.random.default_rng(seed)
    logits, labels = rows_of(folder / "pool.safetensors")
    order = generator.permutation(len(labels))
    fit, reference, like = order[:TEMPERATURE], order[TEMPERATURE:REFERENCE], order[REFERENCE:]
    scaling = TemperatureScaling().fit(logits[fit], labels[fit])
    streams = {"like rows": (logits[like], labels[like])}
    for path in sorted(folder.glob("*.safetensors")):
        if path.stem not in OTHERS and "dropout" not in path.stem:
            found = rows_of(path)
            mixed = generator.permutation(len(found[1]))  # they lie there by length, which is a change by itself
            streams[path.stem] = (found[0][mixed], found[1][mixed])
    told = {}
    for name, (rows, true) in streams.items():
        watch = Watch(seed=seed).start(scaling.transform(logits[reference]), labels[reference])
        report = watch.update(scaling.transform(rows))
        raised = [one.raised_at for one in report.alarms if one.raised_at is not None]
        told[name] = {
            "rows": len(true),
            "accuracy": float((rows.argmax(axis=1) == true).mean()),
            "reference": report.reference_accuracy,
            "alarm": min(raised) if raised else None,
            "expected": {one.name: one.to_dict() for one in report.expected},
        }
    return told


def summary(cuts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over cuts."""
    estimates = {}
    for name in ESTIMATES:
        given = [one["expected"][name] | {"true": one["accuracy"]} for one in cuts]
        given = [one for one in given if one["accuracy"] is not None]
        if given:
            estimates[name] = {
                "accuracy": float(np.mean([one["accuracy"] for one in given])),
                "low": float(np.mean([one["interval"][0] for one in given])),
                "high": float(np.mean([one["interval"][1] for one in given])),
                "holds_measured": float(
                    np.mean([one["interval"][0] <= one["true"] <= one["interval"][1] for one in given])
                ),
                "cuts": len(given),
            }
    delays = [one["alarm"] for one in cuts if one["alarm"] is not None]
    return {
        "cuts": len(cuts),
        "rows": cuts[0]["rows"],
        "measured": float(np.mean([one["accuracy"] for one in cuts])),
        "reference": float(np.mean([one["reference"] for one in cuts])),
        "alarmed": len(delays) / len(cuts),
        "median_row": float(np.median(delays)) if delays else None,
        "estimates": estimates,
    }


def markdown(results: dict[str, Any]) -> str:
    """The table of the page."""
    lines = [
        "| rows | measured | alarm (median row) | by confidence | by threshold | by class shares |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in results["streams"].items():
        row = f" ({found['median_row']:.0f})" if found["median_row"] is not None else ""
        cells = [_estimate(found["estimates"].get(one)) for one in ESTIMATES]
        lines.append(f"| {name} | {found['measured']:.1%} | {found['alarmed']:.0%}{row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _estimate(one: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    return f"{one['accuracy']:.1%} [{100 * one['low']:.0f}, {100 * one['high']:.0f}]"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--place", type=Path, required=True, help="folder of features of every run")
    asked = arguments.parse_args()
    streams: dict[str, list[dict[str, Any]]] = {}
    for cell in CELLS:
        for run in range(RUNS):
            for seed in range(CUTS):
                for name, found in cut(asked.place / f"{cell}-{run}", 100 * run + seed).items():
                    streams.setdefault(f"{cell.removesuffix('-0')}, {name}", []).append(found)
    results = kept(asked.output) | {"streams": {name: summary(cuts) for name, cuts in streams.items()}}
    write(asked.output, results)
    print(markdown(results))


if __name__ == "__main__":
    main()
