"""A run that is stopped anywhere and resumed ends like the run that was not, to the last bit."""

import shutil
from functools import cache

import pytest
import train_script
import transformers
from kills import command, run, run_until_killed, same_run
from packaging.version import Version
from safetensors.torch import load_file

STEPS = 8  # five are an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each method a run with a checkpoint after every step."""
    folders = {}

    def make(method):
        if method not in folders:
            folders[method] = tmp_path_factory.mktemp(method) / "whole"
            line = [method, str(folders[method]), "--steps", str(STEPS), "--save-steps", "1", "--eval-steps", "2"]
            train_script.train(train_script.parse(line))
        return folders[method]

    return make


@pytest.mark.parametrize("step", [1, 4, 5, 7])
@pytest.mark.parametrize("method", list(train_script.METHODS))
def test_resumed_after_any_step(whole, method, step, tmp_path):
    reference, folder = whole(method), tmp_path / "resumed"
    shutil.copytree(reference / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copytree(reference / "best-calibration", folder / "best-calibration")
    lines = (reference / "losses.jsonl").read_text().splitlines()[:step]
    (folder / "losses.jsonl").write_text("\n".join(lines) + "\n")
    line = [method, str(folder), "--steps", str(STEPS), "--save-steps", "1", "--eval-steps", "2", "--resume"]
    train_script.train(train_script.parse(line))
    assert same_run(folder, reference) == dict.fromkeys(("losses", "weights", "evaluation", "best"), True)
    # the checkpoints on the way are the same too
    for name in (f"checkpoint-{each}/adapter_model.safetensors" for each in range(step + 1, STEPS + 1)):
        ours, theirs = load_file(folder / name), load_file(reference / name)
        assert all(ours[key].equal(theirs[key]) for key in theirs), name


def test_the_comparison_can_fail(whole, tmp_path):
    """Another seed of the draws is another run."""
    reference = whole("bayesian-lora")
    shutil.copytree(reference, tmp_path / "other")
    kind, own = train_script.METHODS["bayesian-lora"]
    train_script.METHODS["bayesian-lora"] = (kind, {**own, "sample_seed": 1})
    try:
        line = [
            "bayesian-lora",
            str(tmp_path / "other"),
            "--steps",
            str(STEPS),
            "--save-steps",
            "0",
            "--eval-steps",
            "2",
        ]
        train_script.train(train_script.parse(line))
    finally:
        train_script.METHODS["bayesian-lora"] = (kind, own)
    found = same_run(tmp_path / "other", reference)
    assert not found["losses"]
    assert not found["weights"]


#: Methods by the number of processes that train them.
KILLED = {1: ("bayesian-lora",), 2: ("curve-lora", "members")}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """Runs that nobody kills: the methods of a number of processes are trained one after the other by one start."""

    @cache
    def make(processes):
        folder = tmp_path_factory.mktemp("left-alone")
        run(command(",".join(KILLED[processes]), folder, "--steps", "9", processes=processes))
        return folder

    return lambda method, processes: make(processes) / (method if len(KILLED[processes]) > 1 else "")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "method"), [(n, method) for n, methods in KILLED.items() for method in methods])
def test_killed_and_resumed(left_alone, processes, method, tmp_path):
    """SIGKILL between two checkpoints; the full study is benchmarks/kill_resume.py."""
    if processes > 1 and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.17 cannot load the optimiser's state on the CPUs of several processes")
    reference, folder = left_alone(method, processes), tmp_path / "killed"
    line = command(method, folder, "--steps", "9", "--resume", processes=processes)
    assert run_until_killed(line, step=5, delay=0.02) is not None
    assert not (folder / "final").exists()
    assert "checkpoint-" in run(line)
    assert same_run(folder, reference) == dict.fromkeys(("losses", "weights", "evaluation", "best"), True)
