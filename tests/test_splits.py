"""The calibration split: no leak across the cut, a record beside the adapter, and refusal of rows already seen."""

import json
import random
import shutil
from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from peft_calib import HyperLoraConfig, calibration_split
from peft_calib.files import write_atomically
from peft_calib.provenance.companions import attach_file
from peft_calib.provenance.row_hashes import hash_rows
from peft_calib.splits import SPLIT_FILE, RowSet, SplitRecord, check_unseen, read_split, record_split


def texts(rows) -> set[str]:
    return {row["text"] for row in rows}


# --------------------------------------------------------------------- the cut


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=3, max_size=60),
    st.sampled_from([0.1, 0.25, 0.5, 0.8]),
    st.integers(-5, 5),
    st.sampled_from([None, "label"]),
)
def test_no_input_is_on_both_sides_and_no_row_is_lost(pairs, fraction, seed, stratify_by):
    rows = [{"text": f"text {t}", "label": label, "idx": i} for i, (t, label) in enumerate(pairs)]
    if len({t for t, _ in pairs}) < 2:
        with pytest.raises(ValueError, match="same input"):
            calibration_split(rows, fraction, seed, stratify_by)
        return
    train, calibration = calibration_split(rows, fraction, seed, stratify_by)
    assert train
    assert calibration
    assert not texts(train) & texts(calibration)
    assert sorted(row["idx"] for row in [*train, *calibration]) == list(range(len(rows)))
    for side in (train, calibration):
        assert [row["idx"] for row in side] == sorted(row["idx"] for row in side)
    assert calibration_split(rows, fraction, seed, stratify_by) == (train, calibration)


def test_size_seed_and_order():
    rows = [{"text": f"sentence {i}", "label": i % 3} for i in range(1000)]
    train, calibration = calibration_split(rows, 0.1, seed=0)
    assert (len(train), len(calibration)) == (900, 100)
    assert texts(calibration) != texts(calibration_split(rows, 0.1, seed=1)[1])
    # about a tenth in common, as for independent draws
    assert len(texts(calibration) & texts(calibration_split(rows, 0.1, seed=1)[1])) < 30
    shuffled = random.Random(0).sample(rows, len(rows))
    assert texts(calibration_split(shuffled, 0.1, seed=0)[1]) == texts(calibration)


def test_stratified_shares():
    rows = [{"text": f"sentence {i}", "label": 0 if i % 10 else 1} for i in range(500)]
    _, calibration = calibration_split(rows, 0.2, stratify_by="label")
    labels = [row["label"] for row in calibration]
    assert (labels.count(0), labels.count(1)) == (90, 10)


def test_datasets_and_tensors_give_the_same_cut():
    ids = torch.randint(1, 99, (60, 7), generator=torch.Generator().manual_seed(0))
    as_tensors = [{"input_ids": row, "labels": torch.tensor(0)} for row in ids]
    as_dataset = Dataset.from_dict({"input_ids": ids.tolist(), "label": [1] * 60})
    padded = [
        {"input_ids": [*row.tolist(), 0, 0], "attention_mask": [1] * 7 + [0] * 2, "token_type_ids": [0] * 9}
        for row in ids
    ]
    found = [hash_rows(rows) for rows in (as_tensors, as_dataset, as_dataset.with_format("torch"), padded)]
    for kind, hashes in found:
        assert kind == "tokens"
        assert np.array_equal(hashes, found[0][1])
    train, calibration = calibration_split(as_dataset, 0.25)
    assert isinstance(train, Dataset)
    assert isinstance(calibration, Dataset)
    assert calibration["input_ids"][:] == [row["input_ids"].tolist() for row in calibration_split(as_tensors, 0.25)[1]]


def test_hashes_see_content_only():
    def one(row):
        return hash_rows([row])[1][0]

    assert one({"text": "a", "label": 1, "idx": 5}) == one({"text": "a", "label": 2})
    assert one({"text": "a"}) != one({"text": "b"})
    assert one({"a": "xy", "b": ""}) != one({"a": "x", "b": "y"})
    assert one({"x": [1.5, 2.0]}) == one({"x": torch.tensor([1.5, 2.0])}) == one({"x": np.array([1.5, 2.0])})
    assert one({"x": [[1, 2]]}) != one({"x": [[1], [2]]})
    assert one({"x": [[1], [1, 2]]}) != one({"x": [[1, 1], [2]]})
    assert one({"x": None}) != one({"x": ""})
    assert one({"x": {"p": 1, "q": "z"}}) == one({"x": {"q": "z", "p": 1}})
    numpy_rows = Dataset.from_dict({"pixels": [[[0.1, 0.2], [0.3, 0.4]]]})
    assert hash_rows(numpy_rows)[1][0] == one({"pixels": np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)})


def test_a_dataset_that_tokenises_on_the_fly_is_known_by_what_it_stores():
    rows = Dataset.from_dict({"text": ["a", "b"]})
    rows.set_transform(lambda batch: {"input_ids": [[1]] * len(batch["text"])})
    kind, hashes = hash_rows(rows)
    assert kind == "text"
    assert len(set(hashes.tolist())) == 2


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([{"text": "a"}] * 3, {}, ValueError, "same input"),
        ([{"text": "a"}, {"text": "b"}], {"fraction": 1.0}, ValueError, "between 0 and 1"),
        ([{"text": "a"}, {"text": "b"}], {"fraction": "0.1"}, ValueError, "between 0 and 1"),
        ([{"text": "a"}, {"text": "b"}], {"stratify_by": "class"}, ValueError, "no column"),
        ([], {}, ValueError, "no row"),
        ([{"label": 1}], {}, ValueError, "nothing that tells"),
        (iter([{"text": "a"}]), {}, TypeError, "stream"),
        ([{"text": object()}, {"text": object()}], {}, TypeError, "cannot be hashed"),
        ("train.csv", {}, TypeError, "the text 'train.csv'"),
        (5, {}, TypeError, "int is no sequence"),
        ({"text": ["a", "b"], "label": [0, 1]}, {}, TypeError, r"text, label.*from_dict"),
        (DatasetDict(train=Dataset.from_dict({"text": ["a"]})), {}, TypeError, r"Choose a split: rows\['train'\]"),
        ({"test": pd.DataFrame({"text": ["a"]})}, {}, TypeError, r"Choose a split: rows\['test'\]"),
        (IterableDataset.from_generator(lambda: iter([{"text": "a"}])), {}, TypeError, "stream"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), {}, ValueError, "several columns named text"),
    ],
)
def test_bad_input(rows, options, error, message):
    with pytest.raises(error, match=message):
        calibration_split(rows, **options)


# --------------------------------------------------------------------- tables


def _columns() -> dict[str, list]:
    days = [datetime(2024, 1, 1 + i % 9) for i in range(40)]
    return {"text": [f"note {i % 30}" for i in range(40)], "day": days, "label": ["no", "yes", "no", "no"] * 10}


def _tables():
    columns = _columns()
    frame = pd.DataFrame(columns)
    yield "plain", frame
    yield "shuffled", frame.sample(frac=1.0, random_state=3)
    yield "indexed by words", frame.set_axis([f"row {i}" for i in range(40)])
    yield "a named index that is no column", frame.rename_axis("uid")
    yield "categories", frame.astype({"label": "category"})
    yield "pyarrow", pa.table(columns)
    yield "a batch of pyarrow", pa.RecordBatch.from_pydict(columns)
    yield "rows", frame.to_dict("records")


@pytest.mark.parametrize(("name", "table"), list(_tables()), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("stratify_by", [None, "label"])
def test_tables_are_cut_like_the_data_set_with_their_content(name, table, stratify_by):
    """Whatever the index: what comes back is of the kind given, its rows as they were."""
    as_dataset = Dataset.from_dict(_columns())
    expected = calibration_split(as_dataset, 0.3, stratify_by=stratify_by)
    found = calibration_split(table, 0.3, stratify_by=stratify_by)
    for part, reference in zip(found, expected, strict=True):
        assert type(part) is type(table)
        assert RowSet.of(part).digest == RowSet.of(reference).digest
        assert len(part) == len(reference)
        if isinstance(part, pd.DataFrame):
            pd.testing.assert_frame_equal(part, table.loc[part.index])


def test_polars_frames_are_cut_too():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    table = polars.DataFrame(_columns())
    _, expected = calibration_split(Dataset.from_dict(_columns()), 0.3, stratify_by="label")
    _, found = calibration_split(table, 0.3, stratify_by="label")
    assert isinstance(found, polars.DataFrame)
    assert found["text"].to_list() == expected["text"][:]
    with pytest.raises(TypeError, match="stream"):
        calibration_split(table.lazy())


def test_columns_and_frames_that_arrow_does_not_hold():
    texts = pd.Series(["a", "b", "c", "d"], index=[9, 9, 1, 0])
    train, held_out = calibration_split(texts, 0.25)
    assert sorted([*train, *held_out]) == ["a", "b", "c", "d"]
    assert RowSet.of(texts).digest == RowSet.of(["d", "c", "b", "a"]).digest
    mixed = pd.DataFrame({"value": [1, "x", np.zeros((2, 2))], 5: ["p", "q", "r"]}, index=[2, 1, 0])
    assert RowSet.of(mixed).kind == "5+value"
    assert sum(map(len, calibration_split(mixed, 0.34))) == 3


# --------------------------------------------------------------------- the record

TRAIN = [{"text": f"train {i}", "label": 0} for i in range(50)]
HELD_OUT = [{"text": f"held out {i}", "label": 0} for i in range(20)]
TEST = [{"text": f"test {i}", "label": 0} for i in range(30)]


def adapted(config=None):
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    return get_peft_model(base, config or HyperLoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("config", [HyperLoraConfig(r=2, target_modules=["0"]), LoraConfig(r=2, target_modules=["0"])])
def test_record_is_saved_with_the_adapter_and_with_nothing_else(tmp_path, config):
    model = adapted(config)
    model.save_pretrained(tmp_path / "before")
    record_split(model, trained_on=TRAIN)
    record_split(model, calibrated_on=HELD_OUT)
    model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "before" / SPLIT_FILE).exists()
    record = read_split(tmp_path / "after")
    assert (len(record.trained_on["text"]), len(record.calibrated_on["text"])) == (50, 20)
    # the adapter itself is what it was, and loads
    saved = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("before", "after")]
    assert saved[0] == saved[1]
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "after"), type(config))
    PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "after")


def test_record_in_a_folder_grows_and_survives_a_copy(tmp_path):
    record_split(tmp_path, trained_on=TRAIN)
    record_split(tmp_path, trained_on=[{"input_ids": [1, 2]}])
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(tmp_path / SPLIT_FILE, copy)
    assert set(read_split(copy).trained_on) == {"text", "tokens"}
    assert read_split(tmp_path / "nowhere") == SplitRecord()


def test_models_with_a_record_can_be_copied_and_pickled(tmp_path):
    import copy
    import pickle

    model = adapted()
    record_split(model, trained_on=TRAIN)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(read_split(twin).trained_on["text"]) == 50
        twin.peft_config["default"].r = 7  # the twin saves its own configuration
        twin.peft_config["default"].save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 7


def test_looking_for_a_record_leaves_the_configuration_alone(tmp_path):
    import copy

    model = adapted()
    assert read_split(model) == SplitRecord()
    other = copy.copy(model.peft_config["default"])
    other.r = 7  # a copy that shares what hangs on the configuration saves its own values
    other.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 7


def test_overlap_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="trained on"):
        record_split(model, trained_on=TRAIN, calibrated_on=[*HELD_OUT, *TRAIN[:10]])
    record_split(model, trained_on=TRAIN, calibrated_on=HELD_OUT)
    assert check_unseen(model, TEST) == 0
    assert check_unseen(model, HELD_OUT, "fitted on", fitting=True) == 0
    with pytest.raises(ValueError, match=r"20 of the 20 rows to be reported on .* calibrated on"):
        check_unseen(model, HELD_OUT)
    with pytest.raises(ValueError, match="calibration_split"):
        check_unseen(model, TEST + TRAIN[:2])
    with pytest.warns(UserWarning, match="duplicates by chance"):
        assert check_unseen(model, TEST + TRAIN[:1]) == 1


def test_rows_in_another_form_are_never_passed_off_as_unseen():
    record = SplitRecord(trained_on={"text": RowSet.of(TRAIN)})
    with pytest.raises(ValueError, match="same form"):
        check_unseen(record, [{"input_ids": [1, 2, 3]}])


def test_a_damaged_record_is_refused(tmp_path):
    record_split(tmp_path, trained_on=TRAIN)
    state = json.loads((tmp_path / SPLIT_FILE).read_text())
    state["trained_on"]["text"]["hashes"] = RowSet.of(TEST).to_dict()["hashes"]
    (tmp_path / SPLIT_FILE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match="damaged"):
        read_split(tmp_path)
    (tmp_path / SPLIT_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"calibration_split\.json: format_version is None"):
        read_split(tmp_path)


def test_models_without_an_adapter():
    with pytest.raises(TypeError, match="no adapter"):
        record_split(torch.nn.Linear(2, 2), trained_on=TRAIN)
    with pytest.raises(TypeError, match="no adapter"):
        attach_file(torch.nn.Linear(2, 2), "a.json", "{}")


def test_a_million_rows_fit_into_a_small_record():
    hashes = np.random.default_rng(0).integers(0, 2**63, 1_000_000).astype(np.uint64)
    rows = RowSet("text", np.sort(hashes))
    text = SplitRecord(trained_on={"text": rows}).to_json()
    assert len(text) < 12e6
    again = SplitRecord.from_json(text).trained_on["text"]
    assert rows.overlap(again) == 1_000_000
    assert RowSet("text", hashes[:1000] + np.uint64(1)).overlap(again) < 5


def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.json", "old")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
