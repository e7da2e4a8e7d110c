"""Sets of sampled answers that hold a right one with a guarantee (after Quach et al., 2024)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_atomically
from ...json_files import Fields, read_json, sealed, without_nan
from ..decide.bounds import NoGuaranteeError, band_text, check_share, exact_interval, percent
from ..decide.set_part import rows_needed
from ..decide.set_report import CoverageLaw
from ..decide.set_scores import rank_for
from ..fingerprint import SplitFingerprint, row_hashes
from ..inputs import as_numpy
from ..recalibrate.fitted import refuse_overlap

FORMAT_VERSION = 1
MEND = "Fit the sets again on prompts whose samples are labelled"
#: What decides which samples are in: how many were drawn before, or how sure the model is of each.
COUNT, SCORE = "count", "score"


@dataclass(frozen=True)
class SampleSetReport:
    """What sets of samples reach on prompts they were not fitted on.

    Attributes:
        num_prompts: Prompts.
        alpha: Highest share of prompts whose set may hold no right answer.
        coverage: Share of the sets that hold one.
        coverage_interval: Clopper & Pearson's (1934) interval of it.
        band: Between which shares the coverage of this many new prompts lies (beta-binomial), if no scores are tied;
            with ties it is larger.
        mean_size: Samples a set, on average; different answers where the texts were given.
        possible: Share of prompts that have a right answer among all their samples: no set can cover more.
        empty: Share of sets without a sample.
        confidence_level: Of interval and band.
    """

    num_prompts: int
    alpha: float
    coverage: float
    coverage_interval: tuple[float, float]
    band: tuple[float, float]
    mean_size: float
    possible: float
    empty: float
    confidence_level: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """In words."""
        level = percent(self.confidence_level)
        return (
            f"{percent(self.coverage)} of {self.num_prompts:,} sets hold a right answer ({level} interval "
            f"{band_text(self.coverage_interval)}; to be expected {band_text(self.band)}). A set holds "
            f"{self.mean_size:.2f} on average, {percent(self.empty)} are empty; of all samples "
            f"{percent(self.possible)} of the prompts have a right one."
        )

    def __str__(self) -> str:
        return self.to_markdown()


class SampleSets:
    """Which of the samples of a prompt to show, so that a right one is among them for `1 - alpha` of the prompts.

    With `by="count"` the set is the first k samples, in the order they were drawn, and k is the least number for which
    enough of the prompts of `fit` have a right one: that says how many samples to draw. With `by="score"` it holds the
    samples whose score is at least a cut; sure prompts get few samples, open ones many.

    Guarantee. Let `V` of a prompt be the place of its first right sample (or minus the largest score of a right one),
    infinite where all M samples are wrong. The set holds a right answer exactly where `V <= q`, so with q the
    `ceil((n + 1) (1 - alpha))`-th smallest V of the n prompts of `fit` it does so for a new prompt with probability at
    least `1 - alpha` (Vovk, 2012), on average over calibration splits; with `confidence` for at least `1 - alpha` of
    new prompts, with that probability over splits. It takes prompts, with their samples, that are exchangeable, and
    holds whatever the model. It says nothing of one prompt, nor of which sample is the right one. Where more than
    `alpha` of the prompts have no right sample at all, no set can keep it, and `fit` says so.

    Args:
        alpha: Highest share of prompts whose set may hold no right answer, in (0, 1).
        by: `"count"` or `"score"`.
        confidence: Probability over calibration splits with which the coverage holds; None: on average.

    Attributes:
        num_samples: With `by="count"`, how many samples to draw.
        cut: With `by="score"`, the least score in a set.

    Example:
        >>> right = np.random.default_rng(0).random((200, 8)) < 0.5  # every sample is right half the time
        >>> sets = SampleSets(alpha=0.1).fit(right)
        >>> sets.num_samples  # the least k with 1 - 0.5^k >= 0.9
        4
    """

    def __init__(self, alpha: float = 0.1, by: str = COUNT, *, confidence: float | None = None) -> None:
        self.alpha = check_share(alpha, "alpha", 0.1)
        if by not in (COUNT, SCORE):
            raise ValueError(f'`by` must be "{COUNT}" or "{SCORE}", got {by!r}.')
        self.by = by
        self.confidence = None if confidence is None else check_share(confidence, "confidence", 0.95)
        self.quantile: float | None = None
        self.law: CoverageLaw | None = None
        self.most_samples = 0
        self.fitted_on: SplitFingerprint | None = None

    def fit(self, right: Any, scores: Any = None) -> SampleSets:
        """Finds how far a set reaches, on prompts whose samples are labelled.

        Args:
            right: `(N, M)` bool, which samples of each prompt are right, in the order they were drawn.
            scores: `(N, M)`, with `by="score"`: larger where surer, such as the log-probability of each sample, or the
                share of the samples that give the same answer.

        Returns:
            The object itself.

        Raises:
            NoGuaranteeError: If the prompts are too few, or too many have no right sample; the message says how many
                it takes, or what alpha they allow.
            ValueError: For arrays that are not paired, or no scores where they decide.
        """
        right, values = self._checked(right, scores)
        needed = _first_right(right, values)
        count, rank = len(needed), rank_for(len(needed), self.alpha, self.confidence)
        if rank > count:
            takes = rows_needed(self.alpha, self.confidence)
            raise NoGuaranteeError(
                f"{count} prompts cannot bound the share of sets without a right answer by {percent(self.alpha)}: "
                f"that takes {takes} prompts. Label more, or take a larger alpha.", count, takes,
            )  # fmt: skip
        quantile = float(np.sort(needed)[rank - 1])
        if not np.isfinite(quantile):
            raise NoGuaranteeError(self._out_of_reach(needed, right.shape[1]), count, None)
        self.quantile, self.law = quantile, CoverageLaw(rank, count + 1 - rank)
        self.most_samples = right.shape[1]
        self.fitted_on = SplitFingerprint.of_hashes(_hashes(right, values))
        return self

    @property
    def num_samples(self) -> int:
        """How many samples to draw: k with `by="count"`, all M of the fit with `by="score"`."""
        quantile = self._check_fitted()
        return int(quantile) if self.by == COUNT else self.most_samples

    @property
    def cut(self) -> float:
        """The least score in a set; there is none with `by="count"`."""
        quantile = self._check_fitted()
        if self.by == COUNT:
            raise ValueError('With by="count" a set goes by the number of samples, and there is no cut: num_samples.')
        return -quantile

    def predict(self, samples: Any) -> np.ndarray:
        """Which samples are in the set of each prompt.

        Args:
            samples: `(N, M)` scores with `by="score"`; with `by="count"` anything of that shape, its values not used.

        Returns:
            `(N, M)` bool.

        Raises:
            ValueError: If it is not fitted, or there are fewer samples than the guarantee takes.
        """
        self._check_fitted()
        given = as_numpy(samples, "samples") if self.by == SCORE else np.asarray(samples, dtype=object)
        if given.ndim != 2 or given.shape[1] < self.num_samples:
            raise ValueError(
                f"samples must be (N, M) with at least M = {self.num_samples} samples a prompt, got shape "
                f"{given.shape}: the guarantee is for as many as that."
            )
        return self._inside(self._ordered_by(given.shape, given if self.by == SCORE else None))

    def evaluate(
        self, right: Any, scores: Any = None, answers: Any = None, *, confidence_level: float = 0.95
    ) -> SampleSetReport:
        """Coverage and size of the sets of prompts that they were not fitted on.

        Args:
            right: As for `fit`.
            scores: As for `fit`.
            answers: `(N, M)` what each sample says, such as `normalise_answer` of its text: equal ones count once.
            confidence_level: Of the interval and the band.

        Raises:
            ValueError: If the prompts are those of the fit, or there are fewer samples than the guarantee takes.
        """
        self._check_fitted()
        assert self.fitted_on is not None and self.law is not None
        level = check_share(confidence_level, "confidence_level", 0.95)
        right, values = self._checked(right, scores)
        overlap = self.fitted_on.seen(_hashes(right, values))
        mend = "Coverage must be reported on prompts they have not seen: hold out labelled prompts for the report."
        refuse_overlap(overlap, self.fitted_on, type(self).__name__, mend, "prompts")
        inside = self.predict(right if scores is None else scores)
        covered, count = (inside & right).any(axis=1), len(right)
        return SampleSetReport(
            num_prompts=count,
            alpha=self.alpha,
            coverage=float(covered.mean()),
            coverage_interval=exact_interval(int(covered.sum()), count, level),
            band=self.law.band(count, level),
            mean_size=float(_sizes(inside, answers).mean()),
            possible=float(right.any(axis=1).mean()),
            empty=float((~inside.any(axis=1)).mean()),
            confidence_level=level,
        )

    def promise(self) -> str:
        """What is guaranteed, in one sentence."""
        self._check_fitted()
        sure = (
            "on average over calibration splits"
            if self.confidence is None
            else f"in {percent(self.confidence)} of splits"
        )
        which = (
            f"the first {self.num_samples} samples"
            if self.by == COUNT
            else f"the samples, of {self.most_samples}, whose score is at least {self.cut:.4g}"
        )
        return f"At least {percent(1.0 - self.alpha)} of the prompts have a right answer among {which}, {sure}."

    def __str__(self) -> str:
        if self.fitted_on is None:
            return "This SampleSets is not fitted yet; call fit(right) on prompts whose samples are labelled."
        told = f"fitted on {self.fitted_on.num_rows:,} prompts"
        return f"{self.promise()[:-1]} ({told}). It holds for prompts drawn like those, and not after a shift."

    def save(self, path: str | Path) -> None:
        """Writes the fitted sets to a JSON file, whole or not at all."""
        quantile = self._check_fitted()
        assert self.fitted_on is not None and self.law is not None
        content = {
            "format_version": FORMAT_VERSION,
            "rule": type(self).__name__,
            "settings": {"alpha": self.alpha, "by": self.by, "confidence": self.confidence},
            "fitted": {"quantile": quantile, "law": list(self.law), "most_samples": self.most_samples},
            "fitted_on": self.fitted_on.to_dict(),
        }
        write_atomically(path, json.dumps(sealed(without_nan(content)), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SampleSets:
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is no such file, holds values that cannot be, or was changed after the fit; the
                message names file, field and value.
        """
        fields = read_json(path, MEND)
        if fields.text("rule") != cls.__name__:
            raise fields.wrong("rule", repr(cls.__name__))
        fields.check_version(FORMAT_VERSION)
        settings, fitted = fields.mapping("settings"), fields.mapping("fitted")
        with fields.named():
            found = cls(
                settings.number("alpha"),
                settings.text("by", among=(COUNT, SCORE)),
                confidence=settings.number("confidence", default=None),
            )
        found.most_samples = fitted.integer("most_samples", least=1)
        found.quantile = _quantile_of(fitted, found)
        law = fitted.array("law", (2,))
        if (law <= 0.0).any():
            raise fitted.wrong("law", "two numbers above 0")
        found.law = CoverageLaw(*map(float, law))
        found.fitted_on = SplitFingerprint.from_fields(fields.mapping("fitted_on"))
        fields.check_seal("the rule")
        return found

    def _checked(self, right: Any, scores: Any) -> tuple[np.ndarray, np.ndarray]:
        """`(N, M)` which samples are right, and their values: the set holds those of at most a number."""
        given = as_numpy(right, "right")
        if given.ndim != 2 or not given.size or not np.isin(given, (0, 1)).all():
            raise ValueError(
                f"right must be (N, M) booleans, one for each of M samples of N prompts, got {given.dtype} of shape "
                f"{given.shape}."
            )
        if (scores is None) == (self.by == SCORE):
            told = "needs `scores`, one for each sample" if scores is None else "takes no scores"
            raise ValueError(f'SampleSets(by="{self.by}") {told}.')
        return given.astype(bool), self._ordered_by(given.shape, scores)

    def _ordered_by(self, shape: tuple[int, ...], scores: Any) -> np.ndarray:
        if scores is None:
            return np.broadcast_to(np.arange(1.0, shape[1] + 1.0), shape)
        values = as_numpy(scores, "scores").astype(np.float64)
        if values.shape != shape:
            raise ValueError(f"scores must be finite numbers of shape {shape}, got shape {values.shape}.")
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            prompt, sample = bad[0].tolist()
            raise ValueError(
                f"{len(bad)} scores are NaN or infinite, first {values[prompt, sample]} of sample {sample} of "
                f"prompt {prompt}; finite numbers are expected: leave out such prompts, or score them anew."
            )
        return -values

    def _inside(self, values: np.ndarray) -> np.ndarray:
        return values <= self._check_fitted()

    def _out_of_reach(self, needed: np.ndarray, most: int) -> str:
        none, count = int((~np.isfinite(needed)).sum()), len(needed)
        allowed = next((a / 100 for a in range(1, 100) if _reachable(needed, a / 100, self.confidence)), None)
        remedy = "" if allowed is None else f" The least alpha that they allow is about {allowed:g}."
        return (
            f"{none} of {count} prompts have no right answer among their {most} samples, so no set of these holds one "
            f"for {percent(1.0 - self.alpha)} of the prompts. Draw more samples, or take a larger alpha.{remedy}"
        )

    def _check_fitted(self) -> float:
        if self.quantile is None:
            raise ValueError(str(self))
        return self.quantile


def _first_right(right: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`(N,)` the least value of a right sample; infinite where there is none."""
    return np.where(right, values, np.inf).min(axis=1)


def _reachable(needed: np.ndarray, alpha: float, confidence: float | None) -> bool:
    rank = rank_for(len(needed), alpha, confidence)
    return rank <= len(needed) and bool(np.isfinite(np.sort(needed)[rank - 1]))


def _sizes(inside: np.ndarray, answers: Any) -> np.ndarray:
    """`(N,)` how many samples, or different answers, are in each set."""
    if answers is None:
        return inside.sum(axis=1)
    rows = [
        [one for one, kept in zip(row, held, strict=True) if kept] for row, held in zip(answers, inside, strict=True)
    ]
    return np.array([len(set(row)) for row in rows])


def _hashes(right: np.ndarray, values: np.ndarray) -> np.ndarray:
    first = np.where(np.isfinite(values), values, 0.0)
    return row_hashes(np.concatenate([right.astype(np.float64), first], axis=1), right.sum(axis=1))


def _quantile_of(fitted: Fields, sets: SampleSets) -> float:
    if sets.by == SCORE:
        return fitted.number("quantile")
    found = fitted.number("quantile", least=1, most=sets.most_samples)
    if not float(found).is_integer():
        raise fitted.wrong("quantile", "a whole number of samples")
    return float(found)
