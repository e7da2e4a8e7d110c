"""Join three LoRAs of a language model by a curve of low loss, and ask it multiple-choice questions.

    python hub_examples/multiple_choice_curve.py --data questions.jsonl --adapters lora-0 lora-1 lora-2
    python hub_examples/multiple_choice_curve.py --offline

`questions.jsonl` has `question`, `choices` (a list) and `label` (the position of the right one). The adapters are
folders of ordinary LoRAs of the same model; without `--adapters` three are trained first, alike but for their seed.
The curve passes through all three, and its points are an ensemble that one adapter holds.
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import peft_calib
from peft_calib.calibration import compare
from peft_calib.demo import offline_sentences, tiny_language_model

LETTERS = "ABCD"
TARGETS = "all-linear"


def encode(rows: Dataset, tokenizer, answers: list[int], asked: bool = False) -> Dataset:
    """Prompts with their letter, the one token with a loss; `asked`: without it, and the position as the label."""

    def one(row: dict) -> dict:
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=False))
        prompt = tokenizer(f"{row['question']}\n{choices}\nAnswer:", add_special_tokens=False)["input_ids"]
        letter = answers[row["label"]]
        if asked:
            return {"input_ids": prompt, "labels": row["label"]}
        return {"input_ids": [*prompt, letter], "labels": [*[-100] * len(prompt), letter]}

    return rows.map(one, remove_columns=rows.column_names)


def train(model: PeftModel, rows: Dataset, tokenizer, folder: Path, epochs: float, seed: int) -> PeftModel:
    """One adapter, by the stock Trainer."""
    arguments = TrainingArguments(
        str(folder), num_train_epochs=epochs, learning_rate=2e-3, per_device_train_batch_size=8, seed=seed,
        save_strategy="no", logging_strategy="no", report_to=[],
    )  # fmt: skip
    model = peft_calib.prepare_for_trainer(model)
    Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
    model.save_pretrained(folder)
    return model.eval()


def main() -> None:
    """Train or take three LoRAs, join them, and compare the curve with the first of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="questions.jsonl")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--adapters", nargs=3)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--output-dir", type=Path, default=Path("out"))
    parser.add_argument("--offline", action="store_true")
    args = parser.parse_args()
    if args.offline:  # which of two libraries does a sentence document?
        args.model, libraries = tiny_language_model(args.output_dir / "tiny"), ["pandas", "torch"]
        sentences = offline_sentences(*libraries, each=40)
        rows = sentences.map(
            lambda r: {"question": r["text"], "choices": libraries, "label": libraries.index(r["label"])}
        )
    else:
        rows = load_dataset("json", data_files=args.data, split="train")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    letters = LETTERS[: max(len(choices) for choices in rows["choices"])]
    answers = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in letters]
    parts = rows.select_columns(["question", "choices", "label"]).train_test_split(test_size=0.5, seed=0)
    known, test = encode(parts["train"], tokenizer, answers), encode(parts["test"], tokenizer, answers, asked=True)

    def base() -> AutoModelForCausalLM:
        return AutoModelForCausalLM.from_pretrained(args.model)

    adapters = args.adapters
    if adapters is None:
        adapters = [str(args.output_dir / f"lora-{seed}") for seed in range(3)]
        for seed, folder in enumerate(adapters):
            lora = get_peft_model(base(), LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
            train(lora, known, tokenizer, Path(folder), args.epochs, seed)

    config = peft_calib.CurveLoraConfig(
        task_type="CAUSAL_LM", r=8, target_modules=TARGETS, num_anchors=3, num_handles=1, curve_mode="anchored",
        anchor_adapters=adapters,
    )  # fmt: skip
    curve = train(get_peft_model(base(), config), known, tokenizer, args.output_dir / "curve", args.epochs, 3)

    asked = {"processing_class": tokenizer, "label_tokens": answers, "task": "next_token", "progress": False}
    together = peft_calib.predict_dataset(curve, test, **asked)
    first = peft_calib.predict_dataset(PeftModel.from_pretrained(base(), adapters[0]), test, how="mean", **asked)
    print(
        f"{together.num_samples} points of the curve; nats they disagree on: {together.mutual_information.mean():.4f}"
    )
    print(compare(together.probabilities, first.probabilities, together.labels, names=("curve", "first LoRA")))


if __name__ == "__main__":
    main()
