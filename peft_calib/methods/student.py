"""A plain LoRA trained to have given probabilities: where it starts, and how it learns."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..console import quiet
from ..export import export_lora
from ..identity import active_adapter, saved_alone
from ..prediction.dataset import collator_for
from ..prediction.heads import Head, check_label_tokens, choose_head, logits_of
from ..tuners.rows import count_rows, main_input_name

#: Name under which a batch carries the probabilities to learn.
TARGETS = "teacher_probabilities"
#: What a student is trained with where nothing else is asked for.
ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 8,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 32,
    "warmup_steps": 0.06,
    "weight_decay": 0.0,
}


def training_arguments(
    given: TrainingArguments | Mapping[str, Any] | None, seed: int, progress: bool
) -> TrainingArguments:
    """The Trainer's arguments; what is given as a mapping takes the place of `ARGUMENTS`."""
    if isinstance(given, TrainingArguments):
        given = copy.copy(given)
        given.remove_unused_columns = False  # no model takes the column of the probabilities
        return given
    known = {field.name for field in fields(TrainingArguments)}
    unknown = sorted(set(given or {}) - known)
    if unknown:
        raise ValueError(f"transformers.TrainingArguments has no field {', '.join(unknown)}.")
    needed = {"remove_unused_columns": False}  # no model takes the column of the probabilities
    own: dict[str, Any] = {
        "seed": seed,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": not progress,
    }
    place = {"output_dir": str(Path(tempfile.gettempdir()) / "peft_calib_student")}  # nothing is written there
    values = {**ARGUMENTS, **own, **place, "use_cpu": not torch.cuda.is_available(), **(given or {}), **needed}
    return TrainingArguments(**values)


def start_of(model: PeftModel, adapter_names: Sequence[str] | None, seed: int) -> PeftModel:
    """A plain LoRA to train from: the deterministic function of a law, or the first of several adapters.

    Its base model shares the frozen tensors of the teacher's.
    """
    name = active_adapter(model) if adapter_names is None else adapter_names[0]
    with tempfile.TemporaryDirectory() as scratch:
        if adapter_names is None:
            folder = _written(model, name, Path(scratch), seed)
        else:
            folder = saved_alone(model, name, Path(scratch))
        student = PeftModel.from_pretrained(_base_of(model), folder, adapter_name=name, is_trainable=True)
    return student.eval()


def _written(model: PeftModel, name: str, folder: Path, seed: int) -> Path:
    try:
        return export_lora(model, folder / "start", adapter_name=name)
    except ValueError:  # a law without one deterministic function: its first draw
        return export_lora(model, folder / "draws", adapter_name=name, num_samples=1, seed=seed) / "draw-0"


def _base_of(model: PeftModel) -> torch.nn.Module:
    """The base model without adapters, its frozen tensors shared; the teacher stays as it is."""
    frozen = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in frozen}).unload()


def train_student(
    student: PeftModel,
    rows: Any,
    targets: torch.Tensor,
    arguments: TrainingArguments,
    *,
    processing_class: Any = None,
    collate_fn: Callable[[list], Mapping[str, Any]] | None = None,
    task: str = "auto",
    label_tokens: Sequence[int | str] | None = None,
) -> None:
    """Train by cross-entropy against `(N, C)` targets; the student is in evaluation mode afterwards."""
    base = student.get_base_model()
    if label_tokens is not None:
        label_tokens = check_label_tokens(label_tokens, processing_class, getattr(base.config, "vocab_size", None))
    trainer = _TowardsTargets(
        choose_head(base, task, label_tokens),
        model=student,
        args=arguments,
        train_dataset=_Taught(rows, targets),
        data_collator=_WithTargets(collate_fn or collator_for(processing_class)),
    )
    trainer.remove_callback(PrinterCallback)  # who asked for no bars gets no printed logs in their place
    with quiet():
        trainer.train()
    student.eval()


class _Taught(Dataset):
    """Rows, each with the probabilities to learn."""

    def __init__(self, rows: Any, targets: torch.Tensor) -> None:
        self.rows, self.targets = rows, targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], TARGETS: self.targets[number]}


class _WithTargets:
    """A collator that knows nothing of targets, and the targets beside what it makes."""

    def __init__(self, collate: Callable[[list], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        targets = torch.stack([row.pop(TARGETS) for row in rows])
        return {**self.collate(rows), TARGETS: targets}


class _TowardsTargets(Trainer):
    """The stock Trainer with the cross-entropy between what is to be learnt and what a head of a prediction reads."""

    def __init__(self, head: Head, **options: Any) -> None:
        super().__init__(**options)
        self.head = head
        # the loss below is a mean over the rows of one forward, which accumulation has to divide
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        inputs = dict(inputs)
        targets = inputs.pop(TARGETS)
        root = self.model.get_base_model()
        items = self.head.items(inputs, count_rows(inputs, main_input_name(root)))
        with self.head.reading(root, items):
            output = model(**items.inputs)
        logits = self.head.read(logits_of(output), items, 1)[0].float()
        loss = -(targets.to(logits.device) * logits.log_softmax(-1)).sum(-1).mean()
        return (loss, output) if return_outputs else loss
