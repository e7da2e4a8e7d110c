"""The schedule callback inside the stock Trainer."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_calib import HyperLoraConfig
from peft_calib.trainer_callbacks import RegularizerScheduleCallback


class Record(TrainerCallback):
    def __init__(self):
        self.alphas = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.alphas.append(round(model.base_model.get_law().alpha.item(), 4))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_alpha_reaches_zero_with_the_last_optimizer_step(tiny_classifier, tmp_path, accumulation):
    config = HyperLoraConfig(
        target_modules=["query"], noise_mode_a="add", noise_mode_b="add", noise_alpha=0.8, noise_anneal=True
    )
    model = get_peft_model(tiny_classifier(), config)
    ids = torch.randint(3, 60, (16, 5), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": [i % 3 for i in range(16)]})
    record = Record()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[RegularizerScheduleCallback(), record])
    trainer.train()
    assert record.alphas == [0.8, 0.6, 0.4, 0.2]
    assert model.base_model.get_law().alpha.item() == 0
