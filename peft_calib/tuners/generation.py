"""The factors of one adapter for one forward, and the ways their gradients find back to the law."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..internals.torch import at_end_of_backward, in_backward, inside_checkpoint, is_functorch_wrapped, version_of
from .factors import Draw, Factors, Law, Pair, Perturbation, Points
from .memory import answer
from .objective import Receipt, settle_members, settle_receipts

_optimizer_steps = 0


def _count_optimizer_step(*_) -> None:
    # fused optimisers do not bump a tensor's version, so this is the only sign that parameters have changed
    global _optimizer_steps
    _optimizer_steps += 1
    settle_receipts()
    settle_members()


register_optimizer_step_post_hook(_count_optimizer_step)


class _Use:
    """Whether gradients have come back to a generation, and what to do then; lives as long as its graph."""

    consumed = False
    #: Of the regularisers of the forward; due when the generation is consumed.
    receipt: Receipt | None = None

    def consume(self, _: torch.Tensor) -> None:
        """Tensor hook of the generation's last root."""
        self.consumed = True
        receipt, self.receipt = self.receipt, None
        if receipt is not None:
            receipt.due()


@dataclass
class Generation:
    """The factors of one adapter for one forward, and what tells whether they are still good.

    Three ways lead back to the law's parameters: the autograd graph itself; leaves that wait for `flush`
    (`regenerate="step"`); and, under reentrant checkpointing, bridges. Each checkpointed block then runs a backward of
    its own, which must not walk, and free, the one graph all blocks share: it ends at a bridge, a detached copy of the
    block's factors, and what has gathered there crosses over once, when the outer backward is over.
    """

    pairs: list[Pair]
    regularizer: torch.Tensor | None
    stamp: tuple
    has_graph: bool
    # An object of its own, because the tensor hook that marks it must not keep the generation, and so a whole graph,
    # alive. None in a traced generation: torch.compile has hooks and weak references of its own.
    use: _Use | None = None
    roots: list[torch.Tensor] = field(default_factory=list)
    leaves: list[torch.Tensor] = field(default_factory=list)
    perturbation: Perturbation | None = None
    heads: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    reentrant: bool = False
    read_directly: bool = False
    bridges: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def take(self, factors: Factors, law: Law, draw: Draw) -> None:
        """Take over what layers read."""
        self.pairs = factors.per_slot(law.slots, draw.num_samples)
        self.perturbation, self.heads = factors.perturbation, factors.heads

    @property
    def draw(self) -> Draw:
        return self.stamp[0]

    def only(self, index: int) -> Generation:
        """One of several functions, in the graph of all; what holds one function stays as it is."""
        if self.draw.num_samples == 1:
            return self
        pairs = [(A[index], B[index]) for A, B in self.pairs]
        heads = {
            module: {name: t[index : index + 1] if len(t) > 1 else t for name, t in tensors.items()}
            for module, tensors in self.heads.items()
        }
        return replace(self, pairs=pairs, heads=heads, regularizer=None, has_graph=False)

    def pair(self, index: int) -> Pair:
        """A and B of one slot, as the calling layer may use them."""
        if not self.has_graph:
            return self.pairs[index]
        backward = in_backward()
        if not torch.is_grad_enabled():
            if not backward and inside_checkpoint():
                self.begin_reentrant()
            return self.pairs[index]
        if self.reentrant:
            return self._bridge(index, backward)
        self.read_directly = True
        return self.pairs[index]

    def term(self) -> torch.Tensor | None:
        """The regulariser as it enters the loss."""
        return self._bridge(-1)[0] if self.reentrant and self.regularizer is not None else self.regularizer

    # ----------------------------------------------------------------- regenerate="step"

    @property
    def gradients_wait(self) -> bool:
        return any(leaf.grad is not None for leaf in self.leaves)

    def flush(self) -> None:
        """Carry the gradients waiting at the leaves into the law."""
        _carry(self.roots, self.leaves)

    # ----------------------------------------------------------------- reentrant checkpointing

    def begin_reentrant(self) -> None:
        """A block of a training forward runs without gradients: this is the first pass of a reentrant checkpoint."""
        if self.read_directly:
            raise RuntimeError(
                "Reentrant gradient checkpointing cannot train this adapter: an adapted module before the first "
                "checkpointed block is already tied to the graph that generates the factors. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False} (TrainingArguments or '
                "model.gradient_checkpointing_enable)."
            )
        self.reentrant = True

    # Why two hooks lead to one crossing: a block's own backward ends at its bridge and knows of no other, and
    # which block is last depends on the model. If each crossed by itself, the first would walk the law's graph and
    # free it under the second ("Trying to backward through the graph a second time"), and with `retain_graph` every
    # block would pay for the whole law. So each only asks the engine to call `_cross` when the outer backward is over.
    # The engine takes such a request during a backward alone: in the forward pass the bridge is made and given a hook
    # that asks once its gradient has come; a bridge that is first met in the recomputation asks at once.
    def _bridge(self, index: int, backward: bool = False) -> tuple[torch.Tensor, ...]:
        if index not in self.bridges:
            self.bridges[index] = tuple(as_leaf(tensor) for tensor in self._bank(index))
            for leaf in self.bridges[index]:
                if leaf.requires_grad and not backward:
                    leaf.register_post_accumulate_grad_hook(lambda _: at_end_of_backward(self._cross))
        if backward:
            at_end_of_backward(self._cross)
        return self.bridges[index]

    def _bank(self, index: int) -> tuple[torch.Tensor, ...]:
        return self.pairs[index] if index >= 0 else (self.regularizer,)

    def _cross(self) -> None:
        banks = [tensor for index in self.bridges for tensor in self._bank(index)]
        _carry(banks, [leaf for leaves in self.bridges.values() for leaf in leaves])


def _carry(tensors: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Run one backward from tensors whose detached copies hold gradients, and empty the copies."""
    waiting = [(tensor, leaf) for tensor, leaf in zip(tensors, leaves, strict=True) if leaf.grad is not None]
    if waiting:
        # kept, because a checkpointed block may still be recomputed in a later backward
        torch.autograd.backward([t for t, _ in waiting], [leaf.grad for _, leaf in waiting], retain_graph=True)
    for _, leaf in waiting:
        leaf.grad = None


def generate(law: Law, draw: Draw, wants_graph: bool) -> Generation:
    """Ask a law for its factors; the generation is stamped with the state of the law's parameters."""
    with torch.inference_mode(False), torch.set_grad_enabled(wants_graph):
        factors = ask(law, draw)
        roots = [stack for pair in factors.groups.values() for stack in pair if stack.requires_grad]
        # stamped last: a law may count its generations in a buffer
        generation = Generation([], factors.regularizer, (), has_graph=bool(roots), use=_Use())
        if roots and law.regenerate == "step":
            factors.groups = {g: tuple(as_leaf(t) for t in pair) for g, pair in factors.groups.items()}
            generation.roots = roots
            generation.leaves = [t for pair in factors.groups.values() for t in pair if t.requires_grad]
            generation.has_graph = False
        elif roots:
            roots[-1].register_hook(generation.use.consume)
        generation.take(factors, law, draw)
    generation.stamp = stamp_of(law, draw)
    return generation


def trace(law: Law, draw: Draw) -> Generation:
    """Ask a law inside the graph that torch.compile is building: no stamp, cache or tensor hook there."""
    factors = ask(law, draw)
    found = Generation([], factors.regularizer, (), has_graph=False)
    found.take(factors, law, draw)
    return found


def ask(law: Law, draw: Draw) -> Factors:
    """Ask the law outside autocast, and cast its stacks once to the dtype autocast would give each layer."""
    dtype = _autocast_dtype(law)
    with torch.autocast(_device(law).type, enabled=False):
        factors = answer(law, draw)
        if dtype is not None:
            factors.groups = {g: (A.to(dtype), B.to(dtype)) for g, (A, B) in factors.groups.items()}
    return factors


def as_leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A copy cut from the graph that gathers gradients of its own."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def stamp_of(law: Law, draw: Draw) -> tuple:
    """A value that changes when another generation is due."""
    return (draw, *parameter_stamp([*_tensors(law), *tensors_of(draw)]), _autocast_dtype(law))


def tensors_of(draw: Draw | None) -> list[torch.Tensor]:
    """Tensors in a question: points of a curve, which may change in place and require gradients."""
    return [t for t in draw.points if isinstance(t, torch.Tensor)] if isinstance(draw, Points) else []


def parameter_stamp(tensors: Iterable[torch.Tensor]) -> tuple:
    """A value that changes when a tensor does, through an optimiser, in place, or by `.data = new`.

    It costs no look at the numbers, so it misses `p.data.add_(...)` and writes through a NumPy view: see `Contents`.
    """
    return _optimizer_steps, tuple((id(t), version_of(t), _address(t)) for t in tensors)


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if not torch.compiler.is_compiling() and _is_plain(tensor) else 0


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory of its own to look at: no shard, no wrapper of a transform, nothing fake."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
    return plain and not is_functorch_wrapped(tensor)


class Contents:
    """A copy of a law's tensors, kept while what was made of them is cached, to notice writes that left no trace.

    The comparison reads the law's tensors once more, which is less than generating does. It is made where a cached
    generation would be used again, so in evaluation only. On an accelerator it takes one answer from the device for
    each forward; a training step never asks.
    """

    def __init__(self, law: nn.Module) -> None:
        with torch.no_grad():
            self.tensors = [(t, t.detach().clone()) for t in _tensors(law) if _is_plain(t)]

    def hold(self, law: nn.Module) -> bool:
        now = [t for t in _tensors(law) if _is_plain(t)]
        if len(now) != len(self.tensors) or any(a is not b for a, (b, _) in zip(now, self.tensors, strict=True)):
            return False
        if any(t.shape != copy.shape or t.dtype != copy.dtype or t.device != copy.device for t, copy in self.tensors):
            return False
        with torch.no_grad():
            if _device(law).type == "cpu":
                return all(torch.equal(t, copy) for t, copy in self.tensors)
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return True  # a graph that is captured can ask the device nothing
            return not self.tensors or not bool(torch.stack([(t != copy).any() for t, copy in self.tensors]).any())


def is_transformed(law: nn.Module) -> bool:
    """Whether a law's tensors are stand-ins inside a transform of functorch, of which nothing can be kept."""
    return any(is_functorch_wrapped(t) for t in _tensors(law))


def _tensors(law: nn.Module) -> list[torch.Tensor]:
    return [*law.parameters(), *law.buffers()]


def _device(law: nn.Module) -> torch.device:
    return next((t.device for t in (*law.parameters(), *law.buffers())), torch.device("cpu"))


def _autocast_dtype(law: Law) -> torch.dtype | None:
    kind = _device(law).type
    if kind == "meta":
        raise RuntimeError(
            f"The weights of the {law.method} law lie on the meta device, so it has no answer: the model was "
            "offloaded whole (cpu_offload, disk_offload, a device_map), or never filled. Offload the base model first "
            "and add the adapter then, or give its holder (named calib_...) a device of its own in the device_map."
        )
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
