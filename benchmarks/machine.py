"""What a benchmark ran on, for the JSON beside its figures."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

import peft_calib


def describe_machine() -> dict:
    """Processor, threads, accelerator and the versions that matter; no host names or paths."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        # ours from the module: where the package runs from a checkout it is not installed
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"peft_calib": peft_calib.__version__},
    }
