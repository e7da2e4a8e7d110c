"""What is asked of an evaluation is what it tells: the subset, the scores, the rows left out, every digit."""

import json
import shutil

import pytest
from command_line import peft_calib, sentences, write_csv, write_jsonl
from datasets import Dataset

from peft_calib.provenance.splits import SplitRecord
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.rows import TestData, load_test_rows
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.sources import read_splits
from peft_calib.runs.tables import _cell
from peft_calib.runs.tasks import TASK_CLASSES


@pytest.fixture
def languages(tmp_path):
    """A folder that is laid out like a data set of the Hub with two configurations."""
    head = "---\nconfigs:\n"
    for seed, subset in enumerate(("en", "de")):
        (tmp_path / "zoo" / subset).mkdir(parents=True)
        head += f"- config_name: {subset}\n  data_files:\n"
        for part, split in enumerate(("train", "test")):
            head += f"  - split: {split}\n    path: {subset}/{split}.jsonl\n"
            rows = [{"text": f"{subset} {text}", "label": label} for text, label in sentences(8, 2 * seed + part)]
            write_jsonl(tmp_path / "zoo" / subset / f"{split}.jsonl", rows)
    (tmp_path / "zoo" / "README.md").write_text(head + "---\n")
    return str(tmp_path / "zoo")


def test_another_subset_of_the_runs_data_is_other_rows(languages):
    config = RunConfig(data=languages, subset="en", model="m", test_fraction=0.5)
    task = TASK_CLASSES["seq-cls"].learn(
        config, Dataset.from_list([{"text": "a", "label": x} for x in ("bad", "good")])
    )
    told = {}
    for asked in (
        TestData(split="test"),
        TestData(subset="en", split="test"),
        TestData(subset="de"),
        TestData(source=languages, subset="de"),
        TestData(source=languages, subset="en"),
    ):
        found = load_test_rows(task, SplitRecord(), asked)
        told[asked] = found.name.removeprefix(languages), {text[:2] for text in found.rows["text"]}, len(found.rows)
    own, same, *other, again = told.values()
    assert own == same == again == (" (test)", {"en"}, 8)
    assert other == [(", de (test)", {"de"}, 8)] * 2  # all of them: none was held out
    held = load_test_rows(task, SplitRecord(), TestData())
    assert held.name == f"{languages} (held out)" and {text[:2] for text in held.rows["text"]} == {"en"}


def test_a_file_has_no_subsets(tmp_path):
    data = write_csv(tmp_path / "rows.csv", sentences(4))
    for source in (str(data), Dataset.from_list([{"text": "a"}]), "embedded:documentation"):
        with pytest.raises(ValueError, match="has no subsets, so there is no 'de' in it"):
            read_splits(source, "de")


def test_an_evaluation_that_is_read_back_tells_the_scores_of_now(trained, test_file, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained["lora"], run, ignore=shutil.ignore_patterns("evaluation"))
    asked = ["evaluate", run, "--data", test_file]
    assert peft_calib(*asked, "--metric", "ece") is None
    assert "brier" not in capsys.readouterr().out
    assert peft_calib(*asked) is None
    assert "brier" in capsys.readouterr().out
    (place,) = run.glob("evaluation/*")
    content = json.loads((place / "report.json").read_text())
    assert "| brier |" in (place / "report.md").read_text() and "brier" in content["metrics"]
    again = evaluate_run(run, data=test_file, metrics=["mce"], progress=False)
    assert again.content == {**content, "metrics": ["mce"]}  # nothing else is made anew
    assert "| mce |" in (place / "report.md").read_text()


def test_an_evaluation_of_the_same_rows_tells_how_many_were_left_out_of_these(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained["lora"], run, ignore=shutil.ignore_patterns("evaluation"))
    rows = sentences(20, seed=5)
    data = write_csv(tmp_path / "rows.csv", [*rows, ("a text without a label", "")])
    found = evaluate_run(run, data=data, drop_missing=True, progress=False)
    assert found.content["rows_without_value"] == 1
    write_csv(data, rows)
    again = evaluate_run(run, data=data, progress=False)
    assert again.folder == found.folder and again.content["rows_without_value"] == 0
    for page in ("report.md", "report.html"):
        assert "without a text or a label" not in (again.folder / page).read_text()


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        ((10.5, 20.25), "[10.500,20.250]"),
        ((0.5, 100.125), "[.500,100.125]"),
        ((-0.25, 0.0), "[-.250,.000]"),
        ((-10.5, -0.0), "[-10.500,-.000]"),
    ],
)
def test_a_narrow_interval_loses_no_digit(bounds, told):
    assert _cell({"rmse": 1.0, "intervals": {"rmse": bounds}}, "rmse", "\n").split("\n")[1] == told
