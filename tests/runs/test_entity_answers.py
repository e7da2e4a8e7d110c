"""Entities of a tagger's run: loaded, predicted, decided over, and what the rule reaches."""

import csv
import json
import random
import shutil
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from command_line import QUICK, WORDS, peft_calib, write_jsonl
from datasets import Dataset
from huggingface_hub import ModelCard

from peft_calib import load, predict_to
from peft_calib.calibration import SelectiveThreshold, find_entities
from peft_calib.calibration.scores.kinds import PANELS
from peft_calib.hub import write_card
from peft_calib.hub.runs import measured_in_run
from peft_calib.predictor.answer import CalibratedPrediction, logits_of
from peft_calib.predictor.kinds.entities import EntitiesAnswer
from peft_calib.provenance.stored_decision import StoredDecision
from peft_calib.runs.deciding import decide
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.loading import FinishedRun

RULE = "decision.threshold.json"
WAY = {"num_samples": 2, "seed": 3}


def tagged(count, seed):
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = rng.choices([*WORDS, "7"], k=rng.randint(3, 9))
        tags = ["B-NUM" if word == "7" else "B-LONG" if len(word) > 4 else "O" for word in words]
        rows.append({"words": [*words, f"row{seed}x{number}"], "marks": [*tags, "O"], "number": number})
    return rows


@pytest.fixture(scope="module")
def tagger(tmp_path_factory, tiny_model_folder):
    place = tmp_path_factory.mktemp("tagger")
    data = write_jsonl(place / "train.jsonl", tagged(80, 0))
    base = ["--data", data, "--model", tiny_model_folder, "--task", "token-cls", "--learning-rate", "2e-2", *QUICK]
    base += ["--tokens-column", "words", "--tags-column", "marks", "--max-length", 24]
    draws = ["--method", "bayesian-lora", "--num-samples", 2]
    assert peft_calib("train", "--output-dir", place / "run", *base, *draws, "--epochs", 4) is None
    return place / "run"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("rows")
    names = {"fit": (90, 1), "test": (60, 2)}
    return {name: write_jsonl(place / f"{name}.jsonl", tagged(*how)) for name, how in names.items()}


@pytest.fixture(scope="module")
def decided(tagger, files):
    return decide(tagger, files["fit"], risk=0.1, seed=3, progress=False)


def quietly(tagger, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load(tagger, device="cpu", **options)


def by_hand(tagger, rows, way="sample"):
    """Words of canonical rows at the temperature of the run, and their tags and sentences."""
    run = FinishedRun.load(tagger)
    canonical = run.task.canonical(Dataset.from_list(rows), "rows", "test")
    order = np.argsort(
        [len(ids) for ids in run.task.encode_prediction(canonical, run.tokenizer)["input_ids"]], kind="stable"
    )
    made = run.predict(canonical.select(order), way, 2, 3, progress=False)
    p = np.asarray(run.temperature(way).transform(logits_of(made.probabilities)))
    return p, run.task.labels.names, order[made.positions[:, 0].numpy()], made.labels.numpy()


def test_a_row_has_the_entities_of_the_report(tagger):
    rows = tagged(30, 5)
    predictor = quietly(tagger, decisions=False)
    found = predictor.predict([row["words"] for row in rows], **WAY)
    p, names, sentences, _ = by_hand(tagger, rows)
    back = np.argsort(sentences, kind="stable")
    expected = find_entities(p[back], names, sentences[back])
    assert len(found) == 30 and len(expected) > 20 and found.how == "sample" and "T " in found.recalibration
    flat = [(row, one) for row, entities in enumerate(found.entities) for one in entities]
    assert [row for row, _ in flat] == expected.sentences.tolist()
    assert [one["type"] for _, one in flat] == list(expected.types)
    assert [one["probability"] for _, one in flat] == expected.probability.tolist()
    starts = np.cumsum([0, *(len(row["words"]) for row in rows)])
    placed = [[starts[row] + one["first"], starts[row] + one["last"] + 1] for row, one in flat]
    assert placed == expected.spans.tolist()
    assert all(one["text"] == " ".join(rows[row]["words"][one["first"] : one["last"] + 1]) for row, one in flat)
    table = predictor.predict(Dataset.from_list(rows), **WAY)  # with tags that nobody reads
    assert table.entities == found.entities and "answered" not in flat[0][1]
    assert "entities in 30 rows" in repr(found)


def test_a_word_without_a_token_does_not_move_the_others(tagger):
    predictor = quietly(tagger)
    plain, moved = predictor.predict([["7", "river", "7"], ["\u200b", "7", "\u200b", "river", "7"]], **WAY).entities
    place = {0: 1, 1: 3, 2: 4}
    assert plain and [(one["type"], one["probability"]) for one in plain] == [
        (one["type"], pytest.approx(one["probability"], rel=1e-5)) for one in moved
    ]
    assert [(place[one["first"]], place[one["last"]]) for one in plain] == [(o["first"], o["last"]) for o in moved]


def test_what_is_no_row_of_words_is_refused(tagger):
    predictor = quietly(tagger)
    with pytest.raises(TypeError, match="Row 0 is 'anna wrote'; a list of words is expected"):
        predictor.predict(["anna wrote"])
    with pytest.raises(ValueError, match="Row 1 is no words"):
        predictor.predict([["anna"], []])
    with pytest.raises(ValueError, match="no column 'words'"):
        predictor.predict(Dataset.from_list([{"text": "anna"}]))
    with pytest.raises(ValueError, match="row 0 holds no token"):
        predictor.predict([["\u200b"]])
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 24 tokens"):
        assert predictor.predict([["7"], ["7"] * 40]).num_cut == 1
    with pytest.raises(ValueError, match="calibrated where it is trained"):
        predictor.calibrate([["7"]], [[0]])


def test_an_answer_is_saved_and_read_back(tagger, decided, tmp_path):
    found = quietly(tagger).predict([[*row["words"], "\u200b"] for row in tagged(20, 5)], **WAY)
    assert found.accepted is not None and sum(map(len, found.entities)) > 10
    for _ in range(2):  # over itself, too
        again = EntitiesAnswer.load(found.save(tmp_path / "saved"))
    assert again.entities == found.entities and again.decision == found.decision and repr(again) == repr(found)
    assert CalibratedPrediction.load(tmp_path / "saved").how == "sample" and len(again) == 20
    plain = quietly(tagger, decisions=False).predict([["river"]], **WAY)
    assert EntitiesAnswer.load(plain.save(tmp_path / "plain")).entities == plain.entities
    place = tmp_path / "saved" / "entities.json"
    content = json.loads(place.read_text())
    for name, value in (("kept", content["kept"][1:]), ("kept", [[[0]], *content["kept"][1:]]), ("accepted", [True])):
        place.write_text(json.dumps(content | {name: value}))
        with pytest.raises(ValueError, match=rf"entities.json.*{name}.*Predict and save again"):
            EntitiesAnswer.load(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds no saved entities"):
        EntitiesAnswer.load(tmp_path)


def test_a_rule_is_fitted_on_one_entity_a_sentence(tagger, files, decided):
    rows = [json.loads(line) for line in files["fit"].read_text().splitlines()]
    p, names, sentences, labels = by_hand(tagger, rows)
    back = np.argsort(sentences, kind="stable")
    found = find_entities(p[back], names, sentences[back], labels[back])
    expected = SelectiveThreshold(risk=0.1, seed=3)
    once = found.one_a_sentence(3)
    expected.fit(found.probability, found.correct.astype(int), input="confidence", mask=once)
    stored = StoredDecision.read(tagger / "adapter" / RULE)
    assert stored.rule.threshold == expected.threshold and stored.num_rows == once.sum() < len(found)
    assert stored.to.by == "entity" and stored.to.num_samples == 2 and stored.to.seed == 3
    assert f"Fitted on {once.sum()} sentences, one entity of each, of" in decided.lines()[0]


def test_a_prediction_says_which_entities_are_answered(tagger, decided):
    found = quietly(tagger).predict([row["words"] for row in tagged(30, 5)], **WAY)
    threshold = decided.stored[0].rule.threshold
    flat = [one for entities in found.entities for one in entities]
    assert [one["answered"] for one in flat] == [one["probability"] >= threshold for one in flat]
    assert {one["answered"] for one in flat} == {True, False}
    assert found.decision == "Of what is answered at most 10 % is wrong, with 95 % confidence."
    other = quietly(tagger).predict([["7"]], num_samples=2, seed=4)
    assert other.accepted is None and "was fitted for 2 draws of seed 3" in other.decision


def test_an_evaluation_says_what_the_rule_reaches(tagger, files, decided):
    made = evaluate_run(tagger, data=files["test"], seed=3, num_samples=2, progress=False)
    told = made.content["variants"]["sample"]["decision"]["threshold"]
    rows = [json.loads(line) for line in files["test"].read_text().splitlines()]
    p, names, sentences, labels = by_hand(tagger, rows)
    found = find_entities(p, names, sentences, labels)  # in the order of the report, by length
    once = found.one_a_sentence(3)
    expected = decided.stored[0].rule.evaluate(
        found.probability, found.correct.astype(int), input="confidence", mask=once
    )
    assert told["reached"] == json.loads(json.dumps(expected.to_dict())) and told["by"] == "entity"
    assert expected.to_dict()["num_rows"] == once.sum()
    assert told["told"].splitlines()[0] in (made.folder / "report.md").read_text()
    own = evaluate_run(tagger, data=files["fit"], seed=3, num_samples=2, progress=False)
    assert "were fitted on" not in (refused := own.content["variants"]["sample"]["decision"]["threshold"])["refused"]
    assert "90 of the 90 rows are among" in refused["refused"]


def test_groups_have_scores_of_words_and_what_the_rule_reaches_in_entities(tagger, decided, tmp_path, capsys):
    rows = [row | {"part": "ab"[row["number"] % 3 == 0]} for row in tagged(60, 2)]
    data = write_jsonl(tmp_path / "parts.jsonl", rows)
    made = evaluate_run(tagger, data=str(data), seed=3, group_column="part", progress=False)
    main = made.content["variants"]["sample"]
    words = {part: sum(len(row["words"]) for row in rows if row["part"] == part) for part in "ab"}
    panels = main["after"]["groups"]["panels"]
    assert {name: panel["num_rows"] for name, panel in panels.items()} == words
    # one entity of each sentence, of the sentences of a group
    p, names, sentences, labels = by_hand(tagger, rows)
    found = find_entities(p, names, sentences, labels)
    rule = StoredDecision.read(tagger / "adapter" / RULE).rule
    once, answered = found.one_a_sentence(rule.seed), found.probability >= rule.threshold
    part = np.array([rows[row]["part"] for row in dict.fromkeys(sentences.tolist())])[found.sentences]
    reached = {one["name"]: one for one in main["decision"]["threshold"]["groups"]["groups"]}
    for name in "ab":
        mine = once & (part == name)
        assert reached[name]["num_rows"] == mine.sum() and reached[name]["decided"] == (mine & answered).sum()
        assert reached[name]["failures"] == (mine & answered & ~found.correct).sum()
    assert main["decision"]["threshold"]["groups"]["told"] in (made.folder / "report.md").read_text()
    assert peft_calib("evaluate", tagger, "--data", data, "--seed", 3, "--group-column", "none") is not None


def test_rows_that_were_trained_on_are_refused(tagger, tmp_path, decided):
    seen = write_jsonl(tmp_path / "seen.jsonl", tagged(80, 0))
    assert "are among" in peft_calib("decide", tagger, "--data", seen, "--overwrite")
    assert "are among" in peft_calib("decide", tagger / "adapter", "--data", seen, "--overwrite")
    assert "pass --overwrite" in peft_calib("decide", tagger, "--data", seen)


def test_an_adapter_alone_has_the_same_rule(tagger, files, decided, tmp_path):
    copy = tmp_path / "adapter"
    shutil.copytree(tagger / "adapter", copy, ignore=shutil.ignore_patterns("decision*"))
    found = decide(copy, files["fit"], risk=0.1, seed=3, progress=False).stored[0]
    assert found.rule.state() == decided.stored[0].rule.state()
    rows = found.rows["tokens"].hashes
    assert np.array_equal(rows, decided.stored[0].rows["tokens"].hashes)  # evaluate knows them again


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--costs", 5, 1], "--costs is not of entities: an entity that is missed costs too"),
        (["--alpha", 0.1], "--alpha is not of entities"),
        (["--by", "head"], "--by is not of entities: the uncertainty head is of words"),
        (["--per-class"], "--per-class is of classes; a rule for entities takes --risk, --target-coverage"),
        (["--risk", 0.001], "rows"),
    ],
)
def test_what_no_rule_of_entities_can_promise_is_refused(tagger, files, decided, asked, message):
    assert message in peft_calib("decide", tagger, "--data", files["fit"], "--overwrite", *asked)


def test_a_table_has_a_column_of_entities(tagger, files, decided, tmp_path):
    rows = Dataset.from_json(str(files["test"]))
    expected = quietly(tagger).predict(rows, **WAY).entities
    outs = {end: tmp_path / f"out.{end}" for end in ("jsonl", "parquet", "csv")}
    for path in outs.values():
        base = ["--data", files["test"], "--output", path, "--num-samples", 2, "--seed", 3]
        assert peft_calib("predict", tagger, *base) is None
    lines = [json.loads(line) for line in outs["jsonl"].read_text().splitlines()]
    assert [line["entities"] for line in lines] == expected and lines[0]["number"] == 0
    assert pq.read_table(outs["parquet"])["entities"].to_pylist() == expected
    with outs["csv"].open(newline="") as file:
        assert [json.loads(line["entities"]) for line in csv.DictReader(file)] == expected
    told = peft_calib(
        "predict", tagger, "--data", files["test"], "--output", tmp_path / "no.jsonl", "--all-probabilities"
    )
    assert "is of rows with one answer, not of entities" in told
    folder = predict_to(tmp_path / "shards", quietly(tagger), rows, 25, progress=False, **WAY)
    shards = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    for start, table in zip((0, 25, 50), shards, strict=True):
        part = quietly(tagger).predict(rows.select(range(start, min(start + 25, 60))), **WAY)
        assert table["entities"].to_pylist() == part.entities
    assert len({str(table.schema.field("entities").type) for table in shards}) == 1


def test_tags_that_mark_no_entities_are_refused(tagger, tmp_path):
    copy = tmp_path / "adapter"
    shutil.copytree(tagger / "adapter", copy, ignore=shutil.ignore_patterns("decision*"))
    content = json.loads((copy / "predictor.json").read_text())
    content["classes"] = ["X" if name == "O" else name for name in content["classes"]]
    del content["digest"]
    (copy / "predictor.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="have no 'O' outside of entities"):
        quietly(copy)


def test_a_card_has_the_scores_of_words_and_of_entities(tagger, files, decided, tmp_path):
    run = tmp_path / "run"  # without what other tests evaluated of it, whose rows would lead
    shutil.copytree(tagger, run, ignore=shutil.ignore_patterns("evaluation"))
    made = evaluate_run(run, data=str(files["test"]), seed=3, progress=False)
    about = {"base_model": "user/base", "dataset": "user/rows", "benchmark_task": "main"}
    write_card(run, tmp_path / "card", **about)
    card = ModelCard((tmp_path / "card" / "README.md").read_text())
    assert "It finds entities in words" in card.text and "answer.entities" in card.text
    assert '`entity["answered"]`' in card.text and "labels_predicted" not in card.text
    main = made.content["variants"]["sample"]
    found = [one for one in card.data.eval_results if one.task_name == "token classification, 2 draws, entities"]
    scores = {one.metric_name.split(" ")[0]: one.metric_value for one in found}
    assert scores == {key: main["entities"]["after"][key] for key in PANELS["entities"].meanings}
    (entry,) = yaml.safe_load(next((tmp_path / "card" / ".eval_results").iterdir()).read_text())
    assert entry["value"] == pytest.approx(scores["f1"]) and entry["notes"].startswith("2 draws, entities; precision ")
    assert (tmp_path / "card" / "reliability_entities.png").is_file()
    page = (made.folder / "report.html").read_text()
    assert 'alt="Reliability of the entities"' in page
    # what the pictures are drawn from is what was measured
    *_, last = measured_in_run(run)[1]
    assert last.pictures["f1"] == pytest.approx(scores["f1"]) and last.pictures["ece"] == pytest.approx(scores["ece"])
