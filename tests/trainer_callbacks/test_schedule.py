"""The schedule callback inside the stock Trainer."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig
from peft_calib.trainer_callbacks import RegularizerScheduleCallback


class Record(TrainerCallback):
    """What a law says before each step."""

    def __init__(self, read):
        self.read, self.seen = read, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(self.read(model.base_model.get_law()))


def sentences():
    return Dataset.from_dict({"input_ids": [[5, 6, 7]] * 16, "labels": [i % 3 for i in range(16)]})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_alpha_reaches_zero_with_the_last_optimizer_step(tiny_classifier, tmp_path, accumulation):
    config = HyperLoraConfig(
        target_modules=["query"], noise_mode_a="add", noise_mode_b="add", noise_alpha=0.8, noise_anneal=True
    )
    model = get_peft_model(tiny_classifier(), config)
    ids = torch.randint(3, 60, (16, 5), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": [i % 3 for i in range(16)]})
    record = Record(lambda law: round(law.alpha.item(), 4))
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
    assert record.seen == [0.8, 0.6, 0.4, 0.2]
    assert model.base_model.get_law().alpha.item() == 0


@pytest.mark.parametrize("told", [None, 500])
def test_bayesian_law_learns_the_number_of_items_and_warms_up(tiny_classifier, tmp_path, told, recwarn):
    config = BayesianLoraConfig(target_modules=["query"], kl_warmup=0.5, num_train_examples=told)
    model = get_peft_model(tiny_classifier(), config)
    law = model.base_model.get_law()
    record = Record(lambda law: round(law.kl_factor.item(), 3))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], save_strategy="no"
    )
    Trainer(model, args, train_dataset=sentences(), callbacks=[RegularizerScheduleCallback(), record]).train()
    assert law.num_items() == (told or 16)
    assert record.seen == [0.5, 1.0, 1.0, 1.0]
    assert not [w for w in recwarn.list if "num_train_examples" in str(w.message)]


def test_curve_noise_runs_through_its_cycles_and_knows_the_micro_batches(tiny_classifier, tmp_path):
    config = CurveLoraConfig(target_modules=["query"], flat_rho=0.2, flat_rho_cycles=2)
    model = get_peft_model(tiny_classifier(), config)
    record = Record(lambda law: (round(law.rho.item(), 4), law.micro_batches))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=sentences(), callbacks=[RegularizerScheduleCallback(), record]).train()
    # rho (1 - cos(2 pi f step / steps)): a cycle is four steps
    assert record.seen == [(0.0, 2), (0.2, 2), (0.4, 2), (0.2, 2)] * 2
