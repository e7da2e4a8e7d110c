"""`peft-calib predict`: a table comes back with all its columns and what was predicted behind them."""

import csv
import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from command_line import peft_calib, write_csv, write_jsonl
from datasets import Dataset, DatasetDict

import peft_calib as package

BEFORE = Path(__file__).resolve().parents[1] / "data" / "before" / "runs"
TEXTS = ["the weather was awful", 'a "lovely", long river', "lovely; again\nand again", "Ärger über den Fluss"]
ADDED = ["predicted_label", "probability", "entropy", "mutual_information"]
OTHERS = {"id": ["007", "1e5", "", "None"], "note": ["a", "b,c", "", "d"]}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Runs of an earlier version, in the folder in which they were made."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def users_rows(path: Path) -> Path:
    columns = {"id": OTHERS["id"], "text": TEXTS, "note": OTHERS["note"]}
    return write_csv(path, list(zip(*columns.values(), strict=True)), tuple(columns))


def test_the_columns_are_kept_and_the_probabilities_are_the_predictors(trained, tmp_path, capsys):
    run, rows = trained["bayesian-lora"], users_rows(tmp_path / "rows.csv")
    assert peft_calib("predict", run, "--data", rows, "--output", tmp_path / "out.csv", "--all-probabilities") is None
    header, *lines = table(tmp_path / "out.csv")
    assert header == ["id", "text", "note", *ADDED, "probability_bad", "probability_good"]
    assert [line[:3] for line in lines] == [list(row) for row in zip(OTHERS["id"], TEXTS, OTHERS["note"], strict=True)]
    expected = package.load(run / "adapter").predict(TEXTS)
    assert [line[3] for line in lines] == expected.labels_predicted
    numbers = [[float(value) for value in line[4:]] for line in lines]
    assert [row[3:] for row in numbers] == expected.probabilities.tolist()
    assert [row[0] for row in numbers] == expected.probabilities.amax(1).tolist()
    assert [row[1:3] for row in numbers] == list(
        map(list, zip(expected.entropy.tolist(), expected.mutual_information.tolist(), strict=True))
    )
    told = capsys.readouterr().out
    assert f"4 rows by 3 draws, {expected.recalibration}: bad " in told
    # the folder of the adapter says the same, and an ensemble is asked as a run
    assert peft_calib("predict", run / "adapter", "--data", rows, "--output", tmp_path / "same.csv") is None
    assert [line[:7] for line in table(tmp_path / "same.csv")[1:]] == [line[:7] for line in lines]
    options = ("--data", rows, "--output", tmp_path / "members.csv")
    assert peft_calib("predict", trained["ensemble"], *options) is None
    assert "4 rows by 2 draws" in capsys.readouterr().out


def test_labels_that_are_no_class_are_told_and_their_rows_predicted(trained, tmp_path, capsys):
    labels = ["meh", "good", "meh", "so so", "", "-1"]
    rows = write_csv(tmp_path / "rows.csv", [(f"a lovely text {n}", label) for n, label in enumerate(labels)])
    arguments = ("predict", trained["lora"], "--data", rows, "--output", tmp_path / "out.csv")
    assert peft_calib(*arguments) is None
    told = capsys.readouterr().out
    assert "3 row(s) have a label that the adapter does not know ('meh' 2, 'so so' 1)" in told
    assert len(table(tmp_path / "out.csv")) == 7
    assert peft_calib(*arguments, "--overwrite", "--json") is None
    content = json.loads(capsys.readouterr().out)
    assert content["rows_with_unknown_label"] == 3 and content["unknown_labels"] == {"meh": 2, "so so": 1}
    rows = write_csv(tmp_path / "others.csv", [(f"text {n}", f"star {n}") for n in range(8)])
    assert peft_calib("predict", trained["lora"], "--data", rows, "--output", tmp_path / "others-out.csv") is None
    assert "8 row(s) have a label" in (told := capsys.readouterr().out) and "3 more" in told


def test_json_lines_json_and_parquet(place):
    rows = [
        {"text": text, "tags": ["x", "y"], "meta": {"z": n}, "n": n, "label": None} for n, text in enumerate(TEXTS)
    ]
    source = write_jsonl(place / "rows.jsonl", rows)
    for name in ("out.jsonl", "out.json", "out.parquet", "out.tsv"):
        assert peft_calib("predict", "lora", "--data", source, "--output", name) is None
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["text", "tags", "meta", "n", "label", *ADDED]
    assert [{name: line[name] for name in rows[0]} for line in lines] == rows
    assert json.loads(Path("out.json").read_text()) == lines
    read = pq.read_table("out.parquet").to_pylist()
    assert [line["probability"] for line in read] == [line["probability"] for line in lines]
    assert table(Path("out.tsv"))[0] != lines  # tabs
    assert pd.read_csv("out.tsv", sep="\t")["probability"].tolist() == pytest.approx([x["probability"] for x in lines])
    # Parquet keeps the types of the user's columns
    pd.DataFrame({"text": TEXTS, "when": pd.to_datetime(["2024-01-31"] * 4), "n": [1, 2, 3, 4]}).to_parquet(
        "in.parquet"
    )
    assert peft_calib("predict", "lora", "--data", "in.parquet", "--output", "sub/out.parquet") is None
    before, after = pq.read_table("in.parquet"), pq.read_table("sub/out.parquet")
    assert after.select(before.column_names).equals(before)
    assert after.column_names == [*before.column_names, *ADDED]


def test_a_run_of_an_earlier_version_has_all_its_temperatures(place, capsys):
    rows = users_rows(place / "new.csv")
    assert peft_calib("predict", "bayesian-lora", "--data", rows, "--output", "out.csv", "--num-samples", 2) is None
    assert "4 rows by 2 draws, T left off, fitted with 8 draws" in capsys.readouterr().out
    assert peft_calib("predict", "curve-lora", "--data", rows, "--output", "curve.csv", "--how", "mean") is None
    assert "4 rows by the mean adapter, T" in capsys.readouterr().out
    stored = json.loads(Path("ensemble/temperature.json").read_text())["sample"]
    assert peft_calib("predict", "ensemble", "--data", rows, "--output", "members.csv") is None
    assert f"4 rows by {stored['num_samples']} draws, T" in capsys.readouterr().out
    assert peft_calib("predict", "bayesian-lora/lora", "--data", rows, "--output", "plain.csv") is None
    assert "4 rows by the mean adapter, no temperature is stored: LABEL_0" in capsys.readouterr().out


def test_rows_without_a_text_are_told_or_left_out(place, capsys):
    write_csv(place / "gaps.csv", [("a", "one"), ("", "two"), ("b", "three")], ("text", "note"))
    told = peft_calib("predict", "lora", "--data", "gaps.csv", "--output", "out.csv")
    assert told == "peft-calib: gaps.csv, line 3: row 1 has no text (None); fill it in, or leave such rows out with --drop-missing"  # noqa: E501  # fmt: skip
    assert not Path("out.csv").exists()
    assert peft_calib("predict", "lora", "--data", "gaps.csv", "--output", "out.csv", "--drop-missing") is None
    assert "1 row(s) without a text were left out" in capsys.readouterr().out
    assert [line[1] for line in table(Path("out.csv"))] == ["note", "one", "three"]


def test_names_that_are_taken(place):
    write_csv(place / "again.csv", [("a", "0.5")], ("text", "probability"))
    told = peft_calib("predict", "lora", "--data", "again.csv", "--output", "out.csv")
    assert "again.csv has columns named probability" in told
    assert "--prefix" in told
    asked = ("--data", "again.csv", "--output", "out.csv", "--prefix", "model_")
    assert peft_calib("predict", "lora", *asked) is None
    assert table(Path("out.csv"))[0] == ["text", "probability", *(f"model_{name}" for name in ADDED)]
    assert "out.csv exists; name another file, or pass --overwrite" in peft_calib("predict", "lora", *asked)
    assert peft_calib("predict", "lora", *asked, "--overwrite") is None


@pytest.mark.parametrize(
    ("adapter", "arguments", "message"),
    [
        ("lora", ["--data", "no.csv", "--output", "o.csv"], "there is no data file no.csv"),
        ("lora", ["--data", "new.csv", "--output", "o.xlsx"], "o.xlsx is not of a known type"),
        ("lora", ["--data", "new.csv", "--output", "o.csv", "--text-column", "words"], "no column 'words'; it has"),
        ("lora", ["--data", "new.csv", "--output", "o.csv", "--split", "dev"], "has no split 'dev'; it has train"),
        ("lora", ["--data", "new.csv", "--output", "o.csv", "--how", "best"], "how must be one of"),
        ("no/where", ["--data", "new.csv", "--output", "o.csv"], "no/where is no folder here"),
        ("model", ["--data", "new.csv", "--output", "o.csv"], "model holds no adapter"),
        ("lora", ["--data", "new.csv", "--output", "o.csv", "--base-model", "gone"], "'gone'"),
    ],
)
def test_what_a_user_can_mend_is_one_line(place, adapter, arguments, message):
    users_rows(place / "new.csv")
    told = peft_calib("predict", adapter, *arguments)
    assert told.startswith("peft-calib: ")
    assert message in told
    assert "\n" not in told
    assert not Path("o.csv").exists()


def test_splits_of_a_folder(place):
    parts = {"train": Dataset.from_dict({"text": TEXTS[:1]}), "test": Dataset.from_dict({"text": TEXTS[1:]})}
    DatasetDict(parts).save_to_disk("parts")
    assert peft_calib("predict", "lora", "--data", "parts", "--output", "out.csv") is None
    assert len(table(Path("out.csv"))) == 1 + len(TEXTS[1:])
