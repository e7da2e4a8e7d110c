"""Cases with known answers, in the form `evaluate` Spaces keep them; run by the project's own tests."""

import math

test_cases = [
    {
        "predictions": [[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]],
        "references": [0, 0],
        "options": {},
        "result": {
            "mean_entropy": math.log(2),
            "mean_expected_entropy": math.log(2) / 2,
            "mean_mutual_information": math.log(2) / 2,
            "num_draws": 2,
        },
    },
]
