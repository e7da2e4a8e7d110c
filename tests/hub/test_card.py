"""A card is read back as it was meant, whatever was measured and however things are called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from peft_calib.artefact import Artefact
from peft_calib.calibration import calibration_report
from peft_calib.hub import Measurement, Subject
from peft_calib.hub.card import card_body
from peft_calib.hub.facts import CardFacts, base_of, leading
from peft_calib.hub.metadata import CardMismatchError, benchmark_results, check_card, metadata_of, with_metadata
from peft_calib.hub.runs import _name_of, _rank
from peft_calib.json_files import Fields
from peft_calib.provenance.splits import SplitRecord
from peft_calib.runs.evaluation import Evaluation

SETTINGS = {"num_rows": 200}


def facts(*measured: Measurement, classes: tuple[str, ...] = ("down", "up"), **subject) -> CardFacts:
    return CardFacts(
        name="films", method="BAYESIANLORA", task="SEQ_CLS", base_model="user/base", base_revision=None,
        artefact=Artefact(classes=classes), digest="sha256:0", splits=SplitRecord(), measured=measured,
        subject=Subject(**subject), has_lora=True, head_report="It helps.", versions={"peft-calib": "0"},
    )  # fmt: skip


def scores(**values) -> dict:
    return {"accuracy": 0.5, "nll": 0.7, "settings": SETTINGS, **values}


def measured(number: int, **values) -> Measurement:
    found = scores(accuracy=number / 10, **values)
    return Measurement(way=f"{number} draws", split=f"split {number}", before=found, after=found)


def card_of(found: CardFacts) -> str:
    metadata = metadata_of(found)
    text = with_metadata(metadata, card_body(found, "user/films", {"a picture": "reliability.png"}))
    check_card(text, metadata)
    return text


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_result_keeps_its_names_and_values(count):
    found = facts(*(measured(number) for number in range(1, count + 1)), dataset="user/rows")
    results = ModelCard(card_of(found)).data.eval_results
    accuracies = [result for result in results if result.metric_type == "accuracy"]
    assert [result.metric_value for result in accuracies] == [number / 10 for number in range(1, count + 1)]
    assert [result.dataset_split for result in accuracies] == [f"split {n}" for n in range(1, count + 1)]
    assert [result.metric_name for result in accuracies] == [f"accuracy ({n} draws)" for n in range(1, count + 1)]
    # the first rows are those of the data set; of the others nobody said that
    types = [result.dataset_type for result in accuracies]
    assert types == ["user/rows", *["private"] * (count - 1)]
    assert [result.dataset_name.startswith("user/rows") for result in accuracies] == [True, *[False] * (count - 1)]


def test_numbers_of_numpy_and_what_is_not_defined():
    values = {"nll": np.float64(0.25), "brier": np.float32(0.5), "ece": None, "mce": float("nan"), "aurc": np.inf}
    text = card_of(facts(measured(1, **values)))
    results = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results == {"accuracy": 0.1, "nll": 0.25, "brier_score": 0.5}
    assert all(type(value) is float for value in results.values())
    assert "python/object" not in text and "nan" not in text.lower()


def test_a_card_that_is_read_as_something_else_is_refused():
    found = facts(measured(1), measured(2))
    metadata = metadata_of(found)
    text = with_metadata(metadata, "a text")
    with pytest.raises(CardMismatchError, match="license"):
        check_card(text, {**metadata, "license": "mit"})
    with pytest.raises(CardMismatchError, match="model-index"):
        check_card(text.replace("0.2", "0.3"), metadata)


def test_names_are_text_wherever_they_stand():
    names = ("a|b", "<script>alert(1)</script>", "# heading", "*x*", "[link](there)")
    body = card_of(facts(measured(1), classes=names, intended_use="For <b>all</b>")).split("\n---\n")[1]
    assert "<script>" not in body and "<b>" not in body
    assert "a\\|b" in body and "\\# heading" in body and "\\[link\\]" in body


def test_what_a_card_tells():
    p = np.random.default_rng(0).dirichlet([1, 1], 300)
    labels = (np.random.default_rng(1).random(300) < p[:, 1]).astype(int)
    sharp = p**3 / (p**3).sum(1, keepdims=True)
    one = Measurement.of(calibration_report(p, labels), calibration_report(sharp, labels), temperature=3.0)
    text = card_of(facts(one, license="mit", examples=["a film"], training_datasets=["user/rows"], language=["en"]))
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "peft" and head["base_model"] == "user/base" and head["license"] == "mit"
    assert head["pipeline_tag"] == "text-classification" and head["widget"] == [{"text": "a film"}]
    assert "peft-calib" in head["tags"] and "base_model:adapter:user/base" in head["tags"]
    for told in (
        "| before | after |",
        "95% interval",
        "if calibrated",
        "import peft_calib",
        'subfolder="lora"',
        "T = 3",
    ):
        assert told in text or (told == "T = 3" and "temperature 3" in text), told
    assert one.verdict in text and "It helps." in text
    assert "**Not measured.**" in card_of(facts())


def test_a_benchmarks_result_is_what_the_library_writes():
    about = {"dataset": "user/bench", "benchmark_task": "main", "dataset_revision": "abc"}
    (text,) = benchmark_results(facts(measured(3), **about)).values()
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        pytest.skip("this huggingface_hub does not write .eval_results itself")
    entry = huggingface_hub.EvalResultEntry(
        dataset_id="user/bench", task_id="main", dataset_revision="abc", value=0.3,
        notes="3 draws; nll 0.7000; 200 rows",
    )  # fmt: skip
    assert yaml.safe_load(text) == huggingface_hub.eval_result_entries_to_yaml([entry])
    assert benchmark_results(facts(measured(3), dataset="user/bench")) == {}


def test_a_leaderboard_is_told_of_the_first_rows():
    """Not of those of another origin, which may come last."""
    first = [replace(measured(n), split="test") for n in (1, 2)]
    (text,) = benchmark_results(facts(*first, measured(9), dataset="user/bench", benchmark_task="main")).values()
    (entry,) = yaml.safe_load(text)
    assert entry["value"] == 0.2 and entry["notes"].startswith("2 draws")
    entities = replace(measured(5), split="test", kind="entities")
    assert leading([*first, entities, measured(9)]) == {"classes": first[1], "entities": entities}


def test_what_was_predicted_as_trained_leads_whatever_its_folder_is_called():
    """A leaderboard is not told of two draws where the run has three, nor of another split that was asked for."""

    def evaluation(data: str, draws: int, seed: int = 0) -> Evaluation:
        variants = {"mean": {"num_samples": 1}, "sample": {"num_samples": draws}}
        return Evaluation(Path("."), {"data": data, "seed": seed, "variants": variants})

    ways = [("shifted", 3, 0), ("zoo (dev)", 3, 0), ("zoo (test)", 3, 0), ("zoo (test)", 2, 0), ("zoo (test)", 3, 1)]
    for order in (ways, ways[::-1], [*ways[2:], *ways[:2]]):
        found = sorted(
            (evaluation(*way) for way in order), key=lambda one: _rank(one, "zoo", {"mean": 1, "sample": 3})
        )
        told = [
            Measurement(f"{one.content['variants']['sample']['num_samples']} draws", one.content["data"],
                        scores(), scores(), seed=one.content["seed"])
            for one in found
        ]  # fmt: skip
        assert leading(told) == {"classes": told[2]}
        assert (told[2].way, told[2].split, told[2].seed) == ("3 draws", "zoo (test)", 0)


def test_a_data_set_is_named_for_its_own_rows_only():
    """A leaderboard is told of the rows that are called like the benchmark, wherever they stand."""
    rows = ("zoo (test)", "user/bench (test)", "user/bench, de (test)", "shifted")
    found = [replace(measured(n), split=split) for n, split in enumerate(rows, 1)]
    for config, of, revision in ((None, 2, "abc"), ("en", 2, None), ("de", 3, "abc")):
        about = {"dataset": "user/bench", "dataset_config": config, "dataset_revision": revision}
        one = facts(*found, benchmark_task="main", **about)
        results = [one for one in ModelCard(card_of(one)).data.eval_results if one.metric_type == "accuracy"]
        assert [one.dataset_split for one in results if one.dataset_type == "user/bench"] == [rows[of - 1]]
        assert {one.dataset_revision for one in results if one.dataset_type == "private"} == {None}
        ((entry,),) = map(yaml.safe_load, benchmark_results(one).values())
        assert entry["value"] == of / 10


def test_what_would_be_told_of_no_data_set_or_without_a_score_is_refused():
    for name in ("dataset_config", "dataset_revision", "benchmark_task"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}.*--dataset"):
            Subject(**{name: "main"})
    about = {"dataset": "user/bench", "benchmark_task": "main"}
    with pytest.raises(ValueError, match="nothing was measured"):
        benchmark_results(facts(**about))
    undefined = replace(measured(1), kind="entities", after=scores(f1=None))
    with pytest.raises(ValueError, match="f1 is not defined on these rows"):
        benchmark_results(facts(undefined, **about))


def test_rows_are_called_as_they_are_and_words_are_no_rows():
    of_words = replace(measured(1), split="my_rows|a*b (test)", rows=30)
    body = card_of(facts(of_words)).split("\n---\n")[1]
    assert "**1 draws**, 30 rows (200 words) of `my_rows|a*b (test)`" in body
    assert "| measured on (my\\_rows\\|a\\*b (test), 1 draws) | 30 |" in body
    (result, *_) = ModelCard(card_of(facts(of_words))).data.eval_results
    assert result.dataset_name == "held-out rows (30 rows)"
    (text,) = benchmark_results(facts(of_words, dataset="user/bench", benchmark_task="main")).values()
    assert "; 30 rows" in yaml.safe_load(text)[0]["notes"]


@pytest.mark.parametrize("name", [None, "", "/models/base", "a/b/c", "."])
def test_only_a_base_model_that_others_have(name):
    with pytest.raises(ValueError, match="nobody else can load"):
        base_of(name, Subject())
    assert base_of(name, Subject(base_model="user/base")) == "user/base"
    assert base_of("user/other", Subject()) == "user/other"


def test_nothing_is_said_that_nobody_said():
    p, labels = np.random.default_rng(0).dirichlet([1, 1], 60), np.arange(60) % 2
    one = Measurement.of(calibration_report(p, labels, confidence_level=None))
    text = card_of(facts(one))
    assert "no temperature" not in text and "`test`" not in text and "None" not in text
    assert ModelCard(text).data.eval_results[0].dataset_split is None
    assert "no temperature" in card_of(facts(Measurement.of(calibration_report(p, labels), temperature=1.0)))


def test_a_plain_lora_is_not_called_calibrated_where_more_than_a_temperature_was_fitted():
    ways = {"VectorScaling": {"scale": [2.0, 0.5]}, "TemperatureScaling": {"temperature": 1.0}}
    told = {}
    for method, parameters in ways.items():
        state = Fields({"method": method, "parameters": parameters}, "predictor.json", "")
        found = replace(facts(measured(1)), artefact=Artefact(classes=("down", "up"), ways={"mean": state}))
        told[method] = card_of(found).partition("Its probabilities are ")[2].partition(".\n")[0]
    assert told["VectorScaling"] == "its logits' softmax, without the VectorScaling that was fitted on held-out rows"
    assert told["TemperatureScaling"] == "its logits' softmax, as nothing was found to mend them"


def test_a_text_in_the_place_of_a_list_and_reports_of_other_rows_are_refused():
    for name in ("language", "training_datasets", "examples"):
        with pytest.raises(TypeError, match=name):
            Subject(**{name: "en"})
    with pytest.raises(ValueError, match="100 rows"):
        Measurement("mean", "test", scores(settings={"num_rows": 100}), scores())


def test_a_text_that_ends_like_the_head_of_a_card():
    assert ModelCard(card_of(facts(measured(1), examples=["Breaking news ---", "---", "a\n---\nb"]))).data.widget[
        1
    ] == {"text": "---"}


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("/rows/x/held.csv", "held"),
        ("secret/held.csv", "held"),
        ("../x/held.jsonl", "held"),
        ("nyu-mll/glue", "nyu-mll/glue"),
        ("user/reviews-v1.1 (test)", "user/reviews-v1.1 (test)"),
        ("/rows/x/my.rows.jsonl.gz (held out)", "my.rows (held out)"),
        ("/rows/x/zoo, de (test)", "zoo, de (test)"),
    ],
)
def test_rows_are_called_by_no_path(data, name):
    assert _name_of(data) == name
