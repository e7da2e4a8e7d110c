"""From text to a calibrated number: LoRA and three of our methods as runs on the same rows, side by side."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch.utils.data import DataLoader

from ..console import own_random_state, quiet
from ..files import fill_folder, folder_lock
from ..provenance.splits import SplitRecord
from ..runs.embedded import called, embedded_model
from ..runs.error_head import train_head
from ..runs.evaluation import AFTER, BEFORE, Evaluation, evaluate_run
from ..runs.folder import STAGE, RunFolder, read_json, write_json
from ..runs.loading import FinishedRun
from ..runs.methods import ADAPTER
from ..runs.rows import labelled_test_split, load_outside_rows, load_run_rows, load_test_rows
from ..runs.settings import DEMONSTRATION, RunConfig
from ..runs.sources import FileFormat, read_splits
from ..runs.stage import load_base
from ..runs.training import train_in
from .data import with_embedded
from .table import Line, reliability_grid, result_table

FINISHED = "report.json"  # written last: a folder that has it holds a finished demonstration
#: How the table calls a method, and how the command line does.
METHODS = {
    "LoRA": "lora",
    "HyperLoRA": "hyper-lora",
    "BayesianLoRA": "bayesian-lora",
    "EnsembleLoRA": "ensemble-lora",
}
#: Which way of predicting is shown of a method; the mean adapter of the others.
SHOWN = {"EnsembleLoRA": "sample"}
#: What gets an uncertainty head, fitted on the calibration rows.
WITH_HEAD = ("LoRA",)
#: Nothing is watched or continued here; grouping by length is a third less padding, hence time.
TRAINER = {"eval_strategy": "no", "train_sampling_strategy": "group_by_length"}
NO_CHECKPOINTS = 1e9


def check_output_dir(output_dir: str | Path, overwrite: bool = False) -> Path:
    """The output folder, which must not hold a finished run unless that may be overwritten; nothing is touched."""
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder")
    if (path / FINISHED).exists() and not overwrite:
        raise FileExistsError(f"{path} holds a finished run; name another folder, or pass --overwrite to replace it")
    return path


def demo_config(
    data: str = "documentation", model: str | None = None, **settings: Any
) -> tuple[RunConfig, str | None]:
    """Settings of the runs, and texts of other origin; test rows are held out where the source brings none."""
    source, outside, fractions = with_embedded(data, None, {"test_fraction": 0.2})
    own = {"trainer": TRAINER, "save_steps": NO_CHECKPOINTS, **fractions}
    values: dict[str, Any] = {**DEMONSTRATION, **own, **settings}
    config = RunConfig(data=source, model=model or embedded_model(), **values)
    splits = read_splits(config.data, config.subset, FileFormat(config.encoding, config.delimiter))
    if labelled_test_split(splits, config) is not None:
        config = replace(config, test_fraction=0.0)
    return config, outside


def described(config: RunConfig, outside: Any) -> dict[str, Any]:
    """Name, numbers of rows and classes; all is read before anything is trained, so bad input is told of at once."""
    task, rows = load_run_rows(config)
    test = load_test_rows(task, SplitRecord())
    form, other = FileFormat(config.encoding, config.delimiter), 0
    if outside is not None:
        other = len(load_outside_rows(task, outside, form, config.drop_missing).rows)
    counts = {"train": len(rows.train), "calibration": len(rows.calibration), "test": len(test.rows), "outside": other}
    assert task.labels is not None
    name = config.data.removeprefix("embedded:")
    return {"name": name, "rows": counts, "label_names": list(task.labels.names)}


def run_demo(
    config: RunConfig,
    output_dir: str | Path,
    *,
    outside: Any = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train LoRA and three of our methods alike and report how calibrated each is, LoRA with an uncertainty head.

    BayesianLoRA is measured twice: its mean, which costs what LoRA costs, and the mean of the probabilities of 8
    draws; EnsembleLoRA by the mean of its members' probabilities. The folder gets the runs, their adapters, HyperLoRA
    also as a plain LoRA, `reliability.png`, and `report.json`, last.
    """
    place, console = check_output_dir(output_dir, overwrite), console or Console()
    with quiet():
        about = described(config, outside)
    console.print("{train} rows to train on, {calibration} to calibrate on, {test} to test on".format(**about["rows"]))

    def write(folder: Path) -> None:
        _make(config, outside, about, folder, console)

    with folder_lock(place):
        fill_folder(place, write, FINISHED)
    adapters = ", ".join([*map(str.lower, METHODS), "hyperlora-as-lora"])
    console.print(f"Written to {place}: {FINISHED}, reliability.png, the runs, and the adapters {adapters}.")
    return read_json(place / FINISHED)


def _make(config: RunConfig, outside: Any, about: dict[str, Any], folder: Path, console: Console) -> None:
    """Train and measure every method into a folder, and write the report."""
    runs: dict[str, Evaluation] = {}
    methods: dict[str, Any] = {}
    for name, method in METHODS.items():
        place = RunFolder(folder / "runs" / name.lower())
        facts = train_in(replace(config, method=method), place, console)
        if name in WITH_HEAD:
            with console.status(f"an uncertainty head for {name}"):
                train_head(place.path, progress=False)
        with console.status(f"measuring {name}"):
            runs[name] = evaluate_run(place.path, outside=outside, seed=config.seed, progress=False)
        _copy(place.adapter(ADAPTER), folder / name.lower())
        stage = facts["stages"][ADAPTER]
        counted = {"trainable_parameters": stage["trainable_parameters"], "training_seconds": stage["seconds"]}
        methods[name] = {**counted, **_numbers(runs[name], SHOWN.get(name, "mean"))}
    with quiet(), own_random_state():
        export = _export(FinishedRun.load(folder / "runs" / "hyperlora"), folder / "hyperlora-as-lora")
        draws = {**_about_draws(runs["BayesianLoRA"]), **_spread(FinishedRun.load(folder / "runs" / "bayesianlora"))}
    lines = [Line(name, found, SHOWN.get(name, "mean")) for name, found in runs.items()]
    lines.insert(-1, Line(f"{config.num_samples} draws of it", runs["BayesianLoRA"], "sample"))
    reliability_grid(lines).savefig(folder / "reliability.png", dpi=120)
    baseline = runs["LoRA"].content["baseline"]
    report = {
        "methods": methods,
        "export": export,
        "draws": draws,
        "data": about,
        "settings": config.to_dict(),
        "rank": config.rank,
        "environment": {"cores": os.cpu_count()} | facts["environment"],
        "most_frequent_class": baseline,
    }
    write_json(folder / FINISHED, report)
    classes = f"{about['rows']['test']} test rows, {len(about['label_names'])} classes"
    title = f"{called(config.model)} on {about['name']}: {classes}"
    console.print(result_table(lines, title, baseline))
    for found in runs.values():
        if found.content["baseline"]["verdict"]:
            console.print(found.content["baseline"]["verdict"], markup=False, highlight=False)
    disagreement = ", ".join(f"{name} {value:.3f}" for name, value in draws["mutual_information"].items())
    console.print(
        f"{draws['num_samples']} draws cost {draws['num_forwards']:.1f} forwards a row. Mutual information, what they "
        f"disagree on, nats: {disagreement}.\nMedian posterior standard deviation, the prior's being 1: "
        f"{draws['median_sd']:.2f}, at the start {draws['initial_sd']:.2f}."
    )


def _numbers(evaluation: Evaluation, variant: str) -> dict[str, Any]:
    """Temperature, and what was measured before and after it, of one way of predicting."""
    found = evaluation.content["variants"][variant]
    outside = found.get("outside", {})
    stages = {stage: {"test": found[stage], "outside": outside.get(stage)} for stage in (BEFORE, AFTER)}
    head = {} if "head" not in found else {"head": found["head"]}
    return {"temperature": found["temperature"], "temperature_fit": found["temperature_fit"], **stages, **head}


def _about_draws(evaluation: Evaluation) -> dict[str, Any]:
    """What draws cost, and what they disagree on."""
    found = evaluation.content["variants"]["sample"]
    report: dict[str, Any] = {"num_samples": found["num_samples"], "num_forwards": found["num_forwards"]}
    information = {"test": found["mutual_information"]}
    if "outside" in found:
        information["outside"] = found["outside"]["mutual_information"]
        report["outside_auroc_of_mutual_information"] = found["outside"]["auroc_of_mutual_information"]
    return {**report, "mutual_information": information, **_numbers(evaluation, "sample")}


def _spread(run: FinishedRun) -> dict[str, Any]:
    """How far training has moved the posterior's standard deviations, in units of the prior's."""
    tuner: Any = run.model.base_model
    law = tuner.get_law(ADAPTER)
    return {"initial_sd": law.config.init_sd, "median_sd": float(law.core_sd().median())}


@torch.inference_mode()
def _export(run: FinishedRun, path: Path) -> dict[str, Any]:
    """Take the run's plain LoRA, load it with stock PEFT onto a fresh base model, and compare logits."""
    _copy(run.folder.plain_lora, path)
    plain = PeftModel.from_pretrained(load_base(run.task, run.tokenizer), path).eval().to(run.model.device)
    _, rows = load_run_rows(run.task.config)
    encoded = run.task.encode_prediction(rows.calibration, run.tokenizer)
    difference = 0.0
    loader = DataLoader(encoded, 2 * run.task.config.batch_size, collate_fn=run.task.collator(run.tokenizer))
    for batch in loader:
        inputs = {name: value.to(run.model.device) for name, value in batch.items() if name != "labels"}
        gap = run.model(**inputs).logits - plain(**inputs).logits
        difference = max(difference, float(gap.abs().max()))
    return {"folder": path.name, "max_abs_logit_difference": difference}


def _copy(adapter: Path, to: Path) -> None:
    """A run's adapter at the top of the folder, where it is looked for."""
    shutil.copytree(adapter, to, ignore=shutil.ignore_patterns(STAGE))
