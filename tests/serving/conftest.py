"""A real vLLM in an environment of its own: `make test-serving` makes it and names its Python in SERVING_PYTHON."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from real_server import ALL, NAMES, PYTHON, ROOT, Served, answering, exported, serving, smollm2
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_calib import BayesianLoraConfig
from peft_calib.runs.embedded.sentences import documentation_sentences


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ROOT / "tests/serving" in item.path.parents:
            item.add_marker(pytest.mark.serving)
            if PYTHON is None:
                item.add_marker(pytest.mark.skip(reason="needs a real vLLM: make test-serving"))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A small real language model."""
    return smollm2(tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """A hundred real sentences."""
    sentences = sorted({row.text for row in documentation_sentences()[0]})
    return [sentences[place] for place in np.random.default_rng(0).permutation(len(sentences))[:100]]


@pytest.fixture(scope="session")
def language_model(base, tmp_path_factory) -> Iterator[Served]:
    """Draws that answer with a word."""
    folder = tmp_path_factory.mktemp("language_model")
    adapter, draws = answering(base, folder, 4)
    with serving(base, draws, 8731, folder / "log") as url:
        yield Served(adapter, draws, url)


@pytest.fixture(scope="session")
def classifier(base, tmp_path_factory) -> Iterator[Served]:
    """Four draws with their own head; that of the base model is random."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    torch.manual_seed(0)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, pad_token_id=tokenizer.pad_token_id, **names)
    fresh.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = BayesianLoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="SEQ_CLS", num_train_examples=100)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder / "base"), config)
    adapter, draws = exported(model, folder, 4)
    with serving(folder / "base", draws, 8732, folder / "log") as url:
        yield Served(adapter, draws, url)
