"""Linear maps that nobody calls: their parent reads the weight itself, so a layer around them would do nothing.

The fused kernels of state-space models are given weights (`mamba_inner_fn(..., self.x_proj.weight)`), as is torch's
attention (`F.multi_head_attention_forward`). An adapter there is never asked: it trains nothing and predicts as if it
were not there, without a word.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache

from torch import nn

#: What is asked of a weight and is no reading of its numbers.
_ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda", "is_floating_point"}
#: Functions of Python that look at a weight and compute nothing.
_LOOKS = {"isinstance", "hasattr", "getattr", "type", "len", "print", "id"}


@lru_cache(maxsize=1024)
def uncalled(parent: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight a module's forward reads instead of calling them, always or in a kernel.

    A child that is called, or goes elsewhere whole (`checkpoint(self.fc, x)`), counts as called, unless its weight is
    given to a function as well: so are fused kernels, beside a slow way that calls.
    """
    read: set[str] = set()
    given: set[str] = set()
    called: set[str] = set()
    for method in _methods_of_a_forward(parent):
        within = {id(child): node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(method):
            if not _is_of_self(node):
                continue
            around = within.get(id(node))
            if not (isinstance(around, ast.Attribute) and around.attr == "weight"):
                called |= set() if isinstance(around, ast.Attribute) or _looks(around) else {node.attr}
                continue
            use = within.get(id(around))
            if _looks(use) or (isinstance(use, ast.Attribute) and use.attr in _ABOUT):
                continue
            is_argument = isinstance(use, ast.keyword) or (isinstance(use, ast.Call) and use.func is not around)
            (given if is_argument else read).add(node.attr)
    return frozenset(given | (read - called))


class _Named(ast.NodeTransformer):
    """Puts `self.fc` where a method says `fc` after `fc = self.fc`; a name with two meanings is left as it is."""

    def of(self, tree: ast.AST) -> ast.AST:
        stored = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        pairs = [pair for node in ast.walk(tree) if isinstance(node, ast.Assign) for pair in _pairs(node)]
        self.meant = {name: value for name, value in pairs if stored.count(name) == 1 and _is_of_self(value)}
        return self.visit(tree)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """Leaves a name's own assignment out, which is no use of the map."""
        spent = {id(value) for name, value in _pairs(node) if name in self.meant}
        many = isinstance(node.value, ast.Tuple)
        values = [ast.Constant(None) if id(v) in spent else v for v in (node.value.elts if many else [node.value])]
        node.value = ast.Tuple(values, ast.Load()) if many else values[0]
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        meant = self.meant.get(node.id) if isinstance(node.ctx, ast.Load) else None
        return node if meant is None else copy.deepcopy(meant)


def _pairs(node: ast.Assign) -> list[tuple[str, ast.expr]]:
    """Names and what they are given, in `a = ...` and `a, b = ..., ...`."""
    (target, *more), value = node.targets, node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = list(zip(target.elts, value.elts, strict=False))
    else:
        pairs = [(target, value)]
    return [] if more else [(name.id, value) for name, value in pairs if isinstance(name, ast.Name)]


def _is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _looks(use: ast.AST | None) -> bool:
    return isinstance(use, ast.Call) and isinstance(use.func, ast.Name) and use.func.id in _LOOKS


def _methods_of_a_forward(parent: type[nn.Module]) -> Iterator[ast.AST]:
    """`forward` and the methods it reaches, parsed; none where there is no file to look into."""
    methods, waiting, done = dict(inspect.getmembers(parent, inspect.isfunction)), ["forward"], set()
    while waiting:
        name = waiting.pop()
        method = methods.get(name)
        if name in done or method is None or method.__module__ == nn.Module.__module__:
            continue
        done.add(name)
        with suppress(OSError, TypeError, SyntaxError):
            tree = _Named().of(ast.parse(textwrap.dedent(inspect.getsource(method))))
            waiting += [node.attr for node in ast.walk(tree) if _is_of_self(node)]
            yield tree


def check_called(parent: nn.Module, key: str) -> None:
    """Raise `ValueError` for a target module whose parent reads its weight instead of calling it."""
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"Target module {key} belongs to torch.nn.MultiheadAttention, which reads the weight without calling the "
            "module, so an adapter there would do nothing. Leave it out with exclude_modules."
        )
    alike = uncalled(type(parent)) & {name for name, child in parent.named_children() if isinstance(child, nn.Linear)}
    if key.rpartition(".")[2] in alike:
        raise ValueError(
            f"Target module {key} belongs to {type(parent).__name__}, which reads the weights of "
            f"{', '.join(sorted(alike))} without calling the modules, so an adapter there would do nothing. Leave "
            f"them out with exclude_modules={sorted(alike)}."
        )
