"""Answers to prompts, each with what its draws and its samples say of how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..base_models import able_to_pad
from ..calibration.texts.scores import AnswerScores, answer_scores
from ..tuners.laws import laws_of
from ..whole_numbers import check_whole
from .draws import check_num_samples
from .texts import GeneratedSamples, TextScores, sample_generate, score_texts

#: Labels of tokens that are not scored.
IGNORED = -100
#: No setting that a model brings along may bend its distribution: answers are its likeliest tokens, samples its own.
AS_IT_IS = {
    **{"num_beams": 1, "num_return_sequences": 1, "min_length": 0, "min_new_tokens": None, "no_repeat_ngram_size": 0},
    **{"repetition_penalty": 1.0, "typical_p": 1.0, "min_p": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
    **{"exponential_decay_length_penalty": None, "sequence_bias": None, "guidance_scale": None},
}
#: What each token of a tokenizer says: to decode a vocabulary takes a second.
_token_texts: WeakKeyDictionary[PreTrainedTokenizerBase, list[str]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False, repr=False)
class GeneratedAnswers:
    """Answers to N prompts.

    Args:
        prompts: `(N,)` as they were asked.
        answers: `(N,)` the likeliest text token by token, by the adapter as it is in evaluation.
        samples: `(N,)` of `(K,)` texts, one for each draw.
        scored: What the K draws say of the answers, token by token; the token that ends one included.
        sample_log_probabilities: Float32 (N, K), of each sample under the draw that wrote it, its last token included.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    samples: tuple[tuple[str, ...], ...]
    scored: TextScores
    sample_log_probabilities: torch.Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def __repr__(self) -> str:
        shown = f"{self.answers[0][:40]!r}" if self.answers else "none"
        return f"GeneratedAnswers({len(self)} answers with {len(self.samples[0])} samples each, the first: {shown})"

    def scores(self) -> AnswerScores:
        """Scores of the answers by name, as `peft_calib.calibration.answer_scores` describes them."""
        return answer_scores(self.scored, self.answers, self.samples)

    def records(self) -> list[dict[str, Any]]:
        """One mapping a prompt with all that is known of its answer, for a file or a table."""
        scores = self.scores()
        return [
            {
                "prompt": self.prompts[row],
                "answer": self.answers[row],
                "samples": list(self.samples[row]),
                **{name: float(column[row]) for name, column in scores.items()},
            }
            for row in range(len(self))
        ]


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_samples: int | None = None,
    seed: int = 0,
    how: Literal["sample", "mean"] | None = None,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    until: Sequence[str] = ("\n",),
    batch_size: int = 8,
    progress: bool = True,
) -> GeneratedAnswers:
    r"""Answer prompts, and gather what is needed to say how likely each answer is right.

    The answer is the model's likeliest text, token by token. Each of K draws of the adapter says how probable it finds
    that answer, and writes one of its own, tokens drawn from its distribution. A model without draws (a stock LoRA, or
    none) writes K times by itself; then samples differ by the choice of tokens alone.

    Args:
        model: A decoder, with any adapter or none.
        tokenizer: Its tokenizer.
        prompts: Texts that end where the answer begins.
        num_samples: Number of draws and samples K; when `None` what the adapter suggests, and else 8.
        seed: Key of the draws and of the choice of tokens. Equal arguments give equal answers; the samples of a prompt
            hang on the batch it stands in, too.
        how: `"sample"` for draws, `"mean"` for the one function the adapter has in evaluation; when `None` draws where
            there are some.
        max_new_tokens: Longest answer.
        temperature: Of the samples: logits are divided by it. Log-probabilities are those of the model all the same.
        until: Texts of one character, at which an answer ends, beside the model's own end; it holds nothing after.
        batch_size: Prompts at a time; K times as many rows are generated.
        progress: Show a bar.

    Returns:
        Answers, samples and scores.

    Raises:
        TypeError: If draws are asked of a model that has none, or the model cannot generate.
        ValueError: If there is no prompt, one is no text or empty, or a number is out of range.

    Example:
        >>> found = generate_answers(model, tokenizer, ["Q: Which star is nearest?\nA:"])  # doctest: +SKIP
        >>> found.answers[0], found.scores()["match_share"][0]  # doctest: +SKIP
        ('the Sun', 0.875)
    """
    _check_prompts(prompts)
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}.")
    batch_size, seed = check_whole(batch_size, "batch_size", 1), check_whole(seed, "seed")
    how = how or ("sample" if any(law.varies for law in laws_of(model, active=True)) else "mean")
    count = None if num_samples is None else check_num_samples(num_samples)
    tokenizer = able_to_pad(tokenizer)
    ends = _end_tokens(model, tokenizer, until)
    common = {
        "max_new_tokens": check_whole(max_new_tokens, "max_new_tokens", 1),
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
        **AS_IT_IS,
    }
    parts = []
    starts = range(0, len(prompts), batch_size)
    for number, start in enumerate(tqdm(starts, desc="answer", disable=not progress)):
        batch = _encoded(tokenizer, prompts[start : start + batch_size])
        best = sample_generate(model, batch, 1, how="mean", do_sample=False, **common)
        own: dict[str, Any] = {"how": how, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        drawn = sample_generate(model, batch, count, seed, choice_seed=seed + number, **own, **common)
        scored = score_texts(model, **_continued(batch, best, tokenizer), num_samples=count, seed=seed, how=how)
        texts = (_texts(one, tokenizer, until) for one in (best, drawn))
        parts.append((*texts, scored, drawn.log_probabilities))
    best_texts, samples, scores, log_p = zip(*parts, strict=True)
    return GeneratedAnswers(
        prompts=tuple(prompts),
        answers=tuple(texts[0] for part in best_texts for texts in part),
        samples=tuple(tuple(texts) for part in samples for texts in part),
        scored=_joined(scores),
        sample_log_probabilities=torch.cat(log_p, dim=1).T.contiguous(),
    )


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError("prompts is a list of texts: write generate_answers(model, tokenizer, [prompt]).")
    if not len(prompts):
        raise ValueError("There is nothing to answer: no prompt was given.")
    wrong = next((row for row, text in enumerate(prompts) if not isinstance(text, str) or not text.strip()), None)
    if wrong is not None:
        raise ValueError(f"Prompt {wrong} is {prompts[wrong]!r}; a text is expected.")


def _end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, until: Sequence[str]) -> list[int]:
    """The tokens that end an answer: the model's own, and all whose text holds one of the characters."""
    if isinstance(until, str) or any(not isinstance(text, str) or len(text) != 1 for text in until):
        raise ValueError(f"until is a list of texts of one character, got {until!r}.")
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None) or tokenizer.eos_token_id
    ends = set(own if isinstance(own, list) else [] if own is None else [own])
    if until:
        ends |= {token for token, text in enumerate(_texts_of(tokenizer)) if any(mark in text for mark in until)}
    if not ends:
        raise ValueError("Neither the model nor `until` says where an answer ends: name a character, until=['\\n'].")
    return sorted(ends)


def _texts_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    texts = _token_texts.get(tokenizer, [])
    if len(texts) != len(tokenizer):
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        _token_texts[tokenizer] = texts
    return texts


@contextmanager
def _padding_on_the_left(tokenizer: PreTrainedTokenizerBase) -> Any:
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def _encoded(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    ids = tokenizer(list(prompts))["input_ids"]
    # some tokenizers end every text; an answer begins where the prompt stops
    ids = [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in ids]
    with _padding_on_the_left(tokenizer):
        found = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _continued(
    batch: Mapping[str, torch.Tensor], best: GeneratedSamples, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Prompts with their answers as `score_texts` takes them: padded at the end, the answers alone scored."""
    rows = []
    for ids, mask, tokens, kept in zip(
        batch["input_ids"], batch["attention_mask"], best.sequences[0], best.mask[0], strict=True
    ):
        rows.append((ids[mask.bool()], tokens[kept]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    shape = (len(rows), longest)
    input_ids = torch.full(shape, int(tokenizer.pad_token_id or 0), dtype=torch.long)
    labels, attention = torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.long)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.cat([prompt, answer])
        labels[row, len(prompt) : end] = answer
        attention[row, :end] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention}


def _texts(found: GeneratedSamples, tokenizer: PreTrainedTokenizerBase, until: Sequence[str]) -> list[list[str]]:
    """For each prompt the texts, cut where they end."""

    def cut(text: str) -> str:
        for mark in until:
            text = text.partition(mark)[0]
        return text.strip()

    return [[cut(text) for text in texts] for texts in found.texts(tokenizer)]


def _joined(parts: Sequence[TextScores]) -> TextScores:
    """The scores of all batches; rows are padded to the longest text."""
    longest = max(part.mask.shape[-1] for part in parts)

    def together(name: str, dim: int) -> torch.Tensor:
        tensors = [getattr(part, name) for part in parts]
        widened = [nn.functional.pad(tensor, (0, longest - tensor.shape[-1])) for tensor in tensors]
        return torch.cat(widened, dim=dim)

    return TextScores(
        together("sample_log_probabilities", 1),
        *(together(name, 0) for name in ("log_probabilities", "entropy", "mutual_information", "mask")),
    )
