"""Every example runs as a user would copy it, with `--offline`: embedded rows, models small enough for seconds."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "hub_examples"
#: What an example prints, and what it leaves in its folder.
EXPECTED = {
    "sentiment_abstention": ("at most 20 % is wrong, with 95 % confidence", "run/run.json"),
    "multiple_choice_curve": ("9 points of the curve", "curve/adapter_model.safetensors"),
    "token_classification_hyper": (r"T = \d", "as-lora/adapter_model.safetensors"),
    "bayesianize_lora": (r"sample: NLL \d", "bayesian/predictor.json"),
    "generated_answers": (r"\d+ of 60 are answered", "p_correct.json"),
    "llm_judge": (r"\d+ of \d+ verdicts are kept", "judge/run.json"),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("minilm")]


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--offline", *arguments])
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code in (None, 0)  # noqa: PT017 - typer ends a script so


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs_offline(name, tmp_path, monkeypatch, capsys):
    run(name, ["--output-dir", str(tmp_path)], monkeypatch)
    said, file = EXPECTED[name]
    assert re.search(said, capsys.readouterr().out)
    assert (tmp_path / file).is_file()


def test_exported_draws_are_checked_and_the_command_that_serves_them_is_shown(tmp_path, monkeypatch, capsys):
    run("export_draws", ["--draws", str(tmp_path / "draws")], monkeypatch)
    shown = capsys.readouterr().out
    assert shown.count("logits within") == 3
    assert re.search(r"python hub_examples/serve_draws.py serve --base \S+ --draws \S+", shown)
    assert json.loads((tmp_path / "draws" / "draws.json").read_text())["draws"]


def test_two_processes_train_and_predict(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = [str(EXAMPLES / "multi_gpu.py"), "--offline", "--epochs", "1", "--output-dir", str(tmp_path)]
    done = subprocess.run([*launch, *example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 process(es), 40 rows, 8 draws") == 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_every_example_is_run_here_or_elsewhere():
    # tests/test_readme.py, tests/prediction/test_serving.py, tests/test_vllm_plugin.py
    elsewhere = {"sequence_classification", "serve_draws", "ask_uncertainty"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*EXPECTED, "export_draws", "multi_gpu", *elsewhere}
