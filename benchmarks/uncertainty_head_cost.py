"""What an uncertainty head costs: its fit beside the training of the adapter it sits on, its answer beside a forward.

MiniLM with a LoRA on sentences of library documentation, of 64 tokens at most, one thread, seconds of this process'
own CPU time, arms in turn. An adapter is trained for one epoch, where `peft-calib train` makes 3 at least: the share
of a training is a third of what is given here, or less. Features of as many held-out rows are read before, timed by
itself. A prediction with a head is held against the same prediction without it, over the same rows.

    python benchmarks/uncertainty_head_cost.py --output benchmarks/results/uncertainty_head_cost.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from harness import describe_machine, parser, seconds, take_turns, training_arguments, write
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

from peft_calib import UncertaintyHead, predict_dataset
from peft_calib.runs.embedded import DOCUMENTATION, embedded_model, embedded_rows
from peft_calib.uncertainty_head import copy_head, extract_features
from peft_calib.uncertainty_head.bound import errors_of


def text_rows(count: int) -> tuple[Dataset, DataCollatorWithPadding, int]:
    """Tokens of as many sentences in random order, their collator, and the number of classes."""
    rows, tokenizer = embedded_rows(DOCUMENTATION), AutoTokenizer.from_pretrained(embedded_model())
    some = rows.shuffle(seed=0).select(range(count))
    encoded = some.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True)
    names = [name for name in encoded.column_names if name not in ("input_ids", "attention_mask", "label")]
    return encoded.remove_columns(names), DataCollatorWithPadding(tokenizer), rows.features["label"].num_classes


def trained(rows: Dataset, collate: DataCollatorWithPadding, classes: int, epochs: int) -> PeftModel:
    """A LoRA trained as the runs of the study are."""
    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(embedded_model(), num_labels=classes)
    model = get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(folder, epochs)
        Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    return model.eval()


def fits(model: PeftModel, train: Dataset, held: Dataset, how: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Fits of a head by features that are there: the papers' 27 trials, and what is fitted without options."""
    own, other = extract_features(model, train, **how), extract_features(model, held, **how)
    head = copy_head(model)

    def fit(*rows: Any, **options: Any) -> None:
        found = UncertaintyHead.fit_features(*rows, head, fewest=5, **options)  # one epoch may leave few of a kind
        if not found.report.trials:
            raise RuntimeError(f"nothing was fitted: {found.report}")

    return {
        "fit_27_trials": lambda: fit(own, other, paper="v2"),
        "fit_recommended": lambda: fit(None, other),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=1000)
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--predictions", type=int, default=41)
    args = options.parse_args()
    torch.set_num_threads(1)
    rows, collate, classes = text_rows(2 * args.rows)
    train, held = rows.select(range(args.rows)), rows.select(range(args.rows, 2 * args.rows))
    how: dict[str, Any] = {"collate_fn": collate, "batch_size": 32}
    model = trained(train, collate, classes, args.epochs)
    arms = {
        "training": lambda: seconds(lambda: trained(train, collate, classes, args.epochs)),
        "extraction": lambda: seconds(lambda: extract_features(model, held, **how)),
    }
    for name, fit in fits(model, train, held, how).items():
        arms[name] = lambda fit=fit: seconds(fit)
    results: dict[str, Any] = {"machine": describe_machine(), "rows": args.rows, "epochs": args.epochs}
    results["fit"] = take_turns(arms, "training", args.turns)

    some = held.select(range(min(128, args.rows))).remove_columns("label")
    bound = UncertaintyHead.fit(model, None, held, keep_base=False, lr=1e-3, epochs=2, **how).bind(model)
    features = bound.read(some, **how)[0]
    plain = {"how": "mean", "progress": False, **how}
    asked = {
        "without": lambda: seconds(lambda: predict_dataset(model, some, **plain)),
        "with": lambda: seconds(lambda: bound.read(some, **how)),
        "answer_of_the_head_alone": lambda: seconds(lambda: errors_of(bound.stored, features, bound.head)),
        "without_again": lambda: seconds(lambda: predict_dataset(model, some, **plain)),
    }
    results["predict_128_rows"] = take_turns(asked, "without", args.predictions)
    write(args.output, results)
    for part in ("fit", "predict_128_rows"):
        for name, figures in results[part].items():
            low, high = figures["ratio_quartiles"]
            print(
                f"{name:26} {figures['median_seconds']:8.3f} s {figures['median_ratio']:.4f} [{low:.4f}, {high:.4f}]"
            )


if __name__ == "__main__":
    main()
