"""Settings from YAML and flags, and everything that is refused before anything is trained."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from command_line import peft_calib, sentences, write_csv, write_jsonl
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from peft_calib.runs import sources
from peft_calib.runs.flags import resolve
from peft_calib.runs.labels import LabelMap
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.stage import training_arguments

ROOT = Path(__file__).resolve().parents[2]


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: rows.csv\nmodel: some/model\nmethod: bayesian-lora\nlearning_rate: 1e-3\nepochs: 5\n"
        "adapter:\n  kl_weight: 0.5\n  init_sd: 1e-2\ntext_column: [a, b]\n"
    )
    flags = dict.fromkeys(RunConfig.__dataclass_fields__) | {"epochs": 2.0, "adapter": ["kl_weight=1e-1", "flow=maf"]}
    config = resolve(file, flags)
    assert (config.epochs, config.learning_rate, config.text_column) == (2.0, 1e-3, ["a", "b"])
    assert config.adapter == {"kl_weight": 0.1, "init_sd": 0.01, "flow": "maf"}
    assert resolve(None, {"data": "d", "model": "m", "rank": 4}).lora_alpha == 8.0
    listed = resolve(
        None, {"data": "d", "model": "m", "target_modules": ["query, value", "key"], "metrics": ["ece,nll"]}
    )
    assert (listed.target_modules, listed.metrics) == (["query", "value", "key"], ["ece", "nll"])
    assert RunConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config


def test_the_example_file_is_a_configuration():
    config = resolve(ROOT / "hub_examples/train.yaml", {})
    assert config.method in ("bayesian-lora", "curve-lora")


def test_the_word_no_is_a_strategy(tmp_path):
    """YAML reads a bare `no` as false."""
    config = resolve(None, {"data": "d", "model": "m", "trainer": ["eval_strategy=no", "max_grad_norm=0.5"]})
    arguments = training_arguments(config, output_dir=str(tmp_path), seed=1)
    assert (arguments.eval_strategy, arguments.max_grad_norm, arguments.seed) == ("no", 0.5, 1)


def test_runs_stand_below_the_command_line_and_the_demonstration():
    for file in (ROOT / "peft_calib/runs").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not re.search(r"\b(cli|demo)\b", node.module or ""), file


def test_every_setting_has_a_flag_with_help():
    from typer.main import get_command

    from peft_calib.cli import app

    options = {name: option for option in get_command(app).commands["train"].params for name in option.opts}
    for name, item in RunConfig.__dataclass_fields__.items():
        flag = {"adapter": "--adapter-option", "trainer": "--trainer-option"}.get(name, f"--{name.replace('_', '-')}")
        assert item.metadata["help"].rstrip(".") in options[flag].help


@pytest.mark.parametrize(("command", "flag", "default"), [("demo", "--seed", "0"), ("train", "--weight-decay", "0.0")])
def test_a_default_of_zero_is_told(command, flag, default):
    from typer.main import get_command

    from peft_calib.cli import app

    options = {name: option for option in get_command(app).commands[command].params for name in option.opts}
    assert options[flag].help.endswith(f"Default: {default}.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"task": "ranking"},
            "task must be one of seq-cls, multiple-choice, token-cls, causal-lm, multi-label, rerank, regression; got",
        ),
        ({"method": "dora"}, "method must be one of lora, hyper-lora, bayesian-lora, curve-lora, ensemble"),
        ({"mode": "closed"}, "mode must be one of anchored, free"),
        ({"metrics": ["f1"]}, r"unknown metric\(s\) f1; a report has accuracy"),
        ({"metrics": []}, "none given"),
        ({"model": ""}, "model is missing: give --model"),
        ({"learning_rates": 1}, "unknown setting.*learning_rates; known are data"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"anchors": 1}, "anchors must be at least 2"),
        ({"members": 0}, "members must be at least 1"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"calibration_fraction": 0}, "calibration_fraction must lie between 0 and 1"),
        ({"calibration_fraction": 1}, "calibration_fraction must lie between 0 and 1"),
        ({"text_column": ["a", "b", "c"]}, "one column, or two"),
    ],
)
def test_settings_that_mean_nothing(values, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_mapping({"data": "d", "model": "m"} | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": "eight"}, "rank must be a whole number, got 'eight'"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"adapter": ["x"]}, "adapter must be a mapping"),
        ({"rank": None}, "rank needs a value"),
        ({"text_column": 3}, "text_column must be a name or a list"),
    ],
)
def test_settings_of_the_wrong_type(values, message):
    with pytest.raises(TypeError, match=message):
        RunConfig.from_mapping({"data": "d", "model": "m"} | values)


# ------------------------------------------------------------------ refused before anything is trained or written


@pytest.fixture
def place(tmp_path, tiny_model_folder):
    """Train with given rows and flags; what the command says, and that it wrote nothing."""

    def attempt(rows, *flags, model=tiny_model_folder, name="rows.jsonl"):
        data = write_jsonl(tmp_path / name, rows) if isinstance(rows, list) else rows
        out = tmp_path / "out"
        message = peft_calib("train", "--data", data, "--model", model, "--output-dir", out, *flags)
        assert not out.exists()
        return message

    return attempt


GOOD = [{"text": text, "label": label} for text, label in sentences(40)]


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (GOOD, ["--text-column", "words"], "no column 'words'; it has text, label"),
        (GOOD, ["--label-column", "gold"], "no column 'gold'; it has text, label"),
        ([row | {"label": row["text"]} for row in GOOD], [], "map them to classes with label_names"),
        ([row | {"label": number / 7} for number, row in enumerate(GOOD)], [], "a class is expected"),
        ([*GOOD, {"text": "x", "label": None}], [], "row 40 of train has the label None"),
        ([row | {"label": "same"} for row in GOOD], [], "at least two classes"),
        (GOOD, ["--label-names", "good", "--label-names", "fine"], "the label 'bad'; a class is expected (good, fine"),
        ([*GOOD, {"text": " ", "label": "good"}], [], "row 40 has no text"),
        ([], [], "is empty: it holds no row"),
        (GOOD, ["--train-split", "training"], "no split 'training'; it has train"),
        (GOOD[:4], ["--calibration-fraction", "0.1"], "too few to hold out a share of 0.1"),
        (GOOD, ["--task", "ranking"], "task must be one of"),
        (GOOD, ["--method", "qlora"], "method must be one of"),
        (GOOD, ["--metrics", "f1"], "unknown metric(s) f1"),
        (GOOD, ["--best-metric", "ece"], "A calibration error alone cannot choose a model"),
        (GOOD, ["--adapter-option", "kl_weight=1"], "LoraConfig has no field 'kl_weight'"),
        (GOOD, ["--method", "bayesian-lora", "--adapter-option", "posterior=wide"], "posterior must be one of"),
        (GOOD, ["--adapter-option", "r=9"], "set r with --rank"),
        (GOOD, ["--adapter-option", "init"], "--adapter-option takes name=value"),
        (GOOD, ["--trainer-option", "learning_rate=1"], "follows from a setting of the run"),
        (GOOD, ["--trainer-option", "speed=1"], "TrainingArguments has no field 'speed'"),
        (
            GOOD,
            ["--method", "ensemble-lora", "--trainer-option", "label_smoothing_factor=0.1"],
            "no other member would train",
        ),
    ],
)
def test_refused(place, rows, flags, message):
    assert message in place(rows, *flags)


def test_header_without_rows(place, tmp_path):
    assert "empty" in place(write_csv(tmp_path / "none.csv", []))


def test_unknown_places(place, tmp_path):
    assert "no data file" in place(tmp_path / "nothing.csv")
    assert "no configuration file" in place(GOOD, "--config", tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("- a\n- b\n")
    assert "must hold settings" in place(GOOD, "--config", tmp_path / "bad.yaml")
    (tmp_path / "typed.yaml").write_text("rank: eight\n")
    assert "rank must be a whole number, got 'eight'" in place(GOOD, "--config", tmp_path / "typed.yaml")
    (tmp_path / "worse.yaml").write_text("a: [")
    worse = place(GOOD, "--config", tmp_path / "worse.yaml")
    assert "not valid YAML: line" in worse
    assert "\n" not in worse


@pytest.mark.slow
def test_a_finished_run_is_not_replaced(trained, train_file, tiny_model_folder):
    run = trained["lora"]
    before = (run / "run.json").read_bytes()
    arguments = ["train", "--data", train_file, "--model", tiny_model_folder, "--output-dir", run]
    assert "holds a finished run" in peft_calib(*arguments)
    assert "--overwrite" in peft_calib(*arguments)
    assert (run / "run.json").read_bytes() == before


def test_a_run_of_another_configuration_is_not_continued(tmp_path, train_file, tiny_model_folder, trained):
    out = tmp_path / "begun"
    out.mkdir()
    begun = json.loads((trained["lora"] / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(begun))
    arguments = ["train", "--data", train_file, "--model", tiny_model_folder, "--output-dir", out, "--rank", 3]
    message = peft_calib(*arguments)
    assert "begun with another configuration" in message
    assert "rank: 2 there, 3 now" in message
    assert "epochs: 2.0 there, 10.0 now" in message
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_changed_rows_are_another_configuration(tmp_path, tiny_model_folder):
    rows = write_jsonl(tmp_path / "rows.jsonl", GOOD)
    out = tmp_path / "out"
    arguments = ["train", "--data", rows, "--model", tiny_model_folder, "--output-dir", out, "--epochs", "0.2"]
    assert peft_calib(*arguments) is None
    (out / "run.json").unlink()
    write_jsonl(rows, [*GOOD, {"text": "one more", "label": "good"}])
    assert "rows.train.digest" in peft_calib(*arguments)
    assert peft_calib(*arguments, "--overwrite") is None


def test_a_folder_of_something_else_is_left_alone(place, tmp_path):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("all my work")
    for flags in ([], ["--overwrite"]):
        assert "no run of peft-calib" in peft_calib(
            "train", "--data", "d", "--model", "m", "--output-dir", other, *flags
        )
    taken = tmp_path / "file"
    taken.write_text("")
    assert "is a file" in peft_calib("train", "--data", "d", "--model", "m", "--output-dir", taken)
    assert (other / "thesis.txt").read_text() == "all my work"


# ------------------------------------------------------------------ evaluation refuses what would flatter


def test_rows_the_run_has_seen_are_refused(trained, train_file):
    message = peft_calib("evaluate", trained["lora"], "--data", train_file)
    assert "would flatter" in message
    assert not (trained["lora"] / "evaluation").is_dir() or not list(trained["lora"].glob("evaluation/train-*"))


def test_chance_duplicates_are_left_out(trained, tmp_path):
    rows = [("text", "label"), *sentences(60, seed=5), sentences(80)[0]]
    data = write_csv(tmp_path / "nearly.csv", rows[1:])
    assert peft_calib("evaluate", trained["lora"], "--data", data) is None
    (report,) = trained["lora"].glob("evaluation/nearly-*/report.json")
    content = json.loads(report.read_text())
    assert (content["rows"], content["rows_left_out"]) == (60, 1)
    assert "1 row(s) that the run was trained or calibrated on were left out" in report.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("lora", ["--metric", "f1"], "unknown metric(s) f1"),
        ("lora", ["--num-samples", "4"], "deterministic"),
        ("ensemble", ["--num-samples", "4"], "at most 2, its members"),
        ("lora", ["--split", "dev"], "no split 'dev'; it has train"),
        ("lora", [], "name rows to test on with --data or --split, or train with --test-fraction"),
    ],
)
def test_evaluations_that_mean_nothing(trained, test_file, method, flags, message):
    data = ["--data", test_file] if flags else []
    assert message in peft_calib("evaluate", trained[method], *data, *flags)


def test_unknown_labels_and_empty_rows(trained, tmp_path):
    data = write_csv(tmp_path / "other.csv", [("a text", "neutral"), ("another", "bad")])
    assert "has the label 'neutral'; known are bad, good" in peft_calib("evaluate", trained["lora"], "--data", data)
    data = write_csv(tmp_path / "none.csv", [])
    assert "empty" in peft_calib("evaluate", trained["lora"], "--data", data)
    assert "no finished run" in peft_calib("evaluate", tmp_path)


# ------------------------------------------------------------------ labels


def test_labels_of_other_rows_are_those_of_the_training_rows():
    learned = LabelMap.learn([3, 1, 3], None, "train.csv")
    assert learned.names == ("1", "3")
    assert learned.encode([3, 1], None, "test.csv", "train") == [1, 0]
    assert learned.encode(["3", "1"], None, "test.csv", "train") == [1, 0]
    assert LabelMap.from_dict(json.loads(json.dumps(learned.to_dict()))) == learned


def test_class_labels_are_matched_by_name():
    learned = LabelMap.learn([0, 1], ClassLabel(names=["no", "yes"]), "train")
    assert learned.encode([0, 1], ClassLabel(names=["yes", "no"]), "test", "test") == [1, 0]
    with pytest.raises(ValueError, match="label None"):
        learned.encode([-1], ClassLabel(names=["yes", "no"]), "test", "test")


def test_given_names_map_labels():
    learned = LabelMap.learn(["yes", "no", "no"], None, "train", ["yes", "no"])
    assert learned.encode(["no", 0], None, "test", "test") == [1, 0]
    with pytest.raises(ValueError, match="mix strings and numbers"):
        LabelMap.learn(["yes", 1], None, "train")
    with pytest.raises(ValueError, match="two different names"):
        LabelMap.learn(["yes"], None, "train", ["yes", "yes"])
    assert LabelMap.learn([1.0, 0.0], None, "train").names == ("0", "1")


def test_hub_data_with_hidden_test_labels(tmp_path, tiny_model_folder, monkeypatch):
    """As GLUE: class labels, a configuration name, and -1 for every label of the test split."""
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})

    def split(count: int, seed: int, hidden: bool = False) -> Dataset:
        rows = [{"sentence": text, "label": -1 if hidden else label} for text, label in sentences(count, seed)]
        return Dataset.from_list(rows, features=features)

    def fake(source: str, subset: str) -> DatasetDict:
        assert (source, subset) == ("someone/sentences", "small")
        return DatasetDict(train=split(40, 0), validation=split(30, 1), test=split(30, 2, hidden=True))

    monkeypatch.setattr(sources, "load_dataset", fake)
    base = ["--data", "someone/sentences", "--subset", "small", "--text-column", "sentence", "--epochs", "0.1"]
    assert peft_calib("train", *base, "--model", tiny_model_folder, "--output-dir", tmp_path / "run") is None
    assert peft_calib("evaluate", tmp_path / "run") is None
    (report,) = (tmp_path / "run").glob("evaluation/*/report.json")
    content = json.loads(report.read_text())
    assert (content["data"], content["rows"]) == ("someone/sentences (validation)", 30)
    assert json.loads((tmp_path / "run/config.json").read_text())["labels"]["names"] == ["bad", "good"]
    assert "has the label None" in peft_calib("evaluate", tmp_path / "run", "--split", "test")


def test_pairs_of_texts(tmp_path, tiny_model_folder):
    rows = [{"a": text, "b": text[::-1], "label": number % 2} for number, (text, _) in enumerate(sentences(40))]
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    file = tmp_path / "run.yaml"
    settings = {"data": str(tmp_path / "pairs.parquet"), "model": str(tiny_model_folder), "text_column": ["a", "b"]}
    file.write_text(yaml.safe_dump(settings | {"epochs": 0.1, "test_fraction": 0.2}))
    assert peft_calib("train", "--config", file, "--output-dir", tmp_path / "run") is None
    assert peft_calib("evaluate", tmp_path / "run") is None
    (report,) = (tmp_path / "run").glob("evaluation/*/report.json")
    assert json.loads(report.read_text())["rows"] == 8
