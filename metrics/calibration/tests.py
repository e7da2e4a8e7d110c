"""Cases with known answers, in the form `evaluate` Spaces keep them; run by the project's own tests."""

test_cases = [
    {
        "predictions": [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]],
        "references": [0, 0, 1],
        "options": {"num_bins": 10, "confidence_level": None},
        "result": {"accuracy": 1.0, "ece": 0.266667, "mce": 0.4, "ace": 0.266667, "brier": 0.173333},
    },
    {
        "predictions": [[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 4,
        "references": [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0],
        "options": {"num_bins": 10, "confidence_level": None},
        "result": {"accuracy": 0.75, "ece": 0.25, "mce": 0.25, "classwise_ece": 0.25, "brier": 0.5},
    },
    {
        "predictions": [0.9, 0.2, 0.6],
        "references": [1, 0, 0],
        "options": {"confidence_level": None},
        "result": {"accuracy": 2 / 3, "brier": 2 * (0.01 + 0.04 + 0.36) / 3},
    },
]
