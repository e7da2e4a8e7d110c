"""Speed and memory of the calibration toolkit against its peers, interleaved in one process, on one thread.

Times are medians of CPU seconds (`time.process_time`), which other work on the machine disturbs less than the clock on
the wall; the limits are those the toolkit set out to keep. Everyone gets the same arrays, warm and in memory; what
each does to check and convert them is part of its time.

Peers that are not installed are left out: `pip install torchmetrics uncertainty-calibration`, `pip install --no-deps
netcal`.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import describe_machine, drawn_labels, parser, resident_bytes, seconds, take_turns, write
from threadpoolctl import threadpool_limits

from peft_calib.calibration import CalibrationAccumulator, TemperatureScaling, calibration_report
from peft_calib.calibration.inputs import as_rows, softmax
from peft_calib.calibration.resampling.intervals import bootstrap_intervals, noise_floor
from peft_calib.calibration.scores.table import UNORDERED_KEYS

PANEL = (*UNORDERED_KEYS[:10], "aurc", "error_auroc")


def measure(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each call, the calls taking turns."""
    arms = {name: partial(seconds, call) for name, call in calls.items()}
    return {name: found["median_seconds"] for name, found in take_turns(arms, next(iter(arms)), repeats).items()}


def predictions(num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, their probabilities and labels of an over-confident four-class model."""
    generator = np.random.default_rng(seed)
    true = 2.0 * generator.normal(size=(num_rows, 4))
    labels, logits = drawn_labels(generator, softmax(true)), 2.0 * true
    return logits, softmax(logits), labels


def streamed(p: np.ndarray, y: np.ndarray, ordered: bool) -> CalibrationAccumulator:
    accumulator = CalibrationAccumulator(ordered=ordered)
    accumulator.update(p, y)
    accumulator.compute()
    return accumulator


def peer_calls(p: np.ndarray, y: np.ndarray) -> dict[str, Callable[[], Any]]:
    """One ECE of each peer that is installed."""
    tensors = torch.from_numpy(p), torch.from_numpy(y)
    found: dict[str, Callable[[], Any]] = {}
    if torchmetrics := installed("torchmetrics.functional.classification"):
        ece = torchmetrics.multiclass_calibration_error
        found["torchmetrics"] = lambda: ece(*tensors, num_classes=p.shape[1], n_bins=15)
    if netcal := installed("netcal.metrics"):
        found["netcal"] = lambda: netcal.ECE(15).measure(p, y)
    if calibration := installed("calibration.utils"):
        found["uncertainty-calibration"] = lambda: calibration.get_ece(p, y, num_bins=15)
    return found


@cache
def installed(module: str) -> Any:
    """The module, or None with a message."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"Left out, because it cannot be imported ({error}): {module.split('.')[0]}", file=sys.stderr)
        return None


def panels(repeats: int) -> dict[str, Any]:
    """Twelve scores, all streamed scores, the whole report; against one ECE of each peer."""
    result: dict[str, Any] = {"rows": 10**6, "classes": 4}
    _, probabilities, y = predictions(10**6)
    for dtype in ("float32", "float64"):
        p = probabilities.astype(dtype)
        peers = peer_calls(p, y)
        calls = {
            "twelve scores": lambda p=p: streamed(p, y, ordered=False),
            "all scores, streamed": lambda p=p: streamed(p, y, ordered=True),
            "whole report, exact": lambda p=p: calibration_report(p, y, confidence_level=None),
        }
        seconds = measure(calls | {f"{name}, one ECE": call for name, call in peers.items()}, repeats)
        ratios = {name: seconds[f"{name}, one ECE"] / seconds["twelve scores"] for name in peers}
        whole = {name: seconds["whole report, exact"] / seconds[f"{name}, one ECE"] for name in peers}
        result[dtype] = {
            "seconds": seconds,
            "one ECE of theirs over twelve scores of ours": ratios,
            "our whole report over one ECE of theirs": whole,
        }
    return result | {"limits": {"twelve scores, seconds": 0.04, "whole report over torchmetrics' one ECE": 5}}


def bootstraps(repeats: int) -> dict[str, Any]:
    """1,000 resamples at 10,000 rows: the interval of twelve scores, and of all."""
    _, p, y = predictions(10**4)
    rows = as_rows(p, y)
    seconds = measure(
        {
            "intervals of twelve scores": lambda: bootstrap_intervals(rows, method="percentile", scores=PANEL),
            "intervals of all scores": lambda: bootstrap_intervals(rows, method="percentile"),
            "BCa intervals of twelve scores": lambda: bootstrap_intervals(rows, method="bca", scores=PANEL),
            "BCa intervals of all scores": lambda: bootstrap_intervals(rows, method="bca"),
            "noise floor of twelve scores": lambda: noise_floor(rows, num_resamples=1000, scores=PANEL),
            "noise floor of all scores": lambda: noise_floor(rows, num_resamples=1000),
        },
        repeats,
    )
    return {"rows": 10**4, "classes": 4, "resamples": 1000, "seconds": seconds, "limits": {"twelve, seconds": 0.3}}


def lbfgs_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The usual recipe: LBFGS on T, learning rate 0.01, 50 iterations, from 1.5."""
    temperature = torch.nn.Parameter(torch.full((1,), 1.5, dtype=logits.dtype))
    optimizer = torch.optim.LBFGS([temperature], lr=0.01, max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(temperature.detach())


def temperatures(repeats: int) -> dict[str, Any]:
    """Fits at 100,000 rows for true temperatures from 0.1 to 50."""
    result = {}
    logits, _, y = predictions(10**5, seed=1)
    for true in (0.1, 0.3, 1.0, 3.0, 12.0, 50.0):
        z = 0.5 * true * logits
        tensors = torch.from_numpy(z), torch.from_numpy(y)
        calls = {"ours": lambda z=z: TemperatureScaling().fit(z, y), "LBFGS": lambda t=tensors: lbfgs_temperature(*t)}
        seconds = measure(calls, repeats)
        found = {"ours": TemperatureScaling().fit(z, y).temperature, "LBFGS": lbfgs_temperature(*tensors)}
        nll = {k: float(torch.nn.functional.cross_entropy(tensors[0] / t, tensors[1])) for k, t in found.items()}
        result[f"true {true}"] = {"seconds": seconds, "temperature": found, "nll": nll}
    return {"rows": 10**5, "classes": 4, "fits": result, "limits": {"seconds": 0.1, "relative error": 0.03}}


def memory(num_rows: int) -> dict[str, Any]:
    """State size and peak memory while streaming, the same million rows over and over."""
    _, p, y = predictions(10**6)
    result: dict[str, Any] = {"rows": num_rows, "limits": {"state, bytes": 64_000}}
    for name, ordered in (("all scores", True), ("twelve scores", False)):
        accumulator = CalibrationAccumulator(ordered=ordered)
        peaks, sizes = [], []
        for _ in range(num_rows // len(y)):
            accumulator.update(p, y)
            peaks.append(resident_bytes("VmHWM"))
            sizes.append(accumulator.num_bytes)
        assert accumulator.num_rows == num_rows
        growth = (peaks[-1] - peaks[0]) / 2**20
        result[name] = {"state, bytes": sizes[-1], "largest state, bytes": max(sizes), "peak memory grew, MiB": growth}
    return result


def main() -> None:
    flags = parser(__doc__)
    flags.set_defaults(output=Path(__file__).parent / "results" / "metrics.json")
    flags.add_argument("--repeats", type=int, default=7)
    flags.add_argument("--stream-rows", type=int, default=10**8)
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    warnings.simplefilter("ignore", UserWarning)
    result = {
        "machine": describe_machine(),
        "clock": "CPU seconds of one thread, medians, calls interleaved",
        "panel": panels(arguments.repeats),
        "bootstrap": bootstraps(arguments.repeats),
        "temperature": temperatures(max(3, arguments.repeats // 2)),
        "memory": memory(arguments.stream_rows),
    }
    write(arguments.output, result)
    print(arguments.output.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
