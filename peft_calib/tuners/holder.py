"""Where laws live: one module inside the base model, asked once per forward, read by every layer.

Mental model: before each forward of the base model a hook asks the law of each active adapter for all its factors (a
*generation*); the layers only pick theirs by index. What a forward reads belongs to that forward (`forward.Part`), not
to the holder, so that threads do not disturb each other. The last generation that gradients may come back to is kept,
because activation checkpointing reads it again in backward. Without gradients a generation is cached until a parameter
changes.

The holder is deliberately no `BaseTunerLayer`: PEFT would then report it as an adapted layer and try to convert it to
LoRA. The tuner layers pass on to it what PEFT and transformers tell them (activate, freeze, move, delete).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..internals.peft import count_to_adapters
from ..internals.torch import in_backward
from .asked import asked_for
from .factors import Draw, Law, Perturbation, Train
from .forward import ForwardState, Part, own_draw, running_part
from .generation import Generation, generate, stamp_of, tensors_of, trace
from .memory import load_copies, settle
from .modes import modes_of
from .objective import Receipt, look_after


class FactorHolder(nn.Module):
    """The laws of one tuner type on one base model, under `<prefix>law.<adapter>`, and what they last generated."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.laws_name = f"{prefix}law"
        self.add_module(self.laws_name, nn.ModuleDict())
        #: Adapters in the base weights: their layers read nothing.
        self.merged: set[str] = set()
        #: Names of the active adapters.
        self.active: tuple[str, ...] = ()
        #: Whether the adapters are switched on.
        self.enabled = True
        #: Of single forwards.
        self.now = ForwardState()

    @property
    def laws(self) -> nn.ModuleDict:
        return getattr(self, self.laws_name)

    def forward(self, x: Any) -> Any:
        """Identity: a base model that is an `nn.Sequential` calls its children one after the other."""
        return x

    @property
    def root(self) -> nn.Module | None:
        return None if self.now.root is None else self.now.root()

    def belong_to(self, root: nn.Module) -> None:
        if self.root is not root:
            self.now.root = weakref.ref(root)

    @property
    def draw(self) -> Draw | None:
        """What this call chain asks for in place of the model's own answer; see `asked`."""
        return asked_for(self)

    def _laws_to_compare(self, draw: Draw | None) -> list[Law]:
        if draw is not None or not self.enabled or not torch.is_grad_enabled():
            return []
        laws = [self.laws[adapter] for adapter in self.active if adapter in self.laws]
        laws = [law for law in laws if law.training and law.train_samples > 1]
        return [law for law in laws if any(p.requires_grad for p in law.parameters())]

    def begin_forward(self, draw: Draw | None) -> Part:
        """Make what a forward of the base model reads of the active adapters; called before each."""
        part = Part(draw, self._laws_to_compare(draw))
        compiling = torch.compiler.is_compiling()
        if compiling:
            self.now.tracing = part
        else:
            if torch.is_grad_enabled() or not self.training:  # not one in between, for metrics
                self.now.here.settle()
        for adapter in self.active if self.enabled else ():
            if adapter in self.laws and compiling:
                law = self.laws[adapter]
                part.factors[adapter] = trace(law, draw or own_draw(law, law.training, part))
            elif adapter in self.laws and adapter not in self.merged:
                part.factors[adapter] = self.generation(adapter, part)
        return part

    def end_forward(self, part: Part, model: nn.Module, outputs: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """The regularisers of the adapters that took part; called after each forward, also one that raised."""
        terms = [law.output_term(model, outputs, inputs) for law in part.comparing if outputs is not None]
        terms += [generation.term() for generation in part.factors.values()]
        found = [term for term in terms if term is not None]
        if torch.compiler.is_compiling():
            self.now.tracing = None
        elif torch.is_grad_enabled() or not self.training:
            self.now.here.pending = found
        return found

    def expect(self, part: Part, receipt: Receipt, reached: bool) -> None:
        """Have it noticed if the last forward's regularisers, not `reached` by a loss in its outputs, reach none."""
        self.now.here.receipt, self.now.here.unclaimed = receipt, not reached
        for generation in part.factors.values():
            generation.use.receipt = receipt

    def read(
        self, adapter: str, index: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, Perturbation | None]:
        """A (r, d_in) and B (d_out, r) for a layer, with K in front for draws, and what it adds beside, or `None`."""
        generation = self._readable(adapter, index)
        A, B = generation.pair(index)
        if A.device != device:
            A, B = A.to(device), B.to(device)
        return A, B, generation.perturbation

    def heads(self, adapter: str) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of modules trained whole that the law answers for, by module and tensor name."""
        return self._readable(adapter).heads

    def _readable(self, adapter: str, index: int | None = None) -> Generation:
        """The generation that the caller, a layer or a head, is to read.

        Four callers come here, and each would be wrong with the answer for another: a layer in a forward (that
        forward's own generation, whatever other threads do), one in a graph that is being traced (the traced one), a
        checkpointed block that is recomputed in backward (the generation its forward had, which may be over: the last
        one that gradients come back to), and a part of the model that is called directly (one made for the call).
        """
        if torch.compiler.is_compiling():
            return self.now.tracing.factors[adapter]
        backward = in_backward()
        if backward and self.laws[adapter].stochastic:
            self.now.check_single_forward(adapter)
        part = running_part(self)
        if part is not None and adapter in part.factors:
            return part.factors[adapter]
        # of this thread first: another one may have begun a forward since
        latest = self.now.here.latest.get(adapter) or self.now.latest.get(adapter)
        if backward and latest is not None:
            if isinstance(latest.draw, Train) and (root := self.root) is not None:
                modes_of(root).check_recomputation()
            return latest
        # A part of the base model was called directly; its layers are read in their order, so going back is a new call
        position = self.now.here.position
        same_call = index is not None and index > position.get(adapter, -1)
        position[adapter] = position.get(adapter, -1) if index is None else index
        return self.generation(adapter, trusted=same_call)

    def check_exportable(self, adapter: str) -> None:
        """Raise `ValueError` if the adapter has no single pair of factors now."""
        draw = self.draw
        if draw is not None and draw.num_samples > 1:
            raise ValueError(
                f"{draw.num_samples} functions are in place (inside draws, or curve_at with several points), so there "
                "is no single pair of factors to merge, convert or export. Do it outside, or with one function."
            )
        self.laws[adapter].check_exportable(draw)

    def generation(self, adapter: str, part: Part | None = None, trusted: bool = False) -> Generation:
        """The factors for a forward, or (no `part`) for a direct call of a part of the model, made anew where needed.

        `trusted` says that the cache was found good within the same call.
        """
        law, asked = self.laws[adapter], self.draw if part is None else part.draw
        differentiable = (*law.parameters(), *tensors_of(asked))
        wants_graph = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
        draw = asked or own_draw(law, law.training and wants_graph, part)
        stamp = stamp_of(law, draw)
        if wants_graph:
            generation = self.now.with_graph(adapter, stamp, part is not None)
        else:
            generation = self.now.without_graph(adapter, law, stamp, part is not None, trusted)
        if generation is None:
            generation = generate(law, draw, wants_graph)
            self.now.keep(adapter, law, generation, wants_graph)
        if torch.is_grad_enabled():
            self.now.here.latest[adapter] = self.now.latest[adapter] = generation
        return generation

    def flush_grads(self, adapter: str) -> None:
        """Carry gradients waiting at the generated factors back to the law's parameters (`regenerate="step"`)."""
        generation = self.now.here.latest.get(adapter)
        if generation is not None and generation.leaves:
            generation.flush()
            self.now.forget(adapter)

    def invalidate(self) -> None:
        """Forget cached factors. Writes to parameters are noticed without it, in evaluation even those by `.data`."""
        for adapter, law in self.laws.items():
            self.now.forget(adapter)
            law.invalidate()

    def add(self, adapter: str, law: Law, device: torch.device | None, trainable: bool) -> None:
        """Take in the law of a new adapter, on the device of the adapted maps unless it lies on the meta device."""
        settle(law)
        look_after(law)
        law.register_load_state_dict_pre_hook(load_copies)
        self.laws[adapter] = law.train(self.training)
        self.place(adapter, device)
        law.requires_grad_(trainable)

    def place(self, adapter: str, device: torch.device | None) -> None:
        """Move a law to `device`, keeping its dtype; a law on the meta device waits for its weights."""
        tensors = [*self.laws[adapter].parameters(), *self.laws[adapter].buffers()] if adapter in self.laws else []
        if device is None or any(t.is_meta for t in tensors) or all(t.device == device for t in tensors):
            return
        self.laws[adapter].to(device)
        self.now.forget(adapter)

    def set_adapter(self, adapters: Iterable[str], inference_mode: bool) -> None:
        """Make `adapters` the active ones; only their laws are trainable, and none in inference mode."""
        self.active = tuple(adapters)
        for name, law in self.laws.items():
            law.requires_grad_(name in self.active and not inference_mode)
            if name not in self.active:
                self.now.forget(name)
                law.invalidate()

    def requires_grad_(self, requires_grad: bool = True) -> FactorHolder:
        """Freeze or unfreeze all laws. transformers does so when it has loaded one: without any copy, or check."""
        super().requires_grad_(requires_grad)
        settle(self.laws, frozen_only=True)
        while self.now.awaited and not requires_grad:
            self.now.awaited.popitem()[1]()
        return self

    def enable(self, enabled: bool) -> None:
        """Switch generation on or off; a disabled adapter costs nothing and is frozen."""
        self.enabled = enabled
        if not enabled:
            self.laws.requires_grad_(False)
            self.invalidate()

    def discard(self, adapter: str) -> None:
        """Delete a law and everything kept for it."""
        if adapter in self.laws:
            del self.laws[adapter]
        self.now.forget(adapter)
        self.now.uses.pop(adapter, None)
        self.now.awaited.pop(adapter, None)
        self.now.here.pending = []

    def take_pending(self) -> list[torch.Tensor]:
        return self.now.here.take()

    @property
    def pending(self) -> list[torch.Tensor]:
        """The regularisers of this thread's last training forward, wherever they are by now."""
        return list(self.now.here.pending)

    def train(self, mode: bool = True) -> FactorHolder:
        """Switch the laws' mode, and say so to whoever evaluates draws in another thread."""
        if (root := self.root) is not None:
            modes_of(root).note_switch(mode)
        return super().train(mode)


count_to_adapters(lambda module: [module.laws_name] if isinstance(module, FactorHolder) else [])
