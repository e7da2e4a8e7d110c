"""Generated answers: scores of how sure a model is, the probability of being right, and sets of samples."""

from .answer_calibration import AnswerCalibration
from .sample_sets import SampleSetReport, SampleSets
from .scores import ANSWER_SCORES, AnswerScores, answer_scores
from .similarity import answers_match, normalise_answer, rouge_l

__all__ = [
    "ANSWER_SCORES",
    "AnswerCalibration",
    "AnswerScores",
    "SampleSetReport",
    "SampleSets",
    "answer_scores",
    "answers_match",
    "normalise_answer",
    "rouge_l",
]
