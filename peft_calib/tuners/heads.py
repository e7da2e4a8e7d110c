"""Modules trained whole, such as a new head, whose tensors are a law's: one copy a member, or a control point."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call

from ..internals.torch import MovesAlong
from .holder import FactorHolder
from .rows import check_divides

#: Tensors of modules, by module and tensor name.
HeadTensors = dict[str, dict[str, torch.Tensor]]


class HeadStacks(nn.Module):
    """Parameters for the tensors of modules trained whole, one copy a member, from their initial values (K, ...)."""

    def __init__(self, starts: HeadTensors) -> None:
        super().__init__()
        self.names = [(module, name) for module, tensors in starts.items() for name in tensors]
        self.stacks = nn.ParameterDict({head_key(m, n): nn.Parameter(starts[m][n]) for m, n in self.names})

    def at(self, members: slice) -> HeadTensors:
        """The tensors (K, ...) of some members."""
        heads: HeadTensors = {}
        for module, name in self.names:
            heads.setdefault(module, {})[name] = members_of(self.stacks[head_key(module, name)], members)
        return heads


def members_of(stack: torch.Tensor, members: slice) -> torch.Tensor:
    """Some members of a stack; all of them without a copy of the gradient on the way back."""
    return stack if members == slice(0, len(stack)) else stack[members]


def head_key(module: str, name: str) -> str:
    """Name of a head's tensor in a dictionary of parameters, which takes no dots."""
    return f"{module}.{name}".replace(".", "/")


_TEMPLATES = threading.RLock()


class StackedModule(MovesAlong):
    """What stands in PEFT's `modules_to_save` of a head in a law: the template with the tensors of the holder."""

    def __init__(self, template: nn.Module, holder: FactorHolder, adapter: str, name: str) -> None:
        super().__init__()
        # tuples are no submodules: the template must neither be saved nor trained, nor the holder found twice
        self._template, self._holder = (template.requires_grad_(False),), (holder,)
        self.adapter, self.name = adapter, name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            (template,) = self.__dict__.get("_template", (nn.Module(),))
            if name not in {parameter.partition(".")[0] for parameter, _ in template.named_parameters()}:
                raise
            raise AttributeError(
                f"{self.name} has no {name} of its own: the law of {self.adapter!r} holds one for each of its "
                "functions. Read them by get_peft_model_state_dict, or put one in place by merge_and_unload()."
            ) from error

    @property
    def holder(self) -> FactorHolder:
        return self._holder[0]

    def varies(self) -> bool:
        """Whether the draws in place give it different tensors."""
        heads = self.holder.generation(self.adapter).heads[self.name]
        return any(not torch.equal(t[1:], t[:1].expand_as(t[1:])) for t in heads.values())

    def companions(self) -> tuple[nn.Module, ...]:
        """The template, whose dtype is that of the tensors."""
        return self._template

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module with the tensors of the current draws; the rows of K draws come draw-major."""
        # a functional call puts its tensors into the one template for its duration
        with nullcontext() if torch.compiler.is_compiling() else _TEMPLATES:
            tensors, (template,) = self._tensors(), self._template
            template.train(self.training)
            count = len(next(iter(tensors.values())))
            if count == 1:
                return functional_call(template, {name: tensor[0] for name, tensor in tensors.items()}, args, kwargs)
            x, *rest = args
            check_divides(x, count)  # not a table that all rows read, such as one of positions
            outputs = [
                functional_call(template, {name: tensor[k] for name, tensor in tensors.items()}, (part, *rest), kwargs)
                for k, part in enumerate(x.chunk(count))
            ]
            return torch.cat(outputs)

    def _tensors(self) -> dict[str, torch.Tensor]:
        heads = self.holder.heads(self.adapter)[self.name]
        return {name: heads[name].to(like.dtype) for name, like in self._template[0].named_parameters()}

    @torch.no_grad()
    def materialize(self) -> nn.Module:
        """The module with the tensors of the current single draw, as an ordinary module."""
        tensors = self._tensors()
        for name, parameter in self._template[0].named_parameters():
            parameter.data = tensors[name][0].detach().clone()
        return self._template[0]

    @torch.no_grad()
    def copied(self) -> nn.Module:
        """A copy of the module with the tensors of the current single draw; the template stays as it is."""
        tensors = self._tensors()
        with _TEMPLATES:
            copy = deepcopy(self._template[0])
        for name, parameter in copy.named_parameters():
            parameter.data = tensors[name][0].detach().clone()
        return copy


def trained_modules(model: nn.Module, adapter: str) -> dict[str, tuple[ModulesToSaveWrapper, nn.Module]]:
    """The modules that an adapter trains whole, by name in the base model, with PEFT's wrappers."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            found[name] = (module, module.modules_to_save[adapter])
    return found


def stacked_heads(model: nn.Module, holder: FactorHolder, adapter: str) -> HeadTensors:
    """Put `StackedModule`s in the place of what an adapter trains whole; the modules' tensors as they were."""
    modules = trained_modules(model, adapter)
    heads = {name: dict(map(_in_floats, module.named_parameters())) for name, (_, module) in modules.items()}
    for name, (wrapper, module) in modules.items():
        wrapper.modules_to_save[adapter] = StackedModule(module, holder, adapter, name)
    return heads


def _in_floats(named: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """A tensor that torchao has quantised in place as plain numbers: members and points are numbers to be trained."""
    name, tensor = named
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    return name, tensor if plain or not hasattr(type(tensor), "tensor_data_names") else tensor.dequantize()


@contextmanager
def materialized_heads(model: nn.Module, adapters: Iterable[str]) -> Iterator[None]:
    """Put ordinary modules in the place of adapters' `StackedModule`s, for good unless what is done inside fails."""
    replaced = [
        (wrapper.modules_to_save, adapter, module)
        for adapter in adapters
        for wrapper, module in trained_modules(model, adapter).values()
        if isinstance(module, StackedModule)
    ]
    for modules, adapter, module in replaced:
        modules[adapter] = module.materialize()
    try:
        yield
    except BaseException:
        for modules, adapter, module in replaced:
            modules[adapter] = module
        raise
