"""`predict_to`: the same bytes whatever the number of processes and however often killed."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import peft_calib
from peft_calib import predict_to
from peft_calib.base_models import base_fingerprint
from peft_calib.predictor import shards

WORDS = "the weather was seen again today over a long river and some old trees near our house".split()
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]) for i in range(23)]
ROWS = Dataset.from_dict({"id": list(range(23)), "text": TEXTS})
#: Ends processes of one and of two ranks at five places each; the model is loaded once, before they are forked.
KILLED = """
import os, signal, sys
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
import peft_calib
from datasets import Dataset
from peft_calib.predictor import shards

def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def half(table, path):
    open(path, "wb").write(b"PAR1 and no more")
    killed()

def at(shard, how):
    write = shards.pq.write_table
    def written(table, path):
        if shard not in str(path):
            return write(table, path)
        how(table, path)
    shards.pq.write_table = written

def unnamed(table, path, write=shards.pq.write_table):
    write(table, path)
    killed()

def at_the_end(write=shards._write):
    shards._write = lambda path, content: write(path, content) if content["shards"] is None else killed()

PLACES = {
    "before the manifest": lambda: setattr(shards, "write_atomically", killed),
    "in the first shard": lambda: at("shard-000000", half),
    "in the third shard": lambda: at("shard-000002", half),
    "before the last shard has its name": lambda: at("shard-000004", unnamed),
    "at the end": at_the_end,
}
folder, out, rows = sys.argv[1:]
predictor = peft_calib.load(folder, device="cpu", recalibrate=False)
rows = Dataset.from_parquet(rows)
for count in (1, 2):
    for name, prepare in PLACES.items():
        for index in ((0,), (0, 1, 0))[count - 1]:  # the first one finishes, once all shards are there
            place = f"{out}/{count} {name}"
            # a second rank does not come past a first one that is gone before it wrote the manifest
            wait = lambda: index and not os.path.exists(f"{place}/predictions.json") and os._exit(0)
            state = SimpleNamespace(
                num_processes=count, process_index=index, is_main_process=index == 0, wait_for_everyone=wait
            )
            child = os.fork()
            if child == 0:
                prepare()
                try:
                    peft_calib.predict_to(place, predictor, rows, shard_rows=5, progress=False, accelerator=state)
                finally:
                    os._exit(0)
            print(count, index, name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep="|")
"""


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, tiny_model_folder):
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return peft_calib.load(folder, device="cpu", recalibrate=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, predictor) -> Path:
    """What one process writes without an interruption."""
    return predict_to(tmp_path_factory.mktemp("out") / "whole", predictor, ROWS, shard_rows=5, progress=False)


def rank(index: int, count: int) -> SimpleNamespace:
    """One of several processes, which come one after the other here."""
    facts = {"num_processes": count, "process_index": index, "is_main_process": index == 0}
    return SimpleNamespace(**facts, wait_for_everyone=lambda: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shards_hold_the_rows_and_what_a_predictor_says(predictor, whole):
    names = ["predictions.json", *(f"shard-{number:06d}.parquet" for number in range(5))]
    assert sorted(contents(whole)) == names
    found = load_dataset("parquet", data_files=f"{whole}/*.parquet", split="train", cache_dir=str(whole.parent))
    assert found.column_names == ["id", "text", "predicted_label", "probability", "entropy", "mutual_information"]
    assert found["id"][:] == ROWS["id"][:]
    said = predictor.predict(TEXTS)
    assert found["predicted_label"][:] == said.labels_predicted
    assert found["probability"][:] == pytest.approx(said.probabilities.amax(1).tolist(), abs=1e-5)
    manifest = json.loads((whole / "predictions.json").read_text())
    assert manifest["rows"] == 23
    assert manifest["shards"][-1] == {"file": "shard-000004.parquet", "first": 20, "rows": 3}
    assert (manifest["how"], manifest["seed"], manifest["temperature"]) == ("mean", 0, None)
    assert manifest["adapters"] == {".": peft_calib.identity.folder_digest(predictor.folder)}


def test_as_many_processes_as_one_likes(predictor, whole, tmp_path):
    for count in (2, 3):
        out = tmp_path / str(count)
        options = {"shard_rows": 5, "progress": False}
        with pytest.raises(ValueError, match=r"lacks shard-000001.*run the same call again"):  # it finishes alone
            predict_to(out, predictor, ROWS, **options, accelerator=rank(0, count))
        for index in (*range(1, count), 0):
            predict_to(out, predictor, ROWS, **options, accelerator=rank(index, count))
        assert contents(out) == contents(whole)


def test_a_killed_process_is_continued(predictor, whole, tmp_path, monkeypatch):
    """At five places, of one process and of two: what is there stays, what is half written does not count."""
    ROWS.to_parquet(tmp_path / "rows.parquet")
    rows = Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    words = [str(predictor.folder), str(tmp_path), str(tmp_path / "rows.parquet")]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = [line.split("|") for line in done.stdout.splitlines()]
    cases = {f"{count} {name}" for count, _, name, _ in ends}
    assert len(cases) == 10
    for case in cases:  # somebody was killed; a second rank may have had nothing to do with the place
        assert str(-signal.SIGKILL) in [code for count, _, name, code in ends if f"{count} {name}" == case], case
    made = []
    monkeypatch.setattr(shards, "encode", lambda rows, *rest, _encode=shards.encode: made.append(len(rows)) or _encode(rows, *rest))  # noqa: E501  # fmt: skip
    for case in sorted(cases):
        out, there = tmp_path / case, len(list((tmp_path / case).glob("shard-??????.parquet")))
        predict_to(out, predictor, rows, shard_rows=5, progress=False)
        assert contents(out) == contents(whole), case
        assert len(made) == 5 - there, case  # only what was not there
        made.clear()


def test_streams_texts_and_pages(predictor, tmp_path):
    kinds = {
        "list": TEXTS,
        "generator": (text for text in TEXTS),
        "stream": IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)),
        "table": {"text": TEXTS},
    }
    for name, rows in kinds.items():
        predict_to(tmp_path / name, predictor, rows, shard_rows=10, progress=False)
    first, *others = ([pq.read_table(f).to_pylist() for f in sorted((tmp_path / n).glob("*.parquet"))] for n in kinds)
    assert [len(part) for part in first] == [10, 10, 3]
    assert all(other == first for other in others)


def test_a_stream_is_read_no_further_than_its_shard(predictor, tmp_path):
    """No more than a shard of rows is held: each is written before the next is read."""
    seen = []

    def stream():
        for number, text in enumerate(TEXTS):
            seen.append(len(list((tmp_path / "out").glob("shard-*"))) - number // 5)
            yield text

    predict_to(tmp_path / "out", predictor, stream(), shard_rows=5, progress=False)
    assert set(seen) == {0}


def test_a_folder_of_another_call_is_refused(predictor, whole, tmp_path):
    def again(rows=ROWS, folder=whole, **changed):
        return predict_to(folder, predictor, rows, **{"shard_rows": 5, "progress": False, **changed})

    before = contents(whole)
    again()  # finished: nothing is made again
    again(shard_rows=np.int64(5), seed=np.int64(0))  # numbers of numpy are numbers
    for changed in ({"shard_rows": 6}, {"seed": 1}, {"prefix": "x_"}):
        with pytest.raises(
            ValueError, match=f"begun in another way.*{next(iter(changed)).replace('prefix', 'added')}"
        ):
            again(**changed)
    other = Dataset.from_dict({"id": ROWS["id"][:], "text": [*TEXTS[:22], "another"]})
    with pytest.raises(ValueError, match=r"shard-000004\.parquet was made of other rows than those given now"):
        again(other)
    with pytest.raises(ValueError, match="shards of more rows"):
        again(ROWS.select(range(20)))
    assert contents(whole) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no folder of predictions"):
        again(folder=tmp_path)


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([], ValueError, "no text was given"),
        (iter([]), ValueError, "no text was given"),
        (iter(["a", 3]), TypeError, r"Row 1 is '3' \(int\)"),
        ("text", TypeError, "got one text"),
        (ROWS.rename_column("id", "entropy"), ValueError, "columns named entropy.*prefix="),
        (ROWS.rename_column("text", "words"), ValueError, "has no column 'text'"),
    ],
)
def test_rows_that_are_none(predictor, tmp_path, rows, kind, message):
    with pytest.raises(kind, match=message):
        predict_to(tmp_path / "out", predictor, rows, shard_rows=2, progress=False)


# --------------------------------------------------------------------- continued by another, and types of a stream


def test_the_manifest_says_all_that_decides(predictor, whole):
    manifest = json.loads((whole / "predictions.json").read_text())
    assert manifest["batch_size"] == 8  # what was used where nothing was said
    assert manifest["base"] == base_fingerprint(predictor.model)
    assert (manifest["label_tokens"], manifest["parameters"]) == (None, None)
    assert manifest["inputs"]["max_length"] == 128
    assert {"text_columns", "prompt", "choices_columns"} < set(manifest["inputs"])


def test_a_folder_is_not_continued_with_another_base(predictor, tiny_model_folder, tmp_path):
    """A LoRA of another tool knows no base model; the folder does."""

    class Killed(Exception):
        pass

    def stream():
        yield from TEXTS[:6]
        raise Killed

    with pytest.raises(Killed):
        predict_to(tmp_path / "out", predictor, stream(), shard_rows=5, progress=False)
    assert [path.name for path in (tmp_path / "out").glob("shard-*")] == ["shard-000000.parquet"]
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({n: v + 0.1 for n, v in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    changed = {
        "base": {"base_model": other},
        "inputs": {"max_length": 7},
        "label_names": {"label_names": ["a", "b", "c"]},
    }
    changed["base: 'float32.*'bfloat16"] = {"dtype": torch.bfloat16}
    for name, options in changed.items():
        now = peft_calib.load(predictor.folder, device="cpu", recalibrate=False, **options)
        with pytest.raises(ValueError, match=f"begun in another way.*{name}"):
            predict_to(tmp_path / "out", now, TEXTS[:6], shard_rows=5, progress=False)
    predict_to(tmp_path / "out", predictor, TEXTS[:6], shard_rows=5, progress=False)
    assert len(list((tmp_path / "out").glob("shard-*"))) == 2


def test_the_shards_of_a_stream_are_one_table(predictor, tmp_path):
    """What the first shard's types take is written in them: texts where nothing was, whole numbers among others."""
    rows = [
        {"text": "awful", "note": None, "score": 0.5, "tags": ["x"]},
        {"text": "lovely", "note": None, "score": 1.5, "tags": []},
        {"text": "again", "note": "seen", "score": 2, "tags": ["y"]},
        {"tags": None, "text": "old", "note": None, "score": 3},
        {"text": "river"},
    ]
    predict_to(tmp_path / "out", predictor, iter(rows), shard_rows=2, progress=False)
    files = f"{tmp_path / 'out'}/*.parquet"
    found = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert found["note"][:] == [None, None, "seen", None, None]
    assert found["score"][:] == [0.5, 1.5, 2.0, 3.0, None]
    assert found["tags"][:] == [["x"], [], ["y"], None, None]
    schemas = [pq.read_schema(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert all(schema.equals(schemas[0]) for schema in schemas)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"text": "a", "n": "many"}, "The column 'n' is int64 in the first shard and string in shard 1"),
        ({"text": "a", "n": 0.5}, "The column 'n' is int64 in the first shard and float64 in shard 1"),
        ({"text": 3, "n": 1}, "The column 'text' is string in the first shard and int64 in shard 1"),
        ({"text": "a", "n": 1, "more": 2}, "Shard 1 has a column 'more', which the first shard has not"),
    ],
)
def test_what_no_type_of_the_first_shard_takes_is_named(predictor, tmp_path, later, message):
    with pytest.raises(ValueError, match=f"{message}.*IterableDataset whose features="):
        predict_to(tmp_path / "out", predictor, iter([{"text": "a", "n": 1}, later]), shard_rows=1, progress=False)


def test_nothing_begins_no_folder(predictor, tmp_path):
    for rows in ([], iter([]), IterableDataset.from_generator(lambda: iter([]))):
        with pytest.raises(ValueError, match="no text was given"):
            predict_to(tmp_path / "out", predictor, rows, progress=False)
    assert not (tmp_path / "out").exists()
