"""From an adapter to the Hub and back: what arrives is what was there, with a card that says what was measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as constants
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hub_server import TOKEN
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from methods import METHODS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peft_calib as package
from peft_calib.calibration import TemperatureScaling, calibration_report
from peft_calib.cli import main
from peft_calib.hub import write_card
from peft_calib.hub.staging import _is_of_run
from peft_calib.identity import folder_digest
from peft_calib.provenance.companions import attach_recalibration
from peft_calib.provenance.splits import record_split
from peft_calib.runs.deciding import decide


def command(*arguments: object) -> None:
    """The command line, which ends with the status 0."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code in (0, None)


TEXTS = ["what a film", "a long story of two old friends", "rain"]
TARGETS = ["query", "value"]
#: How each method predicts here: so many draws, or its mean.
DRAWS = {"bayesian": 3, "hyper": None, "curve": 3, "ensemble-late": 3, "lora": None}


def answers(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([1.0, 1.0, 1.0], count)
    return p, np.array([rng.choice(3, p=row) for row in p])


def scaling_of_sharp_answers() -> TemperatureScaling:
    """Fitted to probabilities that are too sure by a factor of 1.7 in their logits."""
    p, labels = answers(2000)
    scaling = TemperatureScaling().fit(p**1.7 / (p**1.7).sum(1, keepdims=True), labels, input="probabilities")
    assert 1.5 < scaling.temperature < 1.9
    return scaling


def trained(folder, method: str = "bayesian") -> PeftModel:
    """An adapter far from zero on a saved base, with a temperature and a record of its rows."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS, init_lora_weights=False)
    if method != "lora":
        config = METHODS[method].config(task_type="SEQ_CLS", target_modules=TARGETS, init_weights=False)
    model = get_peft_model(base, config).eval()
    rows = [{"input_ids": [i, i + 1], "labels": 0} for i in range(3, 30)]
    record_split(model, trained_on=rows, calibrated_on=[{"input_ids": [5, i]} for i in range(10, 40)])
    scaling = scaling_of_sharp_answers()
    attach_recalibration(model, scaling.state(), num_samples=None, seed=0)
    return model


@pytest.fixture
def reports():
    p, labels = answers(300, seed=1)
    sharp = p**2 / (p**2).sum(1, keepdims=True)
    return {"before": calibration_report(sharp, labels), "after": calibration_report(p, labels)}


#: Run in a process of its own, where this package may be imported or not: answers of several repositories.
LOAD = """
import json, sys
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
names, texts = map(json.loads, sys.argv[2:])
found = {name: {} for name in names}
if sys.argv[1] == "ours":
    import peft_calib
    for name in names:
        found[name] = peft_calib.load(name).predict(texts).to_dataset().to_dict()
batch = AutoTokenizer.from_pretrained("user/base")(texts, return_tensors="pt", padding=True)
for name in names:
    if sys.argv[1] == "ours" or name == "user/lora":
        model = AutoPeftModelForSequenceClassification.from_pretrained(name).eval()
    else:
        base = AutoModelForSequenceClassification.from_pretrained("user/base", num_labels=3)
        model = PeftModel.from_pretrained(base, name, subfolder="lora").eval()
    with torch.no_grad():
        found[name]["logits"] = model(**batch).logits.tolist()
assert sys.argv[1] == "ours" or "peft_calib" not in sys.modules
print(json.dumps(found))
"""


def in_another_process(hub, tmp_path, *arguments: object) -> dict[str, dict[str, list]]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hub-cache"), "PYTHONWARNINGS": "ignore"}
    words = [word if isinstance(word, str) else json.dumps(word) for word in arguments]
    line = [sys.executable, "-c", LOAD, *words]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def phrases(count: int) -> list[str]:
    words = "a long film of old friends and rain that nobody saw again".split()
    return [" ".join(words[i % 7 : i % 7 + 2 + i % 5]) for i in range(count)]


def whole(folder: Path, base: Path, method: str) -> Path:
    """An adapter as a user has it in the end: with a head, a temperature and two decision rules for its draws."""
    model, tokenizer, draws = trained(base, method), AutoTokenizer.from_pretrained(base), DRAWS[method]
    texts = [text + f" {i}" for i, text in enumerate(phrases(160))]
    labels = np.random.default_rng(0).integers(0, 3, len(texts)).tolist()
    rows = Dataset.from_dict({**tokenizer(texts), "labels": labels}).select(range(60))
    settings = {"lr": (1e-2,), "epochs": 2, "alpha": (0.1,), "beta": (0.01,), "folds": 2, "keep_base": False}
    head = package.UncertaintyHead.fit(model, None, rows, tokenizer=tokenizer, num_samples=draws or 1, **settings)
    head.attach(model)
    attach_recalibration(model, scaling_of_sharp_answers().state(), num_samples=draws, seed=0)
    model.save_pretrained(folder)
    table = {"text": texts[60:], "label": [f"LABEL_{label}" for label in labels[60:]]}
    decide(folder, Dataset.from_dict(table), target_coverage=0.5, alpha=0.2, progress=False)
    return folder


@pytest.mark.slow
def test_from_the_hub_all_methods_answer_as_before_with_and_without_this_package(
    hub, tmp_path, tiny_model_folder, reports
):
    HfApi(token=TOKEN).create_repo("user/base")
    HfApi(token=TOKEN).upload_folder(repo_id="user/base", folder_path=tiny_model_folder)
    texts, expected, answered = phrases(12), {}, []
    batch = AutoTokenizer.from_pretrained(tiny_model_folder)(texts, return_tensors="pt", padding=True)
    for method in DRAWS:
        folder, name = whole(tmp_path / method, tiny_model_folder, method), f"user/{method}"
        told = package.push_to_hub(folder, name, report=reports, base_model="user/base")
        assert told.commit_url.startswith(hub.url)
        predictor = package.load(folder)
        expected[name] = predictor.predict(texts).to_dataset().to_dict()
        assert {"error_probability", "answered", "set"} <= set(expected[name])
        answered += expected[name]["answered"]
        with torch.no_grad():
            expected[name]["logits"] = predictor.model(**batch).logits.tolist()
        files = hub.files(name)
        assert ("lora/adapter_config.json" in files) == (method != "lora")
        config = json.loads(files["adapter_config.json"])
        assert config["base_model_name_or_path"] == "user/base"
        assert "import peft_calib" in config.get("how_to_load", "") or method == "lora"
        everything = b"".join(files.values())
        assert TOKEN.encode() not in everything and str(tiny_model_folder).encode() not in everything
    assert {True, False} == set(answered)
    assert in_another_process(hub, tmp_path, "ours", list(expected), texts) == expected
    found = in_another_process(hub, tmp_path, "stock", list(expected), texts)
    for name, one in found.items():  # a product of factors in the place of a law's own: other roundings
        assert np.allclose(one["logits"], expected[name]["logits"], atol=1e-5), name


@pytest.mark.parametrize("xet", [False, True])
def test_one_commit_replaces_an_earlier_push_and_nothing_else(
    hub, tmp_path, tiny_model_folder, reports, xet, monkeypatch
):
    if xet:
        pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    ranked = {"dataset": "user/rows", "benchmark_task": "main", "base_model": "user/base"}
    package.push_to_hub(trained(tiny_model_folder), "user/adapter", report=reports, **ranked)
    repository = hub.repositories["user/adapter"]
    assert ".eval_results/peft-calib-user-rows-main.yaml" in hub.files("user/adapter")
    assert repository.commits == 1 and xet == any(request.startswith("POST /xet/") for request in hub.requests)
    trained(tiny_model_folder).save_pretrained(tmp_path)
    weights = "adapter_model.safetensors"
    assert hub.files("user/adapter")[weights] == (tmp_path / weights).read_bytes()
    theirs = {"notes.txt", ".eval_results/other-bench.yaml"}
    repository.branches["main"].files.update(dict.fromkeys(theirs, b"somebody's own"))
    package.push_to_hub(trained(tiny_model_folder, "lora"), "user/adapter", base_model="user/base", private=True)
    files = hub.files("user/adapter")
    assert repository.commits == 2 and theirs <= set(files)
    assert {name for name in files if name.startswith(".eval_results/")} <= theirs
    assert not [name for name in files if name.startswith("lora/") or name.endswith(".png") or name == "report.json"]
    assert b"Not measured" in files["README.md"]


def test_branch_pull_request_and_private(hub, tiny_model_folder):
    model = trained(tiny_model_folder)
    package.push_to_hub(model, "user/one", base_model="user/base", private=True, revision="trial")
    assert hub.repositories["user/one"].private
    assert "README.md" in hub.files("user/one", "trial") and "README.md" not in hub.files("user/one")
    told = package.push_to_hub(model, "user/one", base_model="user/base", create_pr=True)
    assert told.pr_url and "README.md" not in hub.files("user/one")


def test_a_connection_cut_anywhere_leaves_nothing_half_pushed(hub, tmp_path, tiny_model_folder, reports):
    trained(tiny_model_folder, "lora").save_pretrained(tmp_path / "adapter")
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    options = {"report": reports["after"], "base_model": "user/base", "revision": "trial"}

    def push(name: str) -> None:
        hub.objects.clear()  # what lies there already is not sent again
        package.push_to_hub(tmp_path / "adapter", name, **options)

    push("user/whole")
    number_of_requests, whole = len(hub.requests), hub.files("user/whole", "trial")
    assert number_of_requests >= 10
    for cut in range(1, number_of_requests + 1):
        first = len(hub.requests)
        hub.answer = lambda number, request, at=first + cut: "cut" if number >= at else None
        with pytest.raises(Exception) as error:  # the client's own errors of a connection are of many kinds
            push(f"user/cut-{cut}")
        assert TOKEN not in str(error.value)
        found = hub.repositories.get(f"user/cut-{cut}")
        assert found is None or not any(commit.files for commit in found.branches.values()), cut
        assert {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    hub.answer = lambda number, request: None
    push(f"user/cut-{number_of_requests}")
    assert set(hub.files(f"user/cut-{number_of_requests}", "trial")) == set(whole)


def test_a_server_with_a_bad_minute_is_asked_again(hub, tiny_model_folder):
    failing = iter([503, 500, None, 502])
    hub.answer = lambda number, request: (
        next(failing, None) if "repos/create" in request or "commit" in request else None
    )
    package.push_to_hub(trained(tiny_model_folder), "user/adapter", base_model="user/base")
    assert "README.md" in hub.files("user/adapter")
    hub.answer = lambda number, request: 500 if "commit/main" in request else None
    with pytest.raises(HfHubHTTPError):
        package.push_to_hub(trained(tiny_model_folder), "user/adapter", base_model="user/base")


def test_two_pushes_at_once(hub, tiny_model_folder):
    def someone_else(number, request):
        if request == "POST /api/models/user/adapter/preupload/main":
            hub.repositories["user/adapter"].branches["main"].sha = "f" * 40
        return None

    hub.answer = someone_else
    with pytest.raises(ValueError, match="Somebody else pushed to user/adapter meanwhile"):
        package.push_to_hub(trained(tiny_model_folder), "user/adapter", base_model="user/base")
    assert hub.files("user/adapter") == {}


def test_a_commit_whose_answer_was_lost_is_told_as_made(hub, tiny_model_folder):
    lost = iter([True])
    hub.lost = lambda request: "commit/main" in request and next(lost, False)
    told = package.push_to_hub(trained(tiny_model_folder), "user/adapter", base_model="user/base")
    assert hub.repositories["user/adapter"].commits == 1
    assert told.oid == hub.repositories["user/adapter"].branches["main"].sha


def test_other_adapters_of_the_model_stay_at_home(hub, tiny_model_folder):
    model = trained(tiny_model_folder, "lora")
    model.add_adapter("private", LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS))
    package.push_to_hub(model, "user/adapter", base_model="user/base")
    assert not [name for name in hub.files("user/adapter") if "private" in name]
    assert str(tiny_model_folder).encode() not in b"".join(hub.files("user/adapter").values())


def test_a_head_of_other_weights_is_not_vouched_for(tmp_path, tiny_model_folder):
    model = trained(tiny_model_folder, "lora")
    rows = [{"input_ids": torch.randint(3, 64, (5,)), "labels": i % 3} for i in range(120)]
    head = package.UncertaintyHead.fit(model, None, rows)
    head.attach(model)
    write_card(model, tmp_path / "right", base_model="user/base")
    assert "P(error) of each answer" in (tmp_path / "right" / "README.md").read_text()
    detached = {name for name in os.listdir(tmp_path / "right") if name.startswith("uncertainty_head")}
    assert len(detached) == 2
    trained(tiny_model_folder, "bayesian").save_pretrained(tmp_path / "other")
    for name in detached:
        (tmp_path / "other" / name).write_bytes((tmp_path / "right" / name).read_bytes())
    with pytest.raises(ValueError, match="fitted for another adapter"):
        write_card(tmp_path / "other", tmp_path / "wrong", base_model="user/base")
    assert not (tmp_path / "wrong").exists()


def test_paths_of_this_machine_are_in_no_file(hub, tmp_path, tiny_model_folder):
    place = tmp_path / "zq_hidden"
    model = trained(tiny_model_folder)
    model.peft_config["default"].init_from = str(place)
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(place)
    about = json.loads((place / "tokenizer_config.json").read_text())
    about |= {"name_or_path": "../zq_hidden", "special_tokens_map_file": str(place / "x.json")}
    (place / "tokenizer_config.json").write_text(json.dumps(about))
    package.push_to_hub(place, "user/adapter", base_model="user/base")
    assert b"zq_hidden" not in b"".join(hub.files("user/adapter").values())


def test_a_plain_lora_that_lies_beside_an_adapter_may_be_of_earlier_weights(tmp_path, tiny_model_folder):
    """As in a folder that came from the Hub, was trained on and saved again; only a run says what its own is of."""
    place, weights = tmp_path / "adapter", "adapter_model.safetensors"
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(place)
    config = METHODS["bayesian"].config
    for seed in (0, 1):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder)
        model = get_peft_model(base, config(task_type="SEQ_CLS", target_modules=TARGETS, init_weights=False)).eval()
        model.save_pretrained(place)
        assert not _is_of_run(tmp_path, place)
        card = tmp_path / f"card-{seed}"
        write_card(place, card, base_model="user/base")
        package.export_lora(model, tmp_path / f"right-{seed}")
        found, right = (load_file(folder / weights) for folder in (card / "lora", tmp_path / f"right-{seed}"))
        assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
        shutil.copytree(card / "lora", place / "lora", dirs_exist_ok=True)
        if seed == 0:
            known = {"adapter_digests": {"adapter": folder_digest(place)}}
            (tmp_path / "run.json").write_text(json.dumps(known))
            assert _is_of_run(tmp_path, place)


def test_a_wrong_token_is_the_hubs_own_error(hub, tiny_model_folder):
    with pytest.raises(HfHubHTTPError) as error:
        package.push_to_hub(trained(tiny_model_folder), "user/a", base_model="user/base", token="hf_wrong")
    assert "hf_wrong" not in str(error.value)


def test_a_folder_of_this_machine_is_no_base_model(hub, tiny_model_folder):
    with pytest.raises(ValueError, match=r"nobody else can load.*base_model="):
        package.push_to_hub(trained(tiny_model_folder), "user/adapter")
    assert hub.requests == []


def test_a_run_brings_its_evaluations(hub, tmp_path, tiny_model_folder):
    moods = (("dull", "down"), ("fine", "up"))
    rows = [{"text": f"{word} film number {i}", "label": label} for i in range(40) for word, label in moods]
    lines = [json.dumps(row) for row in rows]
    data, elsewhere = tmp_path / "zoo", tmp_path / "another.jsonl"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(lines[:60]))
    (data / "test.jsonl").write_text("\n".join(lines[60:]))
    elsewhere.write_text("\n".join(lines[60:]).replace("film", "book"))
    run = tmp_path / "run"
    command(
        "train", "--data", data, "--model", tiny_model_folder, "--method", "ensemble-lora",
        "--epochs", "1", "--output-dir", run,
    )  # fmt: skip
    command("evaluate", run)
    command("evaluate", run, "--data", elsewhere)
    assert command("card", run, "--base-model", "user/base", "--output-dir", tmp_path / "card") is None
    assert command("push", run, "user/films", "--base-model", "user/base", "--license", "mit") is None
    files = hub.files("user/films")
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and "down, up" in card.text
    # its own rows come first, whatever they are called
    splits = list(dict.fromkeys(result.dataset_split for result in card.data.eval_results))
    assert splits[0] != "another" and splits[1:] == ["another"]
    assert {"report.json", "reliability.png", "risk_coverage.png", "lora/adapter_config.json"} <= set(files)
    assert str(tmp_path) not in b"".join(files.values()).decode("utf-8", "ignore")
    local = (tmp_path / "card" / "README.md").read_text()
    assert local.replace("user/name", "user/films").split("\n---\n")[1] == card.content.split("\n---\n")[1].replace(
        "# films", "# name"
    )


def test_a_card_is_written_to_look_at(tmp_path, tiny_model_folder, reports):
    about = {"base_model": "user/base", "dataset": "nyu-mll/glue", "benchmark_task": "sst2", "examples": ["a text"]}
    card = write_card(trained(tiny_model_folder), tmp_path / "out", report=reports, license="mit", **about)
    assert card == tmp_path / "out" / "README.md"
    (entry,) = yaml.safe_load(next((tmp_path / "out" / ".eval_results").iterdir()).read_text())
    assert entry["dataset"] == {"id": "nyu-mll/glue", "task_id": "sst2"}
    assert entry["value"] == pytest.approx(reports["after"]["accuracy"])
    with pytest.raises(FileExistsError):
        write_card(trained(tiny_model_folder), tmp_path / "out", **about)
    with pytest.raises(TypeError, match="licence"):
        write_card(trained(tiny_model_folder), tmp_path / "two", licence="mit")


def test_a_head_is_not_uploaded_beside_another_adapter(hub, tmp_path):
    from peft_calib import UncertaintyHead
    from peft_calib.uncertainty_head import HeadSettings
    from peft_calib.uncertainty_head.asked import Asked, Belonging
    from peft_calib.uncertainty_head.report import HeadReport
    from peft_calib.uncertainty_head.stored import StoredHead

    files = {name: adapter_folder(tmp_path / name, seed) for seed, name in enumerate(("own", "other"))}
    report = HeadReport("cross", 0, 0, 0, 0, "no errors", None, (), None, "")

    def head(name: str) -> UncertaintyHead:
        belongs = Belonging((folder_digest(files[name]),), None, "")
        return UncertaintyHead(StoredHead(HeadSettings(), Asked(), belongs, None, None, None, report))

    head("own").push_to_hub("me/new", token=TOKEN)  # there is nothing to hold it against
    HfApi(token=TOKEN).upload_folder(repo_id="me/new", folder_path=files["own"])
    head("own").push_to_hub("me/new", token=TOKEN)
    before = dict(hub.files("me/new"))
    with pytest.raises(ValueError, match="head for me/new was fitted for another adapter than lies there now"):
        head("other").push_to_hub("me/new", token=TOKEN)
    assert hub.files("me/new") == before
    with pytest.warns(UserWarning, match="another adapter than lies there"):
        UncertaintyHead(head("other").stored, allow_other=True).push_to_hub("me/new", token=TOKEN)


def adapter_folder(folder, seed: int):
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config).save_pretrained(folder)
    return folder
