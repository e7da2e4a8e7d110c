"""Training runs that are killed with SIGKILL, resumed, and compared with one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "train_script.py"
ACCELERATE = Path(__file__).parents[2] / "hub_examples" / "accelerate"


def command(
    method: str,
    folder: Path,
    *options: str,
    processes: int = 1,
    config: str = "ddp",
    launch_options: tuple[str, ...] = (),
) -> list[str]:
    """The command line of a run, through `accelerate launch` where there are several processes."""
    script = [str(SCRIPT), method, str(folder), *options]
    if processes == 1:
        return [sys.executable, *script]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", str(ACCELERATE / f"{config}.yaml"), "--mixed_precision", "no"]
    launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    if config == "fsdp2":
        # BERT's own list of blocks has the embeddings in it, which Accelerate then shards twice
        launch += ["--fsdp_transformer_layer_cls_to_wrap", "BertLayer"]
    return [*launch, *launch_options, *script]


def run(line: list[str], timeout: float = 480) -> str:
    """Run to the end; its output is in the error if it fails."""
    found = subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=environment())
    if found.returncode:
        raise RuntimeError(f"{' '.join(line)}\n{found.stdout[-2000:]}\n{found.stderr[-6000:]}")
    return found.stdout


def run_until_killed(line: list[str], step: int, delay: float, timeout: float = 480) -> int | None:
    """Run until a step is reported, wait a little, and kill every process of the run with SIGKILL.

    Args:
        line: The command.
        step: The step to wait for.
        delay: Seconds from then to the kill.
        timeout: Seconds for the whole.

    Returns:
        The last step reported, or `None` if the run was over before.
    """
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(), start_new_session=True
    )
    last, watch = 0, threading.Timer(timeout, _kill, (process,))  # one that says nothing more ends its output
    watch.start()
    try:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith("step "):
                last = int(text.split()[1])
            if text.startswith("done"):
                return None
            if last >= step:
                time.sleep(delay)
                return last
        return None
    finally:
        watch.cancel()
        _kill(process)
        process.wait()


def same_run(folder: Path, reference: Path) -> dict[str, bool]:
    """Whether losses, adapter and evaluations of two finished runs are equal to the last bit."""
    expected = {entry["step"]: entry["loss"] for entry in _losses(reference)}
    found = _losses(folder)
    weights = [load_file(each / "final" / "adapter_model.safetensors") for each in (folder, reference)]
    numbers = [json.loads((each / "metrics.json").read_text()) for each in (folder, reference)]
    return {
        "losses": {e["step"] for e in found} == set(expected) and all(e["loss"] == expected[e["step"]] for e in found),
        "weights": weights[0].keys() == weights[1].keys()
        and all(weights[0][k].equal(weights[1][k]) for k in weights[1]),
        "evaluation": numbers[0]["eval_nll"] == numbers[1]["eval_nll"],
        "best": _best(folder) == _best(reference),
    }


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _kill(process: subprocess.Popen) -> None:
    for pid in [*_descendants(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _losses(folder: Path) -> list[dict]:
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed process may leave half a line


def _best(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "best-calibration").iterdir())


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [grand for child in children for grand in (*_descendants(int(child)), int(child))]
