"""One stage of a run: an adapter trained by the stock Trainer, resumed after a kill, put in place when complete."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from ..artefact import HERE, Artefact
from ..base_models import able_to_pad, base_fingerprint, seeded_base
from ..console import StepProgress, own_random_state
from ..files import move_into_place
from ..identity import folder_digest
from ..predictor.kinds import KINDS
from ..provenance.splits import SplitRecord, record_split
from ..trainer_callbacks import (
    BestCalibrationCallback,
    CalibrationCallback,
    CheckpointGuardCallback,
    RegularizedLossMixin,
    RegularizerScheduleCallback,
    TrunkCacheCallback,
    last_complete_checkpoint,
)
from ..tuners.objective import prepare_for_trainer
from .folder import STAGE, RunFolder, write_json
from .methods import Stage
from .processes import on_cpu, processes
from .settings import ANSWERED, RunConfig
from .tasks import Task
from .tasks.base import load_model_config


@dataclass(frozen=True)
class Material:
    """What every stage of a run shares: the task, the tokenizer, encoded rows, and which rows they are."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    calibration: Dataset
    record: SplitRecord


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, able to pad."""
    load_model_config(config)  # says which model there is none of; a tokenizer's own message is about its files
    words = {"add_prefix_space": True} if config.task == "token-cls" else {}  # byte-level tokenizers need it for words
    return able_to_pad(AutoTokenizer.from_pretrained(config.model, revision=config.revision, **words))


def load_base(task: Task, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The base model; what is fresh in it follows the run's seed, and so is the same in every stage and later."""
    return seeded_base(task.load_model, tokenizer, task.config.seed)


def run_stage(stage: Stage, material: Material, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Train one adapter, or keep the one that is complete: trainable parameters, seconds, steps."""
    facts = folder.stage_facts(stage.name)
    if facts is not None:
        progress.console.print(f"{stage.name}: complete, kept")
        return facts
    with own_random_state():
        base = load_base(material.task, material.tokenizer)
        material.task.start_head(base, material.train)
        set_seed(stage.seed)
        model = get_peft_model(base, stage.config)
        if stage.head_of is not None:
            take_head(model, folder, stage.head_of)
        prepare_for_trainer(model)
        record_split(
            model,
            trained_on=next(iter(material.record.trained_on.values())),
            calibrated_on=next(iter(material.record.calibrated_on.values())),
        )
        kept = TrunkCacheCallback()
        trainer = _trainer(model, stage, material, folder, progress, kept)
        checkpoint = last_complete_checkpoint(folder.training(stage.name))
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        if kept.reason is None:
            progress.console.print("What the frozen lower layers answer was computed once for all epochs")
        facts = {
            "seed": stage.seed,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "optimizer_steps": trainer.state.global_step,
            "lower_layers_kept": kept.reason is None,
            "seconds": round(time.perf_counter() - start, 1),
            "resumed_at_step": None if checkpoint is None else int(checkpoint.rpartition("-")[2]),
        }
        described = material.task.described(material.tokenizer, base_fingerprint(model))
        _finish(trainer, stage, folder, facts, described)
    return facts


def take_head(model: PeftModel, folder: RunFolder, other: str) -> None:
    """Give a model the head that another stage trained, and keep it there."""
    saved = load_file(folder.adapter(other) / SAFETENSORS_WEIGHTS_NAME)
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        trained = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
        for copy in module.modules_to_save.values():
            copy.load_state_dict(trained)
            copy.requires_grad_(False)


def training_arguments(config: RunConfig, **own: Any) -> TrainingArguments:
    """The Trainer's arguments: what the settings say, then the user's further fields."""
    settings: dict[str, Any] = {
        "num_train_epochs": 3.0 if config.epochs is None else config.epochs,
        "learning_rate": config.learning_rate,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "weight_decay": config.weight_decay,
        "warmup_steps": config.warmup,
        "save_steps": config.save_steps,
    }
    defaults: dict[str, Any] = {
        "per_device_eval_batch_size": 2 * config.batch_size,
        "eval_strategy": "epoch",
        "logging_steps": 10,
        "save_total_limit": 2,
        "report_to": [],
        "use_cpu": on_cpu(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    fixed: dict[str, Any] = {"save_strategy": "steps", "disable_tqdm": True, **own}
    known = {item.name for item in fields(TrainingArguments)}
    for name in config.trainer:
        if name in {*settings, *fixed, "output_dir", "seed"}:
            raise ValueError(f"{name} of the Trainer follows from a setting of the run; it is no --trainer-option")
        if name not in known:
            raise ValueError(f"transformers.TrainingArguments has no field {name!r}")
    if config.method == "ensemble-lora" and config.trainer.get("label_smoothing_factor"):
        raise ValueError(
            "label_smoothing_factor makes the loss of what the first member of an ensemble-lora answers, so that no "
            "other member would train; leave it out, or train the members one by one with --method ensemble"
        )
    # YAML reads a bare `no` as false, and no strategy is a truth value
    given = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in config.trainer.items()}
    values: dict[str, Any] = {**settings, **defaults, **given, **fixed}
    return TrainingArguments(**values)


class RunTrainer(RegularizedLossMixin, Trainer):
    """The stock Trainer; a loss that it makes of logits (label smoothing) has a law's regulariser too."""


def _trainer(
    model: PeftModel,
    stage: Stage,
    material: Material,
    folder: RunFolder,
    progress: Progress,
    kept: TrunkCacheCallback,
) -> Trainer:
    config, task = material.task.config, material.task
    callbacks: list[TrainerCallback] = [
        RegularizerScheduleCallback(),
        StepProgress(progress, stage.name, config.metrics),
        kept,
    ]
    options: dict[str, Any] = {}
    if task.kind != "classes":
        options["compute_metrics"] = training_scores(task)
    elif task.labels is not None:
        answers = task.answer_tokens(material.tokenizer)
        watch = CalibrationCallback(scores=config.metrics, answer_token_ids=answers)
        callbacks.insert(0, watch)
        callbacks += best_callbacks(config)
        options["compute_metrics"] = watch.compute_metrics
        options["preprocess_logits_for_metrics"] = watch.preprocess_logits_for_metrics
    else:  # a vocabulary: the loss is all that is kept of an evaluation
        options["preprocess_logits_for_metrics"] = lambda logits, labels: labels.new_zeros(labels.shape[0])
    trainer = RunTrainer(
        model=model,
        args=training_arguments(config, output_dir=str(folder.training(stage.name)), seed=stage.seed),
        train_dataset=material.train,
        eval_dataset=material.calibration,
        data_collator=task.collator(material.tokenizer),
        callbacks=[*callbacks, CheckpointGuardCallback()],  # last: it seals what the others add
        **options,
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def training_scores(task: Task) -> Any:
    """`compute_metrics` of the Trainer for a task whose answer is no class."""
    kind, scale = KINDS[task.kind], 1.0 if task.target is None else task.target[1]

    def compute(found: Any) -> dict[str, float]:
        logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        return kind.training_scores(np.asarray(logits, np.float64), np.asarray(found.label_ids), scale)

    return compute


def best_callbacks(config: RunConfig) -> list[TrainerCallback]:
    """What keeps the best evaluation's adapter, if that was asked for."""
    if config.best_metric is None:
        return []
    if config.task == "causal-lm" or config.task in ANSWERED:
        raise ValueError(f"best_metric needs classes; a {config.task} run has none")
    return [BestCalibrationCallback(config.best_metric)]


def _finish(trainer: Trainer, stage: Stage, folder: RunFolder, facts: dict[str, Any], described: Artefact) -> None:
    """Save the adapter beside its place and move it there complete; then checkpoints are no longer needed."""
    state = processes()
    unfinished = folder.training(stage.name) / "adapter"
    if state.is_main_process and unfinished.exists():
        shutil.rmtree(unfinished)
    state.wait_for_everyone()
    trainer.save_model(str(unfinished))
    state.wait_for_everyone()
    if state.is_main_process:
        replace(described, adapters={HERE: folder_digest(unfinished)}).write(unfinished)
        (unfinished / "training_args.bin").unlink(missing_ok=True)  # a pickle; the settings are in config.json
        write_json(unfinished / STAGE, facts)
        write_json(folder.training(stage.name) / "log.json", {"log_history": trainer.state.log_history})
        move_into_place(unfinished, folder.adapter(stage.name))
        for pattern in ("checkpoint-*", "best-calibration"):
            for spent in folder.training(stage.name).glob(pattern):
                shutil.rmtree(spent)
    state.wait_for_everyone()
