"""A kind of answer: what its labels look like, how logits become an answer, what is fitted to it and said of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset

from ...artefact import Artefact, Inputs
from ...calibration.decide.base import DecisionRule
from ...calibration.recalibrate.fitted import FittedMethod
from ...provenance.stored_decision import PROBABILITY
from ..encoded import Encoded


class Kind(ABC):
    """One kind of answer; the instances stand in `kinds.KINDS`, by the name that `predictor.json` has of them."""

    #: Its name in `predictor.json`.
    name: ClassVar[str]
    #: `task=` of `peft_calib.predict`.
    predict_task: ClassVar[str]
    #: What its outputs are called, in messages.
    unit: ClassVar[str]
    #: The decision rules that go by it.
    rules: ClassVar[tuple[str, ...]]
    #: Fewest outputs of a head.
    fewest: ClassVar[int] = 1
    #: Whether every output has a probability.
    has_probabilities: ClassVar[bool] = True
    #: Whether rows are lists of words, each with a tag.
    of_words: ClassVar[bool] = False
    #: What a rule counts, in messages.
    counted: ClassVar[str] = "rows"

    @abstractmethod
    def targets(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[Any] | None:
        """What is true of each row, as far as the table says so; None where no row says it."""

    @abstractmethod
    def strange(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[list[str]]:
        """Of each row that says what is true of it in words that the adapter does not know, these words."""

    @abstractmethod
    def is_known(self, target: Any) -> bool:
        """Whether a row of `targets` says what is true of it."""

    @abstractmethod
    def told(self, method: Any) -> str:
        """In a few words, what a recalibration does."""

    @abstractmethod
    def answer(self, made: Any, method: Any, artefact: Artefact, **said: Any) -> Any:
        """A prediction as the engine made it, taken to its recalibration."""

    def items_in_order(self, made: Any, order: np.ndarray) -> torch.Tensor:
        """Places of the items of a prediction of rows that were read in another order, in the order of the rows."""
        del made
        return torch.from_numpy(np.argsort(order))

    def in_order(self, made: Any, order: np.ndarray) -> Any:
        """Such a prediction with its items in the order of the rows."""
        return made.select(self.items_in_order(made, order))

    def said_of(self, rows: Encoded) -> dict[str, Any]:
        """What an answer says of its rows beside the prediction."""
        del rows
        return {}

    #: The class of its answers.
    answers: ClassVar[type]

    def makes(self, found: Any) -> bool:
        """Whether an answer is of this kind."""
        return isinstance(found, self.answers)

    @abstractmethod
    def columns(self, further: Sequence[str]) -> list[str]:
        """Columns that an answer adds to a table, of which `further` are those that a rule or a head gives."""

    @abstractmethod
    def decided(self, rule: Any, found: Any, **by: Any) -> dict[str, Any]:
        """Fields of an answer that a decision rule fills."""

    # ----------------------------------------------------------------------------------- what `peft-calib decide` fits

    @abstractmethod
    def unfitted(self, asked: Mapping[str, Any], seed: int) -> list[DecisionRule]:
        """The rules that were asked for, not fitted yet; whatever is wrong with them is said before anything is read.

        Args:
            asked: What was given of the arguments of `decide`, by name, without those that ask for nothing.
            seed: Of what is left to chance.
        """

    def goes_by(self, rule: DecisionRule, by: str) -> str:
        """What a rule goes by, where `by` was asked for."""
        del rule, by
        return PROBABILITY

    def _only(self, asked: Mapping[str, Any], known: Sequence[str]) -> None:
        """Refuse what is of rules for other answers."""
        foreign = next((name for name in asked if name not in known), None)
        if foreign is not None:
            flags = ", ".join(map(flag_of, known))
            raise ValueError(f"{flag_of(foreign)} is of classes; a rule for {self.name} takes {flags}")

    # ------------------------------------------------------------------------- what a run does, for other than classes

    #: The proper score by which a run is held against a model that has not read the texts.
    lead: ClassVar[str]
    #: Whether there is something to report before anything was fitted on held-out rows.
    has_before: ClassVar[bool] = True

    def report(self, found: Any, targets: np.ndarray, seed: int, level: float | None = 0.95) -> Any:
        """What answers are worth: an object with `to_dict`, `verdict` and `to_html`."""
        return self.report_of(self.arrays(found), targets, found.label_names, seed, level)

    def report_of(
        self, kept: Mapping[str, np.ndarray], targets: np.ndarray, names: Sequence[str], seed: int, level: float | None
    ) -> Any:
        """The same from what an evaluation keeps, see `arrays`."""
        raise NotImplementedError

    def arrays(self, found: Any) -> dict[str, np.ndarray]:
        """What an evaluation keeps of each row."""
        raise NotImplementedError

    def base_rates(self, targets: Any) -> dict[str, Any]:
        """What a model that has not read the texts knows of the training rows."""
        raise NotImplementedError

    def baseline(self, rates: Mapping[str, Any], targets: np.ndarray) -> tuple[Any, str]:
        """The report of a model that always answers with `base_rates`, and what that is in words."""
        raise NotImplementedError

    def training_scores(self, logits: np.ndarray, targets: np.ndarray, scale: float) -> dict[str, float]:
        """Scores of an evaluation during the training; `scale` is that of a standardised number."""
        raise NotImplementedError

    def summary(self, found: Any) -> dict[str, Any]:
        """Of a table that was predicted, in numbers; `told` is the same in words."""
        raise NotImplementedError

    def fit(self, made: Any, targets: np.ndarray, artefact: Artefact, setting: str | None = None) -> FittedMethod:
        """The recalibration of a prediction, fitted to what is true of its rows."""
        raise NotImplementedError

    @abstractmethod
    def fit_rule(self, rule: Any, found: Any, targets: Any, by: str = PROBABILITY) -> None:
        """Fit a decision rule to answers, and to what is true of their rows."""

    def evaluate_rule(self, rule: Any, found: Any, targets: np.ndarray, mask: np.ndarray) -> Any:
        """What a rule reaches on the rows of a mask."""
        raise NotImplementedError


def flag_of(name: str) -> str:
    """What an argument of `decide` is called in the command."""
    return f"--{name.replace('_', '-')}"
