"""Fine-tune a classifier with HyperLoRA on your own model and data, and leave with probabilities you can defend.

    python hub_examples/sequence_classification.py --model roberta-base --data reviews.csv \
        --text-column review --label-column sentiment --output-dir out

Without arguments it takes the embedded encoder and the embedded sentences, and needs no network.

What it does, in the order in which a careful user would:
1. hold a calibration split out of the training rows;
2. train with the stock Trainer, watching the calibration after every epoch;
3. fit a temperature on the calibration split, and report on the test split, which nothing was fitted on;
4. save the adapter, the same as a plain LoRA for inference servers, the temperature and the report.
"""

from pathlib import Path
from typing import Annotated

import typer
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from typer import Option

import peft_calib
from peft_calib.calibration import TemperatureScaling, calibration_report
from peft_calib.demo import embedded_model, load_text_data
from peft_calib.trainer_callbacks import CalibrationCallback


def main(
    model: Annotated[str | None, Option(help="Hub id or folder; default: the embedded all-MiniLM-L6-v2.")] = None,
    data: Annotated[str, Option(help="File, folder, Hub id, or the embedded 'documentation'.")] = "documentation",
    text_column: Annotated[list[str], Option(help="One column; given twice for pairs.")] = ("text",),
    label_column: str = "label",
    output_dir: Path = Path("out"),
    rank: int = 8,
    epochs: float = 5,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    max_train_rows: int | None = None,
    seed: int = 0,
) -> None:
    """Train, report the calibration on the test rows, and save the adapter both ways."""
    columns = {"text_column": text_column, "label_column": label_column}
    splits = load_text_data(data, **columns, max_train_rows=max_train_rows, seed=seed)
    name = model or embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def encode(rows: Dataset) -> Dataset:
        return rows.map(
            lambda batch: tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=256),
            batched=True,
        )

    base = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=len(splits.label_names), ignore_mismatched_sizes=True
    )
    base.config.pad_token_id = tokenizer.pad_token_id
    base.config.id2label = dict(enumerate(splits.label_names))
    config = peft_calib.HyperLoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted = peft_calib.prepare_for_trainer(get_peft_model(base, config))
    adapted.print_trainable_parameters()

    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(
            output_dir=str(output_dir),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=2 * batch_size,
            eval_strategy="epoch",
            save_strategy="no",
            seed=seed,
            report_to=[],
        ),
        train_dataset=encode(splits.train),
        eval_dataset=encode(splits.calibration),
        processing_class=tokenizer,
        callbacks=[CalibrationCallback()],
    )
    trainer.train()

    calibration = trainer.predict(encode(splits.calibration))
    test = trainer.predict(encode(splits.test))
    scaling = TemperatureScaling().fit(calibration.predictions, calibration.label_ids)
    before = calibration_report(test.predictions, test.label_ids, input="logits")
    after = scaling.evaluate(test.predictions, test.label_ids)
    print(f"\nBefore temperature scaling\n\n{before}\n\nAfter, with T = {scaling.temperature:.2f}\n\n{after}")

    adapted.save_pretrained(output_dir / "adapter")
    peft_calib.export_lora(adapted, output_dir / "as-lora")
    scaling.save(output_dir / "temperature.json")
    (output_dir / "report.json").write_text(after.to_json())


if __name__ == "__main__":
    typer.run(main)
