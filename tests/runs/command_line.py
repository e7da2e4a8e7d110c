"""The command line as a test calls it, and the files that users would bring."""

import csv
import json
import random
from pathlib import Path

import pytest
from datasets import Dataset
from torch import nn

from peft_calib.cli import main
from peft_calib.runs.loading import FinishedRun
from peft_calib.runs.stage import load_base

WORDS = "the weather was seen again today over a long river and some old trees near our house".split()
#: Small enough that a run takes seconds on one core.
QUICK = ["--epochs", "2", "--batch-size", "8", "--rank", "2", "--target-modules", "query", "--target-modules", "value"]


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different sentences in which one word tells the class."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = ("bad", "good")[number % 2]
        text = " ".join([*rng.choices(WORDS, k=rng.randint(4, 9)), ("awful", "lovely")[number % 2], str(number)])
        rows.append((text, label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]], names: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def peft_calib(*arguments: object) -> str | None:
    """Run a command; what it ended with, `None` for success."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return None if stopped.value.code in (None, 0) else str(stopped.value.code)


def read(path: Path) -> Dataset:
    return Dataset.from_csv(str(path))


def fresh_base(run: FinishedRun) -> nn.Module:
    return load_base(run.task, run.tokenizer)
