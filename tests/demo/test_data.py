import csv
import gzip
import json
import random

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset

from peft_calib.demo.data import load_text_data
from peft_calib.runs import sources as module

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{' '.join(rng.choices(WORDS, k=8))} {number}" for number in range(count)]


@pytest.fixture
def rows():
    return [{"text": text, "label": ("no", "yes", "maybe")[i % 3]} for i, text in enumerate(sentences(300))]


def write(path, rows):
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def texts(split) -> set[str]:
    return set(split["text"][:])


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.jsonl.gz"])
def test_every_file_type_gives_the_same_splits(tmp_path, rows, name):
    data = load_text_data(write(tmp_path / name, rows), seed=3)
    reference = load_text_data(write(tmp_path / "reference.jsonl", rows), seed=3)
    assert data.label_names == ("maybe", "no", "yes")
    assert (len(data.train), len(data.calibration), len(data.test)) == (192, 48, 60)
    for split in ("train", "calibration", "test"):
        assert getattr(data, split).to_dict() == getattr(reference, split).to_dict()
    original = {row["text"]: row["label"] for row in rows}
    for split in (data.train, data.calibration, data.test):
        for row in split:
            assert data.label_names[row["label"]] == original[row["text"]]


def test_splits_share_no_text_and_lose_none(tmp_path, rows):
    repeated = rows + rows[:90]  # the same text twice must not end up on both sides of a cut
    data = load_text_data(write(tmp_path / "a.csv", repeated))
    train, calibration, test = map(texts, (data.train, data.calibration, data.test))
    assert not (train & calibration or train & test or calibration & test)
    assert train | calibration | test == {row["text"] for row in rows}
    assert len(data.train) + len(data.calibration) + len(data.test) == len(repeated)


def test_cuts_are_stratified_and_follow_the_seed(tmp_path, rows):
    path = write(tmp_path / "a.csv", rows)
    first, again, other = (load_text_data(path, seed=seed) for seed in (0, 0, 1))
    assert np.bincount(first.test["label"][:]).tolist() == [20, 20, 20]
    assert first.test.to_dict() == again.test.to_dict() != other.test.to_dict()


def test_the_global_random_state_is_left_alone(tmp_path, rows):
    import torch

    path = write(tmp_path / "a.csv", rows)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    load_text_data(path, max_train_rows=50)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_embedded_data():
    data = load_text_data()
    assert (len(data.train), len(data.calibration), len(data.test), len(data.outside)) == (1050, 700, 1750, 600)
    train, calibration, test, outside = map(texts, (data.train, data.calibration, data.test, data.outside))
    assert not (train & calibration or train & test or calibration & test or outside & (train | calibration | test))
    assert len(data.label_names) == 7
    for split, count in ((data.train, 150), (data.calibration, 100), (data.test, 250)):
        assert np.bincount(split["label"][:]).tolist() == [count] * 7


def test_max_train_rows_leaves_the_other_splits_alone(tmp_path, rows):
    path = write(tmp_path / "a.csv", rows)
    whole, small = load_text_data(path), load_text_data(path, max_train_rows=30)
    assert len(small.train) == 30
    assert texts(small.train) <= texts(whole.train)
    assert whole.test.to_dict() == small.test.to_dict()


def test_given_splits_are_kept(tmp_path, rows):
    for name, part in (("train", rows[:180]), ("validation", rows[200:240]), ("test", rows[240:])):
        write(tmp_path / f"{name}.jsonl", part)
    data = load_text_data(tmp_path)
    assert data.test["text"][:] == [row["text"] for row in rows[240:]]
    assert data.calibration["text"][:] == [row["text"] for row in rows[200:240]]
    (tmp_path / "validation.jsonl").unlink()
    data = load_text_data(tmp_path)
    assert data.test["text"][:] == [row["text"] for row in rows[240:]]
    assert (len(data.train), len(data.calibration)) == (144, 36)


def test_hub_data_with_hidden_test_labels(monkeypatch, rows):
    """As GLUE: class labels, a configuration name, sentence pairs, and -1 for every label of the test split."""

    def fake(source, subset):
        assert (source, subset) == ("someone/pairs", "small")
        features = datasets.Features(
            {
                "a": datasets.Value("string"),
                "b": datasets.Value("string"),
                "gold": ClassLabel(names=["differs", "same"]),
            }
        )

        def split(start, stop, hidden=False):
            return Dataset.from_list(
                [{"a": r["text"], "b": "x " + r["text"], "gold": -1 if hidden else i % 2}
                 for i, r in enumerate(rows[start:stop])], features=features)  # fmt: skip

        return datasets.DatasetDict(train=split(0, 200), validation=split(200, 250), test=split(250, 300, hidden=True))

    monkeypatch.setattr(module, "load_dataset", fake)
    data = load_text_data("someone/pairs", subset="small", text_column=("a", "b"), label_column="gold")
    assert data.label_names == ("differs", "same")
    assert data.train.column_names == ["text", "text_pair", "label"]
    assert data.test["text"][:] == [row["text"] for row in rows[200:250]]
    assert (len(data.train), len(data.calibration)) == (160, 40)


def test_a_missing_class_label_is_named(rows, monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": ClassLabel(names=["no", "yes"])})
    split = Dataset.from_list(
        [{"text": r["text"], "label": -1 if i == 7 else i % 2} for i, r in enumerate(rows)], features
    )
    monkeypatch.setattr(module, "load_dataset", lambda *_: datasets.DatasetDict(train=split))
    with pytest.raises(ValueError, match="row 7 of train has the label -1"):
        load_text_data("someone/data")


def test_outside_texts_need_no_labels(tmp_path, rows):
    other = write(tmp_path / "other.jsonl", [{"text": text} for text in sentences(10, seed=9)])
    data = load_text_data(write(tmp_path / "a.csv", rows), outside=other)
    assert data.outside.column_names == ["text"]
    assert data.outside["text"][:] == sentences(10, seed=9)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: [{"sentence": r["text"], "label": r["label"]} for r in rows], {}, "no column 'text'.*sentence"),
        (lambda rows: [{"text": r["text"], "gold": r["label"]} for r in rows], {}, "no column 'label'.*gold"),
        (lambda rows: [*rows, {"text": "  ", "label": "no"}], {}, "row 300 has no text"),
        (lambda rows: [*rows, {"text": "a text", "label": None}], {}, "row 300 of train has the label None"),
        (lambda rows: [r | {"label": 0.25} for r in rows], {}, "a class is expected"),
        (lambda rows: [r | {"label": "same"} for r in rows], {}, "at least two classes"),
        (lambda rows: rows[:3], {}, "too few"),
        (lambda rows: rows, {"test_fraction": 1.0}, "test_fraction must lie between 0 and 1"),
        (lambda rows: rows, {"calibration_fraction": 0}, "calibration_fraction must lie between 0 and 1"),
        (lambda rows: rows, {"text_column": ("text", "text", "text")}, "one column, or two"),
    ],
)
def test_bad_input_is_named(tmp_path, rows, change, options, message):
    path = write(tmp_path / "a.jsonl", change(rows))
    with pytest.raises(ValueError, match=message):
        load_text_data(path, **options)


def test_bad_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv"):
        load_text_data(tmp_path / "nothing.csv")
    notes = tmp_path / "notes.txt"
    notes.write_text("words")
    with pytest.raises(ValueError, match="known type"):
        load_text_data(notes)
