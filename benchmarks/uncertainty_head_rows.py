"""What the study of the uncertainty head fits on: features of every run, extracted once and kept as safetensors."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from evidence import read_rows
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from peft_calib.provenance.row_hashes import hash_rows
from peft_calib.runs.embedded import embedded_model
from peft_calib.runs.folder import RunFolder
from peft_calib.runs.loading import FinishedRun, load_task, read_record
from peft_calib.runs.tasks import task_class
from peft_calib.uncertainty_head import CopiedHead, FeatureSet, copy_head, extract_features
from peft_calib.uncertainty_head.baselines import token_states
from peft_calib.uncertainty_head.baselines.sequences import with_tokens

TENSORS = ("features", "logits", "labels", "tokens", "ends")
#: Sets of rows that several functions are asked about: to test on, and to map their scores on.
OF_FUNCTIONS = ("pool", "test")


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(cell: str, protocol: dict[str, Any], evidence: dict[str, Any], runs: Path, data: Path) -> dict[str, list]:
    """Rows of a cell by name: `pool`, unseen by its runs; `own`, those they were given; test sets by their names."""
    place = runs / "cells" / cell
    tests = {path.stem: jsonl(path) for path in sorted(place.glob("*.jsonl")) if path.stem != "train"}
    own = jsonl(place / "train.jsonl")
    about = evidence["cells"][cell]
    known = {row["text"] for rows in [own, *tests.values()] for row in rows}
    source = evidence["data"][about["data"]]
    rest = read_rows(data / about["data"], "train", source.get("least_words", 0))
    rest = [row for row in rest if row["text"] not in known]
    random.Random(f"{cell} head").shuffle(rest)
    sets = {"pool": rest[: protocol["pool_rows"]], "own": own, **tests}
    return {name: sorted(rows, key=lambda row: len(row["text"])) for name, rows in sets.items()}  # little padding


def loaded(folder: Path) -> FinishedRun:
    """A finished run on the embedded base model of this installation."""
    run = RunFolder(folder)
    task = load_task(run)
    config = replace(task.config, model=embedded_model())
    return FinishedRun.assemble(run, task_class(config.task)(config, task.labels))


def extract(cell: str, seed: int, rows: dict[str, list], protocol: dict[str, Any], runs: Path, place: Path) -> None:
    """Features of all sets of rows of one run; of a run that is a member of the ensemble only, logits of some."""
    folder = place / f"{cell}-{seed}"
    member_only = seed >= protocol["runs"]
    sets = {name: rows[name] for name in OF_FUNCTIONS} if member_only else rows
    wanted = files_of(sets, None if member_only else protocol["dropout"])
    if not all((folder / f"{name}.safetensors").is_file() for name in wanted):
        found = loaded(runs / "runs" / f"{cell}-{protocol['method']}-{seed}")
        extract_run(found, sets, folder, None if member_only else protocol["dropout"], tokens=not member_only)


def files_of(rows: dict[str, list], dropout: dict[str, Any] | None) -> list[str]:
    """Names of the files of a run; the head is written last."""
    passes = [passes_of(name) for name in OF_FUNCTIONS if name in rows] if dropout else []
    return [*rows, *passes, "head"]


def passes_of(name: str) -> str:
    return f"{name}_dropout"


def extract_run(
    found: FinishedRun, rows: dict[str, list], folder: Path, dropout: dict[str, Any] | None, tokens: bool = True
) -> None:
    """Features of sets of rows, passes with dropout over some of them, and the head; what is there stays."""
    words: dict[str, Any] = {"task": found.task.predict_task, "tokenizer": found.tokenizer}
    words["label_tokens"] = found.task.answer_tokens(found.tokenizer)
    wanted = [name for name in files_of(rows, dropout) if not (folder / f"{name}.safetensors").is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        if not {name, passes_of(name)} & set(wanted):
            continue
        canonical = found.task.canonical(Dataset.from_list(part), name, "test")
        canonical = trained_on(found, canonical) if name == "own" else canonical
        encoded = found.task.encode_prediction(canonical, found.tokenizer)
        if name in wanted:
            read_states = token_states if tokens else extract_features
            save(folder / f"{name}.safetensors", read_states(found.model, encoded, batch_size=32, **words))
        if passes_of(name) in wanted:
            passes = extract_features(found.model, encoded, batch_size=32, **words, **(dropout or {}))
            save(folder / f"{passes_of(name)}.safetensors", replace(passes, features=passes.features[..., :0]))
    if "head" in wanted:
        head = copy_head(found.model, **words)
        save_file({name: value.contiguous() for name, value in head.starts[0].items()}, folder / "head.safetensors")


def trained_on(found: FinishedRun, rows: Dataset) -> Dataset:
    """Those of a run's own rows that its adapter was trained on; the others chose its temperature."""
    kind, keys = hash_rows(rows)
    seen = read_record(found.folder, found.task).trained_on[kind].hashes
    return rows.select(np.flatnonzero(np.isin(keys, seen)))


def save(path: Path, features: FeatureSet) -> None:
    tensors = {name: getattr(features, name, None) for name in TENSORS}
    tensors["hashes"] = None if features.hashes is None else torch.from_numpy(features.hashes.view(np.int64))
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, path, metadata={"adapter": features.adapter or ""})


def read(path: Path, tokens: bool = True) -> FeatureSet:
    """Features as `save` wrote them, with the states of their tokens if asked for."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        tensors = {name: file.get_tensor(name) for name in names if tokens or name not in ("tokens", "ends")}
        adapter = file.metadata()["adapter"] or None
    hashes = tensors.get("hashes")
    plain = FeatureSet(
        tensors["features"],
        tensors["logits"],
        tensors.get("labels"),
        None if hashes is None else hashes.numpy().view(np.uint64),
        adapter=adapter,
    )
    return with_tokens(plain, tensors["tokens"], tensors["ends"]) if "tokens" in tensors else plain


def read_head(folder: Path) -> CopiedHead:
    """The linear head of a run's classifier, or the rows of its output layer."""
    with safe_open(folder / "head.safetensors", "pt") as file:
        start = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle, not a dict)
    linear = nn.Linear(*reversed(start["weight"].shape), bias="bias" in start)
    linear.load_state_dict(start)
    return CopiedHead(linear.eval().requires_grad_(False), [start])
