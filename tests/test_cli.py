import json
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
from resamples import few_resamples
from typer.main import get_command
from typer.testing import CliRunner

from peft_calib import __version__
from peft_calib.cli import app, main
from peft_calib.runs.flags import PANELS
from peft_calib.runs.settings import RunConfig

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


@pytest.mark.parametrize("words", ["--help", "train --help", "demo --help", "train --rank x", "", "--version"])
def test_the_script_tells_help_and_slips_without_loading_torch(words):
    done = script(*words.split())
    expected = f"peft-calib {__version__}\n" if words == "--version" else "Usage: peft-calib"
    assert expected in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "loaded"


def test_the_script_has_the_methods_registered_when_a_command_runs(tmp_path, rows_file, tiny_model_folder):
    asked = ["train", "--data", str(rows_file), "--text-column", "review", "--label-column", "mood", "--epochs", "1"]
    asked += ["--model", str(tiny_model_folder), "--method", "hyper-lora", "--output-dir", str(tmp_path / "run")]
    done = script(*asked)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loaded peft scipy torch transformers\n"  # no library has said anything
    assert script("export", str(tmp_path / "run"), str(tmp_path / "lora")).returncode == 0
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_no_command_shows_the_help():
    printed = CliRunner().invoke(app, []).output
    for command in ("demo", "train", "evaluate", "compare", "predict", "export"):
        assert f" {command} " in printed


COMMANDS = sorted(get_command(app).commands)


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_a_terminal_and_nothing_is_cut_off(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = CliRunner().invoke(app, [*filter(None, [command]), "--help"], env={"COLUMNS": str(columns)}).output
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown


def test_every_setting_stands_below_one_heading():
    listed = [name for under in PANELS.values() for name in under]
    assert sorted(listed) == sorted(item.name for item in fields(RunConfig))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_help_are_understood(command):
    found = get_command(app).commands[command]
    lines = [line.strip() for line in found.epilog.splitlines() if line.strip().startswith("peft-calib")]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[1] == command
        found.make_context(command, words[2:])
        assert len(line) <= 78


def test_results_can_be_had_as_json():
    printing = {name for name in COMMANDS if any(p.name == "as_json" for p in get_command(app).commands[name].params)}
    assert printing == set(COMMANDS)


def test_json_is_all_that_is_printed(monkeypatch, tmp_path, capsys):
    from peft_calib.runs import exporting

    def noisy(*_, **__):
        print("a note")
        return tmp_path / "[out]"

    monkeypatch.setattr(exporting, "export_run", noisy)
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path), "out", "--json"])
    assert stopped.value.code in (None, 0)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"folder": str(tmp_path / "[out]")}
    assert "a note" in shown.err


def test_a_score_that_is_not_defined_is_null_in_json(monkeypatch, tmp_path, capsys):
    from peft_calib.runs import error_head

    class Found:
        folder, variant = tmp_path, "mean"
        head = type("Head", (), {"report": type("Report", (), {"to_dict": lambda _: {"gain": float("nan")}})()})

    monkeypatch.setattr(error_head, "train_head", lambda *_, **__: Found)
    with pytest.raises(SystemExit):
        main(["train-head", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["gain"] is None


@pytest.mark.parametrize(
    ("words", "where", "line"),
    [
        ("evaluate r", "peft_calib.runs.evaluation.evaluate_run", "run the same command again"),
        ("compare a b", "peft_calib.runs.comparison.compare_runs", "goes on with the others"),
        ("predict r --data d.csv --output o.csv", "peft_calib.runs.predicting.predict_table", "No output was written"),
        ("train-head r", "peft_calib.runs.error_head.train_head", "The run is as it was"),
        ("export r o", "peft_calib.runs.exporting.export_run", "Nothing was written"),
        ("card r --output-dir o", "peft_calib.hub.write_card", "Nothing was written"),
        ("push r user/name", "peft_calib.hub.push_to_hub", "one commit or none"),
    ],
)
def test_a_word_after_an_interruption_says_how_to_go_on(words, where, line, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 130
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("Interrupted.")
    assert line in told
    with pytest.raises(SystemExit) as stopped:  # while the libraries are loaded, too
        main(words.split(), load=interrupted)
    assert stopped.value.code == 130


def test_an_interruption_before_the_command_is_known_is_one_line_too():
    code = "import importlib, peft_calib_cli\ndef stop(name): raise KeyboardInterrupt\n"
    code += "importlib.import_module = stop\npeft_calib_cli.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted before anything began.\n")


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_help_costs_at_most_twice_that_of_trl():
    def cpu(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    both = [
        (cpu("from peft_calib_cli import main; main()"), cpu("from trl.cli import main; main()")) for _ in range(4)
    ]
    ours, theirs = (min(times) for times in zip(*both[1:], strict=True))  # the first fills caches of the disk
    assert ours <= 2 * theirs


def test_a_shell_completes_commands_and_methods(monkeypatch):
    for words, expected in {"peft-calib comp": ["compare"], "peft-calib train --method hy": ["hyper-lora"]}.items():
        environment = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        environment["_PEFT_CALIB_COMPLETE"] = "complete_bash"
        done = CliRunner().invoke(app, [], env=environment, prog_name="peft-calib")
        assert done.output.split() == expected


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
    with few_resamples(), pytest.raises(SystemExit) as stopped:
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_word(command, monkeypatch):
    """What stands in brackets is markup to rich: it vanishes, or shows its escape, as the version of typer wills."""
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
    shown = " ".join(capsys.readouterr().err.split())
    if begun:
        assert "The same command continues the run" in shown
        assert "It keeps member-0 (complete) and what was trained up to step 40." in shown
    else:
        assert "before anything was written" in shown
