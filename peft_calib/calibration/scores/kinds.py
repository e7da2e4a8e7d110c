"""The scores of labels, numbers and entities: what there is, and what tables show; imports nothing, for a command."""

from __future__ import annotations

#: What is measured of all labels, in the order of the tables.
OF_LABELS = {
    "f1_micro": "F1 of all answers together, a label being given from a probability of 1/2 on",
    "f1_macro": "mean F1 of the labels; of a label that no row has or is given, 0",
    "precision_micro": "share of given labels that hold",
    "recall_micro": "share of labels that hold which are given",
    "exact_match": "share of rows in which every label is right",
    "hamming_loss": "share of answers that are wrong",
    "nll_micro": "mean negative log-likelihood of an answer, nats; the mean of the labels' own is the same",
    "brier_micro": "mean squared error of an answer's probability; the mean of the labels' own is the same",
    "ece_micro": "calibration error of all answers' probabilities, equal-width bins",
    "ece_macro": "mean calibration error of the labels",
    "mean_labels": "labels of a row, on average",
    "mean_probability": "mean probability of a label",
}
#: The same of numbers.
OF_NUMBERS = {
    "rmse": "root of the mean squared error of the predicted mean",
    "mae": "mean absolute error of the predicted mean",
    "r2": "share of the variance of the observed values that the means explain",
    "bias": "mean of predicted minus observed",
    "nll": "mean negative log-density of the observed values, nats",
    "crps": "mean continuous ranked probability score, in the unit of the values",
    "pit_ks": "largest distance of the PIT values from the uniform distribution (Kolmogorov & Smirnov)",
    "coverage_50": "share of values inside the central 50 % of their Gaussian",
    "coverage_90": "share of values inside the central 90 % of their Gaussian",
    "mean_sd": "mean predicted standard deviation",
}
#: The same of entities.
OF_ENTITIES = {
    "f1": "F1 of all entities; one is right if its span and its type are",
    "f1_macro": "mean F1 of the types",
    "precision": "share of the entities found that are right",
    "recall": "share of the true entities that are found",
    "mean_confidence": "mean probability of the entities found, to be held against the precision",
    "ece": "calibration error of the entities' probabilities, equal-width bins",
    "brier": "mean squared error of an entity's probability",
    "error_auroc": "how well the probabilities rank right before wrong entities",
    "aurc": "mean share of wrong ones among the surest entities, over all shares answered",
}
_LEFT_OUT = ("precision_micro", "recall_micro", "mean_labels", "mean_probability", "bias", "mean_sd")
#: What tables show unless others are named.
SHOWN_OF_LABELS = tuple(key for key in OF_LABELS if key not in _LEFT_OUT)
SHOWN_OF_NUMBERS = tuple(key for key in OF_NUMBERS if key not in _LEFT_OUT)
