"""The tasks of the command line."""

from .base import Task
from .choice import MultipleChoice
from .language import CausalLanguageModelling
from .sequence import SequenceClassification
from .token import TokenClassification

__all__ = ["TASK_CLASSES", "Task"]

TASK_CLASSES: dict[str, type[Task]] = {
    "seq-cls": SequenceClassification,
    "multiple-choice": MultipleChoice,
    "token-cls": TokenClassification,
    "causal-lm": CausalLanguageModelling,
}
