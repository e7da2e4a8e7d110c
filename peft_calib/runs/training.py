"""`peft-calib train`: from a configuration to a finished run, through any number of interruptions."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from ..artefact import HERE
from ..console import progress_bars, quiet
from ..export import export_lora
from ..files import move_into_place
from ..identity import folder_digest
from ..items import count_items
from ..predictor.answer import logits_of
from ..predictor.kinds import KINDS
from ..provenance.splits import RowSet, SplitRecord
from .answers import fitted_method
from .baseline import CALLED, MostFrequent
from .folder import RunFolder, write_json
from .limits import settled
from .loading import FORMAT_VERSION, FinishedRun, adapter_digests
from .methods import ADAPTER, Stage, plan
from .processes import processes
from .rows import RunRows, load_run_rows
from .settings import RunConfig
from .stage import Material, best_callbacks, load_tokenizer, run_stage, training_arguments
from .tasks import Task
from .temperatures import class_temperature
from .text_scores import fit_text_temperature

#: Whose versions a run tells.
PACKAGES = ("peft-calib", "torch", "transformers", "peft", "datasets", "numpy")


def train_run(
    config: RunConfig, output_dir: str | Path, *, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train a run, or continue one that was interrupted; every process of `accelerate launch` calls this.

    `overwrite` replaces an earlier run once the new one is finished; the same command continues that, too.
    """
    state = processes()
    console = console or Console(quiet=not state.is_main_process)
    place = RunFolder(Path(output_dir).absolute())
    place.check_unfinished(overwrite)
    with place.written_by_this_process() if state.is_main_process else nullcontext():
        place.check_unfinished(overwrite)  # another process may have finished in between
        state.wait_for_everyone()
        replaces = overwrite and place.config.exists()
        folder = place.successor if replaces else place
        content = train_in(config, folder, console, replaces)
        if state.is_main_process and replaces:
            move_into_place(folder.path, place.path)  # the old run goes last
        state.wait_for_everyone()
    console.print(f"Finished: {output_dir}")
    return content


def train_in(config: RunConfig, folder: RunFolder, console: Console, anew: bool = False) -> dict[str, Any]:
    """Train a run in a folder that no other process writes; the content of `run.json` on the main process."""
    state = processes()
    with quiet():
        task, rows = load_run_rows(config)
        config, notes = settled(task.config, len(rows.train), load_tokenizer(task.config))
        task = replace(task, config=config)
        material = material_of(task, rows)
        stages = _plan(material, folder)
        resolved = _resolved(task, rows)
        if not anew:
            folder.check_same_configuration(resolved)
        state.wait_for_everyone()  # every process has looked before one writes
        if state.is_main_process:
            folder.begin(resolved, anew)
        state.wait_for_everyone()
        console.print(
            f"{config.method} on {config.data}: {len(rows.train)} rows to train on, {len(rows.calibration)} to "
            f"calibrate on, {len(stages)} stage(s)"
        )
        baseline = None
        if task.labels is not None and task.kind == "classes":
            baseline = MostFrequent.of(task.labels.names, task.class_indices(rows.train))
        for note in (*notes, *_about_rows(task, rows, baseline)):
            console.print(note, markup=False, highlight=False)
        with progress_bars(console, disable=not state.is_main_process) as progress:
            facts = {stage.name: run_stage(stage, material, folder, progress) for stage in stages}
        run = FinishedRun.assemble(folder, task)
        temperatures = _fit_temperatures(run, rows, console, baseline)
        counts = None if baseline is None else dict(zip(baseline.names, baseline.counts, strict=True))
        known = {"class_counts": counts}
        if task.kind != "classes":
            known["base_rates"] = KINDS[task.kind].base_rates(task.targets(rows.train))
        content = _finish(run, folder, resolved, facts, temperatures, known) if state.is_main_process else {}
        state.wait_for_everyone()
    return content


def _about_rows(task: Task, rows: RunRows, baseline: MostFrequent | None) -> list[str]:
    """What a user should know of the rows before anything is trained on them."""
    lines = []
    if rows.without_value:
        lines.append(f"{rows.without_value} row(s) without a text or a label were left out")
    for names in () if task.labels is None else task.labels.alike:
        told = ", ".join(map(repr, names))
        lines.append(f"{told} differ in blanks or capitals only, and are different classes; make them one if they are")
    lines.append(f"{task.config.epochs:g} epoch(s) at a learning rate of {task.config.learning_rate:g}")
    if baseline is not None:
        scores = baseline.scores(task.class_indices(rows.calibration), task.config.metrics)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        lines.append(f"{CALLED} ({baseline.answer}), calibration rows: {shown}")
    return lines


def material_of(task: Task, rows: RunRows) -> Material:
    """What the stages of a run share, with its rows encoded."""
    tokenizer = load_tokenizer(task.config)
    train, calibration = (task.encode_training(part, tokenizer) for part in (rows.train, rows.calibration))
    record = SplitRecord()
    for known, part in ((record.trained_on, rows.train), (record.calibrated_on, rows.calibration)):
        described = RowSet.of(part)
        known[described.kind] = described
    return Material(task, tokenizer, train, calibration, record)


def _plan(material: Material, folder: RunFolder) -> list[Stage]:
    """The stages, with every configuration built and so checked."""
    task, config = material.task, material.task.config
    answers = task.answer_tokens(material.tokenizer)
    items = count_items(material.train) or len(material.train)
    best_callbacks(config)
    training_arguments(config, output_dir=str(folder.path), seed=config.seed)
    return plan(config, folder, task.peft_task_type, task.has_head, items, answers)


def _resolved(task: Task, rows: RunRows) -> dict[str, Any]:
    """What makes two runs the same."""
    return {
        "format_version": FORMAT_VERSION,
        "settings": task.config.to_dict(),
        "labels": None if task.labels is None else task.labels.to_dict(),
        "rows": rows.to_dict(),
    }


def _fit_temperatures(
    run: FinishedRun, rows: RunRows, console: Console, baseline: MostFrequent | None
) -> dict[str, Any]:
    """A temperature for each way the run predicts, fitted on the calibration rows; and whether it has learned."""
    temperatures: dict[str, Any] = {}
    for variant, count in run.variants.items():
        fitted: dict[str, Any] = {"num_samples": count}
        verdict = None
        if run.task.kind != "classes":
            kept, reason = fitted_method(run, rows.calibration, variant, count)
            temperatures[variant] = fitted | kept
            console.print(f"{variant}, {count} draw(s): {reason}", markup=False, highlight=False)
            continue
        if baseline is None:
            fit = fit_text_temperature(run, rows.calibration, variant, count)
            fitted |= {"parameters": {"temperature": fit.temperature}, "fit": fit.to_dict()}
        else:
            prediction = run.predict(rows.calibration, variant, count, progress=False)
            assert prediction.labels is not None
            fitted |= class_temperature(logits_of(prediction.probabilities), prediction.labels.numpy()).state()
            verdict = baseline.verdict_of("the run", prediction.probabilities.numpy(), prediction.labels.numpy())
        temperatures[variant] = fitted
        line = f"temperature ({variant}, {count} draw(s)): {fitted['fit']['reason']}"
        console.print(line, markup=False, highlight=False)
    if verdict is not None:  # of the last variant, the way that the method is made for
        console.print(f"On the {len(rows.calibration)} calibration rows: {verdict}", markup=False, highlight=False)
    return temperatures


def _finish(
    run: FinishedRun,
    folder: RunFolder,
    resolved: dict[str, Any],
    facts: dict[str, Any],
    temperatures: dict[str, Any],
    known: dict[str, Any],
) -> dict[str, Any]:
    plain = list(run.adapter_names)
    if run.task.config.method not in ("lora", "ensemble"):
        export_lora(run.model, folder.plain_lora, adapter_name=ADAPTER)
        plain = [folder.plain_lora.name]
    adapters = adapter_digests(folder, run.task.config)
    write_json(folder.temperature, {name: {**fitted, "adapters": adapters} for name, fitted in temperatures.items()})
    _beside_the_adapters(run, folder)
    content = {
        "format_version": FORMAT_VERSION,
        "method": run.task.config.method,
        "task": run.task.config.task,
        "rows": {name: split["rows"] for name, split in resolved["rows"].items()},
        **known,
        "stages": facts,
        "adapters": list(run.adapter_names),
        "adapter_digests": adapters,
        "plain_lora": plain,
        "temperature": {name: fitted["parameters"].get("temperature") for name, fitted in temperatures.items()},
        "temperature_fit": {name: fitted["fit"] for name, fitted in temperatures.items()},
        "environment": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    write_json(folder.finished, content)
    return content


def _beside_the_adapters(run: FinishedRun, folder: RunFolder) -> None:
    """What predicting needs travels with the adapter, and with the plain LoRA, which has its mean only.

    The members of an ensemble have their temperature together, so it lies above them, in the run.
    """
    found = run.artefact()
    if list(run.adapter_names) != [ADAPTER]:
        found.write(folder.path)
        return
    for place, ways in ((folder.adapter(ADAPTER), tuple(found.ways)), (folder.plain_lora, ("mean",))):
        if place.is_dir():
            kept = {how: found.ways[how] for how in ways if how in found.ways}
            replace(found, adapters={HERE: folder_digest(place)}, ways=kept).write(place)
