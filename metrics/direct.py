# SPDX-License-Identifier: Apache-2.0
"""What the bundled `evaluate` modules share."""

from __future__ import annotations

from typing import Any

import evaluate


class DirectMetric(evaluate.Metric):
    """A metric whose one-call `compute` takes arrays as they are; Arrow copies them at a thousand times the cost."""

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """As `evaluate.Metric.compute`, but arrays given in this one call are not copied into Arrow."""
        direct = predictions is not None and references is not None and self.writer is None and self.num_process == 1
        if direct:
            return self._compute(predictions, references, **kwargs)
        return super().compute(predictions=predictions, references=references, **kwargs)
