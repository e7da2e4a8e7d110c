"""Cost of training members against one PEFT LoRA on all layers: process CPU time of a whole training, and its memory.

The same Trainer, rows, epochs, batches and optimiser; the arms in turn, compared turn by turn. Time is that of
`Trainer.train`, with the computing of the trunk's states. Peak memory is by how much the resident size of a process
of its own grows in a training of one epoch (Linux).

    python benchmarks/members.py --output benchmarks/results/members.json
    python benchmarks/members.py --model bert-12x768 --output benchmarks/results/members.json
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from harness import (
    DEVICE,
    alone,
    describe_machine,
    kept,
    parser,
    resident_bytes,
    take_turns,
    training_arguments,
    write,
)
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

from peft_calib import EnsembleLoraConfig
from peft_calib.demo import load_text_data
from peft_calib.runs.embedded import embedded_model
from peft_calib.trainer_callbacks import TrunkCacheCallback

COMMON = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "exclude_modules": ["classifier"],
    "task_type": "SEQ_CLS",
}
members = partial(EnsembleLoraConfig, **COMMON, seed=0)
#: Configuration, whether the trunk's states are kept, and the share of the epochs that is trained.
ARMS: dict[str, tuple[Callable[[], PeftConfig], bool, float]] = {
    "lora": (partial(LoraConfig, **COMMON), False, 1),
    "2 members, last half": (partial(members, num_members=2), False, 1),
    "2 members, last half, kept": (partial(members, num_members=2), True, 1),
    "2 members, last third, kept": (partial(members, num_members=2, layers="last_third"), True, 1),
    "3 members, last third, kept": (partial(members, num_members=3, layers="last_third"), True, 1),
    "3 members, last half, kept, 3/4 of the epochs": (partial(members, num_members=3), True, 0.75),
}
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "minilm": lambda classes: AutoModelForSequenceClassification.from_pretrained(
        embedded_model(), num_labels=classes, ignore_mismatched_sizes=True
    ),
    "bert-12x768": lambda classes: BertForSequenceClassification(BertConfig(num_labels=classes)),
}


def text_rows(count: int) -> tuple[Dataset, DataCollatorWithPadding, int]:
    """Tokens of sentences of library documentation, their collator, and the number of classes."""
    data = load_text_data("documentation", max_train_rows=2 * count)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    rows = data.train.select(range(count))
    encoded = rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True)
    names = [name for name in encoded.column_names if name not in ("input_ids", "attention_mask", "labels", "label")]
    return encoded.remove_columns(names), DataCollatorWithPadding(tokenizer), len(data.label_names)


def training(model: str, arm: str, rows: int, epochs: int, measure: Callable[[], float] = time.process_time) -> float:
    """By how much `measure` grows in one training; process CPU seconds."""
    torch.set_num_threads(1)
    configure, keep, share = ARMS[arm]
    train, collate, classes = text_rows(rows)
    set_seed(0)
    adapted = get_peft_model(MODELS[model](classes), configure())
    callback = TrunkCacheCallback()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(folder, share * epochs, use_cpu=DEVICE == "cpu")
        trainer = Trainer(
            adapted, arguments, train_dataset=train, data_collator=collate, callbacks=[callback] if keep else []
        )
        start = measure()
        trainer.train()
        grown = measure() - start
    if keep and callback.reason is not None:
        raise RuntimeError(f"{arm}: the trunk's states were not kept: {callback.reason}")
    return grown


class PeakBytes:
    """The resident size of this process when first asked; then the largest since."""

    asked = False

    def __call__(self) -> float:
        if self.asked:
            return resident_bytes("VmHWM")
        self.asked = True
        Path("/proc/self/clear_refs").write_text("5")  # the largest size is counted anew
        return resident_bytes("VmRSS")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", choices=MODELS, default="minilm")
    options.add_argument("--rows", type=int, default=300)
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--turns", type=int, default=3)
    args = options.parse_args()
    arms = {arm: partial(training, args.model, arm, args.rows, args.epochs) for arm in ARMS}
    for arm in ARMS:  # the first forward of a process is slower than the others
        training(args.model, arm, 32, 1)
    found = take_turns(arms, "lora", args.turns)
    for arm, figures in found.items():
        figures["peak_bytes"] = alone(
            "members", f"training({args.model!r}, {arm!r}, {args.rows}, 1, members.PeakBytes())"
        )
        figures["peak_ratio"] = figures["peak_bytes"] / found["lora"]["peak_bytes"]
        print(f"{arm:46} {figures['median_ratio']:.3f} {figures['peak_ratio']:.3f}")
    case = {"rows": args.rows, "epochs": args.epochs, "turns": args.turns, "arms": found}
    results = kept(args.output)
    write(args.output, {**results, "machine": describe_machine(), args.model: case})


if __name__ == "__main__":
    main()
