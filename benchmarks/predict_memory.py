"""Memory of predicting a million rows with eight draws: all at once, and shard by shard into files.

A BayesianLoRA on a BERT of width 16 with four classes: rows are cheap, and what is kept of them counts. Each way, and
each number of rows, runs in a process of its own. Its figure is the peak of the resident set over what the model, the
rows and one small prediction took. Rows come from a generator, and all at once from a list of texts.

    python benchmarks/predict_memory.py --output benchmarks/results/predict_memory.json
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import alone, describe_machine, parser, resident_bytes, write
from peft import get_peft_model
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import peft_calib
from peft_calib.runs.embedded import embedded_model

CLASSES, DRAWS = 4, 8
WORDS = ("sorted", "rows", "axis", "shape", "index", "frame", "dtype", "mean")
WAYS = ("predict", "predict_to")


def adapter(folder: Path) -> Path:
    """A BayesianLoRA on a base model, both in the folder."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    base = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=CLASSES, **sizes))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = BertForSequenceClassification.from_pretrained(folder / "base")
    config = peft_calib.BayesianLoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def texts(count: int) -> Iterator[str]:
    """Short texts, few of which are equal in a row."""
    for number in range(count):
        yield f"{WORDS[number % 8]} {WORDS[number // 8 % 8]} {WORDS[number // 64 % 8]}"


def measure(way: str, count: int) -> dict[str, float]:
    """One way in this process."""
    torch.set_num_threads(1)
    how: dict[str, Any] = {"num_samples": DRAWS, "progress": False}
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this adapter has no temperature
        predictor = peft_calib.load(
            adapter(Path(place)), device="cpu", label_names=["a", "b", "c", "d"], batch_size=2048
        )
        rows: Any = texts(count) if way == "predict_to" else list(texts(count))
        predictor.predict(list(texts(2048)), **how)
        before = resident_bytes("VmHWM")
        if way == "predict_to":
            peft_calib.predict_to(Path(place) / "out", predictor, rows, **how)
        else:
            found = predictor.predict(rows, **how)
            assert len(found.probabilities) == count
        peak = resident_bytes("VmHWM")
    return {"peak_above_model_mb": round((peak - before) / 2**20, 1)}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    options = flags.parse_args()
    found: dict[str, Any] = {}
    for count in options.rows:
        for way in WAYS:
            found.setdefault(way, {})[str(count)] = alone("predict_memory", f"measure({way!r}, {count})")
            print(way, count, found[way][str(count)], flush=True)
        ways = (found[way][str(count)]["peak_above_model_mb"] for way in reversed(WAYS))
        found.setdefault("ratio", {})[str(count)] = round(next(ways) / next(ways), 4)
    write(
        options.output,
        {"classes": CLASSES, "draws": DRAWS, "shard_rows": 8192, "machine": describe_machine(), **found},
    )


if __name__ == "__main__":
    main()
