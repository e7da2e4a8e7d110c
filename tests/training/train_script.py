"""A training run as a user's script has it: started by `python` or `accelerate launch`, stopped and resumed at will.

python train_script.py METHOD FOLDER [--steps N] [--save-steps N] [--text] [--resume] ...

Every step's loss goes to FOLDER/losses.jsonl, as it happens; the adapter to FOLDER/final.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import cache
from pathlib import Path

import fsdp_on_cpu
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import peft_calib
from peft_calib.demo import embedded_model, load_text_data
from peft_calib.trainer_callbacks import (
    BestCalibrationCallback,
    CalibrationCallback,
    CheckpointGuardCallback,
    ConsolidatedAdapterCallback,
    RegularizerScheduleCallback,
    TrunkCacheCallback,
    last_complete_checkpoint,
)

torch.set_num_threads(1)

COMMON = dict(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.1)
# with everything that has a state of its own: counters of draws, schedules, dropout inside a generator
METHODS = {
    "lora": (LoraConfig, {}),
    "hyper-lora": (
        peft_calib.HyperLoraConfig,
        dict(a_mode="random", noise_mode_b="add", noise_alpha=0.5, noise_anneal=True),
    ),
    "bayesian-lora": (peft_calib.BayesianLoraConfig, dict(kl_warmup=0.5, init_sd=0.05)),
    "curve-lora": (peft_calib.CurveLoraConfig, dict(jsd_weight=0.2, flat_rho=0.1, flat_rho_cycles=3)),
    "members": (peft_calib.EnsembleLoraConfig, dict(num_members=2)),
}


def adapter_config(method: str, **fields) -> PeftConfig:
    kind, own = METHODS[method]
    return kind(**COMMON | own | fields)


def token_rows(count: int, seed: int) -> Dataset:
    """Rows of unequal lengths; the class is the parity of the first token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [row[0] % 2 for row in ids]})


def token_model() -> BertForSequenceClassification:
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return BertForSequenceClassification(BertConfig(**sizes))


class PadTokens:
    """Pads with zeros."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.tensor([r["labels"] for r in rows]),
        }


@cache
def text_rows(num_train: int, num_evaluation: int) -> tuple:
    """Sentences of library documentation as tokens: training rows, evaluation rows, collator, number of classes."""
    data = load_text_data("documentation", max_train_rows=num_train)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())

    def encode(rows: Dataset) -> Dataset:
        return rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=24), batched=True)

    evaluation = encode(data.test.select(range(num_evaluation)))
    return encode(data.train), evaluation, DataCollatorWithPadding(tokenizer), len(data.label_names)


def text_task(num_train: int = 160, num_evaluation: int = 75) -> tuple:
    """The embedded encoder with a fresh head, and rows for it."""
    train, evaluation, collator, num_labels = text_rows(num_train, num_evaluation)
    model = AutoModelForSequenceClassification.from_pretrained(
        embedded_model(), num_labels=num_labels, ignore_mismatched_sizes=True
    )
    return model, train, evaluation, collator


class Record(TrainerCallback):
    """Writes each loss down at once, and says on which step the run is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and state.is_world_process_zero:
            with open(self.folder / "losses.jsonl", "a") as file:
                file.write(json.dumps({"step": state.global_step, "loss": logs["loss"].hex()}) + "\n")
            print("step", state.global_step, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", help="several, separated by commas, go to folders below FOLDER")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--eval-steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--resume", action="store_true", help="from the last complete checkpoint")
    parser.add_argument("--consolidate", action="store_true", help="write the adapter beside sharded checkpoints")
    parser.add_argument("--resume-from", type=Path, help="a checkpoint")
    return parser.parse_args(arguments)


def arguments(options: argparse.Namespace) -> TrainingArguments:
    found = TrainingArguments(
        str(options.folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=16,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=5e-3,
        warmup_steps=3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
        fsdp_on_cpu.allow()
    return found


def train(options: argparse.Namespace) -> Trainer:
    options.folder.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    if options.text:
        model, rows, evaluation, collator = text_task()
    else:
        model, rows, evaluation, collator = token_model(), token_rows(40, 1), token_rows(24, 2), PadTokens()
    model = get_peft_model(model, adapter_config(options.method, lora_dropout=options.dropout))
    trainer = Trainer(
        peft_calib.prepare_for_trainer(model),
        arguments(options),
        train_dataset=rows,
        eval_dataset=evaluation,
        data_collator=collator,
        callbacks=[
            Record(options.folder),
            RegularizerScheduleCallback(),
            TrunkCacheCallback(),  # does nothing for methods without a trunk
            CalibrationCallback(diagram=False, confidence_level=None),
            BestCalibrationCallback(restore=False),
            *([ConsolidatedAdapterCallback()] if options.consolidate else []),
            CheckpointGuardCallback(),
        ],
    )
    checkpoint = last_complete_checkpoint(options.folder) if options.resume else options.resume_from
    if trainer.is_world_process_zero():
        print("resumes from", checkpoint, flush=True)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics = trainer.evaluate()
    trainer.save_model(options.folder / "final")
    logits = trainer.predict(evaluation).predictions
    if trainer.is_world_process_zero():
        (options.folder / "metrics.json").write_text(json.dumps(metrics))
        save_file({"logits": torch.tensor(logits)}, options.folder / "logits.safetensors")
    return trainer


def main() -> None:
    options = parse()
    methods = options.method.split(",")
    for method in methods:
        folder = options.folder / method if len(methods) > 1 else options.folder
        train(argparse.Namespace(**vars(options) | {"method": method, "folder": folder}))
    print("done", flush=True)
    PartialState().destroy_process_group()  # without it a process now and then aborts at its end


if __name__ == "__main__":
    main()
