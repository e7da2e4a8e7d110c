"""`peft-calib train-head`: a head beside the adapter of a run, measured on rows that it has not seen."""

import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from command_line import QUICK, WORDS, peft_calib, read, sentences, write_csv, write_jsonl
from datasets import Dataset

from peft_calib import UncertaintyHead, load
from peft_calib.calibration.entities import spans_of
from peft_calib.runs.error_head import load_head, read_head, train_head
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.loading import FinishedRun

FAST = ["--lr", "1e-3", "--alpha", "0.1", "--beta", "0.01", "--epochs", "2"]


def noisy(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences whose class is as often another one."""
    rng = random.Random(seed)
    return [(text, rng.choice(["bad", "good"])) for text, _ in sentences(count, seed)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("noisy")
    return write_csv(place / "train.csv", noisy(160, 3)), write_csv(place / "test.csv", noisy(60, 4))


@pytest.fixture(scope="module")
def trained_runs(files, tiny_model_folder, tmp_path_factory):
    """Runs that are wrong often enough to learn from, trained once."""
    made: dict[str, Path] = {}

    def run(method: str, *further: object) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("head-runs") / method
            base = ["--data", files[0], "--model", tiny_model_folder, "--method", method, *QUICK, *further]
            given = ["--calibration-fraction", "0.5", "--epochs", "1", "--output-dir", made[method]]
            assert peft_calib("train", *base, *given) is None
        return made[method]

    return run


@pytest.fixture
def lora(trained_runs, tmp_path) -> Path:
    """A finished run of its own for a test that writes."""
    return Path(shutil.copytree(trained_runs("lora"), tmp_path / "lora"))


def test_a_head_is_written_beside_the_adapter_and_measured_with_the_run(lora, files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = (lora / "adapter" / "adapter_model.safetensors").read_bytes()
    without = evaluate_run(lora, data=str(files[1]), progress=False)
    assert "head" not in without.content["variants"]["mean"]
    assert peft_calib("train-head", lora, *FAST) is None
    told = " ".join(capsys.readouterr().out.split())
    assert "Fitted on 80 items" in told or "The base score stays" in told
    assert "uncertainty_head.safetensors and uncertainty_head.json" in told
    assert (lora / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert peft_calib("evaluate", lora, "--data", files[1]) is None
    shown = capsys.readouterr().out
    assert "1 - P(error)" in shown and "base score (entropy)" in shown and "error_auroc" in shown
    assert "## Uncertainty head" in next(lora.glob("evaluation/*/report.md")).read_text()
    content = json.loads(next(lora.glob("evaluation/*/report.json")).read_text())
    found = content["variants"]["mean"]["head"]
    assert found["error_probability"]["settings"]["num_rows"] == 60
    for part in ("error_probability", "base"):
        for key in ("error_auroc", "aurc"):
            low, high = found[part]["intervals"][key]
            assert low <= found[part][key] <= high
    assert found["errors"] == round(60 * (1 - content["variants"]["mean"]["before"]["accuracy"]))
    for key in ("nll", "ece", "accuracy"):  # the run's own numbers stay as they were
        assert content["variants"]["mean"]["before"][key] == without.content["variants"]["mean"]["before"][key]


def test_what_an_evaluation_says_is_what_the_head_answers(lora, files):
    train_head(lora, fit_on="cross", lr=(1e-3,), alpha=(0.1,), beta=(0.01,), epochs=(2,), progress=False)
    found = evaluate_run(lora, data=str(files[1]), progress=False).content["variants"]["mean"]["head"]
    run = FinishedRun.load(lora)
    head, variant = load_head(run)
    assert variant == "mean"
    rows = run.task.encode_prediction(run.task.canonical(read(files[1]), "test", "train"), run.tokenizer)
    answer = UncertaintyHead.from_pretrained(lora / "adapter").predict(run.model, rows, tokenizer=run.tokenizer)
    wrong = answer.predicted != torch.tensor(rows["labels"][:])
    assert found["errors"] == int(wrong.sum())
    brier = ((answer.error_probability - wrong.double()) ** 2).mean()
    assert found["error_probability"]["brier"] == pytest.approx(float(brier), abs=1e-6)
    assert head.stored.report == UncertaintyHead.from_pretrained(lora / "adapter").report


def test_another_head_makes_an_evaluation_anew(lora, files):
    one = {"epochs": (1,), "lr": (1e-3,), "alpha": (0.1,), "beta": (0.01,)}
    train_head(lora, progress=False, **one)
    first = evaluate_run(lora, data=str(files[1]), progress=False).content
    train_head(lora, progress=False, score="sr_norm", overwrite=True, **one)
    second = evaluate_run(lora, data=str(files[1]), progress=False).content
    assert first["identity"]["uncertainty_head"] != second["identity"]["uncertainty_head"]
    assert second["variants"]["mean"]["head"]["score"] == "sr_norm"


def test_training_rows_are_fitted_on_where_a_paper_does(lora):
    found = train_head(lora, paper="v2", progress=False, lr=(1e-3,), alpha=(0.1,), beta=(0.1,), epochs=(1,))
    assert found.head.report.split == "train" and found.head.report.num_fit == 80
    again = train_head(lora, paper="v2", fit_on="validation", progress=False, epochs=(1,), overwrite=True)
    assert again.head.report.split == "validation"


@pytest.mark.parametrize(
    ("method", "further", "functions", "place"),
    [
        ("ensemble-lora", [], 2, "adapter"),
        ("ensemble", ["--members", 2], 2, "."),
    ],
)
def test_a_head_is_for_the_draws_where_there_are_some(trained_runs, files, method, further, functions, place):
    run = trained_runs(method, *further)
    assert peft_calib("train-head", run, "--overwrite", *FAST) is None
    assert (run / place / "uncertainty_head.json").is_file()
    content = evaluate_run(run, data=str(files[1]), progress=False).content
    assert content["variants"]["sample"]["head"]["functions"] == functions
    assert "head" not in content["variants"].get("mean", {})
    if method == "ensemble-lora":
        assert train_head(run, how="mean", overwrite=True, progress=False, epochs=(1,)).variant == "mean"
        mean = evaluate_run(run, data=str(files[1]), progress=False).content["variants"]
        assert "head" in mean["mean"] and "head" not in mean["sample"]


def test_a_head_of_a_tagger_is_measured_by_tokens_entities_and_sentences(tiny_model_folder, tmp_path):
    rng = random.Random(0)

    def tagged(count: int) -> list[dict]:
        rows = []
        for _ in range(count):
            words = rng.choices(WORDS, k=5)
            rows.append({"tokens": words, "tags": [rng.choice(["O", "B-X", "I-X"]) for _ in words]})
        return rows

    data, test = write_jsonl(tmp_path / "train.jsonl", tagged(40)), write_jsonl(tmp_path / "test.jsonl", tagged(12))
    base = ["--data", data, "--model", tiny_model_folder, "--task", "token-cls", "--tags-column", "tags", *QUICK]
    out = tmp_path / "tagger"
    assert peft_calib("train", *base, "--output-dir", out, "--calibration-fraction", "0.5", "--epochs", "1") is None
    assert peft_calib("train-head", out, *FAST) is None
    content = evaluate_run(out, data=str(test), progress=False).content
    found = content["variants"]["mean"]["head"]
    assert found["error_probability"]["settings"]["num_rows"] == content["items"] == 60
    assert found["sentences"]["items"] == 12
    right = sum(len(spans_of(row["tags"])) for row in map(json.loads, test.read_text().splitlines()))
    entities = found.get("entities", {"items": 0, "errors": 0, "missed": right})
    assert entities["missed"] + entities["items"] - entities["errors"] == right
    own = content["variants"]["mean"]["entities"]  # without a head too
    if "after" in own:
        assert own["before"]["settings"]["num_true"] == right and own["after"]["types"][0]["name"] == "X"
        assert own["after"]["settings"]["num_found"] == entities["items"]
    # a prediction of the adapter says it of every entity, the largest of its words'
    given = [row["tokens"] for row in map(json.loads, test.read_text().splitlines())]
    answer = load(out, device="cpu").predict(given)
    run = FinishedRun.load(out)
    rows = run.task.canonical(Dataset.from_list([{"tokens": row, "tags": ["O"] * len(row)} for row in given]), "", "")
    features, errors = read_head(run, load_head(run)[0], rows, 0, False)
    assert torch.equal(features.items, answer.words.positions)
    torch.testing.assert_close(answer.words.error_probability, errors.error_probability, rtol=1e-5, atol=1e-6)
    found = [(row, one) for row, entities in enumerate(answer.entities) for one in entities]
    assert found and "P(error) by" in repr(answer)
    for row, one in found:
        words = errors.error_probability[5 * row + one["first"] : 5 * row + one["last"] + 1]
        assert one["error_probability"] == pytest.approx(float(words.max()), rel=1e-5)
    assert peft_calib("predict", out, "--data", test, "--output", tmp_path / "out.parquet") is None
    column = pq.read_table(tmp_path / "out.parquet")["entities"]
    assert [[one["error_probability"] for one in row] for row in column.to_pylist()] == [
        [pytest.approx(one["error_probability"], rel=1e-5) for one in row] for row in answer.entities
    ]
    (place,) = out.glob("evaluation/*")
    assert f"Entities: {own['told']}" in (place / "report.md").read_text()


def test_a_language_model_that_answers_with_a_letter_has_a_head(tiny_decoder_folder, tmp_path):
    rng = random.Random(1)

    def asked(count: int) -> list[dict]:
        return [
            {"question": " ".join(rng.choices(WORDS, k=4)), "choices": rng.sample(WORDS, 3), "label": rng.randrange(3)}
            for _ in range(count)
        ]

    data, test = write_jsonl(tmp_path / "train.jsonl", asked(80)), write_jsonl(tmp_path / "test.jsonl", asked(30))
    base = [
        "--data",
        data,
        "--model",
        tiny_decoder_folder,
        "--task",
        "multiple-choice",
        "--epochs",
        "1",
        "--rank",
        "2",
    ]
    given = ["--calibration-fraction", "0.5", "--target-modules", "q_proj", "--output-dir", tmp_path / "letters"]
    assert peft_calib("train", *base, *given) is None
    assert peft_calib("train-head", tmp_path / "letters", *FAST) is None
    content = evaluate_run(tmp_path / "letters", data=str(test), progress=False).content
    assert content["variants"]["mean"]["head"]["error_probability"]["settings"]["num_rows"] == 30


# ------------------------------------------------------------------------------------------- what is refused, and how


def test_a_head_is_replaced_only_where_that_is_asked_for(lora):
    assert peft_calib("train-head", lora, *FAST) is None
    assert "holds an uncertainty head; pass --overwrite" in peft_calib("train-head", lora, *FAST)


def test_what_cannot_be_fitted_is_refused_before_anything_is_read(lora, tmp_path):
    assert "holds no finished run" in peft_calib("train-head", tmp_path)
    assert "predicts with --how mean, got 'sample'" in peft_calib("train-head", lora, "--how", "sample")
    assert "--num-samples 3 is no number of draws" in peft_calib("train-head", lora, "--num-samples", "3")
    told = peft_calib("train-head", lora, "--fit-on", "test")
    assert "split" in told and "'test'" in told
    assert not (lora / "adapter" / "uncertainty_head.json").exists()


def test_rows_that_are_not_the_runs_any_more_are_refused(lora, files, tmp_path):
    settings = json.loads((lora / "config.json").read_text())
    settings["settings"]["data"] = str(tmp_path / "gone.csv")
    (lora / "config.json").write_text(json.dumps(settings))
    assert "name them with --data" in peft_calib("train-head", lora, *FAST)
    other = write_csv(tmp_path / "other.csv", noisy(160, 9))
    assert "does not hold the rows that the run was trained" in peft_calib("train-head", lora, "--data", other, *FAST)
    assert peft_calib("train-head", lora, "--data", files[0], *FAST) is None


def test_too_few_errors_keep_the_base_score_and_say_so(train, test_file, capsys):
    run = train("lora", name="sure")
    assert peft_calib("train-head", run) is None
    assert "The base score stays" in " ".join(capsys.readouterr().out.split())
    assert peft_calib("evaluate", run, "--data", test_file) is None
    assert "keeps the base score" in " ".join(capsys.readouterr().out.split())
