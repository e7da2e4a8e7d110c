"""`accelerate launch` with the example configurations: two gloo processes train on real text, one reloads."""

import json

import pytest
import torch
from kills import command, run
from peft import PeftModel
from safetensors.torch import load_file
from train_script import text_task
from transformers import set_seed

from peft_calib.calibration import calibration_report

METHODS = ("hyper-lora", "bayesian-lora", "curve-lora")
OPTIONS = ("--text", "--steps", "4", "--save-steps", "4", "--eval-steps", "4", "--accumulation", "1", "--dropout", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, minilm):
    """Folders of the three methods, trained by DDP and by FSDP2."""
    folders = {}
    for config in ("ddp", "fsdp2"):
        folder = tmp_path_factory.mktemp(config)
        run(command(",".join(METHODS), folder, *OPTIONS, processes=2, config=config))
        folders[config] = folder
    return folders


@pytest.fixture(scope="module")
def task(minilm):
    set_seed(0)
    return text_task()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_train_and_one_reloads(trained, task, config, method):
    _, _, rows, collate = task
    folder = trained[config] / method
    set_seed(1)  # another random head, which the saved one replaces
    model = PeftModel.from_pretrained(text_task()[0], folder / "final").eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), 25):
            batch = collate(
                [{k: rows[i][k] for k in ("input_ids", "attention_mask", "label")} for i in range(start, start + 25)]
            )
            found.append(model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits)
    logits = torch.cat(found)
    torch.testing.assert_close(logits, load_file(folder / "logits.safetensors")["logits"], rtol=1e-4, atol=1e-5)
    # numbers gathered from both processes are those of all rows, each once
    report = calibration_report(logits, rows["label"][:], input="logits", confidence_level=None)
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in ("accuracy", "nll", "brier", "ece"):
        assert metrics[f"eval_{key}"] == pytest.approx(report[key], abs=1e-4), key
    assert metrics["eval_nll"] < 1.94  # below log 7: something was learned


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sharding_changes_no_number(trained, method):
    """FSDP2 gives the losses and the adapter of DDP."""
    losses = {c: [json.loads(x)["loss"] for x in (f / method / "losses.jsonl").open()] for c, f in trained.items()}
    numbers = {c: torch.tensor([float.fromhex(x) for x in each]) for c, each in losses.items()}
    torch.testing.assert_close(numbers["fsdp2"], numbers["ddp"], rtol=1e-5, atol=1e-6)
    adapters = {c: load_file(f / method / "final" / "adapter_model.safetensors") for c, f in trained.items()}
    assert adapters["fsdp2"].keys() == adapters["ddp"].keys()
    checkpoints = {c: load_file(f / method / "checkpoint-4" / "adapter_model.safetensors") for c, f in trained.items()}
    for name, tensor in adapters["ddp"].items():
        torch.testing.assert_close(adapters["fsdp2"][name], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(checkpoints["fsdp2"][name], adapters["fsdp2"][name])
