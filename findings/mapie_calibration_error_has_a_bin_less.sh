#!/usr/bin/env bash
# mapie 1.6.0 (with scikit-learn 1.9.1), November 2026: `expected_calibration_error(..., num_bins=B)`.
#
# What one expects: B bins of equal width, the 1/B quantiles with `split_strategy="quantile"`, and a result that does not
# depend on the order of the rows.
# What was seen: B is the number of edges, so there are B - 1 bins, and nothing says so. With `num_bins=2` all rows share
# one bin: a model whose .2 always and whose .8 never comes true, the most wrong there is, scores 0 instead of .8. With
# `num_bins=1` the result is nan, and the default of 50 is 49 bins. "quantile" likewise. The third strategy, "array split",
# takes as edges the greatest score of each of B consecutive stretches of the rows, as they happen to lie: the same
# predictions have another error after sorting, .8 here and 0 before.
#
# Exit status 0 while this is so; 1 when it has changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check numpy scikit-learn==1.9.1 mapie==1.6.0 2>&1 |
	grep -v "is ignored" || true

cat > "$scratch/look.py" <<'PYTHON'
import math
import sys
from importlib.metadata import version

import numpy as np
from mapie.metrics.calibration import expected_calibration_error

scores = np.tile([0.2, 0.8], 50)
came_true = (scores < 0.5).astype(int)


def error(bins: int, strategy: str = "uniform", order: np.ndarray | slice = slice(None)) -> float:
    return round(expected_calibration_error(came_true[order], scores[order], num_bins=bins, split_strategy=strategy), 3)


uniform = {bins: error(bins) for bins in (1, 2, 3)}
print(f"mapie {version('mapie')}: .8 with two bins, and found by num_bins:", uniform)
mixed, ordered = error(2, "array split"), error(2, "array split", np.argsort(scores))
print(f"'array split' of two, rows mixed: {mixed}; the same rows sorted by their score: {ordered}")
so = math.isnan(uniform[1]) and uniform[2] == 0 and uniform[3] == 0.8
sys.exit(0 if so and mixed == 0 and ordered == 0.8 else 1)
PYTHON

"$scratch/venv/bin/python" -W ignore "$scratch/look.py"
