"""Memory of evaluating a million rows with calibration numbers, beside the stock way of getting numbers at all.

python benchmarks/evaluation_memory.py --output benchmarks/results/evaluation_memory.json

Each way runs in a process of its own. Its figure is the peak of the resident set over what model, data and one small
evaluation took.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import torch
from harness import alone, describe_machine, parser, resident_bytes, write
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, Trainer, TrainingArguments

from peft_calib.trainer_callbacks import CalibrationCallback, preprocess_logits_for_calibration

CLASSES, BATCH = 4, 2048
WAYS = {
    "callback": "CalibrationCallback alone",
    "streamed": "CalibrationCallback as compute_metrics, batch_eval_metrics=True",
    "gathered": "CalibrationCallback as compute_metrics",
    "stock": "stock compute_metrics (accuracy only)",
    "stock report": "stock compute_metrics as users write it: softmax of all logits, a mask for each bin",
}


class Rows(torch.utils.data.Dataset):
    """Three tokens and a label a row."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, 50, (count, 3), generator=generator, dtype=torch.int16)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator, dtype=torch.int8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[indices].long(), "labels": self.labels[indices].long()}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def usual_report(prediction: EvalPrediction) -> dict[str, float]:
    """What a user writes: softmax, then a mask for each bin."""
    logits = prediction.predictions.astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == prediction.label_ids
    ece = 0.0
    for low in np.linspace(0, 1, 16)[:-1]:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            ece += abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
    nll = -np.log(p[np.arange(len(p)), prediction.label_ids]).mean()
    return {"accuracy": float(right.mean()), "nll": float(nll), "ece": float(ece)}


def measure(way: str, count: int) -> dict[str, float]:
    """One way in this process."""
    torch.set_num_threads(1)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=CLASSES, **sizes))
    callback = CalibrationCallback(diagram=False)
    metrics = {"streamed": callback.compute_metrics, "gathered": callback.compute_metrics, "stock": accuracy}
    metrics["stock report"] = usual_report
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                per_device_eval_batch_size=BATCH,
                batch_eval_metrics=way == "streamed",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                remove_unused_columns=False,
            ),
            callbacks=[] if way.startswith("stock") else [callback],
            compute_metrics=metrics.get(way),
            preprocess_logits_for_metrics=preprocess_logits_for_calibration if way != "callback" else None,
            data_collator=lambda batch: batch,
        )
        data = Rows(count)
        trainer.evaluate(Rows(64))
        before = resident_bytes("VmHWM")
        start = time.perf_counter()
        found = trainer.evaluate(data)
        seconds = time.perf_counter() - start
        peak = resident_bytes("VmHWM")
    numbers = {key: found[f"eval_{key}"] for key in ("accuracy", "nll", "ece") if f"eval_{key}" in found}
    return {"peak_above_model_mb": round((peak - before) / 2**20, 1), "seconds": round(seconds, 1), **numbers}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rows", type=int, default=1_000_000)
    options = flags.parse_args()
    results = {}
    for way, what in WAYS.items():
        results[way] = {"what": what, **alone("evaluation_memory", f"measure({way!r}, {options.rows})")}
        print(way, results[way], flush=True)
    about = {"rows": options.rows, "classes": CLASSES, "batch": BATCH}
    write(options.output, {**about, "machine": describe_machine(), "ways": results})


if __name__ == "__main__":
    main()
