"""Tag words with HyperLoRA, whose network makes the LoRA of every layer, and see how far each tag can be trusted.

    python hub_examples/token_classification_hyper.py --data words.jsonl --model bert-base-cased
    python hub_examples/token_classification_hyper.py --offline

`words.jsonl` has `tokens` (a list of words) and `tags` (one for each).
"""

from pathlib import Path

import numpy as np
import typer
from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

import peft_calib
from peft_calib.calibration import TemperatureScaling, entities_report, find_entities
from peft_calib.demo import offline_words, tiny_encoder
from peft_calib.trainer_callbacks import CalibrationCallback


def main(
    data: str = "words.jsonl",
    model: str = "bert-base-cased",
    epochs: float = 5,
    output_dir: Path = Path("out"),
    offline: bool = False,
) -> None:
    """Train, report over words, and leave the adapter also as a plain LoRA."""
    rows = offline_words() if offline else load_dataset("json", data_files=data, split="train")
    if offline:  # which words are code?
        model = tiny_encoder(output_dir / "tiny")
    tags = sorted({tag for row in rows["tags"] for tag in row})
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(row: dict) -> dict:
        """A word's tag stands at its first token."""
        encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=128)
        words, seen = encoded.word_ids(), {None}
        labels = [-100 if word in seen or seen.add(word) else tags.index(row["tags"][word]) for word in words]
        return {**encoded, "labels": labels}

    encoded = rows.map(encode, remove_columns=rows.column_names)
    parts = encoded.train_test_split(test_size=0.4, seed=0)
    held = parts["test"].train_test_split(test_size=0.5, seed=0)  # to calibrate on, and to report on

    base = AutoModelForTokenClassification.from_pretrained(
        model, num_labels=len(tags), id2label=dict(enumerate(tags)), ignore_mismatched_sizes=True
    )
    config = peft_calib.HyperLoraConfig(task_type="TOKEN_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    adapted = peft_calib.prepare_for_trainer(get_peft_model(base, config))
    trainer = Trainer(
        adapted,
        TrainingArguments(
            str(output_dir), num_train_epochs=epochs, learning_rate=2e-3, per_device_train_batch_size=16,
            eval_strategy="epoch", save_strategy="no", report_to=[],
        ),
        train_dataset=parts["train"],
        eval_dataset=held["train"],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        callbacks=[CalibrationCallback()],
    )  # fmt: skip
    trainer.train()

    def words(part: Dataset) -> tuple:
        """Logits and tags of the words, one row a word, and the sentence of each."""
        found = trainer.predict(part)
        is_word = found.label_ids != -100
        return found.predictions[is_word], found.label_ids[is_word], np.nonzero(is_word)[0]

    scaling = TemperatureScaling().fit(*words(held["train"])[:2])
    logits, labels, sentences = words(held["test"])
    print(f"\nT = {scaling.temperature:.2f}\n\n{scaling.evaluate(logits, labels)}")
    entities = find_entities(scaling.transform(logits), tags, sentences, labels)  # what a user acts on
    print(f"\n{entities_report(entities) if len(entities) else 'No entity is found.'}")
    adapted.save_pretrained(output_dir / "adapter")
    scaling.save(output_dir / "temperature.json")
    peft_calib.export_lora(adapted, output_dir / "as-lora")  # for software that has never heard of HyperLoRA


if __name__ == "__main__":
    typer.run(main)
