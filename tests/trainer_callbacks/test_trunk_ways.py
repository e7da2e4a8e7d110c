"""However rows come to a training, and whatever head reads their states: the losses are those without the cache."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from small_trainer import arguments, assert_equal, trained
from test_trunk import CONFIG, Pad, run, token_rows

from peft_calib import EnsembleLoraConfig, prepare_for_trainer
from peft_calib.trainer_callbacks import TrunkCacheCallback


def losses(callback, tiny_classifier, folder, base=None, **options):
    base = tiny_classifier(num_labels=2) if base is None else base()
    return torch.tensor(run(None, folder, callback, base=base, **options)[0])


def assert_same(tiny_classifier, folder, **options):
    callback = TrunkCacheCallback()
    found = losses(callback, tiny_classifier, folder, **options)
    assert callback.reason is None
    torch.testing.assert_close(found, losses(None, tiny_classifier, folder, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 2},
        {"gradient_accumulation_steps": 2, "dataloader_drop_last": True},
    ],
)
def test_rows_in_any_order_from_any_process(tiny_classifier, tmp_path, options):
    assert_same(tiny_classifier, tmp_path, max_steps=4, **options)


class Tags(Pad):
    """A label for each token, none at padding."""

    def __call__(self, rows):
        batch = super().__call__([{**row, "labels": 0} for row in rows])
        tags = batch["input_ids"].remainder(2).masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": tags}


class Numbers(Pad):
    """A number for each row."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        return {**batch, "labels": batch["labels"].float()}


def test_a_tagger_and_a_regression(tiny_classifier, tmp_path):
    def tagger():
        torch.manual_seed(3)
        return tf.BertForTokenClassification(tiny_classifier(num_labels=2).config).eval()

    config = EnsembleLoraConfig(seed=0, **{**CONFIG, "task_type": "TOKEN_CLS"})
    assert_same(tiny_classifier, tmp_path, base=tagger, collate=Tags(), config=config, max_steps=4)

    def number():
        return tiny_classifier(num_labels=1, problem_type="regression")

    assert_same(tiny_classifier, tmp_path, base=number, collate=Numbers(), max_steps=4)


def test_images_are_off_with_a_reason(tmp_path):
    size = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": i % 2} for i in range(8)]
    callback = TrunkCacheCallback()
    base = tf.ViTForImageClassification(tf.ViTConfig(**size, **small, num_labels=2))
    config = EnsembleLoraConfig(seed=0, r=2, target_modules="all-linear")
    run(None, tmp_path, callback, config, tf.default_data_collator, rows, base, max_steps=1)
    assert callback.reason == "the model is given pixel_values, not tokens alone"


def members(tiny_classifier):
    torch.manual_seed(0)
    return prepare_for_trainer(get_peft_model(tiny_classifier(num_labels=2), EnsembleLoraConfig(seed=0, **CONFIG)))


def train(model, folder, callback, seed=0, resume=None, **options):
    trainer = tf.Trainer(
        model,
        arguments(folder, **options),
        train_dataset=token_rows(seed=seed),
        data_collator=Pad(),
        callbacks=[] if callback is None else [callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_resumed_epoch_ends_with_the_same_bits(tiny_classifier, tmp_path):
    """The fourth step is in the middle of an epoch, whose first rows are skipped."""
    whole = members(tiny_classifier)
    expected = train(whole, tmp_path / "whole", TrunkCacheCallback(), max_steps=6)
    begun = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    train(members(tiny_classifier), tmp_path / "cut", TrunkCacheCallback(), **begun)
    again = members(tiny_classifier)
    checkpoint = str(tmp_path / "cut" / "checkpoint-4")
    found = train(again, tmp_path / "cut", TrunkCacheCallback(), resume=checkpoint, max_steps=6)
    assert found == expected
    assert_equal(trained(again), trained(whole))


def test_one_callback_for_two_data_sets(tiny_classifier, tmp_path):
    """Each training keeps the rows of its own."""
    found, callback = [], TrunkCacheCallback()
    for given in (callback, None):
        model = members(tiny_classifier)
        found.append([train(model, tmp_path, given, seed=seed, max_steps=3) for seed in (0, 1)])
    assert callback.reason is None
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-5, atol=1e-6)
