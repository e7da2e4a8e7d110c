"""A stock Trainer on a task that a tiny classifier learns in a few steps."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_calib import HyperLoraConfig, prepare_for_trainer


def rows(count: int, seed: int, flipped: float = 0.0) -> Dataset:
    """Eight tokens, of which the first five name the class. A share of the labels is wrong."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    ids = generator.integers(3, 64, (count, 8))
    ids[:, :5] = np.where(labels, 5, 40)[:, None]
    wrong = generator.random(count) < flipped
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": np.where(wrong, 1 - labels, labels).tolist()})


def adapted(tiny_classifier, config=None):
    config = config or HyperLoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", seed=0)
    return prepare_for_trainer(get_peft_model(tiny_classifier(num_labels=2), config))


def arguments(folder, kind=TrainingArguments, **options) -> TrainingArguments:
    """Of a training that is soon over and says nothing; `kind` is another library's class of arguments."""
    defaults = dict(
        max_steps=8,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    return kind(str(folder), **defaults | options)


def trainer(model, folder, callbacks, train=None, evaluation=None, compute_metrics=None, **options) -> Trainer:
    return Trainer(
        model,
        arguments(folder, **options),
        train_dataset=rows(64, 1) if train is None else train,
        eval_dataset=rows(64, 2) if evaluation is None else evaluation,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
