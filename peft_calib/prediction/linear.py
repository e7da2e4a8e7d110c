"""The linearised predictive: one forward and one backward for each class, then any number of draws for little.

Around the adapter's mean the logits are expanded in the update D = B A of every adapted map,
`f_k = f + sum_slots s <df/dD, D_k - D>` (as in Laplace-LoRA, Yang et al. 2024, arXiv 2308.13111). The expansion is in
D and not in A and B, so it does not depend on how a law splits D into factors, and their product stays exact.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..tuners.asked import only_here
from ..tuners.factors import Draw, Mean
from ..tuners.layer import FactorLinear
from .heads import Head, Items, logits_of
from .sources import LawDraws

#: Most classes for which a backward each is reasonable.
MAX_CLASSES = 64


@dataclass
class _Use:
    """One call of an adapted layer: its input, and a zero added to its output that gathers the gradient."""

    layer: FactorLinear
    x: torch.Tensor
    probe: torch.Tensor


def linear_logits(source: LawDraws, head: Head, items: Items, first: int, num_samples: int) -> torch.Tensor:
    """Logits (K, N, C) of K draws, linearised around the mean, of a batch with one item a row."""
    if not items.one_a_row:
        raise ValueError("how='linear' needs one item a row, because it takes one gradient for each row and class.")
    if heads := source.own_heads():
        raise ValueError(
            f"how='linear' expands in the updates of adapted maps, and each draw here has a {heads[0].name} of its "
            "own, which is none. Use how='late', which gives the draws themselves, or how='sample'."
        )
    uses, logits = _forward_at_mean(source, head, items)
    if logits.shape[-1] > MAX_CLASSES:
        raise ValueError(
            f"how='linear' takes one backward for each class, at most {MAX_CLASSES}; there are {logits.shape[-1]}. "
            "For a language model name the answers with label_tokens, or use how='sample'."
        )
    gradients = _class_gradients(logits, uses)
    wide = torch.promote_types(logits.dtype, torch.float32)
    moved = logits.detach().to(wide).unsqueeze(0).repeat(num_samples, 1, 1)
    means = [_factors(source, use, Mean()) for use in uses]
    at_mean = [_update(use, *pairs) for use, pairs in zip(uses, means, strict=True)]
    for k in range(num_samples):
        draw = replace(source.draw, first=first + k, num_samples=1)
        drawn = [_factors(source, use, draw) for use in uses]
        for use, pairs, mean, gradient in zip(uses, drawn, at_mean, gradients, strict=True):
            change = (_update(use, *pairs) - mean).flatten(1).to(wide)
            moved[k] += torch.einsum("cbf,bf->bc", gradient, change)
    return moved


def _forward_at_mean(source: LawDraws, head: Head, items: Items) -> tuple[list[_Use], torch.Tensor]:
    uses: list[_Use] = []

    def attach(layer: FactorLinear, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if len(args[0]) != items.rows:
            raise ValueError(
                f"how='linear' needs layers that see one entry a row; one saw {len(args[0])} for {items.rows} rows. "
                "Use how='sample'."
            )
        probe = torch.zeros_like(output, requires_grad=True)
        uses.append(_Use(layer, args[0].detach(), probe))
        return output + probe

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(source.answering(Mean()))
        stack.enter_context(head.reading(source.root, items))
        here = stack.enter_context(only_here())
        for layer in source.layers():
            stack.callback(layer.register_forward_hook(here(attach)).remove)
        return uses, head.read(logits_of(source.model(**items.inputs)), items, 1)[0]


def _class_gradients(logits: torch.Tensor, uses: list[_Use]) -> list[torch.Tensor]:
    """For each use the gradient of every class's logit by the layer's output, (C, B, features)."""
    probes, by_class = [use.probe for use in uses], []
    for c in range(logits.shape[-1]):
        last = c == logits.shape[-1] - 1
        one = torch.zeros_like(logits)
        one[:, c] = 1
        found: Any = torch.autograd.grad(logits, probes, one, retain_graph=not last, allow_unused=True)
        by_class.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, probes, strict=True)])
    wide = torch.promote_types(logits.dtype, torch.float32)
    return [torch.stack(parts).flatten(2).to(wide) for parts in zip(*by_class, strict=True)]


def _factors(source: LawDraws, use: _Use, draw: Draw) -> tuple[list, list]:
    with torch.no_grad(), source.answering(draw):
        active = [name for name in use.layer.active_adapters if name in use.layer.factor_slots]
        slots: list[Any] = [use.layer.factor_slots[name].index for name in active]
        pairs = [use.layer.holder.generation(n).pairs[i] for n, i in zip(active, slots, strict=True)]
        return pairs, [use.layer.scaling[name] for name in active]


def _update(use: _Use, pairs: list, scalings: list[float]) -> torch.Tensor:
    """`s B A x` of all active adapters, in at least float32."""
    wide = torch.promote_types(use.x.dtype, torch.float32)
    x = use.x.to(wide)
    with torch.no_grad():
        terms = [F.linear(F.linear(x, A.to(wide)), B.to(wide)) * s for (A, B), s in zip(pairs, scalings, strict=True)]
        return torch.stack(terms).sum(0)
