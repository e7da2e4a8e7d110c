"""Small runs on small models with a real tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import QUICK, WORDS, peft_calib, sentences, write_csv
from resamples import few_resamples
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizer


@pytest.fixture(autouse=True, scope="module")
def _few_resamples():
    with few_resamples():
        yield


@pytest.fixture(scope="session")
def train_file(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "train.csv", sentences(80))


@pytest.fixture(scope="session")
def test_file(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "held_out.csv", sentences(60, seed=1))


@pytest.fixture(scope="session")
def tiny_roberta_folder(tmp_path_factory) -> Path:
    """A saved tiny encoder with a byte-level tokenizer and a head of two layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny-roberta"
    folder.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, vocab_size=400, special_tokens=special)
    tokenizer.save_model(str(folder))
    RobertaTokenizer.from_pretrained(folder).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=400, max_position_embeddings=130, pad_token_id=1, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def train(tmp_path_factory, tiny_model_folder, train_file) -> Callable[..., Path]:
    """Train a quick run from the command line; its folder."""

    def run(method: str, *further: object, name: str | None = None) -> Path:
        out = tmp_path_factory.mktemp("runs") / (name or method)
        base = ["--data", train_file, "--model", tiny_model_folder, "--method", method, "--learning-rate", "1e-2"]
        assert peft_calib("train", "--output-dir", out, *base, *QUICK, *further) is None
        return out

    return run


@pytest.fixture(scope="session")
def trained(train) -> dict[str, Path]:
    """One finished run of every method, on the same rows."""
    return {
        "lora": train("lora"),
        "hyper-lora": train("hyper-lora"),
        "bayesian-lora": train("bayesian-lora", "--num-samples", 3, "--adapter-option", "kl_weight=0.1"),
        "curve-lora": train("curve-lora", "--anchors", 2, "--handles", 1),
        "ensemble-lora": train("ensemble-lora"),
        "ensemble": train("ensemble", "--members", 2),
    }
