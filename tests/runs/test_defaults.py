"""Every task and method with no optional flag: what somebody types who has read one page."""

import json
import random

import numpy as np
import pytest
import yaml
from command_line import WORDS, peft_calib, sentences, write_jsonl
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    GPT2Config,
    OPTConfig,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
)

import peft_calib as package
from peft_calib.demo import embedded_model
from peft_calib.runs import limits
from peft_calib.runs.baseline import MostFrequent
from peft_calib.runs.flags import resolve
from peft_calib.runs.limits import epochs_for, position_limit
from peft_calib.runs.methods import HEADS, without_foreign_fields
from peft_calib.runs.settings import ANSWERED, METHODS, TASKS, RunConfig


@pytest.fixture
def quick(monkeypatch):
    """Nothing of what a run does is left out: fewer passes over the rows."""
    monkeypatch.setattr(limits, "STEPS", 1)


def task_rows(task: str, count: int, seed: int = 0) -> list[dict]:
    """Rows under the column names that a task asks for by default."""
    rng = random.Random(seed)
    if task == "seq-cls":
        return [{"text": text, "label": label} for text, label in sentences(count, seed)]
    if task == "causal-lm":
        return [{"text": " ".join([*rng.choices(WORDS, k=6), str(number)])} for number in range(count)]
    rows = []
    for number in range(count):
        words = [*rng.sample(WORDS, 4), str(number)]
        if task == "token-cls":
            rows.append({"tokens": words, "tags": ["NUM" if word.isdigit() else "O" for word in words]})
        else:
            answer = rng.randrange(3)
            rows.append({"question": f"number {number}: {words[answer]}", "choices": words[:3], "label": answer})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", [task for task in TASKS if task not in ANSWERED])
def test_no_optional_flag(quick, tmp_path, tiny_model_folder, tiny_decoder_folder, task, method, capsys):
    model = tiny_model_folder if task.endswith("cls") else tiny_decoder_folder
    data = write_jsonl(tmp_path / "rows.jsonl", task_rows(task, 30))
    test = write_jsonl(tmp_path / "test.jsonl", task_rows(task, 12, seed=1))
    run = tmp_path / "run"
    asked = ["train", "--task", task, "--method", method, "--data", data, "--model", model, "--output-dir", run]
    assert peft_calib(*asked) is None
    assert peft_calib("evaluate", run, "--data", test) is None
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    content = json.loads((run / "run.json").read_text())
    assert content["method"] == method
    assert all(PeftConfig.from_pretrained(run / name).r == 8 for name in content["adapters"])
    if task != "causal-lm":
        assert "most frequent class" in printed
        labels = sum(content["class_counts"].values())
        assert labels == content["rows"]["train"] * (5 if task == "token-cls" else 1)


HEADED = [
    (DistilBertForSequenceClassification, "SEQ_CLS"),  # its pre_classifier is trained along, too
    (DistilBertForTokenClassification, "TOKEN_CLS"),
    (RobertaForTokenClassification, "TOKEN_CLS"),
]


@pytest.mark.parametrize("kind", [LoraConfig, package.HyperLoraConfig, package.CurveLoraConfig])
@pytest.mark.parametrize(("model", "task"), HEADED, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_trained_along_is_not_adapted_too(kind, model, task):
    sizes = {"vocab_size": 30, "max_position_embeddings": 20}
    if model is RobertaForTokenClassification:
        config = RobertaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=1, **sizes
        )
    else:
        config = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, **sizes)
    found = get_peft_model(
        model(config), kind(task_type=task, r=2, target_modules="all-linear", exclude_modules=HEADS)
    )
    targets = found.base_model.targeted_module_names
    assert targets
    assert not [name for name in targets if "classifier" in name]
    assert any(p.requires_grad for name, p in found.named_parameters() if "classifier" in name)


# ------------------------------------------------------------------ one file for several methods


@pytest.mark.parametrize(
    ("method", "kept", "left_out"),
    [
        ("bayesian-lora", {"kl_weight": 0.1, "exclude_modules": ["x"]}, []),
        ("lora", {"exclude_modules": ["x"]}, ["kl_weight"]),
        ("curve-lora", {"exclude_modules": ["x"]}, ["kl_weight"]),
        ("hyper-lora", {"exclude_modules": ["x"]}, ["kl_weight"]),
    ],
)
def test_a_file_serves_several_methods(tmp_path, method, kept, left_out):
    file = tmp_path / "run.yaml"
    fields = {"kl_weight": 0.1, "exclude_modules": ["x"]}
    file.write_text(yaml.safe_dump({"data": "d", "model": "m", "method": "bayesian-lora", "adapter": fields}))
    told = []
    config = resolve(file, {"method": method}, told.append)
    assert (config.method, config.adapter) == (method, kept)
    assert [line.split(": ")[1].split(" is")[0] for line in told] == left_out


def test_a_field_that_no_method_has_stays_to_be_refused():
    assert without_foreign_fields("lora", {"speed": 1}) == ({"speed": 1}, {})
    with pytest.raises(ValueError, match="takes name=value"):
        resolve(None, {"data": "d", "model": "m", "adapter": ["kl_weight"]})


def test_a_field_of_another_method_runs_with_a_note(quick, tmp_path, tiny_model_folder, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", task_rows("seq-cls", 30))
    file = tmp_path / "run.yaml"
    settings = {"data": str(data), "model": str(tiny_model_folder), "method": "bayesian-lora"}
    file.write_text(yaml.safe_dump({**settings, "adapter": {"kl_weight": 0.1}}))
    assert peft_calib("train", "--config", file, "--method", "lora", "--output-dir", tmp_path / "run") is None
    assert "kl_weight is for bayesian-lora; left out" in " ".join(capsys.readouterr().out.split())
    told = peft_calib(
        "train", "--config", file, "--adapter-option", "kl_weights=1", "--output-dir", tmp_path / "other"
    )
    assert "BayesianLoraConfig has no field 'kl_weights'" in told


# ------------------------------------------------------------------ what the model and the rows decide


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (BertConfig(max_position_embeddings=100), 100),
        (RobertaConfig(max_position_embeddings=100, pad_token_id=1), 98),
        (RobertaConfig(max_position_embeddings=100, pad_token_id=0), 99),
        (GPT2Config(n_positions=100), 100),
        (OPTConfig(max_position_embeddings=100), 100),
        (T5Config(), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_rows_are_cut_to_the_positions_of_the_model(config, limit):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    tokenizer.model_max_length = 10**30
    assert position_limit(config, tokenizer, 256) == limit
    tokenizer.model_max_length = 64
    assert position_limit(config, tokenizer, 256) == 64


def test_long_rows_fit_the_model(quick, tmp_path, tiny_decoder_folder, capsys):
    """The answer of a multiple choice stands behind the question, and takes a position too."""
    rows = [row | {"question": " ".join([*WORDS * 20, row["question"]])} for row in task_rows("multiple-choice", 30)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    asked = ["train", "--task", "multiple-choice", "--data", data, "--model", tiny_decoder_folder]
    assert peft_calib(*asked, "--output-dir", tmp_path / "run") is None
    assert "rows are cut to 127 tokens instead of 256" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "run/config.json").read_text())["settings"]["max_length"] == 127


@pytest.mark.parametrize(("task", "limit"), [("seq-cls", 128), ("token-cls", 128), ("causal-lm", 128)])
def test_what_was_asked_for_is_cut_with_a_note(tiny_model_folder, task, limit):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    config = RunConfig(data="d", model=str(tiny_model_folder), task=task, max_length=129)
    found, notes = limits.settled(config, 100, tokenizer)
    assert found.max_length == limit
    assert len(notes) == 1
    assert limits.settled(found, 100, tokenizer) == (found, [])


def test_few_rows_are_passed_over_more_often():
    config = RunConfig(data="d", model="m")
    assert [epochs_for(rows, config) for rows in (1, 160, 320, 640, 10**6)] == [10, 10, 6, 3, 3]
    wider = RunConfig(data="d", model="m", gradient_accumulation_steps=2)
    assert epochs_for(640, wider) == epochs_for(320, config)


# ------------------------------------------------------------------ the most frequent class


def test_scores_of_the_most_frequent_class():
    known = MostFrequent.of(["a", "b"], [0, 0, 0, 1, -100])
    assert (known.answer, known.counts) == ("a", (3, 1))
    share = 4 / 6
    scores = known.scores([0, 0, 1, 0], ["accuracy", "nll", "brier"])
    assert scores["accuracy"] == 0.75
    assert scores["nll"] == pytest.approx(-(3 * np.log(share) + np.log(1 - share)) / 4)
    assert scores["brier"] == pytest.approx((3 * 2 * (1 - share) ** 2 + 2 * share**2) / 4)


@pytest.mark.parametrize(
    ("right", "told"), [(50, "no better than"), (60, "no better than"), (65, "cannot tell"), (90, None)]
)
def test_a_run_is_told_that_it_does_not_beat_it(right, told):
    labels = np.array([0] * 60 + [1] * 40)
    answers = labels.copy()
    answers[: 100 - right] = 1 - answers[: 100 - right]
    verdict = MostFrequent(("yes", "no"), (5, 5)).verdict_of("it", np.eye(2)[answers], labels)
    assert verdict is None if told is None else told in verdict
    assert told is None or "'yes'" in verdict


def test_nobody_is_praised_who_has_not_learned(quick, tmp_path, tiny_model_folder, capsys):
    """Labels that have nothing to do with the texts, on rows and in a comparison."""
    rng = random.Random(3)
    rows = [{**row, "label": rng.choice(["up", "up", "down"])} for row in task_rows("seq-cls", 60)]
    data, test = write_jsonl(tmp_path / "rows.jsonl", rows[:40]), write_jsonl(tmp_path / "test.jsonl", rows[40:])
    for name in ("one", "two"):
        asked = [
            "--data",
            data,
            "--model",
            tiny_model_folder,
            "--learning-rate",
            "1e-6",
            "--output-dir",
            tmp_path / name,
        ]
        assert peft_calib("train", *asked, "--seed", int(name == "two")) is None
    assert "the most frequent class" in " ".join(capsys.readouterr().out.split())
    assert peft_calib("evaluate", tmp_path / "one", "--data", test) is None
    shown = " ".join(capsys.readouterr().out.split())
    assert "one is no better than always answering 'up', the most frequent class" in shown
    assert peft_calib("compare", tmp_path / "one", tmp_path / "two", "--data", test) is None
    shown = " ".join(capsys.readouterr().out.split())
    assert "most frequent class" in shown
    assert "one is no better than always answering 'up'" in shown
    assert "|" not in shown
