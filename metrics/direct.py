"""What the bundled `evaluate` modules share."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from peft_calib.calibration.answers import refuse_class_ids
from peft_calib.calibration.inputs import as_numpy


def info(description: str, inputs: str, citation: str, urls: list[str], *predictions: Any) -> evaluate.MetricInfo:
    """What a module says of itself; `predictions` are the features that a row's prediction may have."""
    label = datasets.Value("int64")
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs,
        features=[datasets.Features({"predictions": kind, "references": label}) for kind in predictions],
        reference_urls=urls,
    )


class DirectMetric(evaluate.Metric):
    """A metric whose one-call `compute` takes arrays as they are; Arrow copies them at a thousand times the cost.

    Arrow casts the class ids of rows that are added one by one to floats: what they were is looked at before, and
    refused in `compute`, which is told what they stand for (an uncertainty may be whole). References that are no whole
    numbers are refused at once: Arrow would cut their decimals off.
    """

    _class_ids: Exception | None = None

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """As `evaluate.Metric.compute`, but arrays given in this one call are not copied into Arrow."""
        ids, self._class_ids = self._class_ids, None
        if ids is not None and kwargs.get("input") != "uncertainty":
            raise ids
        direct = predictions is not None and references is not None and self.writer is None and self.num_process == 1
        if direct:
            return self._compute(predictions, references, **kwargs)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """As `evaluate.Metric.add_batch`; class ids are noticed before Arrow casts them."""
        if predictions is not None:
            self._notice(predictions)
        _refuse_decimals(references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """As `evaluate.Metric.add`; class ids are noticed before Arrow casts them."""
        if prediction is not None:
            self._notice([prediction])
        _refuse_decimals(reference)
        super().add(prediction=prediction, reference=reference, **kwargs)

    def _notice(self, predictions: Any) -> None:
        try:
            refuse_class_ids(as_numpy(predictions))
        except (TypeError, ValueError) as error:
            self._class_ids = self._class_ids or error


def _refuse_decimals(references: Any) -> None:
    """Raise `ValueError` for references that a cast to whole numbers would change."""
    if references is None:
        return
    given = as_numpy(references, "references")
    if given.dtype.kind == "f" and given.size and not (given == np.trunc(given)).all():
        wrong = given[given != np.trunc(given)].reshape(-1)[0]
        raise ValueError(f"references must be whole numbers (class ids, or 0 and 1), got {wrong:g}: cast them first.")
