"""Does a head trained to tell errors beat what a classifier has without it? Real data, several runs and draws of rows.

The adapters are the finished LoRA runs of `benchmarks/evidence.py`. Features of a run are extracted once; then every
seed draws rows to fit on and rows to choose by, of the training split and unseen by the run, and all methods are
fitted to them: the papers' presets v1 (AdUE) and v2 (ALIEN), our default, the ablations of v2, and every baseline.
Fits and cells are in `benchmarks/uncertainty_head/protocol.json`, written after one trial fit; a finished one is a
file, so that what is not finished goes on where it stood.

    python benchmarks/uncertainty_head.py extract --data DIR --runs DIR --place DIR
    python benchmarks/uncertainty_head.py fit --place DIR
    python benchmarks/uncertainty_head.py table --place DIR --output benchmarks/results/uncertainty_head.json
    python benchmarks/uncertainty_head.py page --output benchmarks/results/uncertainty_head.json

`uncertainty_head_decoder.py` prepares the same for a small decoder; its results are `uncertainty_head_decoder.json`.
`--runs` is what `evidence.py run` wrote, `--data` what it read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from harness import describe_machine, parser, write
from uncertainty_head_page import put_into
from uncertainty_head_rows import OF_FUNCTIONS, extract, passes_of, read, read_head, rows_of
from uncertainty_head_table import table

from peft_calib.files import write_atomically
from peft_calib.uncertainty_head import FeatureSet, UncertaintyHead
from peft_calib.uncertainty_head.baselines import ProbeTraining, baseline, ensemble_of

HERE = Path(__file__).parent
PROTOCOL = HERE / "uncertainty_head" / "protocol.json"
EVIDENCE = HERE / "evidence" / "evidence.json"
PAGE = HERE.parent / "docs" / "uncertainty-head.md"
TUNED = ProbeTraining(learning_rates=(3e-5, 3e-4, 3e-3))
BRIEF = ProbeTraining(learning_rates=(3e-3,), epochs=60, patience=8)
BCE_ONLY = {"alpha": 0.0, "beta": 0.0}

#: Name to the baseline and its options; all that are fitted to one function's features.
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax response": ("softmax_response", {}),
    "entropy": ("entropy", {}),
    "margin": ("margin", {}),
    "softmax response, tempered": ("temperature_scaled", {}),
    "MD": ("mahalanobis", {}),
    "MD, normalised": ("mahalanobis", {"normalise": True}),
    "RMD, normalised": ("relative_mahalanobis", {"normalise": True}),
    "RDE, normalised": ("robust_density", {"normalise": True, "num_components": 32}),
    "DDU": ("ddu", {}),
    "linear probe": ("linear_probe", {"training": TUNED}),
    "attention probe": ("attention_probe", {"training": BRIEF}),
}
SAMPLED = ("sampled_response", "predictive_entropy", "bald", "ensemble_variance")
#: Name to the rows fitted on and the options of `UncertaintyHead.fit_features`; "held out" has no rows of its own.
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "head (default)": ("held out", {}),
    "head v1 (AdUE)": ("unseen", {"paper": "v1"}),
    "head v2 (ALIEN)": ("unseen", {"paper": "v2"}),
    "head v2, few rows": ("few", {"paper": "v2"}),
    "head v1, own rows": ("own", {"paper": "v1"}),
    "head v2, own rows": ("own", {"paper": "v2"}),
    "head v2, BCE only": ("unseen", {"paper": "v2", **BCE_ONLY}),
    "head v2, random, BCE only": ("unseen", {"paper": "v2", "init": "random", **BCE_ONLY}),
}


def drawn(pool: FeatureSet, seed: int, protocol: dict[str, Any]) -> dict[str, FeatureSet]:
    """Rows to fit on, a few of them, and rows to choose by, of those that the run has not seen."""
    order = torch.from_numpy(np.random.default_rng([seed, 15]).permutation(len(pool)))
    fit, held = protocol["fit_rows"], protocol["validation_rows"]
    parts = {"unseen": order[:fit], "few": order[: protocol["few_rows"]], "validation": order[fit : fit + held]}
    return {name: pool.select(index) for name, index in parts.items()} | {"held out": pool.select(order[: fit + held])}


def scored(fitted: Callable[[FeatureSet], dict[str, np.ndarray]], tests: dict[str, FeatureSet]) -> dict[str, Any]:
    """Scores and probabilities of an error of all test sets, six digits."""

    def digits(values: Any) -> list[float]:
        return [float(f"{value:.6g}") for value in np.asarray(values, dtype=np.float64)]

    return {part: {key: digits(values) for key, values in fitted(rows).items()} for part, rows in tests.items()}


def of_baseline(name: str, rows: dict[str, FeatureSet], tests: dict[str, FeatureSet]) -> dict[str, Any]:
    kind, options = BASELINES[name]
    found = baseline(kind, **options).fit(rows["unseen"], rows["validation"]).calibrate(rows["validation"])

    def asked(part: FeatureSet) -> dict[str, np.ndarray]:
        own = {"own": found.score(part)} if found.is_probability else {}
        return {"score": found.score(part), "mapped": found.error_probability(part), **own}

    return scored(asked, tests)


def of_head(
    name: str, rows: dict[str, FeatureSet], tests: dict[str, FeatureSet], head: Any, seed: int
) -> dict[str, Any]:
    """A head: of a paper's preset its score as it is, and mapped on the validation rows like a baseline's."""
    which, options = HEADS[name]
    held_out = which == "held out"
    train, validation = (None, rows[which]) if held_out else (rows[which], rows["validation"])
    found = UncertaintyHead.fit_features(train, validation, head, **options, calibrate="platt", seed=seed)

    def asked(part: FeatureSet) -> dict[str, np.ndarray]:
        answer = found.predict_features(part)
        own = {} if held_out else {"own": answer.uncertainty.clip(0, 1).numpy()}
        return {"score": answer.uncertainty.numpy(), "mapped": answer.error_probability.numpy(), **own}

    report = found.report
    about = {"why_base": report.why_base, "errors_fitted": report.num_fit_errors, "rows_fitted": report.num_fit}
    if report.verdict is not None:
        about["verdict"] = {key: report.verdict.to_dict()[key] for key in ("difference", "low", "high")}
    return scored(asked, tests) | {"about": about}


def of_functions(name: str, rows: FeatureSet, errors: torch.Tensor, tests: dict[str, FeatureSet]) -> dict[str, Any]:
    """A score of several functions; nothing is fitted but its map to the errors of the run that predicts."""
    # a map is fitted to what the functions' own mean gets wrong; with these labels that is what the run gets wrong
    labels = torch.where(errors, (rows.predicted + 1) % rows.num_classes, rows.predicted)
    found = baseline(name).fit(rows).calibrate(replace(rows, labels=labels))

    def asked(part: FeatureSet) -> dict[str, np.ndarray]:
        own = {"own": found.score(part)} if found.is_probability else {}
        return {"score": found.score(part), "mapped": found.error_probability(part), **own}

    return scored(asked, tests)


def fit_one(
    cell: str, run: int, seed: int, protocol: dict[str, Any], place: Path, names: list[str], found: dict[str, Any]
) -> dict[str, Any]:
    """Methods on one run and one draw of rows, added to those that were fitted before."""
    folder = place / f"{cell}-{run}"
    rows = drawn(read(folder / "pool.safetensors"), seed, protocol)
    if (folder / "own.safetensors").is_file():
        rows["own"] = read(folder / "own.safetensors")
    tests = {path.stem: read(path) for path in sorted(folder.glob("*.safetensors")) if is_test(path.stem)}
    for name in names:
        if name in HEADS and HEADS[name][0] not in rows:
            continue
        start = time.process_time()
        if name in BASELINES:
            found["methods"][name] = of_baseline(name, rows, tests)
        else:
            found["methods"][name] = of_head(name, rows, tests, read_head(folder), seed)
        found["seconds"][name] = round(time.process_time() - start, 2)
    found["errors"] = {part: features.errors.int().tolist() for part, features in tests.items()}
    found["fit_errors"] = {name: int(part.errors.sum()) for name, part in rows.items()}
    return found


def is_test(name: str) -> bool:
    return name not in ("pool", "own", "head") and not name.endswith(passes_of(""))


def functions_of(cell: str, run: int, protocol: dict[str, Any], place: Path) -> dict[str, dict[str, FeatureSet]]:
    """Rows to map on and rows to test on of passes with dropout, and of an ensemble of all runs of the cell."""
    found = {}
    passes = {name: place / f"{cell}-{run}" / f"{passes_of(name)}.safetensors" for name in OF_FUNCTIONS}
    if all(file.is_file() for file in passes.values()):
        found["dropout"] = {name: read(file) for name, file in passes.items()}
    if protocol["members"] > 1:
        others = [other for other in range(protocol["members"]) if other != run]
        found["ensemble"] = {
            name: ensemble_of(
                [read(place / f"{cell}-{member}" / f"{name}.safetensors", tokens=False) for member in (run, *others)]
            )
            for name in OF_FUNCTIONS
        }
    return found


def sampled_one(cell: str, run: int, protocol: dict[str, Any], place: Path) -> dict[int, dict[str, Any]]:
    """By seed: passes with dropout of one run, and the ensemble of all runs, as scores of this one's errors."""
    sources = functions_of(cell, run, protocol, place)
    own = read(place / f"{cell}-{run}" / "pool.safetensors", tokens=False)
    found: dict[int, dict[str, Any]] = {}
    for seed in range(protocol["seeds"]):
        methods = {}
        errors = drawn(own, seed, protocol)["validation"].errors
        for source, rows in sources.items():
            held = drawn(rows["pool"], seed, protocol)["validation"]
            for kind in SAMPLED:
                name = f"{source}, {kind.replace('_', ' ')}"
                methods[name] = of_functions(kind, held, errors, {"test": rows["test"]})
        found[seed] = {"methods": methods}
        if "ensemble" in sources:
            found[seed]["accuracy_of_ensemble"] = 1 - float(sources["ensemble"]["test"].errors.double().mean())
    return found


def fit(args: argparse.Namespace, protocol: dict[str, Any]) -> None:
    """What is not there yet; runs last, so that every seed of few runs is there first."""
    for run in range(protocol["runs"]):
        for cell in args.cells or protocol["cells"]:
            if not (args.place / f"{cell}-{run}" / "head.safetensors").is_file():
                continue
            for seed in range(protocol["seeds"]):
                file = args.place / "fits" / f"{cell}-{run}-{seed}.json"
                found = {"methods": {}, "seconds": {}}
                if file.is_file():
                    found = json.loads(file.read_text(encoding="utf-8"))
                missing = [name for name in args.methods or [*BASELINES, *HEADS] if name not in found["methods"]]
                if missing:
                    found = fit_one(cell, run, seed, protocol, args.place, missing, found)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(file, json.dumps(found) + "\n")
                    print(f"{file.stem}: {sum(found['seconds'].values()):.0f} s", flush=True)


def extract_all(args: argparse.Namespace, protocol: dict[str, Any]) -> None:
    evidence = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    datasets.disable_progress_bars()
    for run in range(max(protocol["runs"], protocol["members"])):
        for cell in args.cells or protocol["cells"]:
            extract(
                cell, run, rows_of(cell, protocol, evidence, args.runs, args.data), protocol, args.runs, args.place
            )


def stored(output: Path) -> dict[str, Any]:
    """The results for a page, those of the decoder among them where there are some."""
    results = json.loads(output.read_text(encoding="utf-8"))
    file = output.with_name("uncertainty_head_decoder.json")
    return results | ({"decoder": json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {})


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=("extract", "fit", "table", "page"))
    options.add_argument("--protocol", type=Path, default=PROTOCOL)
    options.add_argument("--data", type=Path)
    options.add_argument("--runs", type=Path)
    options.add_argument("--place", type=Path, default=Path("uncertainty-head"))
    options.add_argument("--methods", nargs="+", help="names of methods; all if not given")
    options.add_argument("--cells", nargs="+", help="of the protocol; all if not given")
    args = options.parse_args()
    protocol = json.loads(args.protocol.read_text(encoding="utf-8"))
    if args.what == "extract":
        extract_all(args, protocol)
    elif args.what == "fit":
        fit(args, protocol)
    elif args.what == "table":
        write(args.output, table(args.place, protocol, sampled_one) | {"machine": describe_machine()})
    else:
        put_into(PAGE, stored(args.output))


if __name__ == "__main__":
    main()
