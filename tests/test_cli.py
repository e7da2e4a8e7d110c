import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_calib.cli import app, main

ROOT = Path(__file__).resolve().parents[1]
#: The installed script's two lines, and what they loaded.
SCRIPT = """
import sys
from peft_calib_cli import main
sys.argv[0] = "peft-calib"
try:
    main()
finally:
    print("loaded", *sorted({"torch", "transformers", "peft", "scipy"} & set(sys.modules)), file=sys.stderr)
"""


def script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def rows_file(tmp_path) -> Path:
    """A user's own data: two easy classes."""
    path = tmp_path / "rows.csv"
    lines = [
        f"{'good sunny fine' if i % 2 else 'bad rainy poor'} day number {i},{'up' if i % 2 else 'down'}"
        for i in range(60)
    ]
    path.write_text("review,mood\n" + "\n".join(lines) + "\n")
    return path


def test_help_names_the_options():
    done = subprocess.run([sys.executable, "-m", "peft_calib.cli", "demo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for option in ("--data", "--model", "--output-dir", "--overwrite", "--text-column", "--outside"):
        assert option in done.stdout


@pytest.mark.parametrize("words", ["--help", "train --help", "demo --help", "train --rank x", ""])
def test_the_script_tells_help_and_slips_without_loading_torch(words):
    done = script(*words.split())
    assert "Usage: peft-calib" in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "loaded"


def test_the_script_has_the_methods_registered_when_a_command_runs(tmp_path, rows_file, tiny_model_folder):
    asked = ["train", "--data", str(rows_file), "--text-column", "review", "--label-column", "mood", "--epochs", "1"]
    asked += ["--model", str(tiny_model_folder), "--method", "hyper-lora", "--output-dir", str(tmp_path / "run")]
    done = script(*asked)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded peft scipy torch transformers"
    assert script("export", str(tmp_path / "run"), str(tmp_path / "lora")).returncode == 0
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_no_command_shows_the_help():
    printed = CliRunner().invoke(app, []).output
    for command in ("demo", "train", "evaluate", "compare", "predict", "export"):
        assert f" {command} " in printed


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "predict", "export"])
def test_what_a_command_needs(command):
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
    assert CliRunner().invoke(app, [command]).exit_code == 2  # a usage error: the folder is missing


@pytest.mark.slow
def test_own_model_and_data_from_the_command_line(tmp_path, rows_file, tiny_model_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out"
    arguments = ["demo", "--data", str(rows_file), "--text-column", "review", "--label-column", "mood"]
    arguments += ["--model", str(tiny_model_folder), "--output-dir", str(out), "--epochs", "1", "--batch-size", "8"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--target-modules", "query,value", "--rank", "2"])
    assert stopped.value.code in (None, 0)
    printed = capsys.readouterr().out
    assert "HyperLoRA" in printed
    assert "ECE" in printed
    assert max(map(len, printed.splitlines())) <= 80
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["label_names"] == ["down", "up"]
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["r"] == 2

    before = (out / "report.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert "finished run" in str(stopped.value.code)
    assert "--overwrite" in str(stopped.value.code)
    assert (out / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.csv"], "no data file missing.csv"),
        (["--data", "{rows}"], "no column 'label'.*review, mood"),
        (["--data", "{rows}", "--label-column", "mood", "--text-column", "words"], "no column 'words'"),
    ],
)
def test_what_a_user_can_mend_is_one_line(tmp_path, rows_file, arguments, message):
    import re

    arguments = [argument.format(rows=rows_file) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--output-dir", str(tmp_path / "out"), *arguments])
    assert re.search(message, str(stopped.value.code))
    assert str(stopped.value.code).startswith("peft-calib: ")
    assert not (tmp_path / "out").exists()


def test_the_output_folder_is_checked_before_anything_is_read(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--output-dir", str(tmp_path), "--data", "missing.csv"])
    assert "finished run" in str(stopped.value.code)
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--output-dir", str(taken)])
    assert "is a file" in str(stopped.value.code)


def test_wrong_options_are_refused():
    result = CliRunner().invoke(app, ["demo", "--rank", "0"])
    assert result.exit_code == 2


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "compare", "predict", "export"])
def test_help_shows_every_word(command, monkeypatch):
    """What stands in brackets is markup to rich: it vanishes, or shows its escape, as the version of typer wills."""
    from typer.main import get_command

    monkeypatch.setenv("COLUMNS", "300")
    shown = " ".join(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output.split())
    for option in get_command(app).commands[command].params:
        help_text = " ".join((getattr(option, "help", None) or "").split())
        assert help_text in shown, option.name


def test_a_fault_of_the_program_is_one_line_and_a_traceback_on_request(monkeypatch, tmp_path):
    from peft_calib.runs import exporting

    def broken(*_, **__):
        raise RuntimeError("shapes differ\nand a second line")

    monkeypatch.setattr(exporting, "export_run", broken)
    asked = ["export", str(tmp_path), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(asked)
    assert stopped.value.code == "peft-calib: RuntimeError: shapes differ (--debug shows where)"
    with pytest.raises(RuntimeError, match="shapes differ"):
        main([*asked, "--debug"])


@pytest.mark.parametrize("begun", [False, True])
def test_an_interruption_says_what_becomes_of_the_run(monkeypatch, tmp_path, capsys, begun):
    from peft_calib.runs import training

    def interrupted(_, folder, **__):
        if begun:
            for name in (
                "config.json",
                "member-0/stage.json",
                "training/member-1/checkpoint-40/x",
                "training/member-1/checkpoint-9/x",
            ):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", "d.csv", "--model", "m", "--output-dir", str(tmp_path / "run")])
    assert stopped.value.code == 130
    shown = " ".join(capsys.readouterr().out.split())
    if begun:
        assert "The same command continues the run" in shown
        assert "It keeps member-0 (complete) and what was trained up to step 40." in shown
    else:
        assert "before anything was written" in shown
