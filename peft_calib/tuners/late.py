"""Run what comes before the first varying layer once, and only the rest for each draw.

First the model runs on the B rows up to the first layer whose factors vary, and the output of every transformer block
on the way is kept. Then it runs on all K * B rows, where each of those blocks answers with what was kept, repeated for
the draws. Everything between and behind the blocks (embeddings, masks, positions, norms, heads) sees K * B rows, as it
does when the batch is repeated from the start, so nothing about the architecture has to be known; what cannot be right
(a block that runs twice, an output that is not one entry a row) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from .asked import forward_replaced, only_here
from .heads import StackedModule
from .holder import FactorHolder
from .laws import laws_of
from .modes import modes_of
from .one_by_one import replaying
from .rows import repeat_rows
from .shared_rows import mark_repeated


class _FirstDrawReachedError(Exception):
    """Raised from a hook to leave the model where the draws begin."""


@dataclass
class Prefix:
    """The transformer blocks before the first varying layer and their outputs for the B rows, in order of running."""

    outputs: list[tuple[nn.Module, Any]]
    rows: int

    @contextmanager
    def replayed(self, num_samples: int, idle: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Let blocks answer with their kept outputs, repeated K-fold; `idle`, which nobody reads, do nothing."""
        replays = {block: partial(_replay, output, num_samples, self.rows) for block, output in self.outputs}
        with forward_replaced({**replays, **dict.fromkeys(idle, pass_on)}):
            outside = replaying.get()
            replaying.set(outside or num_samples > 1)
            try:
                yield
            finally:
                replaying.set(outside)


def share_of(prefix: Prefix, root: nn.Module, read: float) -> float:
    """Part of the weights that lies in a prefix; `read` is the share of positions the output layer sees."""
    tables = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    skip = tables | {id(p) for law in laws_of(root) for p in law.parameters()}
    output_layer = getattr(root, "get_output_embeddings", lambda: None)()
    output = {id(p): p.numel() for p in output_layer.parameters()} if output_layer is not None else {}
    skip |= output.keys()
    total = sum(p.numel() for p in root.parameters() if id(p) not in skip) + read * sum(output.values())
    inside = sum(p.numel() for block, _ in prefix.outputs for p in block.parameters() if id(p) not in skip)
    return inside / total if total else 0.0


def run_prefix(call: Callable[[], Any], root: nn.Module, varying: list[nn.Module], rows: int) -> Prefix:
    """Run a model on B rows (`call`) up to the first module that varies; `ValueError` where it cannot be cut."""
    blocks = blocks_of(root)
    ids = {id(module) for module in varying}
    inside = {id(block): any(id(module) in ids for module in block.modules()) for block in blocks}
    in_blocks = {id(m) for block in blocks if inside[id(block)] for m in block.modules()}
    outputs: list[tuple[nn.Module, Any]] = []

    def keep(block: nn.Module, _: Any, output: Any) -> None:
        outputs.append((block, output))

    # The run ends where the draws begin, by an exception: at the entrance of the first block that holds a varying
    # layer, or at a varying layer outside of all blocks (a head). Without it the blocks behind would run too, and what
    # they answered for one draw would be replayed for all draws: a wrong prediction, not a slow one. Layers inside a
    # block need no stop of their own, since the entrance of their block comes first.
    stops = [block for block in blocks if inside[id(block)]] + [m for m in varying if id(m) not in in_blocks]
    with only_here() as here, ExitStack() as stack:
        for module in stops:
            stack.callback(module.register_forward_pre_hook(here(_stop)).remove)
        for block in blocks:
            if not inside[id(block)]:
                stack.callback(block.register_forward_hook(here(keep)).remove)
        with suppress(_FirstDrawReachedError):
            call()
    _check(outputs, rows, root)
    return Prefix(outputs, rows)


def _stop(*_: Any) -> None:
    raise _FirstDrawReachedError


def blocks_of(root: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists: a model's transformer blocks."""
    found: list[nn.Module] = []
    for child in root.children():
        if isinstance(child, FactorHolder):
            continue
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def _check(outputs: list[tuple[nn.Module, Any]], rows: int, root: nn.Module) -> None:
    name = type(root).__name__
    if len({id(block) for block, _ in outputs}) < len(outputs):
        raise ValueError(
            f"how='late' keeps one output of each block, but a block of {name} runs more than once in a forward. Use "
            "how='sample'."
        )
    for _, output in outputs:
        for tensor in _flatten(output):
            if tensor.dim() < 2 or len(tensor) not in (1, rows):
                raise ValueError(
                    f"how='late' needs blocks that answer with one entry a row; one of {name} answered with shape "
                    f"{tuple(tensor.shape)} for {rows} rows. Use how='sample'."
                )


def _flatten(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _flatten(part)] if isinstance(value, (list, tuple)) else []


def pass_on(_: Callable[..., Any], x: Any) -> Any:
    """Stand in for the forward of a module that is to do nothing."""
    return x


def asks_for_gradient(args: tuple) -> bool:
    """Whether what stands in for a block has to ask for a gradient, as the block's input does.

    Reentrant checkpointing gives a block no gradient unless its input asks for one, which PEFT sees to at the
    embeddings. What is replayed has lost that on the way, and the blocks above would silently not train.
    """
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)


def _replay(output: Any, num_samples: int, rows: int, *args: Any, **_: Any) -> Any:
    repeated = repeat_rows({"output": output}, num_samples, rows)["output"]
    for tensor, once in zip(_flatten(repeated), _flatten(output), strict=True):
        mark_repeated(tensor, once)
    if asks_for_gradient(args):
        for tensor in _flatten(repeated):
            tensor.requires_grad_(tensor.is_floating_point())
    return repeated


# --------------------------------------------------------------------- training


def trunk_replay(root: nn.Module, inputs: dict[str, Any], rows: int, num_samples: int) -> Any:
    """The context in which what lies below all that trains answers for all draws, without dropout; `None` for none."""
    trunk = trunk_of(root)
    if trunk is None:
        return None
    # with the labels, which an encoder-decoder makes the tokens of its decoder of
    with modes_of(root).evaluation(root):
        try:
            prefix = trunk.run(root, inputs, rows)
        except ValueError:  # a block that runs twice, or that answers with other rows
            return None
    return prefix.replayed(num_samples, trunk.dropouts) if prefix.outputs else None


@dataclass(frozen=True)
class Trunk:
    """The frozen lower part of a model in training; what is `above` trains, or holds an adapter's layer.

    `below` are all its modules, those of the blocks and the embeddings before them.

    `dropouts` come before the blocks; nobody reads their answer where the blocks' own are replayed.
    """

    blocks: list[nn.Module]
    below: list[nn.Module]
    above: list[nn.Module]
    dropouts: list[nn.Module]

    def run(self, root: nn.Module, inputs: Mapping[str, Any], rows: int) -> Prefix:
        """Run it on B rows, in the mode it is in and without gradients; see `run_prefix`."""
        # not through the model's hooks, which would begin another forward of the adapters
        call = partial(type(root).forward, root, **inputs)
        with torch.no_grad():
            return run_prefix(call, root, self.above, rows)


def trunk_of(root: nn.Module) -> Trunk | None:
    """The blocks below the first that trains or is adapted; `None` where there is no such block, or it is sharded."""
    blocks = list(takewhile(lambda block: not any(map(_is_above, block.modules())), blocks_of(root)))
    if not blocks:
        return None
    in_blocks = {id(m) for block in blocks for m in block.modules()}
    order = list(_without_holders(root))
    last = max(position for position, module in enumerate(order) if id(module) in in_blocks)
    below = order[: last + 1]
    # what trains must lie behind: a prompt, or embeddings that are trained, change what the blocks see
    if any(map(_is_above, below)):
        return None
    if any(isinstance(parameter, DTensor) for parameter in root.parameters()):
        return None  # sharded parameters are gathered by hooks, which the trunk does not run through
    dropouts = [m for m in below if isinstance(m, nn.Dropout) and id(m) not in in_blocks]
    return Trunk(blocks, below, [m for m in order[last + 1 :] if _is_above(m)], dropouts)


def _without_holders(root: nn.Module) -> Iterator[nn.Module]:
    yield root
    for child in root.children():
        if not isinstance(child, FactorHolder):
            yield from _without_holders(child)


def _is_above(module: nn.Module) -> bool:
    """Whether a module trains, or holds an adapter's layer or head."""
    trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return trains or isinstance(module, (BaseTunerLayer, StackedModule))
