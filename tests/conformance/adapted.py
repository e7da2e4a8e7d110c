"""What a test of PEFT's looks up where a law has it elsewhere: that one fact is answered, all it asserts stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol
from unittest.mock import patch

from peft import PeftModel
from torch import nn

from peft_calib.tuners import heads


@contextmanager
def numbers_counted(common: ModuleType) -> Iterator[None]:
    """A model that names each trained number, not each tensor: the suite counts names."""
    adapt = common.get_peft_model

    def adapt_and_count(*args: Any, **kwargs: Any) -> PeftModel:
        model = adapt(*args, **kwargs)
        named = model.named_parameters

        def numbers(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            for name, parameter in named(*args, **kwargs):
                for index in range(parameter.numel() if model.prefix in name else 1):
                    yield f"{name}.{index}", parameter

        model.named_parameters = numbers
        return model

    with patch.object(common, "get_peft_model", adapt_and_count):
        yield


@contextmanager
def head_read_from_its_law(common: ModuleType) -> Iterator[None]:
    """`modules_to_save.NAME.weight` of members answers with what the law trains in its place."""

    def stack(head: heads.StackedModule) -> nn.Parameter:
        (holder,) = head._holder
        return holder.laws[head.adapter].heads.stacks[heads.head_key(head.name, "weight")]

    with patch.object(heads.StackedModule, "weight", property(stack), create=True):
        yield


class Answer(Protocol):
    """A context in which a fact is looked up in another place; it is given PEFT's `testing_common`."""

    def __call__(self, common: ModuleType) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Adapted:
    """A test that runs in a context.

    Attributes:
        difference: The name in `tests/contract/differences.py` of what it meets.
        how: What is answered otherwise.
        context: The context.
    """

    difference: str
    how: str
    context: Answer


#: Test function (or a part of its id): how it is run.
ADAPTED = {
    "layer_indexing": Adapted(
        "tensors of many layers", "trained numbers are counted instead of trained tensors", numbers_counted
    ),
    "test_set_adapter_non_overlapping_modules_to_save[Ensemble": Adapted(
        "weights of a head", "the weight of a head is read in the law", head_read_from_its_law
    ),
}
