"""The accelerator's script runs here with the CPU in the device's place; and no law makes the host wait."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification

from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig
from peft_calib.tuners.bayesian_lora import inducing as posterior
from peft_calib.tuners.transfer import to_device

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = ("tests", "steps", "traffic", "predict", "compiled")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.slow
def test_the_script_runs_to_its_end(tmp_path):
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "gpu_check.py"), "--output-dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert tuple(found["parts"]) == PARTS
    assert found["machine"]["device"] == "stand-in (CPU)"
    steps = found["parts"]["steps"]
    for base in steps.values():
        assert {"lora", "hyper-lora", "bayesian-lora", "curve-lora"} <= set(base["methods"])
        assert all(entry["median_seconds"] > 0 for entry in base["methods"].values())
    assert found["parts"]["compiled"]["bayesian-lora"]["graphs"] >= 1
    assert "sample" in found["parts"]["predict"]["short prompt"]


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path, benchmarks, monkeypatch, capsys):
    import gpu_check

    def broken(small, seconds):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_check, "PARTS", {"steps": (broken, 10), "traffic": (lambda small, s: {"lora": {}}, 10)})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output-dir", str(tmp_path)])
    assert gpu_check.main() == 1
    assert "failed: ['steps']" in capsys.readouterr().out
    parts = json.loads(next(tmp_path.iterdir()).read_text())["parts"]
    assert parts == {"steps": {"error": "RuntimeError: no kernel image"}, "traffic": {"lora": {}}}


METHODS = {
    "hyper": HyperLoraConfig,
    "hyper, random A": partial(HyperLoraConfig, a_mode="random"),
    "hyper, dropout": partial(HyperLoraConfig, hyper_dropout=0.1),
    "bayesian": partial(BayesianLoraConfig, num_train_examples=20),
    "bayesian, flow": partial(BayesianLoraConfig, num_train_examples=20, flow="maf", conditional_noise="projected"),
    "curve": CurveLoraConfig,
    "curve, two points": partial(CurveLoraConfig, jsd_weight=0.2),
    "curve, noise": partial(CurveLoraConfig, flat_rho=0.2),
}


def waits(config) -> int:
    import train_step
    from device import StandIn

    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    arm = train_step.Arm(config, lambda: BertForSequenceClassification(BertConfig(**sizes)), 2, 5)
    arm.step()
    with StandIn().traffic(arm.model, arm.batch) as found:
        arm.backward()
    return found["waits"]


@pytest.mark.parametrize("method", METHODS)
def test_no_law_makes_the_host_wait(method, benchmarks, monkeypatch):
    """Beyond the base model's own look at the attention mask, which LoRA's step has too."""
    monkeypatch.setattr(posterior, "_may_look", lambda Z: False)  # as on an accelerator
    with torch.random.fork_rng(devices=[]):
        assert waits(METHODS[method]) == waits(LoraConfig)


def test_a_wait_is_seen(benchmarks):
    """The stand-in counts what it is there to count, and only values that would lie on the device."""
    from device import StandIn

    weight, elsewhere = torch.nn.Linear(3, 3), torch.ones(3)
    with StandIn().traffic(weight, {}) as found:
        float(elsewhere.sum())
    assert found["waits"] == 0
    with StandIn().traffic(weight, {}) as found:
        y = weight(elsewhere)
        y[y > 0].sum()
        float(y.sum())
    assert found["waits"] == 2


def test_to_device_leaves_what_is_there():
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert to_device(tensor, torch.device("cpu"), torch.float64).dtype == torch.float64
    assert to_device(tensor, torch.device("meta")).is_meta
