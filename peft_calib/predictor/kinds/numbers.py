"""A number for each row: the head's mean, its noise and what the draws disagree on, and an interval that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from scipy.special import ndtri

from ...artefact import Artefact, Inputs
from ...calibration.decide.base import DecisionRule
from ...calibration.numbers import ConformalInterval, GaussianNoise, NumbersReport, numbers_report
from ...prediction import RegressionPrediction
from ...provenance.origins import is_missing
from ...provenance.stored_decision import PROBABILITY
from ..answer import Answer
from ..table import NUMBER
from .base import Kind

#: The central share of the Gaussian that `lower` and `upper` hold where no rule says more.
CENTRAL = 0.9


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class NumberAnswer(Answer, RegressionPrediction):
    """What a predictor of numbers answers: a `RegressionPrediction` with the noise of observations around it.

    Args:
        sd: Float64 (N,), standard deviation of an observation: of the noise and, by the law of total variance, of the
            draws; of the draws alone where no noise is stored.
        lower: Float64 (N,), lower end of the interval that the rule beside the adapter gives, or else of the central
            90 % of the Gaussian; NaN where no noise is stored.
        upper: Float64 (N,), its upper end.
        label_names: Name of the number.
        recalibration: In words, what was applied or why nothing was.
        num_cut: Rows that were longer than what the model was trained on, and were cut.
        decision: In words, what the rule promises, or why it is not applied.
    """

    item_tensors: ClassVar[tuple[str, ...]] = ("sd", "lower", "upper")
    sd: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    error_probability: ClassVar[None] = None

    @property
    def means(self) -> np.ndarray:
        """Predicted means, float64 `(N,)`."""
        return self._mean_value[:, 0].numpy()

    def added(self) -> list[list]:
        """The columns that `Kind.columns` names."""
        return [self.means.tolist(), self.sd.tolist(), self.lower.tolist(), self.upper.tolist()]

    def to_dataset(self) -> Any:
        """One row for each item: mean, variance between draws, standard deviation and interval.

        Returns:
            A `datasets.Dataset`.
        """
        found = super().to_dataset()
        for name in ("sd", "lower", "upper"):
            found = found.add_column(name, getattr(self, name).tolist())
        return found


class Numbers(Kind):
    """A number, such as a rating."""

    name = "numbers"
    predict_task = "regression"
    unit = "numbers"
    rules = ("interval",)
    has_probabilities = False
    answers = NumberAnswer

    def targets(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[Any] | None:
        """The number of each row; NaN where there is none."""
        column = inputs.label_column
        if column is None or column not in table.column_names:
            return None
        found = [as_number(value) for value in table[column][:]]
        known = [float("nan") if value is None else value for value in found]
        return known if any(map(self.is_known, known)) else None

    def strange(self, table: Dataset, inputs: Inputs, names: Sequence[str]) -> list[list[str]]:
        column = inputs.label_column
        values = table[column][:] if column in table.column_names else []
        return [[str(value)] for value in values if as_number(value) is None and not is_missing(value)]

    def is_known(self, target: Any) -> bool:
        return target == target

    def told(self, method: GaussianNoise) -> str:
        return f"noise sd = {method.noise_variance**0.5:.4g}"

    def answer(self, made: Any, method: Any, artefact: Artefact, **said: Any) -> NumberAnswer:
        own = {item.name: getattr(made, item.name) for item in fields(RegressionPrediction)}
        plain = RegressionPrediction(**own | {"sample_values": in_units(made.sample_values, artefact.target)})
        own = {item.name: getattr(plain, item.name) for item in fields(RegressionPrediction)}
        mean, variance = plain._mean_value[:, 0].numpy(), plain.variance[:, 0].double().numpy()
        sd = np.sqrt(variance) if method is None else method.transform(mean, variance)
        # without noise there is no interval, and none is made up of what the draws disagree on
        reach = float(ndtri(0.5 + 0.5 * CENTRAL)) * (sd if method is not None else np.full_like(sd, np.nan))
        ends = {"sd": sd, "lower": mean - reach, "upper": mean + reach}
        return NumberAnswer(**own, **{key: torch.from_numpy(value) for key, value in ends.items()}, **said)

    def columns(self, further: Sequence[str]) -> list[str]:
        return list(NUMBER)

    def decided(self, rule: Any, found: Any, **by: Any) -> dict[str, Any]:
        lower, upper = rule.predict(found.means, found.sd.numpy())
        return {"lower": torch.from_numpy(lower), "upper": torch.from_numpy(upper)}

    lead = "crps"
    has_before = False

    def report_of(
        self, kept: Mapping[str, np.ndarray], targets: np.ndarray, names: Sequence[str], seed: int, level: float | None
    ) -> NumbersReport:
        return numbers_report(kept["mean"], kept["sd"], targets, confidence_level=level)

    def arrays(self, found: Any) -> dict[str, np.ndarray]:
        return {"mean": found.means, "sd": found.sd.numpy()}

    def base_rates(self, targets: Any) -> dict[str, Any]:
        """Mean and standard deviation."""
        values = np.asarray(targets, np.float64)
        return {"rows": len(values), "mean": float(values.mean()), "sd": float(values.std())}

    def baseline(self, rates: Mapping[str, Any], targets: np.ndarray) -> tuple[NumbersReport, str]:
        report = numbers_report(np.full(len(targets), rates["mean"]), rates["sd"], targets, confidence_level=None)
        return report, "mean and standard deviation of the training rows, whatever the text"

    def training_scores(self, logits: np.ndarray, targets: np.ndarray, scale: float) -> dict[str, float]:
        residuals = scale * (np.reshape(logits, -1) - np.reshape(targets, -1)).astype(np.float64)
        return {"rmse": float(np.sqrt((residuals**2).mean())), "mae": float(np.abs(residuals).mean())}

    def summary(self, found: Any) -> dict[str, Any]:
        means, width = found.means, float((found.upper - found.lower).mean())
        facts = {"mean": float(means.mean()), "least": float(means.min()), "most": float(means.max()), "width": width}
        told = f"predicted from {facts['least']:.4g} to {facts['most']:.4g}, {facts['mean']:.4g} on average, "
        told += (
            f"in intervals {width:.4g} wide on average" if width == width else "without intervals: no noise is stored"
        )
        return {"predicted": facts, "told": told}

    def fit(self, made: Any, targets: np.ndarray, artefact: Artefact, setting: str | None = None) -> GaussianNoise:
        """The noise around the means, in the unit of the target."""
        found = self.answer(made, None, artefact)
        return GaussianNoise().fit(found.means, found.variance[:, 0].double().numpy(), targets)

    def unfitted(self, asked: Mapping[str, Any], seed: int) -> list[DecisionRule]:
        self._only(asked, ("alpha", "score", "sets_confidence"))
        own = {"confidence": asked.get("sets_confidence"), "score": asked.get("score", "absolute")}
        return [ConformalInterval(asked.get("alpha"), **own)]

    def fit_rule(self, rule: Any, found: Any, targets: Any, by: str = PROBABILITY) -> None:
        rule.fit(found.means, found.sd.numpy(), np.asarray(targets))

    def evaluate_rule(self, rule: Any, found: Any, targets: np.ndarray, mask: np.ndarray) -> Any:
        return rule.evaluate(found.means, found.sd.numpy(), targets, mask=mask)


def in_units(values: torch.Tensor, target: tuple[float, float] | None) -> torch.Tensor:
    """What a head says, (K, N, 1), in the unit of the target; as it is where the head was trained on that."""
    if target is None:
        return values
    offset, scale = target
    return values.double() * scale + offset  # a float32 near 1e9 knows no steps below 64


def as_number(value: Any) -> float | None:
    """A field as a finite number; None for anything else, a missing one too."""
    if is_missing(value) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found) else None
