"""Linear maps that nobody calls: their parent reads the weight itself, so a layer around them would do nothing.

The fused kernels of state-space models are given weights (`mamba_inner_fn(..., self.x_proj.weight)`), as is torch's
attention (`F.multi_head_attention_forward`). An adapter there is never asked: it trains nothing and predicts as if it
were not there, without a word.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache

from torch import nn

_READ = r"self\.(\w+)\.weight\b"
#: Given whole to a function, as fused kernels are.
_GIVEN = re.compile(rf"(?<!isinstance\(){_READ}\s*[,)]")
_CALLED = re.compile(r"self\.(\w+)\(")
#: Methods that make a module or its numbers; what they do with a weight is over when it is adapted.
_MAKING = re.compile(r"init|reset|tie|resize|load|quant|prune|convert")


@lru_cache(maxsize=1024)
def uncalled(parent: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight a module's methods read instead of calling them, always or in a kernel."""
    text = "\n".join(_sources(parent))
    return frozenset(_GIVEN.findall(text)) | (frozenset(re.findall(_READ, text)) - frozenset(_CALLED.findall(text)))


def _sources(parent: type[nn.Module]) -> Iterator[str]:
    """Sources of the methods that run in a forward; none where there is no file to look into."""
    for name, function in inspect.getmembers(parent, inspect.isfunction):
        if _MAKING.search(name) or function.__module__ == nn.Module.__module__:
            continue
        with suppress(OSError, TypeError):
            yield inspect.getsource(function)


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
