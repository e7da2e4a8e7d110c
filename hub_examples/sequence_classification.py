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

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import peft_calib
from peft_calib.calibration import TemperatureScaling, calibration_report
from peft_calib.demo import embedded_model, load_text_data
from peft_calib.trainer_callbacks import CalibrationCallback


def parse_arguments() -> Namespace:
    """The command line: model, data and how long to train."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder; default: the embedded all-MiniLM-L6-v2")
    parser.add_argument(
        "--data", default="documentation", help="file, folder, Hub id, or the embedded 'documentation'"
    )
    parser.add_argument("--text-column", nargs="+", default=["text"], help="one column, or two for pairs")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--output-dir", type=Path, default=Path("out"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-train-rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, report the calibration on the test rows, and save the adapter both ways."""
    args = parse_arguments()
    data = load_text_data(
        args.data,
        text_column=args.text_column,
        label_column=args.label_column,
        max_train_rows=args.max_train_rows,
        seed=args.seed,
    )
    name = args.model or embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def encode(rows: Dataset) -> Dataset:
        return rows.map(
            lambda batch: tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=256),
            batched=True,
        )

    base = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=len(data.label_names), ignore_mismatched_sizes=True
    )
    base.config.pad_token_id = tokenizer.pad_token_id
    base.config.id2label = dict(enumerate(data.label_names))
    config = peft_calib.HyperLoraConfig(
        task_type="SEQ_CLS", r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"
    )
    model = peft_calib.prepare_for_trainer(get_peft_model(base, config))
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir),
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=2 * args.batch_size,
            eval_strategy="epoch",
            save_strategy="no",
            seed=args.seed,
            report_to=[],
        ),
        train_dataset=encode(data.train),
        eval_dataset=encode(data.calibration),
        processing_class=tokenizer,
        callbacks=[CalibrationCallback()],
    )
    trainer.train()

    calibration = trainer.predict(encode(data.calibration))
    test = trainer.predict(encode(data.test))
    scaling = TemperatureScaling().fit(calibration.predictions, calibration.label_ids)
    before = calibration_report(test.predictions, test.label_ids, input="logits")
    after = scaling.evaluate(test.predictions, test.label_ids)
    print(f"\nBefore temperature scaling\n\n{before}\n\nAfter, with T = {scaling.temperature:.2f}\n\n{after}")

    model.save_pretrained(args.output_dir / "adapter")
    peft_calib.export_lora(model, args.output_dir / "as-lora")
    scaling.save(args.output_dir / "temperature.json")
    (args.output_dir / "report.json").write_text(after.to_json())


if __name__ == "__main__":
    main()
