"""Run what comes before the first draw once, and only the rest for each draw.

First the model runs on the B rows up to the first layer whose factors vary, and the output of every transformer block
on the way is kept. Then it runs on all K * B rows, where each of those blocks answers with what was kept, repeated for
the draws. Everything between and behind the blocks (embeddings, masks, positions, norms, heads) sees K * B rows, as it
does when the batch is repeated from the start, so nothing about the architecture has to be known; what cannot be right
(a block that runs twice, an output that is not one entry a row) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..tuners.asked import forward_replaced, only_here
from ..tuners.holder import FactorHolder
from ..tuners.laws import laws_of
from ..tuners.rows import repeat_rows


class _FirstDrawReachedError(Exception):
    """Raised from a hook to leave the model where the draws begin."""


@dataclass
class Prefix:
    """What all draws share: the transformer blocks before the first varying layer, and their outputs.

    Args:
        outputs: Block and its output for the B rows, in the order of running.
        rows: Number of rows B.
        share: Part of the model's work that lies in the blocks, from 0 to 1.
    """

    outputs: list[tuple[nn.Module, Any]]
    rows: int
    share: float

    @contextmanager
    def replayed(self, num_samples: int) -> Iterator[None]:
        """Let the blocks answer with their kept outputs, repeated K-fold."""
        replays = {block: partial(_replay, output, num_samples, self.rows) for block, output in self.outputs}
        with forward_replaced(replays):
            yield


def run_prefix(
    model: nn.Module, root: nn.Module, varying: list[nn.Module], inputs: dict, rows: int, read: float
) -> Prefix:
    """Run the model on the B rows up to the first module that varies between draws.

    Args:
        model: What is called.
        root: The base model.
        varying: The modules that differ between draws, at least one.
        inputs: Arguments of the forward.
        rows: Number of rows B.
        read: Part of the positions that the output layer over a vocabulary is applied to.

    Returns:
        The blocks that ran to their end, with their outputs; none if the draws begin at once.

    Raises:
        ValueError: If a block ran twice, or its output is not one entry a row.
    """
    blocks = _blocks(root)
    inside = {id(block): _contains(block, varying) for block in blocks}
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
            model(**inputs)
    _check(outputs, rows, root)
    return Prefix(outputs, rows, _share(root, [block for block, _ in outputs], read))


def _stop(*_: Any) -> None:
    raise _FirstDrawReachedError


def _blocks(root: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists: a model's transformer blocks."""
    found: list[nn.Module] = []
    for child in root.children():
        if isinstance(child, FactorHolder):
            continue
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


def _contains(block: nn.Module, modules: list[nn.Module]) -> bool:
    ids = {id(module) for module in modules}
    return any(id(module) in ids for module in block.modules())


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


def _replay(output: Any, num_samples: int, rows: int, *_: Any, **__: Any) -> Any:
    return repeat_rows({"output": output}, num_samples, rows)["output"]


def _share(root: nn.Module, blocks: list[nn.Module], read: float) -> float:
    """Part of the weights outside embeddings that lies in the blocks: the work of a forward follows it closely."""
    tables = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    skip = tables | {id(p) for law in laws_of(root) for p in law.parameters()}
    output_layer = getattr(root, "get_output_embeddings", lambda: None)()
    output = {id(p): p.numel() for p in output_layer.parameters()} if output_layer is not None else {}
    skip |= output.keys()
    total = sum(p.numel() for p in root.parameters() if id(p) not in skip) + read * sum(output.values())
    inside = sum(p.numel() for block in blocks for p in block.parameters() if id(p) not in skip)
    return inside / total if total else 0.0
