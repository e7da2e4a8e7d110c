"""Run by `make test-wheel` inside an environment that holds nothing but the installed wheel: is everything there?"""

import tempfile
from importlib.metadata import metadata
from importlib.resources import files
from pathlib import Path

import evaluate
import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import peft_calib
from peft_calib.calibration import calibration_report
from peft_calib.trainer_callbacks import CalibrationCallback


def main() -> None:
    root = Path(peft_calib.__file__).parent
    assert "site-packages" in root.parts, f"peft_calib was not imported from the wheel but from {root}"
    assert metadata("peft-calib")["License-Expression"] == "Apache-2.0"
    assert (files(peft_calib) / "py.typed").is_file()
    assert CalibrationCallback.__module__ == "peft_calib.trainer_callbacks.calibration"

    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(4), 64), rng.integers(0, 4, 64)
    metric = evaluate.load(peft_calib.metric_path("calibration"))
    computed = metric.compute(predictions=probabilities, references=labels)
    assert abs(computed["ece"] - calibration_report(probabilities, labels, confidence_level=None)["ece"]) < 1e-12

    base = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(base).eval()
    config = peft_calib.HyperLoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = get_peft_model(classifier, config).eval()
    tokens = torch.arange(12).reshape(2, 6)
    logits = model(tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert PeftConfig.from_pretrained(folder).peft_type == "HYPERLORA"
        assert torch.equal(PeftModel.from_pretrained(model.unload(), folder)(tokens).logits, logits)
    print(f"peft_calib {peft_calib.__version__} works from {root}")


if __name__ == "__main__":
    main()
