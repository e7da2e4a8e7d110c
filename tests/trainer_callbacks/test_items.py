"""N is what the loss averages over in one epoch: the Trainer's own count of items, whatever makes the labels."""

import random

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models

from peft_calib import BayesianLoraConfig, bayesianize
from peft_calib.items import count_items
from peft_calib.trainer_callbacks import RegularizerScheduleCallback

SIZES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
LENGTHS = [3, 9, 4, 12, 5, 2, 7, 7, 3, 4, 6, 8]


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "<mask>": 3, **{f"w{i}": i for i in range(4, 64)}}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>", eos_token="<eos>", mask_token="<mask>",
    )  # fmt: skip


def sentences(padded_to=None):
    draw, rows = np.random.default_rng(0), {"input_ids": [], "attention_mask": []}
    for length in LENGTHS:
        ids = draw.integers(4, 64, length).tolist()
        fill = 0 if padded_to is None else padded_to - length
        rows["input_ids"].append([*ids, *[0] * fill])
        rows["attention_mask"].append([*[1] * length, *[0] * fill])
    return Dataset.from_dict(rows)


def prompts():
    rows = sentences().to_dict()
    rows["labels"] = [[-100, -100, *ids[2:]] for ids in rows["input_ids"]]
    return Dataset.from_dict(rows)


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, pad_token_id=0, eos_token_id=1))


def causal():
    return tf.DataCollatorForLanguageModeling(tokenizer(), mlm=False)


class Counting(tf.Trainer):
    """Notes what the Trainer itself counts."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is not None and self.seen != self.state.global_step:
            self.counted += int(num_items_in_batch)
            self.seen = self.state.global_step
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


def epoch(folder, base, data, collator, **options):
    kind = "CAUSAL_LM" if "Causal" in type(base).__name__ else None
    config = BayesianLoraConfig(r=2, target_modules=["q_proj"], task_type=kind)
    model = get_peft_model(base, config)
    settings = tf.TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Counting(
        model, settings, train_dataset=data, data_collator=collator, callbacks=[RegularizerScheduleCallback()]
    )
    trainer.counted, trainer.seen = 0, -1
    trainer.train()
    return model.base_model.get_law().num_items(), trainer.counted


@pytest.mark.parametrize(
    ("data", "collator", "options"),
    [
        (sentences, causal, {}),
        (lambda: sentences(96), causal, {}),  # padding="max_length": 16 times as many positions as tokens
        (lambda: sentences(96), causal, {"gradient_accumulation_steps": 4}),
        (lambda: sentences(40), causal, {"train_sampling_strategy": "group_by_length"}),
        (lambda: sentences(40), causal, {"dataloader_drop_last": True, "gradient_accumulation_steps": 3}),
        (prompts, lambda: tf.DataCollatorForSeq2Seq(tokenizer()), {}),
    ],
    ids=["tokens", "padded", "padded, accumulated", "grouped", "drop_last", "prompts masked"],
)
def test_items_of_a_language_model_are_the_trainers(tmp_path, data, collator, options):
    found, counted = epoch(tmp_path, llama(), data(), collator(), **options)
    assert found == counted


def test_streams_are_told_of_and_not_counted(tmp_path):
    stream = sentences().to_iterable_dataset()
    with pytest.warns(UserWarning, match="cannot count the training items"):
        epoch(tmp_path, llama(), stream, causal(), max_steps=2)


def test_packed_rows_of_sft_count_their_targets(tmp_path):
    trl = pytest.importorskip("trl")
    words = [{"prompt_ids": [5, 6, 7], "completion": [8] * n} for n in (2, 5, 3, 4)]
    data = Dataset.from_list(
        [
            {"input_ids": row["prompt_ids"] + row["completion"], "labels": [-100] * 3 + row["completion"]}
            for row in words
        ]
    )
    config = BayesianLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings = trl.SFTConfig(
        str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False,
        gradient_checkpointing=False, packing=True, max_length=16, padding_free=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        get_peft_model(llama(), config), args=settings, train_dataset=data, processing_class=tokenizer(),
        callbacks=[RegularizerScheduleCallback()],
    )  # fmt: skip
    packed = [row["input_ids"] for row in trainer.train_dataset]
    assert len(packed) < len(data)
    trainer.train()
    assert trainer.model.base_model.get_law().num_items() == 2 + 5 + 3 + 4


def test_masked_language_models_count_what_is_masked_alike_in_every_run():
    data = sentences().select([3] * 200)
    collate = tf.DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.25)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    bert = tf.BertForMaskedLM(tf.BertConfig(**SIZES))
    states = torch.get_rng_state(), *states[1:]
    found = count_items(data, collate, bert)
    assert found == pytest.approx(200 * 12 * 0.25, rel=0.15)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    torch.rand(7)
    assert count_items(data, collate, bert) == found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"label": 0}] * 3, 3),
        ([{"labels": 0.5}] * 3, 3),
        (Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -100, 0]}), 2),
        ([{"labels": [-100, 3, 4]}, {"labels": [-100, -100, 4]}], 3),
        ([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}], 3),
        ([{"input_ids": [1, 2, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}], 2),
        ([{"chosen_ids": [1], "rejected_ids": [2]}] * 4, 4),
        ([], None),
        (None, None),
        ([("a", 1)], None),
        (Dataset.from_dict({"label": [1]}).to_iterable_dataset(), None),
    ],
)
def test_columns_are_counted_where_there_is_no_collator(rows, expected):
    assert count_items(rows) == expected


def test_columns_of_other_names_and_rows_that_are_no_mappings():
    answers = Dataset.from_dict({"input_ids": [[1, 2]] * 5, "start_positions": [0] * 5, "end_positions": [1] * 5})
    assert count_items(answers, tf.default_data_collator, tf.BertForQuestionAnswering(tf.BertConfig(**SIZES))) == 5
    pairs = [(torch.ones(3), i % 2) for i in range(7)]

    def collate(batch):
        return {"input_ids": torch.stack([x for x, _ in batch]), "labels": torch.tensor([y for _, y in batch])}

    assert count_items(pairs, collate) == 7
    assert count_items(pairs, lambda batch: {"input_ids": torch.ones(len(batch), 3)}) is None


def test_many_rows_are_counted_by_a_part_of_them():
    data = [{"input_ids": list(range(2 + i % 7))} for i in range(7000)]
    exact = count_items(data)
    assert count_items(data, most_rows=500) == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("form", ["loader", "list"])
def test_bayesianize_counts_the_tokens_of_a_language_model(form):
    lora = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    loader = torch.utils.data.DataLoader(sentences(20), batch_size=4, collate_fn=causal())
    batches = loader if form == "loader" else [dict(batch) for batch in loader]
    model = bayesianize(lora, batches)
    assert model.base_model.get_law().num_train_examples == sum(LENGTHS) - len(LENGTHS)
