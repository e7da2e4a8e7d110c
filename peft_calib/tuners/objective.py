"""How a law's regulariser gets into the loss that trainers use; pure functions over a model's outputs.

Trainers take the loss from one of three places: `outputs.loss` (or a tuple's first item), a sum they form from
`outputs.log_probs` (TRL from 1.15), or a loop of the user's own. The regulariser is a term per training item, like the
loss itself, and its gradient must not depend on how an optimiser step is cut into micro-batches and ranks.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import find_labels

if TYPE_CHECKING:
    from .factors import Law

DROPPED = (
    "The regulariser of the last training forward reached no loss: the loss is formed outside the model, from its "
    "logits (a compute_loss of your own, class weights, label smoothing, compute_loss_func, TRL's RewardTrainer, a "
    "loop of your own). Put peft_calib.trainer_callbacks.RegularizedLossMixin before the trainer's class, or add "
    "peft_calib.regularization_loss(model) to your loss after each forward."
)
ONE_MEMBER = (
    "The loss is formed outside the model (label smoothing, class weights, compute_loss_func, a loop on logits), from "
    "what the first member answered, so that no other member would train. Give the labels to the model and use "
    "outputs.loss, or, with moments=0, call the model for each member k inside draws(model, 1, first=k) and take the "
    "mean of the losses."
)
#: Names of label inputs beside those that transformers' models have.
LABELS = frozenset({"labels", "label", "label_ids", "target", "targets"})


class Receipt:
    """Whether the regularisers of one forward had a gradient by the time an optimiser used that of its factors.

    Outputs with a loss do not mean that a trainer uses that loss. The gradient tells: whoever trains on the loss in
    the outputs sends one to the regularisers in it; where the factors have theirs and the regularisers have none, the
    loss was formed from the logits.
    """

    def __init__(self, terms: list[torch.Tensor]) -> None:
        self.reached = False
        self._terms = [term.detach() for term in terms if term.requires_grad]
        for term in terms:
            if term.requires_grad:
                term.register_hook(self.claim)

    def claim(self, _: torch.Tensor | None = None) -> None:
        """Note that the regularisers are in a loss."""
        self.reached = True

    def due(self) -> None:
        """Note that the factors have their gradient: the next step of an optimiser settles the matter."""
        if not self.reached:
            _due.append(self)

    def settle(self) -> None:
        """Warn if the regularisers had no gradient."""
        if not self.reached and any(bool(value != 0) for value in self._terms):
            warnings.warn(DROPPED, UserWarning, stacklevel=2)
        self.reached = True


_due: list[Receipt] = []


def settle_receipts() -> None:
    """Warn of regularisers without a gradient; called after each step of an optimiser."""
    while _due:
        _due.pop().settle()


def is_in(loss: torch.Tensor, term: torch.Tensor, most: int = 2000) -> bool:
    """Whether a regulariser is in a loss: whether the loss' graph has it near its root.

    A sum is a few operations deep; the search is by breadth and ends after `most` operations, so that it stays short
    where the loss is formed from the logits and the graph is that of the whole model.
    """
    waiting, seen = deque([loss.grad_fn]), {loss.grad_fn}
    while waiting and len(seen) <= most:
        node = waiting.popleft()
        if node is None:
            continue
        if node is term.grad_fn or getattr(node, "variable", None) is term:
            return True
        following = [each for each, _ in node.next_functions if each is not None and each not in seen]
        seen.update(following)
        waiting.extend(following)
    return False


def one_member_watch(laws: list[Law]) -> Callable[[torch.Tensor | None], None] | None:
    """What warns of a loss that is made of one member's answers, in the first backward of a law alone.

    DistributedDataParallel comes back to every output, with zeros or nothing where the loss does not hold it: numbers
    are looked at, which waits for a device, and so once only.
    """
    if torch.compiler.is_compiling():  # no hook goes into a graph
        for law in laws:
            if law.trains_members:
                law.compiled = True
        return None
    unwatched = [law for law in laws if law.trains_members and not law.watched]
    if not unwatched:
        return None

    def watch(gradient: torch.Tensor | None) -> None:
        told = all(law.watched for law in unwatched)
        if not told and gradient is not None and bool(gradient.any()):
            warnings.warn(ONE_MEMBER, stacklevel=2)
        for law in unwatched:
            law.watched = True

    return watch


#: Laws of members on models, for `settle_members`.
_members: weakref.WeakSet[Law] = weakref.WeakSet()


def look_after(law: Law) -> None:
    """Have a law of members looked at after its first step, if it is compiled."""
    if law.trains_members:
        _members.add(law)


def settle_members() -> None:
    """Warn of a loss of one member alone behind a compiled forward; called after each step of an optimiser.

    The gradients of the others are zeros then. The parameters are looked at until a step has a gradient: one that is
    all zeros, or another model's, says nothing of the members.
    """
    for law in [law for law in _members if law.watched or law.compiled]:
        gradients = [p.grad for p in law.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
        if not law.watched and not any(bool(gradient.any()) for gradient in gradients):
            continue
        _members.discard(law)
        if not law.watched and not any(bool(gradient[1:].any()) for gradient in gradients):
            warnings.warn(ONE_MEMBER, stacklevel=2)


def has_labels(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether a model was called with labels, so that a tuple it answers begins with the loss."""
    return any(inputs.get(name) is not None for name in LABELS | _label_names(type(model)))


@lru_cache(maxsize=256)
def _label_names(model_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(find_labels(model_class))


def add_to_outputs(outputs: Any, regularizer: torch.Tensor, share: torch.Tensor | float, has_labels: bool) -> Any:
    """Add a regulariser, times its share (see `micro_batch_share`), to the loss inside a model's outputs.

    These are a `ModelOutput` or dict with `loss` (and TRL's `log_probs`), a tuple whose first item is the loss where
    labels were given, or anything else, which is returned as it is. The sum is formed in float32 and has the loss'
    dtype.
    """
    if isinstance(outputs, dict):
        if isinstance(outputs.get("log_probs"), torch.Tensor) and isinstance(outputs.get("label_mask"), torch.Tensor):
            mask = outputs["label_mask"].expand_as(outputs["log_probs"])
            outputs["log_probs"] = _CarryGradient.apply(outputs["log_probs"], regularizer, mask)
        if _is_loss(outputs.get("loss")):
            outputs["loss"] = _add(outputs["loss"], regularizer, share)
        return outputs
    if has_labels and isinstance(outputs, (tuple, list)) and outputs and _is_first_loss(outputs[0]):
        return type(outputs)((_add(outputs[0], regularizer, share), *outputs[1:]))
    return outputs


def reaches_loss(outputs: Any, has_labels: bool) -> bool:
    """Whether `add_to_outputs` finds a place in these outputs from which a trainer takes its loss."""
    if isinstance(outputs, dict):
        return isinstance(outputs.get("log_probs"), torch.Tensor) or _is_loss(outputs.get("loss"))
    return has_labels and isinstance(outputs, (tuple, list)) and bool(outputs) and _is_first_loss(outputs[0])


def micro_batch_share(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | float:
    """Part of an optimiser step's items that is in this micro-batch, where the model's loss is divided by all of them.

    Since transformers 4.46 a loss that is given `num_items_in_batch` is a sum over the micro-batch divided by the
    items of the whole optimiser step, over all micro-batches and ranks. A regulariser added beside it has to be
    divided in the same way, or it would be counted once for each micro-batch. Most classification heads ignore the
    argument; their loss is a mean over the micro-batch and the share is 1.
    """
    total, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if total is None or labels is None or not honours_num_items(type(model)):
        return 1.0
    if inputs.get("shift_labels") is not None:
        labels = inputs["shift_labels"]
    elif shifts_labels(model):
        labels = labels[..., 1:]
    here = (labels != -100).sum()
    return here / (total.to(here.device) if isinstance(total, torch.Tensor) else total)


@lru_cache(maxsize=256)
def honours_num_items(model_class: type[nn.Module]) -> bool:
    """Whether a forward's source names `num_items_in_batch`, or calls `loss_function(..., **kwargs)`."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(model_class.forward)))
    except (OSError, TypeError):
        return False
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.arg for node in nodes if isinstance(node, (ast.arg, ast.keyword)) and node.arg is not None}
    if "num_items_in_batch" in names:
        return True
    calls = [node for node in nodes if isinstance(node, ast.Call) and _called_name(node) == "loss_function"]
    return any(keyword.arg is None for call in calls for keyword in call.keywords)


def prepare_for_trainer(model: nn.Module) -> nn.Module:
    """Tell the stock Trainer when a model's loss ignores `num_items_in_batch`, so that it divides by the steps itself.

    Without it, the gradient of 125 of transformers' 127 classification heads is multiplied by
    `gradient_accumulation_steps` and by the number of ranks, for every fine-tuning method (transformers issue 47688).
    Call it before building the Trainer, for baselines too.

    Args:
        model: A transformers model or a `PeftModel` around one.

    Returns:
        The model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not honours_num_items(type(base)):
        base.accepts_loss_kwargs = False
    return model


def named_inputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, also those given by position."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


class _CarryGradient(torch.autograd.Function):
    """Identity on log-probabilities that hands the regulariser the weight which the loss gives to the items.

    A loss `-sum log_probs / n` sends -1/n to each item, so minus the sum over the mask is the micro-batch's share,
    whatever accumulation, world size or loss scaling the trainer uses.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: torch.Tensor, regularizer: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.dtype = regularizer.dtype
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad, -(grad.to(torch.float32) * mask).sum().to(ctx.dtype), None


def _add(loss: torch.Tensor, regularizer: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    wide = torch.promote_types(loss.dtype, torch.float32)
    share = share.to(loss.device) if isinstance(share, torch.Tensor) else share
    return (loss.to(wide) + regularizer.to(loss.device, wide) * share).to(loss.dtype)


def _is_loss(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.is_floating_point()


def _is_first_loss(value: Any) -> bool:
    # the logits of one row and one class have one entry too, but two dimensions
    return _is_loss(value) and value.dim() <= 1


def _called_name(call: ast.Call) -> str | None:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)


def shifts_labels(model: nn.Module) -> bool:
    """Whether position i of the logits answers for label i + 1, by the Trainer's own rule for counting items."""
    causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return causal and not is_encoder_decoder(model)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has a decoder beside its encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
