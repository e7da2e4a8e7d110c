"""Sampled texts, one function a text, and how sure the draws are of a text, token by token."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from ..tuners.padding import numbered, numbers_places
from ..tuners.rows import count_rows, main_input_name, repeat_rows
from .draws import check_num_samples, count_draws, evaluating
from .result import NotFiniteError
from .sources import DrawSource, LawDraws, TheModel

_RANDOM_STATE = threading.RLock()


@dataclass(frozen=True, eq=False, repr=False)
class TextScores:
    """What K draws say about given texts. All tensors are on the CPU; entries behind the end of a text are 0.

    Args:
        sample_log_probabilities: Float32 (K, N, T), log-probability of each token under each draw.
        log_probabilities: Float32 (N, T), under the mean of the draws' probabilities.
        entropy: Float32 (N, T), entropy of the predictive distribution of each token, nats.
        mutual_information: Float32 (N, T), what the draws disagree on there, nats.
        mask: Bool (N, T), which entries are tokens of the text.
    """

    sample_log_probabilities: torch.Tensor
    log_probabilities: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor
    mask: torch.Tensor

    def __repr__(self) -> str:
        draws, texts, _ = self.sample_log_probabilities.shape
        return f"TextScores({draws} draws, {texts} texts, mean confidence {float(self.confidence.mean()):.3f})"

    @property
    def sequence_log_probabilities(self) -> torch.Tensor:
        """Log-probability of each text as the mean of the draws' probabilities of the whole text, float32 (N,)."""
        by_draw = self.sample_log_probabilities.double().sum(-1)
        return (by_draw.logsumexp(0) - torch.tensor(len(by_draw)).log()).float()

    @property
    def confidence(self) -> torch.Tensor:
        """Geometric mean of the tokens' predictive probabilities, float32 (N,), from 0 to 1."""
        return (self.log_probabilities.sum(-1) / self.mask.sum(-1).clamp_min(1)).exp()


@dataclass(frozen=True, eq=False, repr=False)
class GeneratedSamples:
    """One text for each draw and prompt.

    Args:
        sequences: Int64 (K, N, T), the generated tokens without the prompt, padded at the end.
        log_probabilities: Float32 (K, N), log-probability of each text under the draw that wrote it.
        mask: Bool (K, N, T), which entries are tokens of the text.
    """

    sequences: torch.Tensor
    log_probabilities: torch.Tensor
    mask: torch.Tensor

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """The texts.

        Args:
            tokenizer: The model's tokenizer.

        Returns:
            For each prompt the texts of the draws.
        """
        return [
            [
                tokenizer.decode(self.sequences[k, row][self.mask[k, row]].tolist(), skip_special_tokens=True)
                for k in range(len(self.sequences))
            ]
            for row in range(self.sequences.shape[1])
        ]

    def __repr__(self) -> str:
        draws, prompts, tokens = self.sequences.shape
        return (
            f"GeneratedSamples({draws} draws of {prompts} prompts, up to {tokens} tokens, mean agreement "
            f"{float(self.agreement.mean()):.3f}; texts(tokenizer) shows them)"
        )

    @property
    def agreement(self) -> torch.Tensor:
        """Share of the draws that wrote the most frequent text of their prompt, float32 (N,): a confidence."""
        padded = torch.where(self.mask, self.sequences, -1)
        same = (padded.unsqueeze(0) == padded.unsqueeze(1)).all(-1)
        return same.float().mean(0).amax(0)


def sample_generate(
    model: nn.Module,
    batch: Mapping[str, Any],
    num_samples: int | None = None,
    seed: int = 0,
    *,
    how: Literal["sample", "mean"] = "sample",
    choice_seed: int | None = None,
    **generate_kwargs: Any,
) -> GeneratedSamples:
    """Let each of K draws write a text for each prompt; a draw stays the same function for its whole text.

    Args:
        model: A language model with an active adapter of this package.
        batch: Prompts, padded on the left for a decoder.
        num_samples: Number of draws K; when `None` what the law suggests.
        seed: Key of the draws; with `do_sample=True` also of the choice of tokens.
        how: `"mean"` takes the deterministic model K times, any model: texts differ by the choice of tokens alone.
        choice_seed: Key of the choice of tokens, where it is another one: batches of one data set take different ones.
        generate_kwargs: For `model.generate`, such as `max_new_tokens`, `do_sample`, `generation_config`,
            `stopping_criteria`, or `stop_strings` with the `tokenizer`.

    Returns:
        The texts.

    Raises:
        TypeError: If the model carries no adapter of this package, or cannot generate.
        ValueError: If `num_samples` is below 1, the adapter is not in place, or several texts a prompt are asked for.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_calib import BayesianLoraConfig
        >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0))
        >>> model = get_peft_model(base, BayesianLoraConfig(r=2, target_modules=["q_proj"]))
        >>> ids = torch.ones(3, 5, dtype=torch.long)
        >>> sample_generate(model, {"input_ids": ids}, num_samples=4, max_new_tokens=2).sequences.shape[:2]
        torch.Size([4, 3])
    """
    source, num_samples = _functions(model, how, seed, num_samples)
    generate: Any = getattr(source.root, "generate", None)
    if generate is None:
        raise TypeError(f"{type(source.root).__name__} cannot generate.")
    asked = _Asked(source.root.generation_config, generate_kwargs)
    device = next(source.root.parameters()).device
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inputs = send_to_device(inputs, device, non_blocking=True)
    rows = count_rows(inputs, main_input_name(source.root))
    inputs = repeat_rows(inputs, num_samples, rows)
    choice_seed = seed if choice_seed is None else choice_seed
    own_state = _own_random_state(choice_seed, device) if asked.value("do_sample") else nullcontext()
    with torch.no_grad(), evaluating(model), source.use(0, num_samples), own_state:
        output = generate(**inputs, **asked.kwargs)
    logits = torch.stack(output.logits, dim=1).float()
    tokens = output.sequences[:, -logits.shape[1] :]
    mask = asked.until_end(tokens)
    log_p = logits.log_softmax(-1)
    by_draw = (num_samples, rows)
    _check_finite(log_p, mask, by_draw)
    chosen = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return GeneratedSamples(
        tokens.unflatten(0, by_draw).cpu(),
        torch.where(mask, chosen, 0).sum(-1).unflatten(0, by_draw).cpu(),
        mask.unflatten(0, by_draw).cpu(),
    )


def score_texts(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    *,
    how: Literal["sample", "mean"] = "sample",
) -> TextScores:
    """Ask K draws about given texts: probability, predictive entropy and mutual information of every token.

    Draws are evaluated one after another, so that one draw's logits over the vocabulary are held at a time.

    Args:
        model: A decoder with an active adapter of this package.
        input_ids: Prompt and text, int64 (N, L).
        labels: The same with -100 where a token is not to be scored (the prompt and padding), int64 (N, L).
        attention_mask: (N, L); all ones when `None`.
        num_samples: Number of draws K; when `None` what the law suggests.
        seed: Key of the draws.
        how: `"mean"` asks the deterministic model once, any model: nothing disagrees then.

    Returns:
        Scores of the tokens after the first, T = L - 1.

    Raises:
        ValueError: If `num_samples` is below 1, the shapes differ, or the model is an encoder-decoder.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)} differ in shape.")
    source, num_samples = _functions(model, how, seed, 1 if how == "mean" else num_samples)
    if getattr(source.root.config, "is_encoder_decoder", False):
        raise ValueError("score_texts takes decoders; this model is an encoder-decoder.")
    device = next(source.root.parameters()).device
    mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
    inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    inputs = numbered(inputs) if numbers_places(source.root) else inputs
    targets = labels[:, 1:].to(device)
    kept = targets != -100
    of_token: list[torch.Tensor] = []
    mean: torch.Tensor | None = None
    expected = torch.zeros(targets.shape, device=device)
    with torch.no_grad(), evaluating(model):
        for k in range(num_samples):
            with source.use(k, 1):
                log_p = model(**inputs).logits[:, :-1].float().log_softmax(-1)
            _check_finite(log_p, kept, (1, len(kept)))
            p = log_p.exp()
            mean = p if mean is None else mean + (p - mean) / (k + 1)
            expected += torch.special.entr(p).sum(-1) / num_samples
            chosen = log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            of_token.append(torch.where(kept, chosen, 0).cpu())
    entropy = torch.special.entr(mean).sum(-1)
    by_draw = torch.stack(of_token)
    mixture = by_draw.double().logsumexp(0) - torch.tensor(num_samples, dtype=torch.float64).log()
    kept_cpu = kept.cpu()
    return TextScores(
        by_draw,
        torch.where(kept_cpu, mixture, 0).float(),
        torch.where(kept, entropy, 0).cpu(),
        torch.where(kept, (entropy - expected).clamp_min(0), 0).cpu(),
        kept_cpu,
    )


def _functions(model: nn.Module, how: str, seed: int, num_samples: int | None) -> tuple[DrawSource, int]:
    """Where the functions come from, and how many there are."""
    if how not in ("sample", "mean"):
        raise ValueError(f'how must be "sample" or "mean", got {how!r}.')
    if how == "mean":
        source: DrawSource = TheModel(model)
        return source, check_num_samples(source.default_num_samples if num_samples is None else num_samples)
    draws = LawDraws(model, seed)
    return draws, count_draws(draws, num_samples)


def _check_finite(log_p: torch.Tensor, mask: torch.Tensor, by_draw: tuple[int, int]) -> None:
    """Raise `NotFiniteError` if a token that counts has no distribution."""
    wrong = (log_p.isnan().any(-1) & mask).any(-1).unflatten(0, by_draw)
    if bool(wrong.any()):
        raise NotFiniteError(wrong.cpu(), " (texts)")


class _Stops(StoppingCriteria):
    """Remembers after which token each text was stopped by something else than an end token."""

    def __init__(self, criteria: Sequence[StoppingCriteria]) -> None:
        self.criteria, self.ended = StoppingCriteriaList(criteria), list[torch.Tensor]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.ended.append(self.criteria(input_ids, scores, **kwargs))
        return self.ended[-1]


class _Asked:
    """What `generate` is asked for: its arguments before those of `generation_config=` before the model's own."""

    def __init__(self, own: Any, generate_kwargs: Mapping[str, Any]) -> None:
        self.kwargs, self._given = dict(generate_kwargs), dict(generate_kwargs)
        self._configs = [deepcopy(generate_kwargs.get("generation_config")), own]
        for name in ("num_return_sequences", "num_beams"):
            if self.value(name) not in (None, 1):
                raise ValueError(f"sample_generate writes one text for each draw and prompt, so {name} must be 1.")
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        if self._configs[0] is None:
            self.kwargs |= wanted
        else:  # beside one, transformers frowns upon arguments
            self._configs[0].update(**wanted)
            self.kwargs["generation_config"] = self._configs[0]
        criteria = list(generate_kwargs.get("stopping_criteria") or ())
        if self.value("stop_strings") is not None and "tokenizer" in generate_kwargs:
            criteria.append(StopStringCriteria(generate_kwargs["tokenizer"], self.value("stop_strings")))
        self._stops = _Stops(criteria)
        if criteria:
            self.kwargs["stopping_criteria"] = StoppingCriteriaList([self._stops])

    def value(self, name: str) -> Any:
        """A setting of the generation."""
        if name in self._given:
            return self._given[name]
        found = (getattr(config, name, None) for config in self._configs)
        return next((value for value in found if value is not None), None)

    def until_end(self, tokens: torch.Tensor) -> torch.Tensor:
        """True up to and with the first end token, or the token that something else stopped the text at."""
        end = self.value("eos_token_id")
        ends = torch.zeros_like(tokens, dtype=torch.bool)
        if end is not None:
            ends |= torch.isin(tokens, torch.as_tensor(end, device=tokens.device))
        if self._stops.ended:
            ends |= torch.stack(self._stops.ended, dim=-1).to(tokens.device)
        return (ends.int().cumsum(-1) - ends.int()) == 0


@contextmanager
def _own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """`generate` chooses tokens with the global generator: seed it inside, and put it back, one thread at a time."""
    with _RANDOM_STATE, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
