"""What becomes of a mutated adapter folder: loaded as it was, refused clearly or not, or silently other."""

from __future__ import annotations

import contextlib
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from mutations import CONFIG, WEIGHTS, Mutation
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from peft_calib import BayesianLoraConfig, CurveLoraConfig, EnsembleLoraConfig, HyperLoraConfig, draws
from peft_calib.tuners.laws import laws_of

METHODS: dict[str, Callable[..., PeftConfig]] = {
    "hyper-lora": lambda **f: HyperLoraConfig(hyper_hidden=16, embed_dim=8, **f),
    "bayesian-lora": BayesianLoraConfig,
    "curve-lora": CurveLoraConfig,
    "ensemble-lora": lambda **f: EnsembleLoraConfig(num_members=3, **f),
    "lora": LoraConfig,
}
SAME, CLEAR, UNCLEAR, OTHER = "the same", "refused, file and field named", "refused, unclear", "silently other"
#: How far logits may lie apart and still be the same.
CLOSE = 1e-5
_BATCH = {"input_ids": torch.arange(1, 29).reshape(4, 7)}


def base_model() -> BertForSequenceClassification:
    """A tiny classifier, the same in every call."""
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=64, num_labels=3)).eval()


def save_adapter(method: str, folder: Path) -> None:
    """Save an adapter of a method that is off its start in every parameter."""
    targets = ["query", "value", "output.dense"]
    config = METHODS[method](task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=targets)
    model = get_peft_model(base_model(), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def answers(folder: Path) -> torch.Tensor:
    """Logits of a folder's adapter on a fresh base model: its deterministic answer, and three draws where it draws."""
    model = PeftModel.from_pretrained(base_model(), folder).eval()
    with torch.no_grad():
        found = [model(**_BATCH).logits]
        if any(law.stochastic or law.has_points or law.num_draws for law in laws_of(model)):
            with draws(model, 3, seed=1) as sampling:
                found.append(sampling(**_BATCH).logits.reshape(-1, 3))
    return torch.cat(found)


def judge(folder: Path, expected: torch.Tensor) -> tuple[str, str]:
    """What a mutated folder does, and the error or the distance in words."""
    try:
        with _at_most(20), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = answers(folder)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return (CLEAR if names_its_place(text) else UNCLEAR), text
    if found.shape == expected.shape and bool(((found - expected).abs() <= CLOSE).all()):
        return SAME, ""
    return OTHER, "other shape" if found.shape != expected.shape else f"{(found - expected).abs().max():.3g}"


def names_its_place(text: str) -> bool:
    """Whether a message names the file; every message of this package that does names field or tensor, too."""
    return CONFIG in text or WEIGHTS in text


def study(
    good: Path, scratch: Path, found: list[Mutation], then: Callable[[Path], object] | None = None
) -> tuple[Counter, list[dict]]:
    """Apply each mutation to a copy of a good folder and judge it.

    Args:
        good: The folder as it was saved.
        scratch: An empty folder to work in.
        found: The mutations.
        then: Called with the mutated folder before it is judged.

    Returns:
        Counts by kind of mutation and outcome, and every mutation that ended badly.
    """
    expected, counts, bad = answers(good), Counter(), []
    for mutation in found:
        place = scratch / "adapter"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place)
        mutation.apply(place)
        if then is not None:
            with contextlib.suppress(ValueError, FileNotFoundError):
                then(place)
        outcome, text = judge(place, expected)
        counts[mutation.kind, outcome] += 1
        if outcome in (UNCLEAR, OTHER):
            bad.append({"kind": mutation.kind, "what": mutation.what, "outcome": outcome, "text": text[:300]})
    return counts, bad


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Interrupt what does not end, such as building without end; on the main thread."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
