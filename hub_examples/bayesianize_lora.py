"""Take a LoRA from the Hub and make it Bayesian: same answers, and a spread that says what its data left open.

    python hub_examples/bayesianize_lora.py --adapter user/lora --train train.csv --held-out held_out.csv
    python hub_examples/bayesianize_lora.py --offline

Only the variances are fitted, on the rows the LoRA was trained on; then held-out rows decide how far draws may lie
apart, together with a temperature. Where they do not show that draws help, the adapter goes on with its mean.
"""

from pathlib import Path

import typer
from datasets import ClassLabel, Dataset, load_dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import peft_calib
from peft_calib.calibration import calibration_report
from peft_calib.demo import offline_sentences, tiny_encoder


def plain_lora(rows: Dataset, tokenizer, model: str, folder: Path) -> str:
    """In the place of somebody's LoRA."""
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    lora = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    arguments = TrainingArguments(
        str(folder), num_train_epochs=4, learning_rate=5e-3, per_device_train_batch_size=16, save_strategy="no",
        logging_strategy="no", report_to=[],
    )  # fmt: skip
    Trainer(lora, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer)).train()
    lora.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(
    adapter: str = "user/lora",
    train: str = "train.csv",
    held_out: str = "held_out.csv",
    output_dir: Path = Path("out"),
    offline: bool = False,
) -> None:
    """Fit the spread, calibrate it, save the adapter, and measure mean and draws on rows that decided nothing."""
    if offline:
        model = tiny_encoder(output_dir / "tiny")
        rows = offline_sentences("pandas", "torch", each=80).cast_column(
            "label", ClassLabel(names=["pandas", "torch"])
        )
        parts = rows.train_test_split(test_size=0.5, seed=0)
    else:
        parts = load_dataset("csv", data_files={"train": train, "test": held_out})  # text and label, a class id
    tokenizer = AutoTokenizer.from_pretrained(model if offline else adapter)

    def encoded(part: Dataset) -> Dataset:
        return part.map(lambda r: tokenizer(r["text"], truncation=True, max_length=128), remove_columns=["text"])

    rows, held = encoded(parts["train"]), encoded(parts["test"]).train_test_split(test_size=0.5, seed=0)
    if offline:
        adapter = plain_lora(rows, tokenizer, model, output_dir / "lora")
    lora = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=len(set(rows["label"])))

    loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    bayesian = peft_calib.bayesianize(lora, loader, num_epochs=3)
    options = {"processing_class": tokenizer, "progress": False}
    found = peft_calib.calibrate_posterior(bayesian, held["train"], num_samples=8, **options)
    print(found.reason)
    bayesian.save_pretrained(output_dir / "bayesian")  # scale and temperature are saved with it

    for how in ("mean", "sample"):
        prediction = peft_calib.predict_dataset(bayesian, held["test"], how=how, **options)
        scores = calibration_report(prediction.probabilities, prediction.labels).to_dict()
        print(f"{how:>6}: NLL {scores['nll']:.4f}, ECE {scores['ece']:.4f}, before the temperature")


if __name__ == "__main__":
    typer.run(main)
