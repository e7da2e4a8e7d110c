"""What the README says is true: its code runs as printed, its commands exist, its status table is honest."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import peft_calib
import peft_calib.calibration
import peft_calib.trainer_callbacks
from peft_calib.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def run(arguments: list, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_code_runs_as_printed(tmp_path, minilm):
    (code,) = blocks("python")
    (tmp_path / "example.py").write_text(code)
    done = run(["example.py"], tmp_path)
    assert "ece" in done.stdout.lower()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "as-lora" / "adapter_model.safetensors").is_file()
    assert list((tmp_path / "out").glob("reliability_*.png"))


def test_code_is_short():
    (code,) = blocks("python")
    statements = [line for line in code.splitlines() if line and not line.startswith(("import", "from", " ", ")"))]
    assert len(statements) <= 16


def test_commands_exist():
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    command_line = typer.main.get_command(app)
    assert len(commands) > 4
    for words in map(shlex.split, filter(None, commands)):
        if words[0] == "make":
            assert words[1] in targets
        else:
            assert words[0] == "peft-calib"
            known = {option for parameter in command_line.commands[words[1]].params for option in parameter.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= known


def test_links_and_files_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
    for name in re.findall(r"`((?:hub_examples|docs|benchmarks)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_status_table_is_honest():
    rows = re.findall(r"^\| (`[^|]+`) \| (yes|not yet) \|", README, flags=re.MULTILINE)
    assert rows
    homes = (peft_calib, peft_calib.calibration, peft_calib.trainer_callbacks)
    for names, status in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert any(hasattr(home, name) for home in homes) == (status == "yes"), (
                f"{name} is said to be there: {status}"
            )


@pytest.mark.slow
def test_example_script_on_own_model_and_data(tmp_path, tiny_model_folder):
    rows = "".join(
        f"{'fine' if i % 2 else 'poor'} weather on day {i},{'up' if i % 2 else 'down'}\n" for i in range(80)
    )
    (tmp_path / "rows.csv").write_text("review,mood\n" + rows)
    script = [ROOT / "hub_examples" / "sequence_classification.py", "--model", tiny_model_folder, "--data", "rows.csv"]
    done = run([*script, "--text-column", "review", "--label-column", "mood", "--epochs", "1"], tmp_path)
    assert "After, with T" in done.stdout
    for name in ("adapter", "as-lora"):
        assert (tmp_path / "out" / name / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "temperature.json").is_file()
    assert (tmp_path / "out" / "report.json").is_file()
