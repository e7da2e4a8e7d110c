"""Multiple choice, token classification and language modelling: what is encoded, and runs from end to end."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import QUICK, WORDS, peft_calib, write_jsonl
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from huggingface_hub import ModelCard
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_calib import CurveLoraConfig, curve_at
from peft_calib.calibration import entities_report, find_entities
from peft_calib.hub import write_card
from peft_calib.prediction import predict
from peft_calib.runs.entities import entities_in
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.loading import FinishedRun, read_record
from peft_calib.runs.rows import load_run_rows, load_test_rows
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.stage import load_tokenizer
from peft_calib.runs.tasks import TASK_CLASSES
from peft_calib.runs.text_scores import _scored

DECODER = ["--target-modules", "q_proj", "--target-modules", "v_proj"]


def config(model, task, **further) -> RunConfig:
    return RunConfig(data="rows", model=str(model), task=task, **further)


def choice_rows(count, seed=0):
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        choices = rng.sample(WORDS, 3 if number % 5 else 2)
        label = rng.randrange(len(choices))
        rows.append(
            {"question": f"which word number {number} is {choices[label]}", "choices": choices, "label": label}
        )
    return rows


def tagged_rows(count, seed=0):
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = [*rng.choices(WORDS, k=rng.randint(3, 6)), str(number)]
        rows.append(
            {"tokens": words, "tags": ["NUM" if w.isdigit() else "LONG" if len(w) > 4 else "O" for w in words]}
        )
    return rows


def decoder_run(tmp_path, model, data, task, *further):
    base = ["--data", data, "--model", model, "--task", task, "--batch-size", 8, "--rank", 2]
    assert peft_calib("train", "--output-dir", tmp_path / "run", *base, *further) is None
    return tmp_path / "run"


# ------------------------------------------------------------------ rows that are cut

#: Of each task, a row of so many words; one of three is cut at 8 tokens.
LONG = {
    "seq-cls": (["text"], lambda n: {"text": "river " * n, "label": "ab"[n % 2]}),
    "rerank": (["text", "other"], lambda n: {"text": "river", "other": "river " * n, "label": n % 2}),
    "multi-label": (["text"], lambda n: {"text": "river " * n, "label": "a|b" if n % 2 else "a"}),
    "regression": (["text"], lambda n: {"text": "river " * n, "label": float(n)}),
    "token-cls": (["text"], lambda n: {"tokens": ["river"] * n, "tags": (["O", "B-X"] * n)[:n]}),
    "causal-lm": (["text"], lambda n: {"text": "river " * n}),
    "multiple-choice": (["text"], lambda n: {"question": "river " * n, "choices": ["a", "b"], "label": n % 2}),
}


@pytest.mark.parametrize("task", LONG)
def test_rows_that_lose_an_end_are_counted_in_every_task(task, tiny_model_folder, tiny_decoder_folder):
    columns, row = LONG[task]
    decodes = task in ("causal-lm", "multiple-choice")
    settings = config(tiny_decoder_folder if decodes else tiny_model_folder, task, text_column=columns)
    rows = Dataset.from_list([row(n) for n in (2, 3, 30)])
    learned = TASK_CLASSES[task].learn(settings, rows)
    canonical, tokenizer = learned.canonical(rows, "rows", "train"), load_tokenizer(settings)
    whole = [len(ids) for ids in learned.encode_prediction(canonical, tokenizer)["input_ids"]]
    for limit in (whole[1] - 1, whole[1], whole[1] + 1, whole[2] - 1, whole[2], 256):
        short = replace(learned, config=replace(learned.config, max_length=limit))
        ids = short.encode_prediction(canonical, tokenizer)["input_ids"][:]
        assert short.num_cut(canonical, ids, tokenizer) == sum(size > limit for size in whole), limit


# ------------------------------------------------------------------ multiple choice


@pytest.fixture(scope="module")
def choices(tiny_decoder_folder):
    rows = Dataset.from_list(choice_rows(20))
    task = TASK_CLASSES["multiple-choice"].learn(config(tiny_decoder_folder, "multiple-choice"), rows)
    return task, task.canonical(rows, "rows", "train"), AutoTokenizer.from_pretrained(tiny_decoder_folder)


def test_the_loss_is_over_the_answer_alone(choices):
    task, rows, tokenizer = choices
    answers = task.answer_tokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens(answers) == ["a", "b", "c"]  # an uncased vocabulary
    for row, encoded in zip(rows, task.encode_training(rows, tokenizer), strict=True):
        *before, last = encoded["labels"]
        assert set(before) == {-100}
        assert last == encoded["input_ids"][-1] == answers[row["label"]]
        assert len(encoded["labels"]) == len(encoded["input_ids"]) == len(encoded["attention_mask"])


def test_training_and_prediction_ask_the_same(choices, tiny_decoder_folder):
    """The model's loss on the training row is that of the predicted distribution over the vocabulary."""
    task, rows, tokenizer = choices
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder_folder).eval()
    batch = task.collator(tokenizer)(list(task.encode_training(rows, tokenizer)))
    prompts = list(task.encode_prediction(rows, tokenizer))
    padded = tokenizer.pad([{k: p[k] for k in ("input_ids", "attention_mask")} for p in prompts], return_tensors="pt")
    prediction = predict(model, dict(padded), "mean")
    answers = torch.tensor(task.answer_tokens(tokenizer))[[p["labels"] for p in prompts]]
    expected = -prediction.probabilities[torch.arange(len(rows)), answers].log().mean()
    torch.testing.assert_close(model(**batch).loss.detach(), expected, atol=1e-4, rtol=1e-4)


def test_the_prompt_shows_the_question_and_lettered_choices(choices):
    task, *_ = choices
    assert task.prompt("which one", ["this", "that"]) == "which one\nA. this\nB. that\nAnswer:"


def test_a_long_prompt_keeps_its_end(choices, tiny_decoder_folder):
    _, _, tokenizer = choices
    rows = Dataset.from_list([{"question": "very " * 200 + "last", "choices": ["one", "two"], "label": "B"}])
    task = TASK_CLASSES["multiple-choice"].learn(config(tiny_decoder_folder, "multiple-choice", max_length=24), rows)
    (encoded,) = task.encode_prediction(task.canonical(rows, "rows", "train"), tokenizer)
    assert len(encoded["input_ids"]) == 24
    assert "last a. one b. two answer :" in tokenizer.decode(encoded["input_ids"])
    assert tokenizer.truncation_side == "right"


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "q", "choices": ["x", "y"], "label": label} for label in (1, 0)],
        [{"question": "q", "choices": ["x", "y"], "label": label} for label in ("B", "A")],
        [{"question": "q", "choices": ["x", "y"], "label": label} for label in ("1", "0")],
        [{"question": "q", "choices": ["x", "y"], "label": label} for label in ("y", "x")],
        [
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "label": mark}
            for mark in ("2", "1")
        ],
    ],
    ids=["positions", "letters", "digits", "texts", "marks"],
)
def test_the_right_choice_may_be_named_in_every_usual_way(tiny_decoder_folder, rows):
    data = Dataset.from_list(rows)
    task = TASK_CLASSES["multiple-choice"].learn(config(tiny_decoder_folder, "multiple-choice"), data)
    canonical = task.canonical(data, "rows", "train")
    assert canonical["label"][:] == [1, 0]
    assert canonical["choices"][:] == [["x", "y"], ["x", "y"]]


def test_one_column_a_choice(tiny_decoder_folder):
    data = Dataset.from_dict({"question": ["q"], "option1": ["x"], "option2": ["y"], "label": [1]})
    settings = config(tiny_decoder_folder, "multiple-choice", choices_column=["option1", "option2"])
    task = TASK_CLASSES["multiple-choice"].learn(settings, data)
    assert task.canonical(data, "rows", "train")["choices"][:] == [["x", "y"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 2}, "position of one of its 2 choices"),
        ({"label": "none"}, "position of one of its 2 choices"),
        ({"label": 0.5}, "position of one of its 2 choices"),
        ({"choices": ["x"]}, "at least two texts"),
        ({"choices": "x"}, "at least two texts"),
        ({"question": " "}, "has no question"),
    ],
)
def test_rows_that_are_no_questions(tiny_decoder_folder, row, message):
    data = Dataset.from_list([{"question": "q", "choices": ["x", "y"], "label": 0} | row])
    task = TASK_CLASSES["multiple-choice"]
    with pytest.raises(ValueError, match=message):
        task.learn(config(tiny_decoder_folder, "multiple-choice"), data).canonical(data, "rows", "train")


@pytest.mark.parametrize("task", ["multiple-choice", "causal-lm"])
def test_an_encoder_is_refused(tiny_model_folder, task):
    rows = Dataset.from_list(choice_rows(3)).add_column("text", ["x"] * 3)
    with pytest.raises(ValueError, match=r"no causal language model.*seq-cls"):
        TASK_CLASSES[task].learn(config(tiny_model_folder, task), rows)


@pytest.mark.parametrize("prompt", ["{question}", "{choices} {else} {question}", "no place"])
def test_a_prompt_shows_what_is_asked(tiny_decoder_folder, prompt):
    with pytest.raises(ValueError, match="prompt"):
        TASK_CLASSES["multiple-choice"].learn(
            config(tiny_decoder_folder, "multiple-choice", prompt=prompt), Dataset.from_list(choice_rows(3))
        )


def test_multiple_choice_run(tmp_path, tiny_decoder_folder):
    data = write_jsonl(tmp_path / "questions.jsonl", choice_rows(60))
    further = ["--method", "bayesian-lora", "--num-samples", 2, "--test-fraction", 0.3, "--epochs", 1, *DECODER]
    run = decoder_run(tmp_path, tiny_decoder_folder, data, "multiple-choice", *further)
    settings = json.loads((run / "adapter/adapter_config.json").read_text())
    rows = json.loads((run / "run.json").read_text())["rows"]
    assert settings["num_train_examples"] == rows["train"]  # one answer token a row
    assert peft_calib("evaluate", run) is None
    found = evaluate_run(run, progress=False)
    assert found.content["rows"] == 60 - rows["train"] - rows["calibration"]
    assert found.content["variants"]["sample"]["after"]["settings"]["num_classes"] == 3
    loaded = FinishedRun.load(run)
    assert loaded.task.labels.names == ("A", "B", "C")


# ------------------------------------------------------------------ token classification


def test_a_tag_sits_at_the_first_token_of_its_word(tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    rows = Dataset.from_list([{"tokens": ["caterpillarish", "in", "rivers"], "tags": ["X", "O", "X"]}])
    task = TASK_CLASSES["token-cls"].learn(config(tiny_model_folder, "token-cls"), rows)
    assert task.labels.names == ("O", "X")
    (encoded,) = task.encode_training(task.canonical(rows, "rows", "train"), tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert sum(piece.startswith("##") for piece in pieces) >= 1  # the first word has several tokens
    tags = dict(zip(pieces, encoded["labels"], strict=True))
    first = pieces[1]
    assert [piece for piece, tag in tags.items() if tag != -100] == [first, "in", "rivers"]
    assert (tags[first], tags["in"], tags["rivers"]) == (1, 0, 1)


def test_a_byte_level_tokenizer_sees_words(tiny_roberta_folder):
    rows = Dataset.from_list([{"tokens": ["weather", "seen"], "tags": ["X", "O"]}])
    task = TASK_CLASSES["token-cls"].learn(config(tiny_roberta_folder, "token-cls"), rows)
    tokenizer = load_tokenizer(task.config)
    (encoded,) = task.encode_training(task.canonical(rows, "rows", "train"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == ["<s>", "Ġweather", "Ġseen", "</s>"]
    assert encoded["labels"] == [-100, 1, 0, -100]


def test_declared_tags_keep_their_names(tiny_model_folder):
    features = Features({"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["O", "PER"]))})
    rows = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[1, 0]]}, features=features)
    task = TASK_CLASSES["token-cls"].learn(config(tiny_model_folder, "token-cls"), rows)
    assert task.labels.names == ("O", "PER")
    assert task.canonical(rows, "rows", "train")["labels"][:] == [[1, 0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 tags"),
        ({"tokens": [], "tags": []}, "has the words"),
        ({"tokens": ["a"], "tags": ["new"]}, "has the label 'new'; known are O, X"),
    ],
)
def test_rows_that_are_not_tagged_well(tiny_model_folder, row, message):
    good = Dataset.from_list([{"tokens": ["a", "b"], "tags": ["O", "X"]}])
    task = TASK_CLASSES["token-cls"].learn(config(tiny_model_folder, "token-cls"), good)
    with pytest.raises(ValueError, match=message):
        task.canonical(Dataset.from_list([*good, row]), "rows", "train")


def test_token_classification_run(tmp_path, tiny_model_folder):
    data = write_jsonl(tmp_path / "tagged.jsonl", tagged_rows(50))
    base = ["--data", data, "--model", tiny_model_folder, "--task", "token-cls", "--learning-rate", "2e-2", *QUICK]
    ensemble = ["--method", "ensemble", "--members", 2, "--test-fraction", 0.3]
    assert peft_calib("train", "--output-dir", tmp_path / "one", *base, *ensemble) is None
    assert peft_calib("train", "--output-dir", tmp_path / "two", *base, "--test-fraction", 0.3) is None
    one = evaluate_run(tmp_path / "one", progress=False)
    two = evaluate_run(tmp_path / "two", progress=False)
    words = sum(len(row["tokens"]) for row in FinishedRun.load(tmp_path / "one").task.canonical(
        Dataset.from_list(tagged_rows(50)), "rows", "train"))  # fmt: skip
    assert one.content["items"] == two.content["items"] < words
    assert one.content["rows"] == 15
    run = FinishedRun.load(tmp_path / "one")
    rows = load_test_rows(run.task, read_record(run.folder, run.task)).rows
    found = run.predict(rows, "sample", 2, progress=False)
    tags = run.task.labels.names
    expected = find_entities(found.sample_probabilities, tags, found.positions[:, 0], found.labels)
    entities = one.content["variants"]["sample"]["entities"]
    for key, value in entities_report(expected, confidence_level=None).items():
        assert entities["before"][key] == pytest.approx(value, abs=1e-6), key
    assert {row["name"] for row in entities["after"]["types"]} == {"NUM", "LONG"}
    assert "Report of entities" not in (one.folder / "report.html").read_text()  # a part of the page
    assert "<h2>Types</h2>" in (one.folder / "report.html").read_text()
    assert peft_calib("compare", tmp_path / "one", tmp_path / "two", "--every-pair") is None
    fresh = tagged_rows(20, seed=9)
    long = [{"tokens": row["tokens"] * 100, "tags": row["tags"] * 100} for row in fresh[:2]]
    cut = evaluate_run(
        tmp_path / "two", data=write_jsonl(tmp_path / "long.jsonl", [*fresh[2:], *long]), progress=False
    )
    assert two.content["rows_cut"] == two.content["words_lost"] == 0 and cut.content["rows_cut"] == 2
    assert cut.content["words_lost"] == sum(len(row["tags"]) for row in [*fresh[2:], *long]) - cut.content["items"] > 0
    lost = f"{cut.content['words_lost']} tagged word(s) have no answer"
    text = (cut.folder / "report.md").read_text()
    assert "2 row(s) are longer than what the run reads, and were cut" in text and lost in text
    assert "20 rows; 2 of them cut to 128 tokens, as in training" in (cut.folder / "report.html").read_text()
    assert "were cut" not in (two.folder / "report.md").read_text()
    assert "tokens, as in training" not in (two.folder / "report.html").read_text()


def test_a_tagger_that_finds_nothing_still_has_its_entities_told():
    run = SimpleNamespace(task=SimpleNamespace(labels=SimpleNamespace(names=("O", "X"))))
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    prediction = SimpleNamespace(positions=torch.tensor([[0, 0], [1, 0]]), sample_probabilities=p[None])
    found, page, _ = entities_in(run, prediction, p.numpy(), np.array([1, 0]), 0)
    assert "1 are there" in found["entities"]["told"] and "probability to measure" in page
    assert found["entities"]["before"]["recall"] == 0.0 and "ece" not in found["entities"]["after"]
    none, page, _ = entities_in(run, prediction, p.numpy(), np.array([0, 0]), 0)
    assert none == {"entities": {"told": "there is none in these sentences, and none is found."}} and page == ""


# ------------------------------------------------------------------ language modelling


def test_language_modelling_run(tmp_path, tiny_decoder_folder):
    rng = random.Random(0)
    texts = [{"text": " ".join([*rng.choices(WORDS, k=8), str(number)])} for number in range(80)]
    data = write_jsonl(tmp_path / "texts.jsonl", texts)
    further = ["--method", "bayesian-lora", "--num-samples", 2, "--test-fraction", 0.25, "--epochs", 2]
    further += [*DECODER, "--learning-rate", "3e-2", "--adapter-option", "kl_weight=0.01"]
    run = decoder_run(tmp_path, tiny_decoder_folder, data, "causal-lm", *further)
    loaded = FinishedRun.load(run)
    tokens = json.loads((run / "adapter/adapter_config.json").read_text())["num_train_examples"]
    count = json.loads((run / "run.json").read_text())["rows"]["train"]
    assert 8 * count < tokens < 16 * count  # target tokens, not rows

    found = evaluate_run(run, progress=False)
    assert peft_calib("evaluate", run) is None
    assert found.content["rows"] == 20
    report = found.content["variants"]["mean"]["before"]
    low, high = report["intervals"]["perplexity"]
    assert low <= report["perplexity"] <= high
    assert np.isclose(report["perplexity"], np.exp(report["nll"]))
    # the model's own loss on the same texts, weighted by their tokens
    held_out = held_out_rows(loaded)
    encoded = loaded.task.encode_prediction(held_out, loaded.tokenizer)
    total = count = 0
    for row in encoded:
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            number = sum(label != -100 for label in row["labels"])
            total += float(loaded.model(**batch).loss) * number
            count += number
    assert found.content["items"] == count
    assert np.isclose(report["nll"], total / count, rtol=1e-5)
    assert "no classes to compare" in peft_calib("compare", run, copy_of(run, tmp_path))
    # no temperature near the fitted one has a smaller loss on the calibration texts
    _, rows = load_run_rows(loaded.task.config)
    fit = loaded.temperature_fit("mean")
    fitted = fit["fitted"]
    encoded = loaded.task.encode_prediction(rows.calibration, loaded.tokenizer)
    with torch.no_grad():
        logits = [loaded.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double() for row in encoded]
    targets = torch.cat([torch.tensor(row["labels"][1:]) for row in encoded])
    assert 0.01 < fitted < 10  # not at a bound
    losses = [cross_entropy(torch.cat(logits) / (fitted * factor), targets) for factor in (0.97, 1.0, 1.03)]
    assert losses[1] == min(losses)
    # its card has what was measured of it, and no pictures
    write_card(run, tmp_path / "card", base_model="user/base")
    card = ModelCard((tmp_path / "card" / "README.md").read_text())
    told = {one.metric_type: one.metric_value for one in card.data.eval_results if "2 draws" in one.metric_name}
    assert told == {
        key: found.content["variants"]["sample"]["after"][key] for key in ("nll", "perplexity", "accuracy")
    }
    assert "| perplexity |" in card.text and ".png" not in card.text
    assert fit["low"] <= fitted <= fit["high"]
    used = fitted if fit["applied"] else 1.0
    assert found.content["variants"]["mean"]["temperature"] == loaded.text_temperature("mean") == used


def test_texts_are_scored_at_the_points_of_a_curve(tiny_decoder):
    """Its points come one after the other, and are those of one prediction all the same."""
    model = get_peft_model(tiny_decoder(), CurveLoraConfig(r=2, num_anchors=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    ids = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    task = SimpleNamespace(
        encode_prediction=lambda rows, _: rows,
        collator=lambda _: torch.utils.data.default_collate,
        config=SimpleNamespace(batch_size=2),
    )
    run = SimpleNamespace(model=model, task=task, tokenizer=None, adapter_names=("adapter",))
    tokens, _, loss = _scored(run, rows, "sample", 3, 0, np.ones(1)).T
    with torch.no_grad(), curve_at(model, [0.0, 0.5, 1.0]):
        p = model(input_ids=ids).logits[:, :-1].softmax(-1).unflatten(0, (3, 4)).mean(0)
    assert (tokens == 5).all()
    expected = -p.gather(-1, ids[:, 1:, None]).log().sum((1, 2))
    np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-5)


def held_out_rows(run):
    from peft_calib.runs.loading import read_record
    from peft_calib.runs.rows import load_test_rows

    return load_test_rows(run.task, read_record(run.folder, run.task)).rows


def copy_of(run, tmp_path):
    import shutil

    return shutil.copytree(run, tmp_path / "copy")
