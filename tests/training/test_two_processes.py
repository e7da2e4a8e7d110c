"""Callbacks and adapters on two gloo processes, in one launch: what they write is what one process would write."""

import json

import pytest
import torch
from families import FAMILIES, perturb
from kills import command, run, same_run
from peft import PeftModel, get_peft_model
from processes import run_ranks
from safetensors.torch import load_file
from train_script import PadTokens, token_model, token_rows
from transformers import Trainer, TrainingArguments, set_seed

import peft_calib
from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig, predict
from peft_calib.calibration import TemperatureScaling, calibration_report
from peft_calib.identity import digest_of
from peft_calib.splits import read_split
from peft_calib.trainer_callbacks import (
    BestCalibrationCallback,
    CalibrationCallback,
    PosteriorSpreadCallback,
    RecalibrationCallback,
    RegularizerScheduleCallback,
    load_recalibration,
)
from peft_calib.trainer_callbacks.adapter_state import adapter_tensors, restore_adapter, write_adapter

METHODS = {"hyper": HyperLoraConfig, "bayesian": BayesianLoraConfig, "curve": CurveLoraConfig}


def adapter(method):
    return perturb(get_peft_model(FAMILIES["bert"].build(), METHODS[method](r=2, target_modules=["query", "dense"])))


def sharded(rank, folder):
    """FSDP2: gather, write, change, put back."""
    from torch.distributed.fsdp import fully_shard

    for method in METHODS:
        model = adapter(method)
        for block in model.get_base_model().bert.encoder.layer:
            fully_shard(block)
        fully_shard(model)
        before = adapter_tensors(model)
        write_adapter(model, folder / method)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        changed = digest_of(adapter_tensors(model)) != digest_of(before)
        restore_adapter(model, folder / method)
        restored = digest_of(adapter_tensors(model)) == digest_of(before)
        (folder / f"{method}-{rank}.json").write_text(json.dumps([changed, restored]))


def callbacks(rank, folder):
    """DDP: a Trainer with every callback, and an evaluation set that two processes cannot share evenly."""
    set_seed(0)
    config = BayesianLoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_sd=0.3, max_sd=1.0)
    model = peft_calib.prepare_for_trainer(get_peft_model(token_model(), config))
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=5,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=token_rows(40, 1),
        eval_dataset=token_rows(37, 2),
        data_collator=PadTokens(),
        callbacks=[
            RegularizerScheduleCallback(),
            CalibrationCallback(diagram=False, num_samples=2, seed=3),
            BestCalibrationCallback("brier"),
            PosteriorSpreadCallback(),
            RecalibrationCallback(token_rows(21, 3)),
        ],
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(folder / "final")
    (folder / f"metrics-{rank}.json").write_text(json.dumps(metrics))
    outside = PopsLabels(
        model,
        arguments,
        eval_dataset=token_rows(37, 2),
        data_collator=PadTokens(),
        callbacks=[CalibrationCallback(diagram=False, num_samples=2, seed=3)],
    )
    (folder / f"outside-{rank}.json").write_text(json.dumps(outside.evaluate()))


class PopsLabels(Trainer):
    """Forms the loss itself, so that the forward sees no labels."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def both(rank, folder):
    sharded(rank, folder)
    callbacks(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(both, folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_sharded_adapters_are_written_whole_and_put_back(folder, method):
    for rank in (0, 1):
        assert json.loads((folder / f"{method}-{rank}.json").read_text()) == [True, True]
    loaded = PeftModel.from_pretrained(FAMILIES["bert"].build(), folder / method).eval()
    batch = FAMILIES["bert"].batch()
    assert torch.equal(loaded(**batch).logits, adapter(method).eval()(**batch).logits)


@pytest.mark.parametrize("name", ["metrics", "outside"])
def test_callbacks_see_every_row_once(folder, name):
    set_seed(0)
    model = PeftModel.from_pretrained(token_model(), folder / "final").eval()
    rows = token_rows(37, 2)
    batch = PadTokens()([rows[i] for i in range(37)])
    labels = batch.pop("labels")
    metrics = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    for prefix, how in (("eval_", "mean"), ("eval_sample_", "sample")):
        probabilities = predict(model, batch, how, 2, seed=3).probabilities
        expected = calibration_report(probabilities, labels, confidence_level=None)
        for key in ("accuracy", "nll", "brier", "ece"):
            assert metrics[0][prefix + key] == metrics[1][prefix + key]
            assert metrics[0][prefix + key] == pytest.approx(expected[key], abs=1e-5), prefix + key


def test_temperature_is_that_of_one_process(folder):
    set_seed(0)
    model = PeftModel.from_pretrained(token_model(), folder / "final").eval()
    rows = token_rows(21, 3)
    batch = PadTokens()([rows[i] for i in range(21)])
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = TemperatureScaling().fit(model(**batch).logits, labels)
    found = load_recalibration(folder / "final")
    assert found.temperature == pytest.approx(expected.temperature, rel=1e-3)
    assert len(read_split(folder / "final").calibrated_on["tokens"]) == 21


@pytest.mark.slow
def test_sharded_checkpoints_resume_exactly_and_their_adapters_load_anywhere(tmp_path):
    """FSDP2 with SHARDED_STATE_DICT, for which the Trainer itself writes no adapter."""

    def line(folder, *options):
        return command(
            "bayesian-lora", folder, "--steps", "6", "--consolidate", *options, processes=2, config="fsdp2",
            launch_options=("--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
        )  # fmt: skip

    reference, folder = tmp_path / "reference", tmp_path / "resumed"
    run(line(reference))
    (folder / "checkpoint-3").parent.mkdir()
    (reference / "checkpoint-3").rename(folder / "checkpoint-3")
    (reference / "best-calibration").rename(folder / "best-calibration")
    (folder / "losses.jsonl").write_text("".join((reference / "losses.jsonl").open().readlines()[:3]))
    assert "checkpoint-3" in run(line(folder, "--resume"))
    for each in (reference, folder):
        (each / "adapter").rename(each / "final")
        (each / "best-calibration").mkdir(exist_ok=True)
    found = same_run(folder, reference)
    assert (found["losses"], found["weights"], found["evaluation"]) == (True, True, True)
    rows = token_rows(24, 2)
    batch = PadTokens()([rows[i] for i in range(24)])
    batch.pop("labels")
    expected = load_file(folder / "logits.safetensors")["logits"]
    # the base model of the run has the seed of the run
    set_seed(0)
    model = PeftModel.from_pretrained(token_model(), folder / "final").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
