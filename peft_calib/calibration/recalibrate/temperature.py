"""Temperature scaling, solved where it is convex, and left off where the rows do not support it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from ...json_files import Fields
from ..fingerprint import SplitFingerprint, softmax_hashes
from ..inputs import LogitRows, as_logit_rows
from .base import LogitScaling
from .temperature_fit import BOUNDS, FEWEST_ROWS, TemperatureFit, check_enough_rows, temperature_fit

__all__ = ["BOUNDS", "FEWEST_ROWS", "TemperatureFit", "TemperatureScaling", "check_enough_rows", "fit_temperature"]

#: What a stored temperature may be at all; far beyond what is ever fitted.
POSSIBLE = (1e-6, 1e6)
#: Names of classification heads.
HEAD_NAMES = ("classifier", "score", "classification_head", "logits_proj", "qa_outputs", "head")


class TemperatureScaling(LogitScaling):
    """`softmax(z / T)` with the `T` of least negative log-likelihood (Guo et al., 2017), where the rows support it.

    A temperature is a number like any other: it has an interval, `fit_result` says which. Where that interval holds 1,
    or no row sets it a lower end, `T = 1` is used, which changes nothing, and `fit_result.reason` says why. Fewer than
    10 rows are refused.

    Attributes:
        temperature: `T`, after `fit`; above 1 the model was over-confident, 1 where it is left off.
        fit_result: Fitted value, interval, whether it is applied and why; None for a file of an earlier version.
        fitted_on_softmax: Fingerprint of the rows' probabilities, by which they are known whether they come as logits
            or as probabilities; None where it was read from a file.

    Example:
        >>> logits = np.tile([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]], (10, 1))
        >>> scaling = TemperatureScaling().fit(logits, [0, 0, 1, 1] * 10)
        >>> round(scaling.temperature, 3)  # accuracy 0.75 = sigmoid(4 / T)
        3.641
        >>> print(scaling.fit_result.reason)
        T = 3.641, fitted on 40 rows, is applied: its 95% interval [2.102, 10.3] leaves out 1.
    """

    parameter_names = ("temperature",)
    temperature: float
    fit_result: TemperatureFit | None = None
    fitted_on_softmax: SplitFingerprint | None = None

    def fit(  # type: ignore[override]
        self,
        logits: Any,
        labels: Any,
        *,
        input: str = "logits",
        mask: Any = None,
        ignore_index: int | None = -100,
        sample_weight: Any = None,
    ) -> TemperatureScaling:
        """Fits the temperature on a calibration split.

        Args:
            logits: A model's answer on it.
            labels: Integer class ids, `(N,)` or `(N, T)`.
            input: `"logits"`, or `"probabilities"` where there are no logits, as for the mean of several draws.
            mask: Boolean, of the labels' shape; False leaves the row out.
            ignore_index: Label of rows to leave out, or None.
            sample_weight: How much each row counts, numbers of at least 0, `(N,)` or of the labels' shape. The
                temperature is that of the weighted NLL, a row of weight 2 being there twice; for its interval a row
                stays one observation.

        Returns:
            The object itself.

        Raises:
            ValueError: For NaN or +inf, class ids in place of logits, labels or weights out of range, or too few rows.
        """
        options: dict[str, Any] = {"input": input, "mask": mask, "ignore_index": ignore_index}
        return self._fitted_to(as_logit_rows(logits, labels, **options, sample_weight=sample_weight))

    def _fit_rows(self, rows: LogitRows) -> None:
        check_enough_rows(len(rows.labels))
        self.fit_result = temperature_fit(rows)
        self.temperature = self.fit_result.temperature
        self.fitted_on_softmax = SplitFingerprint.of_hashes(softmax_hashes(rows.logits, rows.labels))

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        self._fit_rows(LogitRows(logits, labels, np.arange(len(labels))))

    def _read_parameter(self, parameters: Fields, name: str) -> Any:
        if name == "temperature":
            return parameters.number(name, least=POSSIBLE[0], most=POSSIBLE[1])
        return super()._read_parameter(parameters, name)

    def _transform_logits(self, logits: np.ndarray) -> np.ndarray:
        return logits / self.temperature

    def state(self) -> dict[str, Any]:
        """The fitted method as JSON-ready values, its interval and the choice among them."""
        return {**super().state(), **({} if self.fit_result is None else {"fit": self.fit_result.to_dict()})}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | Fields) -> TemperatureScaling:
        """The inverse of `state`; a state without `fit`, of an earlier version, has a temperature and no interval.

        Raises:
            ValueError: If it is not such a state, or the fit in it is not the temperature's.
        """
        method = super().from_state(state)
        # Null is what a temperature of an even earlier version had when it was saved again.
        if (recorded := state.get("fit", None)) is not None:
            source = f"{state.source}: " if isinstance(state, Fields) else ""
            method.fit_result = TemperatureFit.from_dict(recorded, method.temperature, source)
        return method

    def fold_into_head(self, model: nn.Module) -> nn.Linear:
        """Divides the last linear layer of a sequence-classification model by `T`, in place, exactly.

        Afterwards the model itself gives calibrated logits wherever it is served.

        Args:
            model: A model with a linear classification head (`classifier`, `score`, ...), plain or adapted by PEFT.

        Returns:
            The layer that was changed.

        Raises:
            ValueError: If the method is not fitted, or no such layer with the right number of outputs is found.
        """
        self._check_fitted()
        assert self.num_classes is not None
        layer = final_linear(model, self.num_classes)
        layer.weight.data.div_(self.temperature)
        if layer.bias is not None:
            layer.bias.data.div_(self.temperature)
        return layer


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of least NLL in `BOUNDS`, whether or not the rows support it; 1 where none matters."""
    return temperature_fit(LogitRows(logits, labels, np.arange(len(labels)))).fitted


def final_linear(model: nn.Module, num_classes: int) -> nn.Linear:
    """The last linear layer of a classification head, under one of `HEAD_NAMES`; of a PEFT model its trained copy."""
    found = None
    for name, module in model.named_modules():
        parts = name.split(".")
        is_stale_copy = "original_module" in parts
        if isinstance(module, nn.Linear) and not is_stale_copy and any(part in HEAD_NAMES for part in parts):
            found = (name, module) if _is_active(model, parts) else found
    if found is None:
        raise ValueError(f"No linear layer found in a classification head; looked for modules named {HEAD_NAMES}.")
    name, layer = found
    if layer.out_features != num_classes:
        raise ValueError(
            f"The head {name!r} has {layer.out_features} outputs, but the temperature is for {num_classes}."
        )
    if not layer.weight.is_floating_point():
        raise ValueError(f"The head {name!r} is quantised ({layer.weight.dtype}); dequantise it before folding.")
    return layer


def _is_active(model: nn.Module, parts: list[str]) -> bool:
    """Whether a layer inside a PEFT `modules_to_save` wrapper belongs to the active adapter."""
    if "modules_to_save" not in parts:
        return True
    position = parts.index("modules_to_save")
    wrapper = model.get_submodule(".".join(parts[:position]))
    active = getattr(wrapper, "active_adapters", None) or [getattr(wrapper, "active_adapter", None)]
    return parts[position + 1] in active
