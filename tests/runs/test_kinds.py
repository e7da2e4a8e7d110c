"""Several labels, a number, a reranker's logit: from a CSV file to a decision, with what every way of asking says."""

import json
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import QUICK, WORDS, peft_calib, write_csv
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSequenceClassification
from scipy.special import expit

from peft_calib import Scorer, load, predict_to
from peft_calib.calibration import (
    LabelScaling,
    LabelThresholds,
    NoGuaranteeError,
    labels_report,
    load_decision,
    numbers_report,
)
from peft_calib.calibration.scores.kinds import PANELS
from peft_calib.hub import write_card
from peft_calib.predictor.kinds import LabelsAnswer, NumberAnswer
from peft_calib.predictor.kinds.labels import labels_in, separator_of
from peft_calib.runs import tasks
from peft_calib.runs.deciding import decide
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.settings import RunConfig

NAMES = ("text", "labels", "nice", "price", "stars", "group")


def rows(count: int, seed: int) -> list[tuple]:
    """Texts whose labels are frequent, so that a run that has learned nothing gives them, and a number."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        nice, price = rng.random() < 0.75, rng.random() < 0.7
        words = [*rng.choices(WORDS, k=5), *(["lovely"] * nice), *(["cheap"] * price), f"{seed}x{number}"]
        listed = "|".join(name for name, held in (("nice", nice), ("price", price)) if held)
        stars = round(300 + 100 * (2 * nice - price) + rng.gauss(0, 30), 2)
        found.append((" ".join(words), listed, int(nice), int(price), stars, "ab"[number % 2]))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {
        name: write_csv(folder / f"{name}.csv", rows(count, seed), NAMES)
        for name, count, seed in (("train", 70, 1), ("decide", 120, 2), ("test", 60, 3))
    }


@pytest.fixture(scope="module")
def runs(files, tiny_model_folder, tmp_path_factory) -> dict[str, Path]:
    """A run of each kind, with the rule beside it."""
    asked = {
        "labels": [
            "--task",
            "multi-label",
            "--label-column",
            "labels",
            "--method",
            "bayesian-lora",
            "--num-samples",
            3,
        ],
        "columns": ["--task", "multi-label", "--label-columns", "nice,price", "--label-scaling", "label"],
        "numbers": [
            "--task",
            "regression",
            "--label-column",
            "stars",
            "--method",
            "bayesian-lora",
            "--num-samples",
            3,
        ],
        "rerank": ["--task", "rerank", "--label-column", "nice", "--text-column", "group", "--text-column", "text"],
    }
    found = {}
    for name, words in asked.items():
        found[name] = tmp_path_factory.mktemp("runs") / name
        common = ["--data", files["train"], "--model", tiny_model_folder, "--calibration-fraction", "0.4", *QUICK]
        assert peft_calib("train", "--output-dir", found[name], *common, *words) is None
        rule = ["--score", "normalised"] if name == "numbers" else ["--risk", "0.5"]
        rule += ["--miss", "0.3"] if name == "labels" else []
        assert peft_calib("decide", found[name], "--data", files["decide"], *rule) is None
    return found


def targets(files, name: str = "test") -> tuple[list[str], np.ndarray, np.ndarray]:
    table = load_dataset(
        "csv", data_files=str(files[name]), split="train", cache_dir=str(files[name].parent / "cache")
    )
    return table["text"][:], np.stack([table["nice"][:], table["price"][:]], 1), np.array(table["stars"][:])


def test_labels_are_sigmoids_of_draws_at_the_stored_temperature(runs, files):
    predictor = load(runs["labels"], device="cpu")
    texts = targets(files)[0]
    found = predictor.predict(texts)
    assert isinstance(found, LabelsAnswer) and found.label_names == ("nice", "price") and found.num_samples == 3
    mean = found.sample_probabilities.double().mean(0).numpy()
    state = json.loads((runs["labels"] / "adapter" / "predictor.json").read_text())
    assert state["kind"] == "labels" and state["format_version"] == 2 and state["inputs"]["label_separator"] == "|"
    temperature = state["ways"]["sample"]["parameters"]["temperatures"][0]
    expected = expit(np.log(mean / (1 - mean)) / temperature)
    np.testing.assert_allclose(found.probabilities.numpy(), expected, rtol=1e-9)
    rule = load_decision(runs["labels"] / "adapter" / "decision.labels.json")
    np.testing.assert_array_equal(found.given.numpy(), rule.predict(found.probabilities.numpy()))
    np.testing.assert_array_equal(found.ruled_out.numpy(), rule.ruled_out(found.probabilities.numpy()))
    assert found.decision == rule.promise() and rule.promise() in repr(found)
    for row, given in zip(found.probabilities.tolist(), found.labels_given, strict=True):
        assert given == [
            found.label_names[k] for k in sorted(range(2), key=lambda k: -row[k]) if found.label_names[k] in given
        ]
    other = predictor.predict(texts[:2], seed=1)
    assert other.given is None and "3 draws of seed 0" in other.decision
    found.save(runs["labels"].parent / "saved")
    again = LabelsAnswer.load(runs["labels"].parent / "saved")
    assert torch.equal(again.probabilities, found.probabilities) and again.labels_given == found.labels_given
    with torch.no_grad():  # the base model that PEFT builds has a sigmoid's loss
        model = AutoPeftModelForSequenceClassification.from_pretrained(runs["labels"] / "adapter")
    assert model.config.problem_type == "multi_label_classification" and model.config.num_labels == 2


def test_tables_shards_and_workers_have_the_labels(runs, files, tmp_path):
    texts, _, _ = targets(files)
    out = load(runs["labels"], device="cpu").predict(texts)
    assert peft_calib("predict", runs["labels"], "--data", files["test"], "--output", tmp_path / "t.jsonl",
                      "--all-probabilities") is None  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    added = ["predicted_labels", "entropy", "mutual_information", "given", "ruled_out"]
    assert list(lines[0])[-7:] == [*added, "probability_nice", "probability_price"]
    assert [line["given"] for line in lines] == out.labels_given
    assert [line["probability_nice"] for line in lines] == pytest.approx(out.probabilities[:, 0].tolist(), abs=1e-6)
    table = Dataset.from_dict({"text": texts})
    predict_to(tmp_path / "shards", load(runs["labels"], device="cpu"), table, shard_rows=25, progress=False)
    read = load_dataset("parquet", data_files=f"{tmp_path}/shards/*.parquet", split="train", cache_dir=str(tmp_path))
    assert read["given"][:] == out.labels_given
    scored = Scorer(runs["labels"], device="cpu")({"text": texts[:4]})
    assert scored["predicted_labels"] == out.labels_predicted[:4]


def test_an_evaluation_of_labels_says_what_predictions_are_worth(runs, files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    texts, held, _ = targets(files)
    for name in ("labels", "columns"):
        assert peft_calib("evaluate", runs[name], "--data", files["test"]) is None
        shown = capsys.readouterr().out
        assert "f1_macro" in shown and "Which labels to give:" in shown and "base rates" in shown
        (place,) = runs[name].glob("evaluation/*")
        content = json.loads((place / "report.json").read_text())
        main = content["variants"]["sample" if name == "labels" else "mean"]
        p = load(runs[name], device="cpu").predict(texts).probabilities.numpy()
        report = labels_report(p, held, confidence_level=None)
        for key in ("nll_micro", "f1_macro", "ece_macro", "exact_match"):
            assert main["after"][key] == pytest.approx(report[key], abs=1e-6), key
        assert [row["name"] for row in main["after"]["labels"]] == ["nice", "price"]
        reached = load_decision(runs[name] / "adapter" / "decision.labels.json").evaluate(p, held)
        assert main["decision"]["labels"]["reached"]["labels"][0]["given"] == reached.labels[0].given
        assert "Which labels to give" in (place / "report.html").read_text()
        first = evaluate_run(runs[name], data=str(files["test"]), progress=False)
        assert first.content["variants"] == content["variants"]  # read back
    own = evaluate_run(runs["columns"], data=str(files["decide"]), progress=False).content["variants"]["mean"]
    assert own["decision"]["labels"]["refused"].startswith("Refused: 120 of the 120 rows are among the 120")
    stated = json.loads((runs["columns"] / "run.json").read_text())
    assert stated["base_rates"]["rows"] == 42 and len(stated["base_rates"]["counts"]) == 2


def test_a_number_has_the_noise_and_the_spread_of_draws_in_its_own_unit(runs, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    texts, _, stars = targets(files)
    predictor = load(runs["numbers"], device="cpu")
    found = predictor.predict(texts)
    assert isinstance(found, NumberAnswer) and found.label_names == ("stars",)
    assert 300 < found.means.mean() < 500  # the head itself says numbers about 0
    state = json.loads((runs["numbers"] / "adapter" / "predictor.json").read_text())
    noise = state["ways"]["sample"]["parameters"]["noise_variance"]
    between = found.sample_values.double().var(0)[:, 0].numpy()
    np.testing.assert_allclose(found.sd.numpy(), np.sqrt(noise + between), rtol=1e-5)
    rule = load_decision(runs["numbers"] / "adapter" / "decision.interval.json")
    np.testing.assert_allclose(found.lower.numpy(), rule.predict(found.means, found.sd.numpy())[0])
    assert rule.score == "normalised" and rule.promise() in found.decision
    plain = load(runs["numbers"], device="cpu", decisions=False).predict(texts[:3])
    np.testing.assert_allclose((plain.upper - plain.lower).numpy(), 2 * 1.6448536 * plain.sd.numpy(), rtol=1e-6)
    assert peft_calib("predict", runs["numbers"], "--data", files["test"], "--output", tmp_path / "t.csv") is None
    table = load_dataset("csv", data_files=str(tmp_path / "t.csv"), split="train", cache_dir=str(tmp_path))
    assert table.column_names[-4:] == ["mean", "sd", "lower", "upper"]
    assert table["upper"][:] == pytest.approx(found.upper.tolist(), rel=1e-6)
    capsys.readouterr()
    assert peft_calib("evaluate", runs["numbers"], "--data", files["test"], "--metric", "crps") is None
    shown = capsys.readouterr().out
    assert "crps" in shown and "rmse" not in shown.split("Brackets")[0] and "Intervals:" in shown
    (place,) = runs["numbers"].glob("evaluation/*")
    content = json.loads((place / "report.json").read_text())["variants"]["sample"]
    report = numbers_report(found.means, found.sd.numpy(), stars, confidence_level=None)
    for key in ("crps", "nll", "rmse", "pit_ks", "coverage_90"):
        assert content["after"][key] == pytest.approx(report[key], rel=1e-5), key
    assert content["decision"]["interval"]["reached"]["num_rows"] == 60
    found.save(tmp_path / "saved")
    assert torch.equal(NumberAnswer.load(tmp_path / "saved").sd, found.sd)


@pytest.mark.parametrize(
    ("name", "way", "parameter"),
    [
        ("labels", "sample", "temperatures"),
        ("columns", "mean", "temperatures"),
        ("numbers", "sample", "noise_variance"),
        ("rerank", "mean", "biases"),
    ],
)
def test_what_was_fitted_is_not_changed_by_hand(name, way, parameter, runs, files, tmp_path):
    """Neither in the file that an evaluation reads, nor in the one that predicting reads, nor in both."""
    run = shutil.copytree(runs[name], tmp_path / name)
    of_run, beside = run / "temperature.json", run / "adapter" / "predictor.json"
    whole = {file: file.read_text() for file in (of_run, beside)}

    def edit(file: Path, anew: float = 3.25) -> str:
        content = json.loads(whole[file])
        content.pop("digest", None)  # what was fitted has a seal of its own
        parameters = (content if file == of_run else content["ways"])[way]["parameters"]
        was = parameters[parameter]
        parameters[parameter] = [anew] * len(was) if isinstance(was, list) else anew
        file.write_text(json.dumps(content))
        return repr(was)[:50]

    def readers():
        yield lambda: evaluate_run(run, data=str(files["test"]), progress=False)
        yield lambda: load(run, device="cpu")
        yield lambda: load(run / "adapter", device="cpu")

    for file in (of_run, beside):
        was = edit(file)
        for read in readers():
            with pytest.raises(ValueError, match="changed by hand") as told:
                read()
            message = str(told.value)
            assert f"{way}.parameters.{parameter}" in message and "3.25" in message and was in message
            assert str(of_run) in message and str(beside) in message and "\n" not in message
        file.write_text(whole[file])
    edit(of_run)
    edit(beside)
    for read in readers():
        with pytest.raises(ValueError, match=rf"{parameter} is .*3\.25.* and what was fitted is another one"):
            read()
    alone = shutil.copytree(run / "adapter", tmp_path / f"{name}-alone")
    with pytest.raises(ValueError, match=rf"{parameter} is .*3\.25.* and what was fitted is another one.*by hand"):
        load(alone, device="cpu")


def test_a_label_that_the_adapter_does_not_know_is_told(runs, files, tmp_path, capsys):
    new = [("a text", "nice|sad", "maybe", 1, "many"), ("another", "price", 1, 0, 3.5), ("a third", "", "", 1, "")]
    own = ("text", "labels", "nice", "price", "stars")
    data = write_csv(tmp_path / "new.csv", [(*row, "a") for row in new], (*own, "group"))
    for name, told in (
        ("labels", "'sad' 1"),
        ("columns", "'maybe' 1"),
        ("numbers", "'many' 1"),
        ("rerank", "'maybe' 1"),
    ):
        assert peft_calib("predict", runs[name], "--data", data, "--output", tmp_path / f"{name}.csv") is None
        assert f"1 row(s) have a label that the adapter does not know ({told}); they are predicted all the same" in (
            " ".join(capsys.readouterr().out.split())
        )
    assert peft_calib("predict", runs["labels"], "--data", files["test"], "--output", tmp_path / "t.csv") is None
    assert "does not know" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "tells", "read", "value", "files_of"),
    [
        ("labels", "any of 2 label", "answer.labels_predicted", "f1_micro", ["reliability", "reliability_labels"]),
        ("numbers", "predicts a number, stars", "answer.means, answer.sd", "rmse", ["intervals", "pit"]),
    ],
)
def test_a_card_says_what_the_adapter_answers_with_and_how_well(
    name, tells, read, value, files_of, runs, files, tmp_path
):
    made = evaluate_run(runs[name], data=str(files["test"]), progress=False)
    about = {"base_model": "user/base", "dataset": "user/rows", "benchmark_task": "main"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no evaluation is left out
        write_card(runs[name], tmp_path / name, **about)
    card = ModelCard((tmp_path / name / "README.md").read_text())
    assert tells in card.text and read in card.text and "Deciding" in card.text
    scores = made.content["variants"]["sample"]["after"]
    results = [found for found in card.data.eval_results if "3 draws" in found.metric_name]
    keys = [found.metric_name.split(" ")[0] for found in results]
    assert keys == [
        key for key in PANELS["labels" if name == "labels" else "numbers"].meanings if scores[key] is not None
    ]
    assert [found.metric_value for found in results] == [scores[key] for key in keys]
    done = made.content["variants"]["sample"]["recalibration"]
    assert f"**3 draws**, 60 rows of `test`, {done}" in card.text and scores["verdict"] in card.text
    low, high = scores["intervals"][value]
    assert f"| {value} |" in card.text and f"[{low:.4f}, {high:.4f}]" in card.text
    (entry,) = yaml.safe_load(next((tmp_path / name / ".eval_results").iterdir()).read_text())
    assert entry["value"] == pytest.approx(scores[value]) and "60 rows" in entry["notes"]
    assert sorted(place.stem for place in (tmp_path / name).glob("*.png")) == files_of
    for stem in files_of:
        assert f"]({stem}.png)" in card.text


def test_a_reranker_has_one_logit_and_a_probability_of_relevance(runs, files):
    predictor = load(runs["rerank"], device="cpu")
    assert predictor.model.config.num_labels == 1 and predictor.label_names == ("relevant",)
    found = predictor.predict([("a", text) for text in targets(files)[0][:5]])
    assert found.probabilities.shape == (5, 1) and found.given is not None
    state = json.loads((runs["rerank"] / "adapter" / "predictor.json").read_text())["ways"]["mean"]
    assert state["kind"] == "platt" and len(state["parameters"]["biases"]) == 1
    # a single logit of another tool: nothing says what it is, so the caller does
    bare = shutil.copytree(runs["rerank"] / "adapter", runs["rerank"].parent / "bare")
    for name in ("predictor.json", "decision.labels.json"):
        (bare / name).unlink()
    with pytest.raises(ValueError, match="kind='labels'"):
        load(bare, device="cpu")
    with pytest.warns(UserWarning, match="no temperature"):
        plain = load(bare, device="cpu", kind="labels")
    with torch.no_grad():
        inputs = plain.tokenizer("a", "our house", return_tensors="pt")
        logit = float(plain.model(**inputs).logits)
    assert float(plain.predict([("a", "our house")]).probabilities) == pytest.approx(expit(logit), abs=1e-6)
    pairs = [("a", text) for text, *_ in rows(40, 7)]
    calibrated = plain.calibrate(pairs, [nice for _, _, nice, *_ in rows(40, 7)])
    calibrated.save(runs["rerank"].parent / "mended")
    again = load(runs["rerank"].parent / "mended", device="cpu").predict(pairs[:3])
    assert torch.equal(again.probabilities, calibrated.predict(pairs[:3]).probabilities)
    assert again.label_names == plain.label_names
    with pytest.raises(ValueError, match="40 rows and 3 labels"):
        plain.calibrate(pairs, [1, 0, 1])
    with pytest.raises(ValueError, match="kind must be one of"):
        load(bare, kind="scores")
    with pytest.raises(ValueError, match="says that it answers with labels"):
        load(runs["rerank"], device="cpu", kind="numbers")


def test_a_cross_encoder_is_calibrated_and_answers_as_the_run_does(runs, tmp_path):
    """sentence-transformers' own class: of the run's merged adapter it says what we say, and takes our rules."""
    cross = pytest.importorskip("sentence_transformers").CrossEncoder
    predictor = load(runs["rerank"], device="cpu")
    pairs, nice = [("a", text) for text, *_ in rows(240, 5)], np.array([row[2] for row in rows(240, 5)])
    ours = predictor.predict(pairs).probabilities.numpy()
    predictor.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    predictor.tokenizer.save_pretrained(tmp_path / "merged")
    encoder = cross(str(tmp_path / "merged"), device="cpu", local_files_only=True)
    p = encoder.predict(pairs, show_progress_bar=False)[:, None].astype(float)  # a sigmoid, by its default
    stored = LabelScaling.load(runs["rerank"] / "temperature.json")
    np.testing.assert_allclose(stored.transform(p), ours, atol=1e-5)
    fit, decide_on, report_on = (slice(start, start + 80) for start in (0, 80, 160))
    scaling = LabelScaling("platt").fit(p[fit], nice[fit])
    rule = LabelThresholds(risk=0.5).fit(scaling.transform(p[decide_on]), nice[decide_on])
    reached = rule.evaluate(scaling.transform(p[report_on]), nice[report_on])
    assert reached.labels[0].given == rule.predict(scaling.transform(p[report_on])).sum() > 0
    logits = encoder.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    np.testing.assert_allclose(scaling.transform(logits, input="logits")[:, 0], scaling.transform(p)[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("value", "separator", "expected"),
    [
        ("a|b", "|", ["a", "b"]),
        ("a, b ,", ",", ["a", "b"]),
        ("['a', 'b c']", None, ["a", "b c"]),
        ('["a"]', None, ["a"]),
        ([1, 2.0], None, ["1", "2"]),
        (None, "|", []),
        ("  ", "|", []),
        ("[draft] note", None, ["[draft] note"]),
    ],
)
def test_labels_of_a_field(value, separator, expected):
    assert labels_in(value, separator) == expected


def test_what_stands_between_labels_is_found():
    assert separator_of(["a;b", "c"]) == ";" and separator_of(["a,b|c"]) == "|" and separator_of(["a", None]) is None
    assert separator_of(["['a', 'b']"]) is None


def config(**own) -> RunConfig:
    return RunConfig.from_mapping({"data": "d", "model": "m", **own})


def test_lists_of_names_in_other_files_are_read(tmp_path):
    table = Dataset.from_list([{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}])
    task = tasks.MultiLabel.learn(config(task="multi-label"), table)
    assert task.labels.names == ("x", "y")
    assert task.canonical(table, "d", "train")["labels"][:] == [[1.0, 1.0], [0.0, 0.0]]
    named = tasks.MultiLabel.learn(config(task="multi-label", label_names=["y", "x", "z"]), table)
    assert named.canonical(table, "d", "train")["labels"][0] == [1.0, 1.0, 0.0]
    other = Dataset.from_list([{"text": "a", "label": ["w"]}])
    with pytest.raises(ValueError, match="has the label 'w'; known are x, y"):
        task.canonical(other, "d", "test")


def test_a_head_of_labels_starts_at_their_shares(tiny_classifier):
    table = Dataset.from_dict({"text": ["a"] * 8, "label": ["x|y", "x", "x", "x", "", "x", "x", "y"]})
    task = tasks.MultiLabel.learn(config(task="multi-label"), table)
    model = tiny_classifier(num_labels=2)
    task.start_head(model, task.canonical(table, "d", "train"))
    expected = np.log([7 / 10, 3 / 10]) - np.log([3 / 10, 7 / 10])  # six and two of eight, and one of each
    np.testing.assert_allclose(model.classifier.bias.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("own", "values", "told"),
    [
        ({"task": "multi-label", "label_columns": ["a"]}, {"a": [1, 2]}, "row 1 has 2 in the column 'a'"),
        ({"task": "multi-label", "label_columns": ["b"]}, {"a": [1, 0]}, "has no column 'b'"),
        ({"task": "multi-label"}, {"label": [None, None]}, "at least one"),
        ({"task": "regression"}, {"label": ["1", "many"]}, "a number is expected"),
        ({"task": "regression"}, {"label": ["", "2"]}, "a number is expected"),
        ({"task": "regression"}, {"label": [2, 2]}, "nothing to learn"),
        ({"task": "rerank"}, {"label": [1, 1]}, "relevant and other texts are needed"),
    ],
)
def test_bad_labels_are_refused_before_anything_is_trained(own, values, told):
    table = Dataset.from_dict({"text": ["a", "b"], **values})
    asked = config(**own)
    with pytest.raises(ValueError, match=told):
        tasks.task_class(asked.task).learn(asked, table)


def test_settings_and_rules_of_another_kind_are_refused(runs, files):
    for own, told in (
        ({"task": "multi-label", "metrics": ["ece"]}, "unknown metric.*f1_micro"),
        ({"task": "regression", "metrics": ["f1_micro"]}, "unknown metric.*crps"),
        ({"label_scaling": "isotonic"}, "label_scaling must be one of"),
    ):
        with pytest.raises(ValueError, match=told):
            config(**own)
    assert config(task="regression").metrics[0] == "rmse" and config(task="multi-label").metrics[0] == "f1_micro"
    where = {"data": str(files["decide"]), "overwrite": True, "progress": False}
    for name, own, told in (
        ("numbers", {"risk": 0.1}, "--risk is of classes"),
        ("labels", {"alpha": 0.1}, "--alpha is of classes"),
        ("labels", {"per_class": True}, "--per-class is of classes"),
        ("numbers", {"alpha": 1.5}, "strictly between"),
    ):
        with pytest.raises(ValueError, match=told):
            decide(runs[name], **where, **own)
    for name in ("numbers", "labels"):
        with pytest.raises(ValueError, match="evaluate the rows of each group by themselves"):
            evaluate_run(runs[name], data=str(files["test"]), group_column="group", progress=False)
    with pytest.raises(NoGuaranteeError, match="takes 999 rows"):
        decide(runs["numbers"], **where, alpha=0.001)
    with pytest.raises(ValueError, match=r"trained on|calibrated"):
        decide(runs["numbers"], str(files["train"]), overwrite=True, progress=False)
    assert "no classes to compare" in peft_calib("compare", runs["labels"], runs["columns"], "--data", files["test"])
    assert "answers with no class" in peft_calib("train-head", runs["labels"])
    assert peft_calib("watch", runs["labels"], "--data", files["test"]) is not None
