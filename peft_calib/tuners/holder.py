"""Where laws live: one module inside the base model, asked once per forward, read by every layer.

Mental model: before each forward of the base model a hook asks the law of each active adapter for all its factors (a
*generation*); the layers only pick theirs by index. A generation is kept until the next one, because activation
checkpointing reads it again in backward. Without gradients it is cached until a parameter changes.

The holder is deliberately no `BaseTunerLayer`: PEFT would then report it as an adapted layer and try to convert it to
LoRA. The tuner layers pass on to it what PEFT and transformers tell them (activate, freeze, move, delete).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .factors import Draw, Law, Perturbation
from .generation import Generation, Traced, ask, generate, inside_checkpoint, stamp_of
from .objective import (
    Receipt,
    add_to_outputs,
    has_labels,
    micro_batch_share,
    named_inputs,
    reaches_loss,
    task_loss,
)
from .rows import count_rows, first_rows, main_input_name, repeat_training_rows


class FactorHolder(nn.Module):
    """Holds the laws of one tuner type on one base model and the factors they last generated.

    Args:
        prefix: The tuner's parameter prefix, e.g. `"hyperlora_"`; the laws are found under `<prefix>law.<adapter>`.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.laws_name = f"{prefix}law"
        self.add_module(self.laws_name, nn.ModuleDict())
        self.draw: Draw | None = None
        #: Adapters in the base weights: their layers read nothing.
        self.merged: set[str] = set()
        self.last_task_loss: torch.Tensor | None = None
        self.last_regularizer: torch.Tensor | None = None
        self._active: tuple[str, ...] = ()
        self._enabled = True
        self._generations: dict[str, Generation]
        self._fresh: set[str]
        self._pending: list[torch.Tensor]
        self._receipt: Receipt | None
        self.unclaimed: bool
        self._uses: dict[str, list[weakref.ref]]
        self._traced: dict[str, Traced]
        self._comparing: list[Law]
        self._in_forward: bool
        self.__dict__.update(_nothing_generated())

    @property
    def laws(self) -> nn.ModuleDict:
        """The law of each adapter."""
        return self._modules[self.laws_name]

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters."""
        return self._active

    @property
    def enabled(self) -> bool:
        """Whether the adapters are switched on."""
        return self._enabled

    def forward(self, x: Any) -> Any:
        """Identity: a base model that is an `nn.Sequential` calls its children one after the other."""
        return x

    # ----------------------------------------------------------------- generating

    @property
    def num_samples(self) -> int:
        """Functions that the current forward evaluates on each row: several only where a law trains on several."""
        return max([1, *[law.train_samples for law in self._comparing]])

    def _laws_to_compare(self) -> list[Law]:
        if self.draw is not None or not self._enabled or not torch.is_grad_enabled():
            return []
        laws = [self.laws[adapter] for adapter in self._active if adapter in self.laws]
        laws = [law for law in laws if law.training and law.train_samples > 1]
        return [law for law in laws if any(p.requires_grad for p in law.parameters())]

    def begin_forward(self) -> None:
        """Bring the factors of the active adapters up to date; called before each forward of the base model."""
        self._comparing = self._laws_to_compare()
        if torch.compiler.is_compiling():
            self._trace()
            return
        if torch.is_grad_enabled() or not self.training:  # not one in between, for metrics
            if self.unclaimed and self._receipt is not None and self._pending:
                self._receipt.settle()
            self.unclaimed = False
        self._in_forward = True
        self._fresh.clear()
        if self._enabled:
            for adapter in self._active:
                if adapter in self.laws and adapter not in self.merged:
                    self._refresh(adapter)

    def end_forward(self, model: nn.Module, outputs: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Called after each forward of the base model, also when it raised.

        Args:
            model: The base model.
            outputs: What it answered; `None` if it raised.
            inputs: What it was called with, by name.

        Returns:
            The regularisers of the adapters that took part, none outside training.
        """
        comparing, self._comparing = self._comparing, []
        terms = [law.output_term(model, outputs, inputs) for law in comparing if outputs is not None]
        if torch.compiler.is_compiling():
            terms += [traced.regularizer for traced in self._traced.values()]
            self._traced = {}
            return [term for term in terms if term is not None]
        terms += [self._generations[a].term() for a in self._active if a in self._fresh]
        self._in_forward = False
        self._fresh.clear()
        found = [term for term in terms if term is not None]
        if torch.is_grad_enabled() or not self.training:
            self._pending = found
        return found

    def expect(self, receipt: Receipt) -> None:
        """Have it noticed if the regularisers of the forward that has just ended reach no loss."""
        self._receipt = receipt
        for adapter in self._active:
            if adapter in self._generations:
                self._generations[adapter].use.receipt = receipt

    def read(self, adapter: str, index: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of one slot: what a layer calls in its forward.

        Args:
            adapter: Adapter name.
            index: Position of the slot in the adapter's table.
            device: Where the layer computes.

        Returns:
            A of shape (r, d_in) and B of shape (d_out, r), with a leading K when draws are asked for.
        """
        if torch.compiler.is_compiling():
            return self._traced[adapter].pairs[index]
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self.laws[adapter].stochastic:
            self._check_single_forward(adapter)
        if adapter not in self._fresh and not (in_backward and adapter in self._generations):
            self._refresh(adapter)  # a submodule of the base model was called directly
        generation = self._generations[adapter]
        if generation.has_graph and not torch.is_grad_enabled() and not in_backward and inside_checkpoint():
            generation.begin_reentrant()
        A, B = generation.pair(index, in_backward)
        return (A, B) if A.device == device else (A.to(device), B.to(device))

    def perturbation(self, adapter: str) -> Perturbation | None:
        """What the layers add beside the update just read, if anything."""
        if torch.compiler.is_compiling():
            return self._traced[adapter].perturbation
        return self._generations[adapter].perturbation

    def heads(self, adapter: str) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of modules trained whole that the law answers for, by module and tensor name."""
        if torch.compiler.is_compiling():
            return self._traced[adapter].heads
        if adapter not in self._fresh:
            self._refresh(adapter)
        return self._generations[adapter].heads

    def check_exportable(self, adapter: str) -> None:
        """Raise `ValueError` if the adapter has no single pair of factors now."""
        self.laws[adapter].check_exportable(self.draw)

    def generation(self, adapter: str) -> Generation:
        """The adapter's current factors, brought up to date."""
        self._refresh(adapter)
        return self._generations[adapter]

    def _refresh(self, adapter: str) -> None:
        law = self.laws[adapter]
        points = self.draw.points or () if self.draw is not None else ()
        differentiable = (*law.parameters(), *(t for t in points if isinstance(t, torch.Tensor)))
        wants_graph = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
        draw = self.draw or self._own_draw(law, law.training and wants_graph)
        stamp, old = stamp_of(law, draw), self._generations.get(adapter)
        if old is None or not self._still_good(law, old, stamp, wants_graph):
            self._generations[adapter] = generation = generate(law, draw, wants_graph)
            if generation.has_graph and law.stochastic:
                alive = [use for use in self._uses.get(adapter, []) if use() is not None]
                self._uses[adapter] = [*alive, weakref.ref(generation.use)]
        if self._in_forward:
            self._fresh.add(adapter)

    def _own_draw(self, law: Law, trains: bool) -> Draw:
        # a part of the base model that is called directly has only the rows it was given
        samples = law.train_samples if trains and law in self._comparing else 1
        return Draw("train", samples) if trains else Draw("mean")

    def _trace(self) -> None:
        """Generate inside the graph that torch.compile is building: no stamps, caches or tensor hooks there."""
        self._traced = {}
        for adapter in self._active if self._enabled else ():
            if adapter in self.laws:
                law = self.laws[adapter]
                draw = self.draw or self._own_draw(law, law.training)
                factors = ask(law, draw)
                pairs = factors.per_slot(law.slots, draw.num_samples)
                self._traced[adapter] = Traced(pairs, factors.regularizer, factors.perturbation, factors.heads)

    def _check_single_forward(self, adapter: str) -> None:
        open_uses = [use() for use in self._uses.get(adapter, [])]
        if sum(use is not None and not use.consumed for use in open_uses) > 1:
            raise RuntimeError(
                "Gradient checkpointing recomputes a block in backward, but since its forward the adapter has drawn "
                "other factors for another forward, so the gradient would be wrong. Call backward (or drop the loss) "
                "after each forward, or switch gradient checkpointing off."
            )

    def _still_good(self, law: Law, old: Generation, stamp: tuple, wants_graph: bool) -> bool:
        if old.leaves:
            if old.gradients_wait and old.stamp[1] != stamp[1]:
                raise RuntimeError(
                    "The optimiser stepped while gradients of the generated factors were still waiting, so the "
                    'generator learned nothing. With regenerate="step" call model.flush_grads() after the last '
                    'backward and before clipping or stepping, or use regenerate="forward".'
                )
            return wants_graph and old.stamp == stamp
        if wants_graph:  # a new graph for each forward of the base model; shared by direct calls of its parts
            return old.has_graph and old.stamp == stamp and not old.use.consumed and not self._in_forward
        return not old.has_graph and old.stamp == stamp and (law.cache or not self._in_forward)

    def flush_grads(self, adapter: str) -> None:
        """Carry gradients waiting at the generated factors back to the law's parameters (`regenerate="step"`).

        Args:
            adapter: Adapter name.
        """
        generation = self._generations.get(adapter)
        if generation is not None and generation.leaves:
            generation.flush()
            del self._generations[adapter]

    def invalidate(self) -> None:
        """Forget cached factors; needed only after an edit through `.data`, which leaves no trace."""
        self._generations.clear()
        for law in self.laws.values():
            law.invalidate()

    # ----------------------------------------------------------------- lifecycle, as told by the layers

    def add(self, adapter: str, law: Law, device: torch.device | None, trainable: bool) -> None:
        """Take in the law of a new adapter.

        Args:
            adapter: Adapter name.
            law: The law; stays where it is if on the meta device.
            device: Device of the adapted maps.
            trainable: Whether its parameters require gradients.
        """
        self.laws[adapter] = law.train(self.training)
        self.place(adapter, device)
        law.requires_grad_(trainable)

    def place(self, adapter: str, device: torch.device | None) -> None:
        """Move a law to `device`, keeping its dtype; a law on the meta device waits for its weights."""
        tensors = [*self.laws[adapter].parameters(), *self.laws[adapter].buffers()] if adapter in self.laws else []
        if device is None or any(t.is_meta for t in tensors) or all(t.device == device for t in tensors):
            return
        self.laws[adapter].to(device)
        self._generations.pop(adapter, None)

    def set_adapter(self, adapters: Iterable[str], inference_mode: bool) -> None:
        """Make `adapters` the active ones; only their laws are trainable, and none in inference mode."""
        self._active = tuple(adapters)
        for name, law in self.laws.items():
            law.requires_grad_(name in self._active and not inference_mode)
            if name not in self._active:
                self._generations.pop(name, None)
                law.invalidate()

    def enable(self, enabled: bool) -> None:
        """Switch generation on or off; a disabled adapter costs nothing and is frozen."""
        self._enabled = enabled
        if not enabled:
            self.laws.requires_grad_(False)
            self.invalidate()

    def discard(self, adapter: str) -> None:
        """Delete a law and everything kept for it."""
        if adapter in self.laws:
            del self.laws[adapter]
        self._generations.pop(adapter, None)
        self._uses.pop(adapter, None)
        self._pending = []

    def take_pending(self) -> list[torch.Tensor]:
        """The regularisers of the last forward, once."""
        pending, self._pending = self._pending, []
        if self._receipt is not None:
            self._receipt.claim()
        return pending

    @property
    def pending(self) -> list[torch.Tensor]:
        """The regularisers of the last training forward, wherever they are by now."""
        return list(self._pending)

    def __getstate__(self) -> dict:
        # generations hang on an autograd graph, which can neither be copied nor pickled
        return {**self.__dict__, **_nothing_generated()}


def _nothing_generated() -> dict:
    """The part of a holder's state that belongs to single forwards, as it is before the first."""
    return {
        "_generations": {},
        "_fresh": set(),
        "_in_forward": False,
        "_pending": [],
        "_receipt": None,
        "unclaimed": False,
        "_uses": {},
        "_traced": {},
        "_comparing": [],
    }


def holders_of(model: nn.Module) -> list[FactorHolder]:
    """The holders anywhere inside a model, one for each tuner type on each base model."""
    return [module for module in model.modules() if isinstance(module, FactorHolder)]


# --------------------------------------------------------------------- hooks on the base model


def _holders(model: nn.Module) -> list[FactorHolder]:
    return [child for child in model._modules.values() if isinstance(child, FactorHolder)]


def begin_forward(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of the base model; module-level so that the model stays picklable."""
    if getattr(model, "_is_replica", False):
        raise RuntimeError(
            "torch.nn.DataParallel copies layers without the law they share, so the adapter would not train. Start "
            "one process a GPU with `accelerate launch`, or show the process a single GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    for holder in _holders(model):
        holder.begin_forward()
    num_samples = max([1, *[holder.num_samples for holder in _holders(model)]])
    if num_samples == 1:
        return None
    return (), repeat_training_rows(named_inputs(model, args, kwargs), num_samples, main_input_name(model))


def end_forward(model: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
    """Forward hook of the base model, called also when the forward raised; adds regularisers to the loss."""
    holders = _holders(model)
    num_samples = max([1, *[holder.num_samples for holder in holders]])
    inputs = named_inputs(model, args, kwargs) if num_samples > 1 else {}
    terms = [term for holder in holders for term in holder.end_forward(model, output, inputs)]
    if output is None or (not terms and num_samples == 1):
        return None
    inputs = inputs or named_inputs(model, args, kwargs)
    if terms:
        labelled = has_labels(model, inputs)
        total = torch.stack([term.float() if term.dtype != torch.float64 else term for term in terms]).sum()
        receipt = None if torch.compiler.is_compiling() else Receipt(terms)
        for holder in holders:
            holder.last_task_loss, holder.last_regularizer = task_loss(output, labelled), total.detach()
            holder.unclaimed = not reaches_loss(output, labelled)
            if receipt is not None:
                holder.expect(receipt)
        output = add_to_outputs(output, total, micro_batch_share(model, inputs), labelled)
    return output if num_samples == 1 else first_rows(output, num_samples, count_rows(inputs, main_input_name(model)))


def regularization_loss(model: nn.Module) -> torch.Tensor | None:
    """The regulariser of the last training forward, for a loop that computes its loss from the logits.

    `outputs.loss` contains it already: add it only to a loss of your own.

    Args:
        model: The model that was called, or one that contains it.

    Returns:
        A scalar with a graph, once for each forward; `None` afterwards and outside training.

    Example:
        >>> from torch import nn
        >>> regularization_loss(nn.Linear(2, 2)) is None
        True
    """
    pending = [term for holder in holders_of(model) for term in holder.take_pending()]
    return torch.stack(pending).sum() if pending else None


def attach_hooks(model: nn.Module) -> None:
    """Register the hooks once, whatever the number of adapters and tuner types on the model."""
    if begin_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(begin_forward, with_kwargs=True)
        model.register_forward_hook(end_forward, always_call=True, with_kwargs=True)


def detach_hooks(model: nn.Module) -> None:
    """Remove the hooks when no law is left on the model."""
    if any(len(holder.laws) for holder in _holders(model)):
        return
    for hooks, function in ((model._forward_pre_hooks, begin_forward), (model._forward_hooks, end_forward)):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)
            model._forward_hooks_with_kwargs.pop(key, None)
