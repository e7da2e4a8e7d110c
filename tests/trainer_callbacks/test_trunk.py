"""The trunk cache: the same training, begun above the frozen layers; off where it cannot be right, and said why."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from small_trainer import arguments, trained
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
)

from peft_calib import EnsembleLoraConfig, HyperLoraConfig, prepare_for_trainer
from peft_calib.trainer_callbacks import TrunkCacheCallback
from peft_calib.tuners.trunk_cache import CACHES, CannotCacheError, rows_of

CONFIG = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def token_rows(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [row[0] % 2 for row in ids]})


class Pad:
    """Pads with zeros, on either side."""

    def __init__(self, side="right", **further):
        self.side, self.further = side, further

    def __call__(self, rows):
        length = max(len(row["input_ids"]) for row in rows)
        ids = []
        for row in rows:
            zeros = [0] * (length - len(row["input_ids"]))
            ids.append(row["input_ids"] + zeros if self.side == "right" else zeros + row["input_ids"])
        ids = torch.tensor(ids)
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels, **self.further}


class BlockRuns:
    """Counts the forwards of the lowest block, in a training."""

    def __init__(self, model):
        self.count = 0
        block = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
        inner = next(module for module in block.modules() if isinstance(module, nn.Linear))
        inner.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1


def run(tiny_classifier, folder, callback, config=None, collate=None, rows=None, base=None, **options):
    torch.manual_seed(0)
    base = tiny_classifier(num_labels=2) if base is None else base
    config = EnsembleLoraConfig(seed=0, **CONFIG) if config is None else config
    model = prepare_for_trainer(get_peft_model(base, config))
    runs = BlockRuns(model)
    callbacks = [] if callback is None else [callback]
    trainer = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=token_rows() if rows is None else rows,
        data_collator=Pad() if collate is None else collate,
        callbacks=callbacks,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, trained(model), runs.count, model


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_same_training(tiny_classifier, tmp_path, side):
    plain, weights, runs, _ = run(tiny_classifier, tmp_path, None, collate=Pad(side))
    assert runs == 8 + 1  # eight steps, and one look at a model that is met (tuners/one_by_one.py)
    callback = TrunkCacheCallback()
    found, cached, runs, model = run(tiny_classifier, tmp_path, callback, collate=Pad(side))
    if side == "left":  # positions count from the first token, padding or not: BERT's states change with padding
        assert "padding" in callback.reason
        assert found == plain
        return
    assert callback.reason is None
    assert runs < 12  # one batch a length and one for the check, and none in a step
    assert not any(module in CACHES for module in model.modules())  # given back at the end
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-3, atol=1e-5)


def test_steps_read_what_is_kept(tiny_classifier, tmp_path):
    few = run(tiny_classifier, tmp_path, TrunkCacheCallback(), max_steps=2)[2]
    many = run(tiny_classifier, tmp_path, TrunkCacheCallback(), max_steps=9)[2]
    assert few == many


def test_any_law_above_a_trunk(tiny_classifier, tmp_path):
    def losses(callback, dropout):
        base = tiny_classifier(num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        config = HyperLoraConfig(layers_to_transform=[1], seed=0, **CONFIG)
        return torch.tensor(run(None, tmp_path, callback, config, base=base)[0])

    callback = TrunkCacheCallback()
    torch.testing.assert_close(losses(callback, 0.0), losses(None, 0.0), rtol=1e-5, atol=1e-6)
    assert callback.reason is None
    assert losses(callback, 0.1).equal(losses(None, 0.1))
    assert "dropout" in callback.reason


def test_gradient_checkpointing(tiny_classifier, tmp_path):
    for reentrant in (False, True):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        plain = run(tiny_classifier, tmp_path, None, **options)[0]
        found = run(tiny_classifier, tmp_path, TrunkCacheCallback(), **options)[0]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), rtol=1e-5, atol=1e-6)


def test_a_real_encoder_in_half_precision_states(minilm, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = ["a short one", "a somewhat longer sentence, with a comma", "two words", "and one more of them"] * 4
    rows = Dataset.from_dict({**tokenizer(texts), "labels": [0, 1, 0, 1] * 4})
    losses = {}
    for name, callback in (
        ("none", None),
        ("float", TrunkCacheCallback()),
        ("half", TrunkCacheCallback(dtype=torch.bfloat16)),
    ):
        base = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
        collate = DataCollatorWithPadding(tokenizer)
        losses[name] = run(None, tmp_path, callback, collate=collate, rows=rows, base=base, max_steps=3, seed=0)[0]
        assert callback is None or callback.reason is None
    base = torch.tensor(losses["none"])
    assert losses["none"] != losses["half"]
    torch.testing.assert_close(torch.tensor(losses["half"]), base, rtol=2e-2, atol=0)


def test_a_file_where_memory_is_short(tiny_classifier, tmp_path):
    callback = TrunkCacheCallback(max_bytes=100, folder=tmp_path / "states")
    found = run(tiny_classifier, tmp_path, callback)[0]
    assert callback.reason is None
    assert found == run(tiny_classifier, tmp_path, TrunkCacheCallback())[0]
    assert not list((tmp_path / "states").iterdir())


class Noise(Pad):
    """Draws a token of each row anew, as augmentation does."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        batch["input_ids"][:, 0] = torch.randint(3, 64, (len(rows),))
        return batch


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"config": EnsembleLoraConfig(seed=0, layers="all", **CONFIG)}, "no layers lie below"),
        ({"config": LoraConfig(**CONFIG)}, "no adapter of peft_calib"),
        ({"collate": Noise()}, "does not hold"),
    ],
)
def test_off_with_a_reason(tiny_classifier, tmp_path, options, reason):
    callback = TrunkCacheCallback()
    run(tiny_classifier, tmp_path, callback, **options)
    assert reason in callback.reason


def test_off_for_a_stream_and_for_too_little_memory(tiny_classifier, tmp_path):
    callback = TrunkCacheCallback()
    stream = IterableDataset.from_generator(lambda: iter(token_rows().to_list()))
    run(tiny_classifier, tmp_path, callback, rows=stream)
    assert "stream" in callback.reason
    callback = TrunkCacheCallback(max_bytes=100)
    plain = run(tiny_classifier, tmp_path, None)[0]
    assert run(tiny_classifier, tmp_path, callback)[0] == plain
    assert "more than the" in callback.reason


def test_a_trunk_that_is_written_to_is_run_again(tiny_classifier, tmp_path):
    """Weights that change under a cache are noticed: the step computes its states."""

    class Write(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                block = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
                with torch.no_grad():
                    next(block.parameters()).mul_(1.5)

    def losses(callback):
        torch.manual_seed(0)
        model = prepare_for_trainer(
            get_peft_model(tiny_classifier(num_labels=2), EnsembleLoraConfig(seed=0, **CONFIG))
        )
        callbacks = [Write(), *([] if callback is None else [callback])]
        trainer = Trainer(
            model, arguments(tmp_path), train_dataset=token_rows(), data_collator=Pad(), callbacks=callbacks
        )
        trainer.train()
        return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])

    torch.testing.assert_close(losses(TrunkCacheCallback()), losses(None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])},
            "gaps",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 1, 3, 3)},
            "more than what",
        ),
        ({"inputs_embeds": torch.ones(2, 3, 4)}, "inputs_embeds"),
    ],
)
def test_batches_whose_rows_cannot_be_told(batch, match):
    with pytest.raises(CannotCacheError, match=match):
        list(rows_of(batch))


@pytest.mark.parametrize("max_bytes", [-1, 1.5, True])
def test_bad_arguments(max_bytes):
    with pytest.raises(ValueError, match="max_bytes"):
        TrunkCacheCallback(max_bytes=max_bytes)
