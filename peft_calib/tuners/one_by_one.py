"""K functions one after the other, for models whose rows share what an adapted map is applied to.

DeBERTa applies the adapted maps of its attention to one table of relative positions, which all rows read; XLNet keeps
positions before rows. K functions make K tables, or K rows at each position, and the one pass over the rows of all
functions would give a row another's function. Such a pass is made anew, one function at a time, and the answers are
put together as the one pass would have given them.

Which models need it is found in the first pass: there every adapted map sees K times the rows that it sees when one
function runs alone. That K divides them says nothing, a table of 512 positions is divided by two.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import Context, ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .asked import only_here
from .forward import Forward, pop, push
from .heads import StackedModule
from .rows import SharedRowsError

_NEEDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_PROVEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: Of base models whose rows the caller repeats, the modules that were seen to read those of all functions.
_REPEATED: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
#: Whether blocks answer for all functions at once, so that they cannot be asked one by one.
replaying: ContextVar[bool] = ContextVar("peft_calib_replaying", default=False)
#: Rows that each adapted map, and each head of a law, was applied to, call by call.
Rows = dict[nn.Module, list[int]]


class _AllSeenError(Exception):
    """Raised from a hook to leave the model behind its last adapted map."""


def runs_one_by_one(root: nn.Module) -> bool:
    """Whether a base model is known to need one pass for each function."""
    return root in _NEEDED


def look_again(root: nn.Module) -> None:
    """Have the next pass looked at as the first: a further adapter may change maps that none has changed before."""
    _PROVEN.discard(root)


def run(forward: Callable[..., Any], root: nn.Module, running: Forward | None, args: tuple, kwargs: dict) -> Any:
    """Call a base model's forward, once for all functions where that is possible."""
    if running is None or running.given is None:
        return forward(root, *args, **kwargs)
    if root in _NEEDED:
        return _one_by_one(forward, root, running)
    if root in _PROVEN:
        try:
            return forward(root, *args, **kwargs)
        except SharedRowsError:  # which rows a map sees may hang on what a function says
            _NEEDED.add(root)
            return _one_by_one(forward, root, running)
    return _first_pass(forward, root, running, args, kwargs)


def _first_pass(forward: Callable[..., Any], root: nn.Module, running: Forward, args: tuple, kwargs: dict) -> Any:
    """Find out whether all functions can run at once, and answer for all."""
    states = _random_states()
    try:
        with _rows_seen(_reading(root)) as together:
            output = forward(root, *args, **kwargs)
    except SharedRowsError:
        shared = True
    else:
        if not _can_run_again(running.given):
            return output
        # in a context of its own nothing replays, reads along or asks for draws, as it may in this one
        alone = Context().run(_rows_alone, forward, root, running, sum(map(len, together.values())))
        shared = _not_repeated(together, alone, running.functions) is not None
    if not shared:
        _PROVEN.add(root)
        return output
    _NEEDED.add(root)
    _restore(states)
    return _one_by_one(forward, root, running)


def run_repeated(
    root: nn.Module,
    varying: Sequence[nn.Module],
    functions: int,
    together: Callable[[], torch.Tensor],
    alone: Callable[[], Any],
) -> torch.Tensor:
    """What several functions answer on rows that the caller repeated for them, found to be possible in the first pass.

    Args:
        root: The base model.
        varying: The modules that differ between the functions.
        functions: How many there are.
        together: Runs all of them.
        alone: Runs one of them.

    Raises:
        SharedRowsError: Where a module reads other rows than those of all functions; the caller runs them one by one.
    """
    known = _REPEATED.setdefault(root, weakref.WeakSet())
    if all(module in known for module in varying):
        return together()
    try:
        with _rows_seen(varying) as rows:
            answer = together()
        with _rows_seen(varying) as once:
            alone()
        if (shared := _not_repeated(rows, once, functions)) is not None:
            raise SharedRowsError(shared[0], functions)
    except SharedRowsError:
        _NEEDED.add(root)
        raise
    known.update(varying)
    return answer


def _not_repeated(together: Rows, alone: Rows, functions: int) -> list[int] | None:
    """The rows of the first module that read others than those of all functions."""
    return next(
        (rows for module, rows in together.items() if rows != [functions * n for n in alone.get(module, [])]), None
    )


def _reading(root: nn.Module) -> list[nn.Module]:
    """What reads factors or tensors of a function."""
    return [module for module in root.modules() if isinstance(module, (BaseTunerLayer, StackedModule))]


@contextmanager
def _rows_seen(modules: Iterable[nn.Module], calls: int | None = None) -> Iterator[Rows]:
    """Count the rows of some modules in a forward of this call chain, which ends after so many calls of them."""
    seen: Rows = {}

    def note(module: nn.Module, args: tuple) -> None:
        if args:
            seen.setdefault(module, []).append(args[0].shape[0])
        if calls is not None and sum(map(len, seen.values())) >= calls:
            raise _AllSeenError

    with only_here() as here, ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(here(note)).remove)
        yield seen


def _rows_alone(forward: Callable[..., Any], root: nn.Module, running: Forward, calls: int) -> Rows:
    """The rows of every adapted map where one function runs on the batch; nothing is drawn, updated or kept.

    It ends at the last adapted map: what is behind it, a vocabulary for every token, may take more memory than all
    before.
    """
    training = [module for module in root.modules() if module.training]
    for module in training:  # not by eval(): what a module does when it is switched is not for one look
        module.training = False
    push(running.only(0))
    try:
        with torch.no_grad(), _rows_seen(_reading(root), calls) as seen, suppress(_AllSeenError):
            forward(root, **(running.given or {}))
    finally:
        pop(root)
        for module in training:
            module.training = True
    return seen


def _can_run_again(inputs: Mapping[str, Any] | None) -> bool:
    """Whether a forward leaves its inputs as they are, which one with a cache of earlier tokens does not."""
    return not any(hasattr(value, "get_seq_length") for value in (inputs or {}).values())


def _one_by_one(forward: Callable[..., Any], root: nn.Module, running: Forward) -> Any:
    running.end_replay()
    if replaying.get():  # its blocks answer for all functions: whoever has them do so asks for one at a time
        raise SharedRowsError(1, running.functions)
    checkpointed = any(getattr(module, "gradient_checkpointing", False) is True for module in root.modules())
    if checkpointed and torch.is_grad_enabled() and root.training:
        raise RuntimeError(
            f"{type(root).__name__} shares rows between functions, so {running.functions} of them run one after the "
            "other, and a checkpointed block would be recomputed with another. Switch gradient checkpointing off, or "
            "train one function at a time."
        )
    outputs = []
    for index in range(running.functions):
        push(running.only(index))
        try:
            outputs.append(forward(root, **running.given))
        finally:
            pop(root)
    return _joined(outputs)


def _joined(outputs: list[Any]) -> Any:
    """What functions answered on B rows each, as one answer on K * B rows; a loss is the mean."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs) if first.dim() else torch.stack(outputs).mean()
    if isinstance(first, Mapping):
        joined = {name: _joined([output[name] for output in outputs]) for name in first}
        return type(first)(**joined)
    if isinstance(first, (tuple, list)):
        parts = [_joined(list(part)) for part in zip(*outputs, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return None  # a cache, whose rows belong to one function


def _random_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def _restore(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Take back what the attempt drew: a model that is met for the first time trains as one that is known."""
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
