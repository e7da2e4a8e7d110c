"""Cases with known answers, in the form `evaluate` Spaces keep them; run by the project's own tests."""

test_cases = [
    {
        "predictions": [0.1, 0.2, 0.8, 0.9],
        "references": [0, 0, 1, 0],
        "options": {"input": "uncertainty"},
        "result": {
            "error_rate": 0.25,
            "error_auroc": 2 / 3,
            "aurc": (0 + 0 + 1 / 3 + 1 / 4) / 4,
            "num_distinct_scores": 4,
        },
    },
    {
        "predictions": [[0.9, 0.1], [0.6, 0.4]],
        "references": [0, 1],
        "options": {},
        "result": {"error_auroc": 1.0, "aurc": 0.25, "e_aurc": 0.0, "augrc": 0.125},
    },
]
