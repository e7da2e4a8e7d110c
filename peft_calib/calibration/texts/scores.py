"""Scores of whole answers: how sure a language model is of a text, from its tokens' probabilities and from samples.

Each is one number an answer, on a scale of its own; `AnswerCalibration` makes a probability of being right of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from ..inputs import as_numpy
from .similarity import normalise_answer, rouge_l


class ScoredTexts(Protocol):
    """What `peft_calib.score_texts` answers: `(K, N, T)` and `(N, T)`, 0 where `mask` is False."""

    sample_log_probabilities: Any
    log_probabilities: Any
    entropy: Any
    mutual_information: Any
    mask: Any


# ------------------------------------------------------------------------------------- of the answer's own probability


def sum_log_probability(scored: ScoredTexts) -> np.ndarray:
    """`log (1/K) sum_k prod_t p_k(y_t | y_<t, x)`: the log-probability of the whole answer under the mean of K draws.

    Longer answers have a smaller one. For K = 1 it is the sum of the tokens' log-probabilities; see Malinin & Gales
    (2021) for K draws.
    """
    by_draw = _of(scored.sample_log_probabilities).sum(-1)
    top = by_draw.max(axis=0)
    return top + np.log(np.exp(by_draw - top).mean(axis=0))


def mean_log_probability(scored: ScoredTexts) -> np.ndarray:
    """`(1/T) sum_t log (1/K) sum_k p_k(y_t | y_<t, x)`: the same for each token, on average (Malinin & Gales, 2021).

    Its exponential is the inverse perplexity of the answer.
    """
    return _token_means(scored, _of(scored.log_probabilities))


def min_log_probability(scored: ScoredTexts) -> np.ndarray:
    """`min_t log (1/K) sum_k p_k(y_t | y_<t, x)`: as sure as the least sure token (Manakul et al., 2023)."""
    values = np.where(_of(scored.mask).astype(bool), _of(scored.log_probabilities), np.inf).min(axis=-1)
    return np.where(np.isfinite(values), values, 0.0)


def mean_entropy(scored: ScoredTexts) -> np.ndarray:
    """`(1/T) sum_t H[(1/K) sum_k p_k(. | y_<t, x)]`, nats: how many next tokens were open (Malinin & Gales, 2021)."""
    return _token_means(scored, _of(scored.entropy))


def mean_mutual_information(scored: ScoredTexts) -> np.ndarray:
    """`(1/T) sum_t (H[mean_k p_k] - mean_k H[p_k])`, nats: what the draws disagree on (Malinin & Gales, 2021).

    0 for one function; only draws of an adapter make it more.
    """
    return _token_means(scored, _of(scored.mutual_information))


# ------------------------------------------------------------------------------------------------------- of K samples


def match_share(answers: Sequence[str], samples: Sequence[Sequence[str]]) -> np.ndarray:
    """`(1/K) sum_k 1[sample_k = answer]`, equal after `normalise_answer`: exact match (Cole et al., 2023)."""
    pairs = zip(map(normalise_answer, answers), samples, strict=True)
    return np.array([_counts(texts)[answer] / len(texts) for answer, texts in pairs])


def mean_overlap(answers: Sequence[str], samples: Sequence[Sequence[str]]) -> np.ndarray:
    """`(1/K) sum_k ROUGE-L(answer, sample_k)`: agreement that sees that two answers share words."""
    pairs = zip(answers, samples, strict=True)
    return np.array([np.mean([rouge_l(answer, text) for text in texts]) for answer, texts in pairs])


def pair_overlap(answers: Sequence[str], samples: Sequence[Sequence[str]]) -> np.ndarray:
    """`2 / (K (K - 1)) sum_{j<k} ROUGE-L(sample_j, sample_k)`: lexical similarity (Fomicheva et al., 2020).

    It says how alike samples are to each other, whatever the answer is; 1 for a single sample.
    """
    means = ([rouge_l(one, other) for one, other in combinations(texts, 2)] for texts in samples)
    return np.array([np.mean(found) if found else 1.0 for found in means])


def num_answers(answers: Sequence[str], samples: Sequence[Sequence[str]]) -> np.ndarray:
    """How many different answers the samples give, equal after `normalise_answer` (compare Lin et al., 2024)."""
    return np.array([float(len(_counts(texts))) for texts in samples])


def answer_entropy(answers: Sequence[str], samples: Sequence[Sequence[str]]) -> np.ndarray:
    """`-sum_c (n_c / K) log(n_c / K)` over the different answers c, nats.

    The discrete semantic entropy of Farquhar et al. (2024) with "equal after `normalise_answer`" in place of a model
    of entailment: no second model, and paraphrases count as different answers.
    """
    shares = (np.array(list(_counts(texts).values())) / len(texts) for texts in samples)
    return np.array([float(-(share * np.log(share)).sum()) + 0.0 for share in shares])


# ----------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class AnswerScore:
    """One score: its name is that of its function, whose text has formula and source."""

    compute: Callable[..., np.ndarray]
    of_samples: bool
    higher_is_surer: bool

    @property
    def key(self) -> str:
        """The name in `AnswerScores`."""
        return self.compute.__name__


#: Every score, in the order of tables.
ANSWER_SCORES = (
    AnswerScore(sum_log_probability, False, True),
    AnswerScore(mean_log_probability, False, True),
    AnswerScore(min_log_probability, False, True),
    AnswerScore(mean_entropy, False, False),
    AnswerScore(mean_mutual_information, False, False),
    AnswerScore(match_share, True, True),
    AnswerScore(mean_overlap, True, True),
    AnswerScore(pair_overlap, True, True),
    AnswerScore(num_answers, True, False),
    AnswerScore(answer_entropy, True, False),
)
#: Scores that are smaller where a model is surer.
FALLING = frozenset(score.key for score in ANSWER_SCORES if not score.higher_is_surer)


class AnswerScores(Mapping[str, np.ndarray]):
    """Scores of N answers by name, each `(N,)` float64.

    Args:
        values: The scores; further ones of your own may stand among them.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._by_name = {name: as_numpy(column, name).astype(np.float64) for name, column in values.items()}
        shapes = {name: column.shape for name, column in self._by_name.items()}
        if not shapes or len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
            raise ValueError(f"Scores are columns of one length, one number an answer; got {shapes}.")
        wrong = next((name for name, column in self._by_name.items() if not np.isfinite(column).all()), None)
        if wrong is not None:
            row = int(np.flatnonzero(~np.isfinite(self._by_name[wrong]))[0])
            raise ValueError(f"The score {wrong} of row {row} is {self._by_name[wrong][row]}, not a finite number.")

    @property
    def num_rows(self) -> int:
        """N."""
        return len(next(iter(self._by_name.values())))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"AnswerScores({self.num_rows} answers: {', '.join(self)})"

    def take(self, rows: Any) -> AnswerScores:
        """The scores of some rows: places, or a mask."""
        return AnswerScores({name: column[rows] for name, column in self.items()})


def answer_scores(
    scored: ScoredTexts | None = None,
    answers: Sequence[str] | None = None,
    samples: Sequence[Sequence[str]] | None = None,
) -> AnswerScores:
    """All scores of whole answers that follow from what there is.

    Args:
        scored: What `peft_calib.score_texts` says of the answers.
        answers: `(N,)` the answers as texts.
        samples: For each of them K further answers to the same prompt, as `GeneratedSamples.texts` gives them.

    Returns:
        The scores by name: those of the probabilities with `scored`, those of the samples with the other two.

    Raises:
        ValueError: If neither is given, or they are not of the same answers.

    Example:
        >>> scores = answer_scores(answers=["sun"], samples=[["The sun", "sun.", "moon", "sun"]])
        >>> float(scores["match_share"][0]), float(scores["num_answers"][0])
        (0.75, 2.0)
    """
    if scored is None and samples is None:
        raise ValueError("Give `scored`, from peft_calib.score_texts, or `answers` with `samples`, or all.")
    if samples is not None:
        if answers is None or len(answers) != len(samples) or any(not len(texts) for texts in samples):
            raise ValueError("`samples` go with `answers`: at least one sampled text for each answer.")
        if scored is not None and _of(scored.mask).shape[0] != len(answers):
            raise ValueError(f"`scored` is of {_of(scored.mask).shape[0]} answers, and {len(answers)} are given.")
    found = {}
    for score in ANSWER_SCORES:
        if score.of_samples and samples is not None:
            found[score.key] = score.compute(answers, samples)
        elif not score.of_samples and scored is not None:
            found[score.key] = score.compute(scored)
    return AnswerScores(found)


def _of(values: Any) -> np.ndarray:
    return as_numpy(values, "scored texts").astype(np.float64)


def _token_means(scored: ScoredTexts, values: np.ndarray) -> np.ndarray:
    mask = _of(scored.mask)
    return (values * mask).sum(axis=-1) / np.maximum(mask.sum(axis=-1), 1.0)


def _counts(texts: Sequence[str]) -> Counter[str]:
    return Counter(map(normalise_answer, texts))
