"""A run that is killed goes on where it stood, and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from command_line import QUICK, peft_calib
from processes import started
from safetensors.torch import load_file

from peft_calib.cli import main
from peft_calib.runs.processes import leave_processes


def command(out: Path, train_file: Path, model: Path, *further: object) -> list[str]:
    base = ["train", "--output-dir", out, "--data", train_file, "--model", model, "--learning-rate", "1e-2"]
    return [str(argument) for argument in [*base, *QUICK, *further]]


def silently(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        main(arguments)


def kill_when(sign: Path, arguments: list[str]) -> None:
    """Run a command in a process of its own and kill it as soon as a file is there."""
    process = started(silently, arguments)
    deadline = time.monotonic() + 120
    while not sign.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert sign.exists(), "the command did not come so far"
    assert process.exitcode == -signal.SIGKILL, "the command ended before it was killed"


def assert_same_weights(one: Path, two: Path) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_killed_between_checkpoints(trained, train_file, tiny_model_folder, tmp_path):
    out = tmp_path / "bayesian-lora"
    further = ["--method", "bayesian-lora", "--num-samples", 3, "--adapter-option", "kl_weight=0.1"]
    arguments = command(out, train_file, tiny_model_folder, *further)
    kill_when(out / "training/adapter/checkpoint-4/checkpoint_manifest.json", arguments)
    assert not (out / "run.json").exists()
    assert not (out / "adapter").exists()  # nothing half-made is in its place
    assert "holds no finished run" in peft_calib("evaluate", out)
    assert "continue it" in peft_calib("export", out, tmp_path / "exported")

    assert peft_calib(*arguments) is None
    assert json.loads((out / "adapter/stage.json").read_text())["resumed_at_step"] >= 4
    whole = trained["bayesian-lora"]
    assert_same_weights(out / "adapter", whole / "adapter")
    assert_same_weights(out / "lora", whole / "lora")
    assert (out / "temperature.json").read_text() == (whole / "temperature.json").read_text()


@pytest.mark.slow
def test_killed_between_stages(trained, train_file, tiny_model_folder, tmp_path):
    out = tmp_path / "curve-lora"
    further = ["--method", "curve-lora", "--anchors", 2, "--handles", 1]
    arguments = command(out, train_file, tiny_model_folder, *further)
    kill_when(out / "training/anchor-1/checkpoint-4/checkpoint_manifest.json", arguments)
    anchor = out / "anchor-0/adapter_model.safetensors"
    made = anchor.stat().st_mtime_ns
    kill_when(out / "training/adapter/checkpoint-4/checkpoint_manifest.json", arguments)
    second = out / "anchor-1/adapter_model.safetensors"
    assert json.loads((out / "anchor-1/stage.json").read_text())["resumed_at_step"] >= 4
    made_second = second.stat().st_mtime_ns

    assert peft_calib(*arguments) is None
    assert anchor.stat().st_mtime_ns == made  # complete anchors are not trained again
    assert second.stat().st_mtime_ns == made_second
    for name in ("anchor-0", "anchor-1", "adapter", "lora"):
        assert_same_weights(out / name, trained["curve-lora"] / name)


def test_a_damaged_checkpoint_is_not_resumed_from(trained, train_file, tiny_model_folder, tmp_path):
    out = tmp_path / "lora"
    arguments = command(
        out, train_file, tiny_model_folder, "--method", "lora", "--trainer-option", "save_total_limit=9"
    )
    plain = command(out, train_file, tiny_model_folder, "--method", "lora")
    kill_when(out / "training/adapter/checkpoint-8/checkpoint_manifest.json", arguments)
    newest = out / "training/adapter/checkpoint-8/adapter_model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    for later in out.glob("training/adapter/checkpoint-1*"):
        (later / "trainer_state.json").unlink(missing_ok=True)
    assert "save_total_limit" in peft_calib(*plain)  # another configuration
    with pytest.warns(UserWarning, match="is not complete"):
        assert peft_calib(*arguments) is None
    assert json.loads((out / "adapter/stage.json").read_text())["resumed_at_step"] == 4
    assert_same_weights(out / "adapter", trained["lora"] / "adapter")


@pytest.mark.slow
def test_two_processes(train_file, test_file, tiny_model_folder, tmp_path):
    out = tmp_path / "run"
    arguments = command(out, train_file, tiny_model_folder, "--method", "bayesian-lora", "--num-samples", 2)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, *options, "-m", "peft_calib.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Finished:") == 1  # one process speaks
    content = json.loads((out / "run.json").read_text())
    assert content["stages"]["adapter"]["optimizer_steps"] == 8  # two processes, half the steps
    assert content["rows"] == {"train": 64, "calibration": 16}
    assert peft_calib("evaluate", out, "--data", test_file) is None


def test_the_group_is_left_at_the_end():
    """A process that ends with its group alive aborts now and then."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    leave_processes()
    assert not torch.distributed.is_initialized()
    leave_processes()  # of one process: nothing to leave
