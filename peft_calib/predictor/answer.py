"""A prediction with its recalibration applied, the names of its classes, and what was done said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch

from ..calibration import log_probabilities
from ..calibration.recalibrate import Recalibrator, TemperatureScaling
from ..json_files import Fields
from ..prediction import Prediction
from ..prediction.result import DrawnResult


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Answer(DrawnResult):
    """What every answer of a predictor says beside its numbers, and keeps in files."""

    label_names: tuple[str, ...] = ()
    recalibration: str = ""
    num_cut: int = 0
    decision: str = ""

    def _facts(self) -> list[str]:
        cut = [f"{self.num_cut} rows cut"] if self.num_cut else []
        return [*super()._facts(), self.recalibration, *filter(None, self._words()), *cut]

    def _words(self) -> list[str]:
        """What further is told in words, where there is something to tell."""
        return [self.decision]

    def added_types(self) -> list[pa.DataType]:
        """Types of the first columns that `added` gives, where their values do not say them."""
        return []

    @property
    def _made_by(self) -> dict[str, Any]:
        own = {"label_names": tuple(self.label_names), "recalibration": self.recalibration}
        return super()._made_by | own | {"num_cut": self.num_cut, "decision": self.decision}

    @classmethod
    def _read_facts(cls, facts: Fields) -> dict[str, Any]:
        return super()._read_facts(facts) | {
            "label_names": tuple(facts.listing("label_names", str)),
            "recalibration": facts.text("recalibration"),
            "num_cut": facts.integer("num_cut", least=0),
            "decision": facts.text("decision", default=""),
        }


def names_by_probability(p: torch.Tensor, chosen: torch.Tensor, names: Sequence[str]) -> list[list[str]]:
    """Names of the chosen entries (N, C) of each row, the most probable first."""
    order = p.argsort(dim=-1, descending=True, stable=True)
    held = chosen.gather(-1, order)
    return [
        [names[k] for k, inside in zip(row, kept, strict=True) if inside]
        for row, kept in zip(order.tolist(), held.tolist(), strict=True)
    ]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class CalibratedPrediction(Answer, Prediction):
    """What a predictor answers: a `Prediction` whose probabilities are calibrated.

    The temperature T was fitted to the mean of the draws' probabilities, and acts there:
    `probabilities = softmax(log(mean_k p_k) / T)`, float64, the very numbers of `peft-calib evaluate`. `entropy` is
    that of these. Each draw is taken to the same temperature, `softmax(log(p_k) / T)`; `sample_probabilities`,
    `expected_entropy` and `mutual_information` are those of the tempered draws around their own mean. So the entropy
    is the sum of the other two where T = 1 or there is one draw, and elsewhere nearly.

    Args:
        calibrated: Float64 (N, C), the calibrated probabilities.
        label_names: Names of the classes, in order.
        temperature: T that was applied; None where nothing was, or no temperature.
        recalibration: In words, what was applied or why nothing was.
        num_cut: Rows that were longer than what the model was trained on, and were cut.
        error_probability: Float64 (N,), how likely the predicted class is wrong, by the uncertainty head beside the
            adapter; None where there is none.
        error_head: In words, which head that is, or why there is none.
        answered: Bool (N,), which rows the decision rule beside the adapter answers, False where it passes on; None
            where there is no such rule for this way of predicting.
        sets: Bool (N, C), the classes in the prediction set of each row; None where there is no such rule.
        decision: In words, what the rules promise, or why one is not applied.
    """

    item_tensors: ClassVar[tuple[str, ...]] = ("calibrated",)
    optional_item_tensors: ClassVar[tuple[str, ...]] = ("error_probability", "answered", "sets")
    calibrated: torch.Tensor
    temperature: float | None = None
    error_probability: torch.Tensor | None = None
    error_head: str = ""
    answered: torch.Tensor | None = None
    sets: torch.Tensor | None = None

    @classmethod
    def of(cls, prediction: Prediction, method: Recalibrator | None, **said: Any) -> CalibratedPrediction:
        """A prediction taken to its recalibration."""
        own = {item.name: getattr(prediction, item.name) for item in fields(Prediction)}
        if method is None:
            return cls(**own, calibrated=prediction.probabilities.double(), **said)
        mean = _recalibrated(method, prediction.probabilities)
        own["sample_probabilities"] = _draws(method, prediction)
        if isinstance(method, TemperatureScaling):
            said["temperature"] = method.temperature
        return cls(**own, calibrated=mean, **said)

    @classmethod
    def stack_draws(cls, parts: Sequence[Self]) -> Self:
        """Refuse: what was recalibrated is the mean of the draws, which are not all here."""
        raise TypeError(
            "Calibrated predictions cannot be stacked to one of more draws: their temperature was fitted to the mean "
            "of the draws, and is applied to that last. Predict with num_samples= as many draws as you want, or stack "
            "the predictions of peft_calib.predict_dataset(predictor.model, ...), which have no temperature."
        )

    @property
    def _predictive(self) -> torch.Tensor:  # type: ignore[override]
        return self.calibrated

    @property
    def probabilities(self) -> torch.Tensor:  # type: ignore[override]
        """Calibrated probabilities, float64 (N, C)."""
        return self.calibrated

    @property
    def labels_predicted(self) -> list[str]:
        """Name of the most probable class of each row."""
        return [self.label_names[position] for position in self.predictions.tolist()]

    @property
    def label_sets(self) -> list[list[str]] | None:
        """Names of the classes in each row's prediction set, the most probable first; None without `sets`."""
        return None if self.sets is None else names_by_probability(self.calibrated, self.sets, self.label_names)

    @cached_property
    def mutual_information(self) -> torch.Tensor:  # type: ignore[override]
        """What the draws at this temperature disagree on, nats, float64 (N,); 0 for one draw."""
        divergence = torch.xlogy(self._p, self._p) - torch.xlogy(self._p, self._mean(self._p))
        return self._mean(divergence.sum(-1, keepdim=True)).squeeze(-1).clamp_min(0)

    def added(self) -> list[list]:
        """The columns that `kinds.Kind.columns` names, and a probability of every class."""
        columns: list[list] = [self.labels_predicted, self.probabilities.amax(-1).tolist()]
        columns += [self.entropy.tolist(), self.mutual_information.tolist()]
        columns += [] if self.error_probability is None else [self.error_probability.tolist()]
        columns += [] if self.answered is None else [self.answered.tolist()]
        columns += [] if self.label_sets is None else [self.label_sets]
        return columns + self.probabilities.T.tolist()

    def to_dataset(self) -> Any:
        """One row for each item, as of a `Prediction`, the predicted class, and P(error) and decision where known."""
        found = super().to_dataset().add_column("predicted_label", self.labels_predicted)
        for name in ("error_probability", "answered"):
            if getattr(self, name) is not None:
                found = found.add_column(name, getattr(self, name).tolist())
        return found if self.label_sets is None else found.add_column("set", self.label_sets)

    def _words(self) -> list[str]:
        return [self.error_head, *super()._words()]

    @property
    def _made_by(self) -> dict[str, Any]:
        return super()._made_by | {"temperature": self.temperature, "error_head": self.error_head}

    @classmethod
    def _read_facts(cls, facts: Fields) -> dict[str, Any]:
        return super()._read_facts(facts) | {
            "temperature": facts.number("temperature", above=0, default=None),
            "error_head": facts.text("error_head", default=""),
        }


def logits_of(probabilities: torch.Tensor) -> np.ndarray:
    """Logarithms of probabilities, float64 (N, C): logits of the same distribution, always finite.

    What a recalibration of a run is fitted to and applied to, here and in an evaluation: hence the same bits.
    """
    return log_probabilities(probabilities.double().numpy())


def _recalibrated(method: Recalibrator, probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, C) after the method, float64."""
    return torch.from_numpy(np.ascontiguousarray(method.transform(logits_of(probabilities))))


def _draws(method: Recalibrator, prediction: Prediction) -> torch.Tensor:
    """Every draw after the method, float32 (K, N, C); NaN where none was made."""
    made, flat = prediction._made.squeeze(-1), prediction.sample_probabilities
    found = torch.full_like(flat, float("nan"))
    found[made] = _recalibrated(method, flat[made]).float()
    return found
