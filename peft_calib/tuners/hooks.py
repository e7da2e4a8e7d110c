"""How holders take part in the forwards of their base model: two hooks, and an entrance for who goes round them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..internals.torch import has_pre_hook, is_replica, remove_hooks
from .asked import Asked, asked_of, asked_while_tracing
from .forward import Forward, is_running, pop, push, running_forward
from .holder import FactorHolder
from .late import trunk_replay
from .modes import modes_of
from .objective import (
    Receipt,
    add_to_outputs,
    has_labels,
    micro_batch_share,
    named_inputs,
    one_member_watch,
    reaches_loss,
)
from .one_by_one import look_again, run, runs_one_by_one
from .padding import check_one_row, give_back, lend, takes_one_row
from .rows import check_packed, count_rows, first_rows, main_input_name, repeat_rows, repeat_training_rows
from .trunk_cache import CACHES, cached_replay


def _holders(model: nn.Module) -> list[FactorHolder]:
    return [child for child in model.children() if isinstance(child, FactorHolder)]


def begin_forward(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of the base model; module-level so that the model stays picklable."""
    if is_replica(model):
        raise RuntimeError(
            "torch.nn.DataParallel copies layers without the law they share, so the adapter would not train. Start "
            "one process a GPU with `accelerate launch`, or show the process a single GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    if torch.compiler.is_compiling():
        asked = asked_while_tracing(model)
        parts = [holder.begin_forward(asked.draws[id(holder)] if asked else None) for holder in _holders(model)]
        compared = max([1, *[part.num_samples for part in parts]])
        forward = None
    else:
        asked = asked_of(model)
        forward = _begin(model, asked)
        compared = forward.num_samples
    drawn = asked.num_samples if asked is not None and not asked.repeated else 1
    one_row = forward is not None and takes_one_row(model)
    trains = forward is not None and asked is None and torch.is_grad_enabled() and model.training
    if max(drawn, compared) == 1 and not one_row and not (trains and model in CACHES):
        return None
    inputs, main_input = named_inputs(model, args, kwargs), main_input_name(model)
    rows = count_rows(inputs, main_input)
    if one_row:
        check_one_row(rows)
        if max(drawn, compared) == 1:
            return None
        forward.lent = lend(model)
    if forward is not None and max(drawn, compared) > 1:
        check_packed(model, inputs, rows)
        forward.given, forward.functions = inputs, max(drawn, compared)
    if drawn > 1:
        return (), repeat_rows(inputs, drawn, rows)
    if trains and not (compared > 1 and runs_one_by_one(model)):
        forward.replay = cached_replay(model, inputs, compared)
        if forward.replay is None and compared > 1:
            forward.replay = trunk_replay(model, inputs, rows, compared)
        if forward.replay is not None:
            forward.replay.__enter__()
    return None if compared == 1 else ((), repeat_training_rows(inputs, compared, main_input))


def _begin(model: nn.Module, asked: Asked | None) -> Forward:
    modes = modes_of(model)
    forward = Forward(model, asked, modes.begin_forward(model))
    try:
        for holder in _holders(model):
            holder.belong_to(model)
            forward.parts[holder] = holder.begin_forward(None if asked is None else asked.draws.get(id(holder)))
    except BaseException:
        modes.end_forward(model, forward.trains)
        raise
    push(forward)
    return forward


def end_forward(model: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
    """Forward hook of the base model, called also when the forward raised; adds regularisers to the loss."""
    if torch.compiler.is_compiling():
        parts = {holder: holder.now.tracing for holder in _holders(model)}
    else:
        forward = pop(model)
        if forward is None:  # it was refused before it began
            return None
        parts = forward.parts
        if forward.lent is not None:
            give_back(forward.lent)
        forward.end_replay()
        modes_of(model).end_forward(model, forward.trains)
    num_samples = max([1, *[part.num_samples for part in parts.values()]])
    inputs = named_inputs(model, args, kwargs) if num_samples > 1 else {}
    terms = [term for holder, part in parts.items() for term in holder.end_forward(part, model, output, inputs)]
    if output is None or (not terms and num_samples == 1):
        return None
    inputs = inputs or named_inputs(model, args, kwargs)
    if terms:
        labelled = has_labels(model, inputs)
        total = torch.stack([term.float() if term.dtype != torch.float64 else term for term in terms]).sum()
        if not torch.compiler.is_compiling():
            receipt = Receipt(terms)
            for holder, part in parts.items():
                holder.expect(part, receipt, reaches_loss(output, labelled))
        output = add_to_outputs(output, total, micro_batch_share(model, inputs), labelled)
    if num_samples == 1:
        return output
    watch = one_member_watch([law for part in parts.values() for law in part.comparing])
    return first_rows(output, num_samples, count_rows(inputs, main_input_name(model)), watch)


# --------------------------------------------------------------------- callers of model.forward


def _entrance(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that also does what its hooks do, where it is called without them.

    `model.forward(...)` instead of `model(...)` (as sentence-transformers calls it) runs no hook: no regulariser, no
    draws.
    """

    @functools.wraps(forward)
    def enter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        holders = _holders(self)
        compiling = torch.compiler.is_compiling()
        begun = any(holder.now.tracing is not None for holder in holders) if compiling else is_running(self)
        if not holders or (compiling and begun):
            return forward(self, *args, **kwargs)
        if begun:
            try:
                return run(forward, self, None if compiling else running_forward(self), args, kwargs)
            except Exception:
                raise  # torch calls the hook behind the forward
            except BaseException:  # which it does not for an interrupt
                end_forward(self, args, kwargs, None)
                raise
        output = None
        try:
            args, kwargs = begin_forward(self, args, kwargs) or (args, kwargs)
            output = run(forward, self, None if compiling else running_forward(self), args, kwargs)
        finally:
            changed = end_forward(self, args, kwargs, output)
        return output if changed is None else changed

    # not `__wrapped__`, by which Accelerate finds what it has wrapped itself, and would take this off with it
    enter.__signature__ = inspect.signature(forward)
    del enter.__wrapped__
    enter.is_entrance = True
    return enter


def attach_hooks(model: nn.Module) -> None:
    """Register the hooks once, whatever the number of adapters and tuner types on the model."""
    look_again(model)
    for holder in _holders(model):
        holder.belong_to(model)
    if not has_pre_hook(model, begin_forward):
        # first, so that hooks which look at the batch see the rows of all draws
        model.register_forward_pre_hook(begin_forward, with_kwargs=True, prepend=True)
        model.register_forward_hook(end_forward, always_call=True, with_kwargs=True)
    if "forward" not in model.__dict__:  # a forward put there by others (Accelerate) is theirs
        model.forward = MethodType(_entrance(type(model).forward), model)


def detach_hooks(model: nn.Module) -> None:
    """Remove the hooks when no law is left on the model."""
    if any(len(holder.laws) for holder in _holders(model)):
        return
    remove_hooks(model, begin_forward, end_forward)
    if getattr(model.__dict__.get("forward"), "is_entrance", False):
        del model.forward
