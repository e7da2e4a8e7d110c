"""Train a posterior on several devices, and predict with each of them a share of the rows.

    torchrun --nproc-per-node 2 hub_examples/multi_gpu.py --data reviews.csv --model roberta-base
    torchrun --nproc-per-node 2 hub_examples/multi_gpu.py --offline       # two processes of a CPU, by gloo
    accelerate launch --config_file hub_examples/accelerate/ddp.yaml hub_examples/multi_gpu.py

Nothing in here asks for the number of processes. All draw the same functions, so the KL counts once, and the
probabilities are those of one process; with one it runs as well (`python hub_examples/multi_gpu.py`).
"""

from pathlib import Path

import typer
from accelerate import PartialState
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import peft_calib
from peft_calib.calibration import calibration_report
from peft_calib.demo import load_text_data, offline_sentences, tiny_encoder
from peft_calib.trainer_callbacks import RegularizerScheduleCallback


def main(
    data: str = "reviews.csv",
    model: str = "roberta-base",
    epochs: float = 3,
    output_dir: Path = Path("out"),
    offline: bool = False,
) -> None:
    """Train BayesianLoRA, predict with 8 draws, report once."""
    source = offline_sentences("pandas", "torch", each=100) if offline else data
    state = PartialState(cpu=True) if offline else PartialState()
    with state.main_process_first():
        if offline:
            model = tiny_encoder(output_dir / "tiny") if state.is_main_process else str(output_dir / "tiny")
        rows = load_text_data(source)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encoded(part):
        return part.map(lambda r: tokenizer(r["text"], truncation=True, max_length=128), remove_columns=["text"])

    base = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=len(rows.label_names), ignore_mismatched_sizes=True
    )
    config = peft_calib.BayesianLoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    adapted = peft_calib.prepare_for_trainer(get_peft_model(base, config))
    arguments = TrainingArguments(
        str(output_dir), num_train_epochs=epochs, learning_rate=1e-3, per_device_train_batch_size=8,
        save_strategy="no", logging_strategy="no", report_to=[], use_cpu=offline,
    )  # fmt: skip
    trainer = Trainer(
        adapted, arguments, train_dataset=encoded(rows.train), processing_class=tokenizer,
        callbacks=[RegularizerScheduleCallback()],
    )  # fmt: skip
    trainer.train()

    prediction = peft_calib.predict_dataset(
        adapted, encoded(rows.test), num_samples=8, processing_class=tokenizer, progress=False
    )
    if state.is_main_process:  # every process has all rows
        print(f"{state.num_processes} process(es), {len(prediction)} rows, {prediction.num_samples} draws")
        print(calibration_report(prediction.probabilities, prediction.labels).verdict())
        adapted.save_pretrained(output_dir / "adapter")
    state.destroy_process_group()  # without it a process now and then aborts at its end


if __name__ == "__main__":
    typer.run(main)
