"""The metrics as Spaces: what is pushed, and what its page starts with."""

import hashlib
import json
from pathlib import Path

import evaluate
import pytest
from hub_server import client_of_a_hub
from huggingface_hub import RepoCard

from peft_calib.cli import main
from peft_calib.hub import push_metric, write_space
from peft_calib.hub.spaces import PICTURE

METRICS = ("calibration", "decision", "selective_prediction", "uncertainty")


@pytest.fixture
def hub(monkeypatch):
    with client_of_a_hub(monkeypatch) as server:
        yield server


@pytest.mark.parametrize("name", METRICS)
def test_the_page_starts_with_a_measured_example_and_its_picture(name, tmp_path):
    folder = write_space(name, tmp_path / "space", repo_id=f"user/{name}")
    card = RepoCard.load(folder / "README.md")
    assert (card.data.sdk, card.data.app_file) == ("gradio", "app.py")
    start = card.text.partition("\n## ")[0]
    assert f"]({PICTURE})" in start
    assert "**An example.**" in start
    assert "cannot be measured" not in start
    assert start.count("\n```") == 2
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert "## Description" in card.text  # all of the metric card is there
    with pytest.raises(FileExistsError, match="not empty"):
        write_space(name, folder)


def test_a_space_is_pushed_in_one_commit_and_its_module_loads_under_the_repository_s_name(hub, tmp_path):
    told = push_metric("calibration", "user/how-sure", private=True)
    repository = hub.repositories["spaces/user/how-sure"]
    assert repository.private
    assert told.commit_url == f"{hub.url}/spaces/user/how-sure/commit/{told.oid}"
    files = hub.files("spaces/user/how-sure")
    assert set(files) == {"README.md", "app.py", "requirements.txt", "how-sure.py", PICTURE}
    for file, content in files.items():
        (tmp_path / "how-sure").mkdir(exist_ok=True)
        (tmp_path / "how-sure" / file).write_bytes(content)
    metric = evaluate.load(str(tmp_path / "how-sure"))
    assert metric.compute(predictions=[[0.9, 0.1], [0.2, 0.8]] * 10, references=[0, 1] * 10)["accuracy"] == 1.0

    picture = hashlib.sha256(files[PICTURE]).hexdigest()
    push_metric("calibration", "user/how-sure")  # the same again: equal bytes
    assert hashlib.sha256(hub.files("spaces/user/how-sure")[PICTURE]).hexdigest() == picture


def test_the_command_pushes_or_writes(hub, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["push-metric", "decision", "user/decision", "--create-pr", "--json"])
    assert stopped.value.code in (None, 0)
    assert json.loads(capsys.readouterr().out)["pull_request_url"].endswith("/discussions/1")
    with pytest.raises(SystemExit) as stopped:
        main(["push-metric", "uncertainty", "user/u", "--output-dir", str(tmp_path / "space")])
    assert stopped.value.code in (None, 0)
    assert (tmp_path / "space" / "u.py").is_file()
    assert not any("user/u" in name for name in hub.repositories)
    with pytest.raises(SystemExit) as stopped:
        main(["push-metric", "accuracy", "user/accuracy"])
    assert "No bundled metric is called 'accuracy'" in str(stopped.value.code)


def test_a_connection_that_is_cut_leaves_no_half_space(hub):
    hub.answer = lambda number, request: "cut" if "/commit/" in request else None
    with pytest.raises(Exception, match=r"(?i)connect|disconnect"):
        push_metric("calibration", "user/calibration")
    assert hub.files("spaces/user/calibration") == {}
    hub.answer = lambda number, request: None
    push_metric("calibration", "user/calibration")
    assert "app.py" in hub.files("spaces/user/calibration")


def test_the_bundled_modules_are_those_of_the_command():
    from peft_calib.cli.push_metric import METRICS as offered

    folders = {folder.name for folder in (Path(__file__).resolve().parents[2] / "metrics").iterdir()}
    assert set(offered) == set(METRICS) == {name for name in folders if not name.startswith("_") and "." not in name}
