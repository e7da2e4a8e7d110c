"""What CONTRIBUTING.md shows runs as it stands there."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from peft_calib.calibration import calibration_report
from peft_calib.cli import main
from peft_calib.trainer_callbacks import CalibrationCallback

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"^`(\w+\.py)`\n```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's files in the working folder, and a function that imports one."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name: importlib.import_module(name)


def command(*words: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code in (None, 0)


def code_lines(text: str) -> int:
    """Lines that are no comment, no blank and no docstring."""
    docstrings = [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    taken = {line for node in docstrings for line in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") for n, line in lines if n not in taken)


def test_the_page_has_all_examples():
    assert set(FILES) == {"gauss_law.py", "class_temperatures.py", "stop_when_sure.py", "stars.py"}
    assert code_lines(FILES["gauss_law.py"]) <= 48


def test_a_law_from_the_page_is_trained_from_the_command_line(page, tmp_path, tiny_model_folder):
    rows = "".join(f"{'fine' if i % 2 else 'poor'} day number {i},{i % 2}\n" for i in range(60))
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)
    base = ["--data", "rows.csv", "--model", tiny_model_folder, "--test-fraction", "0.3", "--epochs", "1"]
    command("train", *base, "--rank", 2, "--method", "gauss_law:GaussConfig", "--output-dir", "run")
    command("evaluate", "run")
    command("export", "run", "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_law_from_the_page_holds_the_contract(page, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", str(ROOT / "tests" / "contract")]
    command += ["--law", "gauss_law:GaussConfig", "-o", f"pythonpath={tmp_path} tests/support tests/tuners"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


SCORE = """
import numpy as np
from peft_calib.calibration import CalibrationAccumulator, calibration_report, compare
rng = np.random.default_rng(0)
p = rng.dirichlet(np.ones(3), 3000)
labels = rng.integers(0, 3, 3000)
report = calibration_report(p, labels, num_resamples=50)
bins = np.ceil(p.max(1) * 15)
right = p.argmax(1) == labels
gaps = [(p.max(1) - right)[bins == b].mean() for b in np.unique(bins)]
assert abs(report["worst_overconfidence"] - max(gaps)) < 1e-12, (report["worst_overconfidence"], max(gaps))
low, high = report.intervals["worst_overconfidence"]
assert 0 < low < high < 1
assert "worst_overconfidence" in str(report)
stream = CalibrationAccumulator()
stream.update(p, labels)
assert abs(stream.compute()["worst_overconfidence"] - max(gaps)) < 1e-12
found = compare(p, p[:, ::-1], labels, scores=["worst_overconfidence"], num_resamples=50)
assert found["worst_overconfidence"].a > 0
"""


def test_a_score_from_the_page(tmp_path):
    """Two lines in a copy of the package: every list of scores, interval, stream and comparison has it."""
    compiled = shutil.ignore_patterns("__pycache__")
    package = shutil.copytree(ROOT / "peft_calib", tmp_path / "peft_calib", ignore=compiled)
    for folder in ("trainer_callbacks", "metrics"):
        shutil.copytree(ROOT / folder, package / folder, ignore=compiled)
    places = {"table.py": "SCORES: tuple[Score, ...] = (\n", "binned.py": "def scores_of_bins("}
    for name, place in places.items():
        (block,) = re.findall(rf"scores/{name}`:\n```\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
        file = package / "calibration" / "scores" / name
        before, mark, after = file.read_text().partition(place)
        if name == "binned.py":
            body, entry, rest = after.partition("return {\n")
            file.write_text(before + mark + body + entry + block + rest)
        else:
            file.write_text(before + mark + block + after)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCORE], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_recalibration_from_the_page(page, tmp_path):
    kind = page("class_temperatures").ClassTemperatures
    rng = np.random.default_rng(0)
    z = 2 * rng.normal(size=(4000, 3))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    labels = (rng.random((4000, 1)) > p.cumsum(1)).sum(1).clip(max=2)
    logits = z * np.where(z.argmax(1) == 0, 3.0, 1.0)[:, None]  # too sure of one class only
    fitted = kind().fit(logits[:2000], labels[:2000])
    np.testing.assert_allclose(fitted.temperatures, [3, 1, 1], rtol=0.15)
    after = fitted.evaluate(logits[2000:], labels[2000:], confidence_level=None)
    before = calibration_report(logits[2000:], labels[2000:], input="logits", confidence_level=None)
    assert after["ece"] < before["ece"] / 2
    assert after["accuracy"] == before["accuracy"]
    with pytest.raises(ValueError, match="fitted on"):
        fitted.evaluate(logits[:2000], labels[:2000])
    fitted.save("temperatures.json")
    assert np.array_equal(kind.load("temperatures.json").transform(logits), fitted.transform(logits))


@pytest.mark.parametrize(("gap", "stopped"), [(-1.0, True), (1.0, False)])
def test_a_callback_from_the_page(page, tmp_path, tiny_classifier, gap, stopped):
    torch.manual_seed(0)
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 8, "labels": [0, 1, 2, 0] * 2})
    trainer = Trainer(
        tiny_classifier(),
        TrainingArguments(
            str(tmp_path / "out"), num_train_epochs=2, eval_strategy="epoch", save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[CalibrationCallback(diagram=False), page("stop_when_sure").StopWhenSure(gap)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == (1 if stopped else 2)


def test_a_task_from_the_page(page, tmp_path, tiny_model_folder):
    rows = "".join(f"{'fine' if i % 2 else 'poor'} day number {i},{4.5 if i % 2 else 2}\n" for i in range(60))
    (tmp_path / "rows.csv").write_text("text,stars\n" + rows)
    base = ["--data", "rows.csv", "--label-column", "stars", "--model", tiny_model_folder, "--test-fraction", "0.3"]
    command("train", *base, "--rank", 2, "--epochs", 1, "--task", "stars:Stars", "--output-dir", "run")
    command("evaluate", "run", "--outside", "rows.csv")
