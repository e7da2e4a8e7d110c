"""The scores of each kind of answer: what there is, and what tables show; imports next to nothing, for a command."""

from __future__ import annotations

from typing import NamedTuple

from .table import DEFINITIONS, HEADLINES, TABLED

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
#: The same of the tokens of texts, whose vocabulary has no probabilities that one could keep.
OF_TEXTS = {
    "nll": "mean negative log-likelihood of a token, nats",
    "perplexity": "exp of that",
    "accuracy": "share of tokens whose most probable one is the text's",
}
_LEFT_OUT = ("precision_micro", "recall_micro", "mean_labels", "mean_probability", "bias", "mean_sd")


class Panel(NamedTuple):
    """What is said of one kind of answer."""

    meanings: dict[str, str]  # Of each score, in one line
    shown: tuple[str, ...]  # The scores that tables show unless others are named
    first: tuple[str, ...]  # Those that a leaderboard is told, the one it ranks by in front


def _panel(meanings: dict[str, str], *first: str) -> Panel:
    return Panel(meanings, tuple(key for key in meanings if key not in _LEFT_OUT), first)


#: By the kind of answer.
PANELS = {
    "classes": Panel(DEFINITIONS, TABLED, HEADLINES),
    "labels": _panel(OF_LABELS, "f1_micro", "nll_micro", "brier_micro", "ece_macro"),
    "numbers": _panel(OF_NUMBERS, "rmse", "crps", "nll", "pit_ks", "coverage_90"),
    "entities": _panel(OF_ENTITIES, "f1", "precision", "recall", "ece"),
    "texts": _panel(OF_TEXTS, "perplexity", "nll", "accuracy"),
}
