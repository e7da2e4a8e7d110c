"""The code of the documentation's pages runs as printed, on small models and rows in the places of the reader's own.

Pages whose code needs a server, or what another tool leaves, are run beside what they are about: see `ELSEWHERE`.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hub_server import client_of_a_hub
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import peft_calib
from peft_calib.calibration import TemperatureScaling, find_entities

DOCS = Path(__file__).parents[1] / "docs"
ELSEWHERE = {"decide.md", "elsewhere.md", "generated-text.md", "serving.md", "watch.md"}
WORDS = "a long short film story of two three old new friends rain sun and night".split()
TARGETS = ["query", "value"]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{' '.join(rng.choice(WORDS, 6))} {seed} {row}" for row in range(count)]


class Reader:
    """What the reader of a page has: a base model, rows, a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def base(self):
        return AutoModelForSequenceClassification.from_pretrained(self.folder)

    def rows(self, count: int = 24, seed: int = 0) -> Dataset:
        encoded = [dict(self.tokenizer(text)) for text in texts(count, seed)]
        return Dataset.from_list([{**row, "labels": number % 3} for number, row in enumerate(encoded)])

    def batch(self) -> dict[str, torch.Tensor]:
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in self.rows(3, seed=9)]
        return dict(self.collator(rows))

    def arguments(self) -> TrainingArguments:
        return TrainingArguments(
            output_dir="out",
            max_steps=4,
            per_device_train_batch_size=8,
            report_to=[],
            use_cpu=True,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            logging_steps=2,
            disable_tqdm=True,
            remove_unused_columns=False,
        )

    def adapted(self, kind: type = peft_calib.BayesianLoraConfig, **fields) -> PeftModel:
        fields = {"task_type": "SEQ_CLS", "target_modules": TARGETS, "r": 2, **fields}
        model = get_peft_model(self.base(), kind(**fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "log" not in name and "classifier" not in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        return model.eval()

    def loras(self, *names: str) -> PeftModel:
        model = self.adapted(LoraConfig)
        for name in names:
            model.add_adapter(name, model.peft_config["default"])
        return model

    def bayesian(self) -> PeftModel:
        return self.adapted(num_train_examples=24, init_sd=0.5)


def answers(count: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), count)
    return p, np.array([rng.choice(classes, p=row) for row in p])


def names_of_all(reader: Reader) -> dict:
    return {
        "peft_calib": peft_calib,
        "get_peft_model": get_peft_model,
        "Trainer": Trainer,
        "PeftModel": PeftModel,
        "tokenizer": reader.tokenizer,
        "collator": reader.collator,
        "args": reader.arguments(),
        "arguments": reader.arguments(),
        "rows": reader.rows(),
        "train_rows": reader.rows(),
        "batch": reader.batch(),
        "base": reader.base(),
    }


def for_calibration(reader: Reader) -> dict:
    p, labels = answers(600)
    logits = np.log(p) * 1.7
    lora, hyper, ensemble = (answers(600, seed=seed)[0] for seed in (1, 2, 3))
    halves = [SimpleNamespace(probabilities=answers(50, 4)[0], labels=answers(50, 4)[1]) for _ in range(2)]
    return {
        "probabilities": p,
        "labels": labels,
        "logits": logits,
        "weights": np.ones(600),
        "TemperatureScaling": TemperatureScaling,
        "table": {"language": ["de", "en"] * 300},
        "lora": lora,
        "hyper_lora": hyper,
        "ensemble": ensemble,
        "batches": halves,
        "accelerator": Accelerator(cpu=True),
        "calibration_logits": logits[:300],
        "calibration_labels": labels[:300],
        "test_logits": logits[300:],
        "test_labels": labels[300:],
        "unlabelled_probabilities": p,
        "model": reader.base(),
        "train_prior": [0.5, 0.3, 0.2],
        "new_prior": [0.2, 0.3, 0.5],
    }


def for_curves(reader: Reader) -> dict:
    for seed in range(3):
        torch.manual_seed(seed)
        reader.adapted(LoraConfig, r=8, lora_alpha=8).save_pretrained(f"runs/seed-{seed}")
    return {}


def for_members(reader: Reader) -> dict:
    args = reader.arguments()
    args.eval_strategy = "no"
    return {"args": args}


def for_files(reader: Reader) -> dict:
    reader.bayesian().save_pretrained("my-adapter")
    return {}


def for_texts(reader: Reader) -> dict:
    reader.adapted().save_pretrained("runs/texts")
    reader.tokenizer.save_pretrained("runs/texts")
    return {}


def for_hub(reader: Reader) -> dict:
    """The base model lies on the Hub too, under the name that the adapter has for it."""
    HfApi().create_repo("user/base")
    HfApi().upload_folder(repo_id="user/base", folder_path=reader.folder)
    before, labels = answers(400)
    model = reader.bayesian()
    model.peft_config["default"].base_model_name_or_path = "user/base"
    return {"model": model, "before": before, "after": before, "labels": labels}


def for_prediction(reader: Reader) -> dict:
    model = reader.bayesian()
    for folder in ("runs/bayesian/adapter", "runs/b"):
        model.save_pretrained(folder)
        reader.tokenizer.save_pretrained(folder)
    return {
        "model": model,
        "stock_lora": reader.adapted(LoraConfig),
        "stream": iter(texts(6, 1)),
        "rows": Dataset.from_dict({"text": texts(8, 2)}),
        "unlabelled_rows": reader.rows(40, 3).remove_columns("labels"),
    }


def for_training(reader: Reader) -> dict:
    return {"validation": reader.rows(12, 5), "test": reader.rows(12, 6), "rows": reader.rows(150)}


def for_heads(reader: Reader) -> dict:
    base = BertForTokenClassification.from_pretrained(reader.folder, num_labels=3, ignore_mismatched_sizes=True)
    lora = LoraConfig(task_type="TOKEN_CLS", target_modules=TARGETS, r=2)

    return {
        "model": reader.adapted(LoraConfig),
        "validation_rows": reader.rows(120, 7),
        "tagger": get_peft_model(base, lora).eval(),
        "sentences_of_words": tagged(reader, 12, 8),
        "validation_sentences": tagged(reader, 60, 9),
        "tags": ["O", "B-PER", "I-PER"],
    }


def tagged(reader: Reader, count: int, seed: int) -> list[dict]:
    found = reader.rows(count, seed).remove_columns("labels")
    return [{**row, "labels": [i % 3 for i in range(len(row["input_ids"]))]} for row in found]


def for_words(reader: Reader) -> dict:
    base = BertForTokenClassification.from_pretrained(reader.folder, num_labels=3, ignore_mismatched_sizes=True)
    law = peft_calib.BayesianLoraConfig(task_type="TOKEN_CLS", target_modules=TARGETS, r=2, num_train_examples=100)
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.5, 0.2, 0.2], 900)
    tags, owners = ["O", "B-PER", "I-PER"], np.repeat(np.arange(150), 6)
    return {
        "model": get_peft_model(base, law).eval(),
        "calibration_rows": tagged(reader, 60, 9),
        "tags": tags,
        "other": find_entities(p, tags, owners, p.argmax(1)),
        "new_p": rng.random(9),
    }


def for_kinds(reader: Reader) -> dict:
    rng = np.random.default_rng(0)

    def labelled() -> tuple[np.ndarray, np.ndarray]:
        p = 1 / (1 + np.exp(-rng.normal(0, 6, (600, 2))))
        return p, (rng.random(p.shape) < p).astype(int)

    def numbers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean, variance = rng.normal(size=300), rng.gamma(1.0, 1.0, 300)
        return mean, variance, rng.normal(mean, np.sqrt(0.5 + variance))

    chances = rng.random(600)  # a real one is asked in tests/runs/test_kinds.py
    found: dict = {"names": ["billing", "refund"], "encoder": SimpleNamespace(predict=lambda _: chances[:, None])}
    for prefix in ("", "other_", "new_"):
        found |= {
            f"{prefix}pairs": [("question", "text")] * 600,
            f"{prefix}relevant": rng.random(600) < 0.02 + 0.97 * (chances > 0.5),
        }
    for prefix in ("", "new_", "other_"):
        found[f"{prefix}probabilities"], found[f"{prefix}labels"] = labelled()
        mean, variance, values = numbers()
        found |= {f"{prefix}mean": mean, f"{prefix}variance": variance, f"{prefix}values": values}
        found[f"{prefix}sd"] = np.sqrt(0.5 + variance)
    return found


PAGES = {
    "bayesian-lora.md": lambda reader: {"calibration_rows": reader.rows(40, 4)},
    "calibration.md": for_calibration,
    "curve-lora.md": for_curves,
    "ensemble-lora.md": for_members,
    "files.md": for_files,
    "guide-texts.md": for_texts,
    "guide-words.md": for_words,
    "hub.md": for_hub,
    "hyper-lora.md": lambda reader: {},
    "kinds-of-answer.md": for_kinds,
    "prediction.md": for_prediction,
    "training.md": for_training,
    "uncertainty-head.md": for_heads,
}


def test_every_page_with_code_is_run():
    with_code = {path.name for path in DOCS.glob("*.md") if blocks(path.name)}
    assert with_code == {*PAGES, *ELSEWHERE}


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    reader = Reader(tiny_model_folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with client_of_a_hub(monkeypatch):
        names = {**names_of_all(reader), **PAGES[page](reader)}
        for block in blocks(page):
            names["base"] = reader.base()
            exec(as_run(block, reader, names), names)


def as_run(block: str, reader: Reader, names: dict) -> str:
    """What no test can run is left out; a page's second subject is given in the place of its first."""
    if "ray_rows" in block:  # an extra; see test_scorer.py
        block = "\n".join(line for line in block.splitlines() if "ray_rows" not in line)
    if '["one", "two", "three"]' in block:
        names["model"] = reader.loras("one", "two", "three")
    if "    ...,\n" in block:
        block = block.replace("    ...,\n", "    model, args,\n")
        names["args"].eval_strategy = "no"
    if "distill(" in block:
        names["model"] = reader.bayesian()
    return block
