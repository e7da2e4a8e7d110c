"""Tables as people have them: what is written is what is read, and what cannot be read is said in one line."""

import csv
import gzip
import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from peft_calib.demo.data import load_text_data
from peft_calib.provenance.columns import texts_of, without_missing
from peft_calib.provenance.origins import at
from peft_calib.runs.labels import LabelMap
from peft_calib.runs.sources import FileFormat, read_splits

WORDS = [
    "None",
    "N/A",
    "null",
    "nan",
    "NaN",
    "NA",
    "",
    "007",
    "1e5",
    "1E400",
    "-0",
    "True",
    "false",
    "2024-01-31",
    "inf",
]


def table(rows, delimiter=",", **options) -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, **options).writerows(rows)
    return stream.getvalue()


def columns(path, **form) -> dict:
    return read_splits(path, form=FileFormat(**form))["train"].to_dict()


# ------------------------------------------------------------------ the same strings are the same data


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_words_are_words_in_every_format(tmp_path, suffix):
    rows = [
        {"text": f'a text, {word!r}\nand a second line\twith a tab; "quoted"', "label": word or None} for word in WORDS
    ]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        if ".json" in suffix:
            text = json.dumps(rows, indent=1) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        else:
            lines = [("text", "label"), *((row["text"], row["label"]) for row in rows)]
            text = table(lines, "\t" if suffix == ".tsv" else ",")
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    assert columns(path) == {name: [row[name] for row in rows] for name in ("text", "label")}


def test_a_column_of_digits_is_text_and_a_late_word_no_error(tmp_path):
    rows = [(str(10_000 + i), "1" if i % 2 else "0") for i in range(12_000)] + [("then a word", "other")]
    path = tmp_path / "digits.csv"
    path.write_text(table([("text", "label"), *rows]))
    assert columns(path) == {"text": [t for t, _ in rows], "label": [label for _, label in rows]}
    lines = [{"text": t, "label": int(label) if label.isdigit() else label} for t, label in rows]
    path = tmp_path / "digits.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert columns(path)["label"] == [label for _, label in rows]


def test_written_numbers_stand_in_the_order_of_numbers():
    labels = ["10", "2", "1", "2"]
    assert LabelMap.learn(labels, None, "rows").names == ("1", "2", "10")
    assert LabelMap.learn([int(label) for label in labels], None, "rows").names == ("1", "2", "10")
    assert LabelMap.learn(["007", "7", "10"], None, "rows").names == ("007", "7", "10")
    assert LabelMap.learn(["4.5", "-1", "10"], None, "rows").names == ("-1", "4.5", "10")
    assert LabelMap.learn(["b", "10", "9"], None, "rows").names == ("10", "9", "b")


@pytest.mark.parametrize(
    ("learned", "stored", "expected"),
    [
        ([0, 1], ["1", "0", "1.0"], [1, 0, 1]),  # what an earlier release learned from a CSV file
        (["0", "1"], [1, 0, 1.0], [1, 0, 1]),
        ([False, True], ["True", "False", 1], [1, 0, 1]),
        (["False", "True"], [True, False], [1, 0]),
        ([0.0, 1.0], ["1", 0], [1, 0]),
    ],
)
def test_labels_stored_in_another_form(learned, stored, expected):
    labels = LabelMap.from_dict(json.loads(json.dumps(LabelMap.learn(learned, None, "train").to_dict())))
    assert labels.encode(stored, None, "test", "test") == expected


def test_words_that_look_alike_are_different_classes():
    labels = LabelMap.learn(["7", "10"], None, "train")
    with pytest.raises(ValueError, match="the label '007'; known are 7, 10"):
        labels.encode(["007"], None, "test", "test")


def test_whole_numbers_are_texts_and_fractions_are_not():
    assert texts_of(Dataset.from_dict({"t": [12, 7]}), "t", "text", "rows") == ["12", "7"]
    with pytest.raises(ValueError, match=r"row 0 has no text but the float 0\.5; write it as a text"):
        texts_of(Dataset.from_dict({"t": [0.5]}), "t", "text", "rows")


# ------------------------------------------------------------------ encodings and delimiters


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marked_encodings_and_every_line_end(tmp_path, encoding, end):
    path = tmp_path / "rows.csv"
    path.write_bytes(f"text,label{end}über,ja{end}naïve,nein{end}".encode(encoding))
    assert columns(path) == {"text": ["über", "naïve"], "label": ["ja", "nein"]}


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nplain,a\nbœuf,b\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"rows\.csv is not encoded in UTF-8: line 3 has .*'œ'.*--encoding.*cp1252"):
        read_splits(path)
    assert columns(path, encoding="cp1252")["text"] == ["plain", "bœuf"]
    with pytest.raises(ValueError, match="no text encoding 'latin-99'"):
        read_splits(path, form=FileFormat("latin-99"))
    path.write_bytes("text,label\nplain,a\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"NUL characters.*--encoding utf-16-le"):
        read_splits(path)
    assert columns(path, encoding="utf-16-le")["text"] == ["plain"]
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes('{"text": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="not encoded in UTF-8: line 1"):
        read_splits(lines)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_usual_delimiters_are_recognised(tmp_path, delimiter, suffix):
    rows = [
        ("text", "label"),
        ("one, two", "a"),
        ("three; four | five", "b"),
        ('she said "no"', "a"),
        ("six\tseven", "b"),
    ]
    path = tmp_path / f"rows.{suffix}"
    path.write_text(table(rows, delimiter), newline="")
    assert columns(path) == {"text": [t for t, _ in rows[1:]], "label": [label for _, label in rows[1:]]}


def test_a_column_alone_is_not_divided(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text\nfirst; of two\nsecond | of two\n")
    assert columns(path) == {"text": ["first; of two", "second | of two"]}


def test_named_delimiters(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text^label\na, b^x\n")
    assert columns(path, delimiter="^") == {"text": ["a, b"], "label": ["x"]}
    path.write_text("text^label\na^x\n")
    with pytest.raises(ValueError, match=r"no column 'label'.*--delimiter"):
        load_text_data(path)
    path.write_text("a;b|c;d\ne;f|g;h\n".replace("|", "\t"))
    with pytest.raises(ValueError, match=r"both semicolons and tabs .*--delimiter"):
        read_splits(path)
    assert columns(path, delimiter="semicolon") == {"a": ["e"], "b\tc": ["f\tg"], "d": ["h"]}
    path.write_text("sep=;\na;b\n1;2\n")
    assert columns(path) == {"a": ["1"], "b": ["2"]}
    for wrong in ("--", "", '"'):
        with pytest.raises(ValueError, match="delimiter is one character"):
            FileFormat(delimiter=wrong)


# ------------------------------------------------------------------ lines


def test_messages_count_lines_as_an_editor_does(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"over\nthree\nlines",a\n\n"",b\nx,\n')
    rows = read_splits(path)["train"]
    assert [at("rows", rows, row) for row in range(3)] == [f"{path}, line {line}" for line in (2, 6, 7)]
    with pytest.raises(ValueError, match=r"rows\.csv, line 6: row 1 has no text .*--drop-missing"):
        texts_of(rows, "text", "text", "rows")
    with pytest.raises(ValueError, match=r"rows\.csv, line 7: row 2 of train has the label None; .*--drop-missing"):
        LabelMap.learn(rows["label"][:], None, "rows", rows=rows)
    left, count = without_missing(rows, ["text", "label"])
    assert (left.to_dict(), count) == ({"text": ["over\nthree\nlines"], "label": ["a"]}, 2)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("rows.jsonl", '{"text": "a"}\n\n{"text": null}\n', 3),
        ("rows.json", '[\n {"text": "a"},\n {"text": ""}\n]\n', 3),
        ("rows.json", '[{"text":\n"a"}, {"label": "b"}]', 2),
    ],
)
def test_lines_of_json(tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    rows = read_splits(tmp_path / name)["train"]
    with pytest.raises(ValueError, match=rf"{name}, line {line}: row 1 has no text"):
        texts_of(rows, "text", "text", "rows")


def test_lines_of_the_files_of_a_folder(tmp_path):
    (tmp_path / "train-0.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "train-1.csv").write_text("text;label\nc;x\n;y\n")
    (tmp_path / "test.jsonl").write_text('{"text": "d", "label": "x"}\n')
    (tmp_path / "notes.txt").write_text("not a table")
    found = read_splits(tmp_path)
    assert found["train"]["text"][:] == ["a", "b", "c", None]
    assert found["test"]["text"][:] == ["d"]
    with pytest.raises(ValueError, match=r"train-1\.csv, line 3: row 3 has no text"):
        texts_of(found["train"], "text", "text", "folder")
    kept, _ = without_missing(found["train"].select([0, 1, 2, 3]), ["text"])
    assert at("folder", kept, 0) == "folder"  # a selection made elsewhere has no lines, and says none


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "text,label\nfine,x\nred, green, and blue,x\n",
            r"line 3: 4 fields, but the header has 2 \(text, label",
        ),
        ("a.csv", 'text,label\nfine,x\n"never closed,x\nmore,y\n', "line 3: a quote mark does not close"),
        ("a.csv", 'text,label\n"a "quoted" word",x\n', "line 2: a quote mark"),
        ("a.csv", "text,label,text\na,b,c\n", "columns 1 and 3 are both named 'text'"),
        ("a.csv", "", "is empty: it holds no row"),
        ("a.csv", "\n\n", "is empty: it holds no row"),
        ("a.csv", "text,label\n", "is empty: it holds no row"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "a.jsonl, line [23]: this is no JSON"),
        ("a.jsonl", '"only a text"\n', "line 1: a row is an object"),
        ("a.json", '[{"text": "a"}', "no JSON"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "line 1: this is no JSON"),
        ("a.json", "[]", "is empty"),
        ("a.parquet", "text,label", "no Parquet file"),
        ("a.csv.gz", "text,label", "cannot be unpacked"),
        ("a.xlsx", "PK", "not of a known type"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_splits(path)
    assert "\n" not in str(caught.value)


def test_what_is_harmless_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        ",text , label,\n0,a,x,\n1,b,y,\n2,c\n"
    )  # the index of pandas, spaces, trailing commas, a short row
    assert columns(path) == {
        "column 1": ["0", "1", "2"], "text": ["a", "b", "c"], "label": ["x", "y", None], "column 4": [None] * 3,
    }  # fmt: skip
    path.write_text(table([("text", "label"), ("long " * 60_000, "x")]))  # longer than the csv module's own limit
    limit = csv.field_size_limit()
    assert len(columns(path)["text"][0]) == 300_000
    assert csv.field_size_limit() == limit
    path = tmp_path / "a.json"
    path.write_text('{"text": ["a", "b"], "label": [1, 0]}')
    assert columns(path) == {"text": ["a", "b"], "label": [1, 0]}
    pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"]}, index=[7, 3]).to_json(path)
    assert columns(path) == {"text": ["a", "b"], "label": ["x", "y"]}
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"text": "a", "more": {"n": 1}}\n{"text": "b", "more": "none", "late": [1, "two"]}\n')
    assert columns(path)["late"] == [None, ["1", "two"]]


# ------------------------------------------------------------------ several labels, chats


@pytest.mark.parametrize(
    "label", [["a", "b"], [0.0, 1.0], [1, 0, 1], {"a": 1}, "['a', 'b']", '["c"]', "[0. 1.]", "[]"]
)
def test_several_labels_are_refused_in_one_line(tmp_path, label):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}", "label": label}) for i in range(30)))
    with pytest.raises(ValueError, match=r"line 1: row 0 has several labels .* with --task multi-label") as caught:
        load_text_data(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="several labels"):
        LabelMap.learn(["a", "b"], None, "train").encode([label], None, "test", "test")


def test_words_in_brackets_are_labels():
    names = ["[PAD]", "[see 1]", "[]x", "[a, b]"]
    assert LabelMap.learn(names, None, "train").names == tuple(sorted(names))


@pytest.mark.parametrize(
    ("row", "column", "mend"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "text", "apply_chat_template"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "apply_chat_template"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "text", "joined"),
        ({"text": ["one", "two"]}, "text", "join it to one text"),
    ],
)
def test_chats_are_refused_with_what_to_do(row, column, mend):
    with pytest.raises(ValueError, match=mend):
        texts_of(Dataset.from_list([row]), column, "text", "rows")


# ------------------------------------------------------------------ tables in memory


TEXTS = [f"text {i}" for i in range(30)]
LABELS = [("no", "yes")[i % 2] for i in range(30)]
BOTH = {"text": TEXTS, "label": LABELS}  # the same thirty rows in every form


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame(BOTH),
        pd.DataFrame(BOTH).astype({"label": "category"}),
        pd.DataFrame(BOTH, index=range(100, 130)),
        pa.table(BOTH),
        Dataset.from_dict(BOTH),
        DatasetDict(train=Dataset.from_dict(BOTH)),
        [{"text": t, "label": label} for t, label in zip(TEXTS, LABELS, strict=True)],
        BOTH,
    ],
    ids=["pandas", "category", "index", "pyarrow", "dataset", "splits", "list", "columns"],
)
def test_a_data_frame_is_a_data_set(tmp_path, table):
    path = tmp_path / "rows.csv"
    pd.DataFrame(BOTH).to_csv(path)  # with its index
    expected, found = load_text_data(path), load_text_data(table)
    for split in ("train", "calibration", "test"):
        assert getattr(found, split).to_dict() == getattr(expected, split).to_dict()
    assert found.label_names == ("no", "yes")


def test_missing_values_of_a_data_frame():
    frame = pd.DataFrame({"text": [*TEXTS, None, "x"], "label": [*LABELS, "no", np.nan]})
    with pytest.raises(
        ValueError, match=r"the DataFrame given: row 30 has no text|row 31 of train has the label None"
    ):
        load_text_data(frame)
    found = load_text_data(frame, drop_missing=True)
    assert found.left_out == 2
    assert sum(map(len, (found.train, found.calibration, found.test))) == 30
    frame.columns = ["text", "text"]
    with pytest.raises(ValueError, match="several columns named 'text'"):
        load_text_data(frame)
    with pytest.raises(TypeError, match="cannot be read from a int"):
        load_text_data(3)


def test_saved_data_sets_and_categories(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    assert read_splits(tmp_path / "rows.parquet")["train"].features["label"].names == ["no", "yes"]
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    assert list(read_splits(tmp_path / "saved")) == ["train", "test"]
    pd.DataFrame({"text": ["a", "b"], "label": pd.Categorical(["x", "y"])}).to_parquet(tmp_path / "frame.parquet")
    assert read_splits(tmp_path / "frame.parquet")["train"]["label"][:] == ["x", "y"]


def test_a_workbook_named_csv_and_a_stray_nul_are_told_apart_from_an_encoding(tmp_path):
    book = tmp_path / "book.csv"
    book.write_bytes(b"PK\x03\x04\x14\x00" + bytes(60))
    with pytest.raises(ValueError, match="packed or binary file, as Excel"):
        read_splits(book)
    damaged = tmp_path / "damaged.csv"
    damaged.write_bytes(b"text,label\n" + b"a text,1\n" * 20 + b"b\0roken,0\n")
    with pytest.raises(ValueError, match="line 22 holds a NUL character"):
        read_splits(damaged)


def test_an_unknown_hub_id_is_named():
    with pytest.raises(OSError, match="nobody/nothing is no file or folder here"):
        read_splits("nobody/nothing")


def test_labels_that_differ_in_blanks_or_capitals_only_are_found():
    labels = LabelMap.learn(["Good", "good ", "bad", "very  bad", "Very bad"], None, "rows.csv")
    assert sorted(map(sorted, labels.alike)) == [["Good", "good "], ["Very bad", "very  bad"]]
    assert LabelMap.learn(["good", "bad"], None, "rows.csv").alike == []
