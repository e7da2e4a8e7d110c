"""Cases with known answers, in the form `evaluate` Spaces keep them; run by the project's own tests."""

_SURE = {"calibration_predictions": [[0.9, 0.1]] * 60, "calibration_references": [0] * 60}

test_cases = [
    {
        "predictions": [[0.95, 0.05]] * 3 + [[0.4, 0.6]],
        "references": [0, 0, 1, 1],
        "options": {**_SURE, "risk": 0.05},
        "result": {"risk": 0.25, "coverage": 1.0, "accepted": 4, "errors": 1, "bound": 1 - 0.05 ** (1 / 60)},
    },
    {
        "predictions": [[0.95, 0.05]] * 3 + [[0.4, 0.6]],
        "references": [0, 0, 1, 1],
        "options": {**_SURE, "alpha": 0.1},
        "result": {"coverage": 0.5, "mean_set_size": 0.75, "singletons": 0.75, "empty": 0.25},
    },
]
