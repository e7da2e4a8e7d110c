"""How a head is fitted: the settings, the papers' presets, and the trials of a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import torch

from ..json_files import describe
from .scores import AGGREGATES, SCORES, check_choice

SPLITS = ("cross", "train", "validation")
CALIBRATIONS = ("platt", "isotonic", "none")
#: The papers by their version: AdUE (May 2025), and ALIEN (April 2026).
PAPERS = ("v1", "v2")


@dataclass(frozen=True)
class HeadSettings:
    """How an uncertainty head is fitted. The defaults are our recommendation, not the papers' settings.

    Attributes:
        score: `"entropy"`, `"sr_norm"` or `"sr_raw"`, see `scores.uncertainty`.
        sharpness: Of the smooth maximum in the last two.
        aggregate: How K functions become one score: `"bma"`, of their mean probabilities, or `"mean_u"`.
        lr: Peak learning rates of the grid.
        epochs: Passes over the rows of the grid.
        alpha: Weights of staying near the frozen model's own score.
        beta: Weights of the squared distance from the frozen head's parameters.
        patience: Epochs without a better error AUROC on held-out rows after which a trial ends with its best epoch;
            None keeps the last epoch.
        batch_size: Rows of a step.
        balance: Draw errors and the rest equally often; the prior is corrected afterwards.
        head_dropout: Keep the head's own dropout while it trains.
        init: `"copy"` starts at the frozen head; `"random"`, an ablation, at fresh parameters of its shape.
        split: What is fitted on: `"cross"`, folds of the validation rows, then all of them; `"train"`, the training
            rows, as in the papers; `"validation"`, a part of the validation rows, the rest of which selects.
        folds: Of `"cross"`.
        held_out: Share of the validation rows that selects under `"validation"`.
        keep_base: Whether the frozen model's own score is the first candidate.
        calibrate: Map to P(error): `"platt"`, `"isotonic"` (from 200 errors on), or `"none"`, where U itself is it.
        fewest: Errors, and correct items, with fewer of which nothing is fitted and the base score stays.
        seed: Of orders, folds, dropout, fresh parameters and resampling.
    """

    score: Literal["entropy", "sr_norm", "sr_raw"] = "entropy"
    sharpness: float = 100.0
    aggregate: Literal["bma", "mean_u"] = "bma"
    lr: tuple[float, ...] = (4e-4, 1e-4)
    epochs: tuple[int, ...] = (20,)
    alpha: tuple[float, ...] = (0.01, 0.1, 1.0)
    beta: tuple[float, ...] = (0.01, 0.1, 1.0)
    patience: int | None = 5
    batch_size: int = 128
    balance: bool = False
    head_dropout: bool = False
    init: Literal["copy", "random"] = "copy"
    split: Literal["cross", "train", "validation"] = "cross"
    folds: int = 5
    held_out: float = 0.15
    keep_base: bool = True
    calibrate: Literal["platt", "isotonic", "none"] = "platt"
    fewest: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        for name in ("lr", "epochs", "alpha", "beta"):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
            object.__setattr__(self, name, values)
        for name, among in _CHOICES.items():
            check_choice(name, getattr(self, name), among)
        for name, (kind, least, beyond) in _RANGES.items():
            for value in _each(getattr(self, name)):
                _check_number(name, value, kind, least, beyond)
        for name in ("balance", "head_dropout", "keep_base"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")

    @classmethod
    def of(cls, score: str | None = None, paper: str | None = None, **options: Any) -> HeadSettings:
        """The settings of a paper, or the recommended ones, with a score and further options in place of theirs.

        Args:
            score: In place of the default, `"entropy"`, or of the paper's.
            paper: `"v1"`, AdUE: 144 trials of the raw score, 5 to 20 epochs, the last of which is kept, dropout on.
                `"v2"`, ALIEN: 27 trials of the entropy over 20 epochs. Both are fitted on the training rows, take the
                trial of the largest validation AUROC, and give U itself as P(error).
            options: Fields of `HeadSettings`.

        Raises:
            ValueError: For an unknown paper, option or value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"Unknown option {unknown[0]!r} of an uncertainty head; there are {', '.join(known)}.")
        settings = cls() if paper is None else _of_paper(check_choice("paper", paper, PAPERS))
        return replace(settings, **options, **({} if score is None else {"score": score}))

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All combinations of the grid."""
        return tuple(Trial(*values) for values in product(self.lr, self.epochs, self.alpha, self.beta))


@dataclass(frozen=True)
class Trial:
    """One setting of the grid."""

    lr: float
    epochs: int
    alpha: float
    beta: float


def _of_paper(paper: str) -> HeadSettings:
    as_both: dict[str, Any] = {"split": "train", "keep_base": False, "calibrate": "none", "head_dropout": True}
    if paper == "v1":
        return HeadSettings(
            score="sr_raw", lr=(1e-4, 1e-5, 1e-3), epochs=(5, 10, 20), alpha=(0.0, 0.1, 0.3, 1.0),
            beta=(0.01, 0.1, 0.5, 1.0), patience=None, **as_both,
        )  # fmt: skip
    return HeadSettings(score="entropy", lr=(4e-4, 1e-4, 1e-5), **as_both)


_CHOICES: dict[str, tuple[str, ...]] = {
    "score": SCORES,
    "aggregate": AGGREGATES,
    "init": ("copy", "random"),
    "split": SPLITS,
    "calibrate": CALIBRATIONS,
}
# Kind, least value, and what a value must stay below.
_RANGES: dict[str, tuple[type, float, float]] = {
    "sharpness": (float, 1e-6, 1e6),
    "lr": (float, 0, 10),
    "epochs": (int, 1, 10_000),
    "alpha": (float, 0, 1e6),
    "beta": (float, 0, 1e6),
    "patience": (int, 1, 10_000),
    "batch_size": (int, 1, 1e9),
    "folds": (int, 2, 1_000),
    "held_out": (float, 0.01, 0.91),
    "fewest": (int, 1, 1e9),
    "seed": (int, 0, 2**63),
}


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch, alone, in arrays and in sequences, as Python's own."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _each(value: Any) -> tuple:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _check_number(name: str, value: Any, kind: type, least: float, beyond: float) -> None:
    is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not is_number or not least <= value < beyond:
        words = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {words} of at least {least:g} and below {beyond:g}, got {describe(value)}.")
