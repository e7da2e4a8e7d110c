"""The tasks of the command line."""

from ..settings import named_class
from .base import Task
from .choice import MultipleChoice
from .language import CausalLanguageModelling
from .multi_label import MultiLabel, Reranking
from .regression import Regression
from .sequence import SequenceClassification
from .token import TokenClassification

__all__ = ["TASK_CLASSES", "Task", "task_class"]

TASK_CLASSES: dict[str, type[Task]] = {
    "seq-cls": SequenceClassification,
    "multiple-choice": MultipleChoice,
    "token-cls": TokenClassification,
    "causal-lm": CausalLanguageModelling,
    "multi-label": MultiLabel,
    "rerank": Reranking,
    "regression": Regression,
}


def task_class(task: str) -> type[Task]:
    """The class of a task: one of the table, or from outside as `module:Class`."""
    return TASK_CLASSES[task] if task in TASK_CLASSES else named_class(task, "task", Task)
