"""How a law's regulariser gets into the loss that trainers use; pure functions over a model's outputs.

Trainers take the loss from one of three places: `outputs.loss` (or a tuple's first item), a sum they form from
`outputs.log_probs` (TRL from 1.15), or a loop of the user's own. The regulariser is a term per training item, like the
loss itself, and its gradient must not depend on how an optimiser step is cut into micro-batches and ranks.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss


def add_to_outputs(outputs: Any, regularizer: torch.Tensor, share: torch.Tensor | float, has_labels: bool) -> Any:
    """Add a regulariser to the loss inside a model's outputs.

    Args:
        outputs: A `ModelOutput` or dict with `loss` (and TRL's `log_probs`), a tuple whose first item is the loss, or
            anything else, which is returned as it is.
        regularizer: Scalar.
        share: Part of the optimiser step's items that is in this micro-batch, see `micro_batch_share`.
        has_labels: Whether labels were given; without them a tuple's first item is no loss.

    Returns:
        The outputs with the regulariser in their loss. The sum is formed in float32 and has the loss' dtype.

    Example:
        >>> add_to_outputs({"loss": torch.tensor(1.0)}, torch.tensor(0.5), 1.0, True)["loss"]
        tensor(1.5000)
    """
    if isinstance(outputs, dict):
        if isinstance(outputs.get("log_probs"), torch.Tensor) and isinstance(outputs.get("label_mask"), torch.Tensor):
            mask = outputs["label_mask"].expand_as(outputs["log_probs"])
            outputs["log_probs"] = _CarryGradient.apply(outputs["log_probs"], regularizer, mask)
        if _is_loss(outputs.get("loss")):
            outputs["loss"] = _add(outputs["loss"], regularizer, share)
        return outputs
    if has_labels and isinstance(outputs, (tuple, list)) and outputs and _is_loss(outputs[0]):
        return type(outputs)((_add(outputs[0], regularizer, share), *outputs[1:]))
    return outputs


def reaches_loss(outputs: Any, has_labels: bool) -> bool:
    """Whether `add_to_outputs` finds a place in these outputs from which a trainer takes its loss."""
    carried = isinstance(outputs, dict) and isinstance(outputs.get("log_probs"), torch.Tensor)
    return carried or task_loss(outputs, has_labels) is not None


def task_loss(outputs: Any, has_labels: bool) -> torch.Tensor | None:
    """The loss inside a model's outputs before anything is added, detached; `None` where there is none."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else None
    if loss is None and has_labels and isinstance(outputs, (tuple, list)) and outputs:
        loss = outputs[0]
    return loss.detach() if _is_loss(loss) else None


def micro_batch_share(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | float:
    """Part of an optimiser step's items that is in this micro-batch, where the model's loss is divided by all of them.

    Since transformers 4.46 a loss that is given `num_items_in_batch` is a sum over the micro-batch divided by the
    items of the whole optimiser step, over all micro-batches and ranks. A regulariser added beside it has to be
    divided in the same way, or it would be counted once for each micro-batch. Most classification heads ignore the
    argument; their loss is a mean over the micro-batch and the share is 1.

    Args:
        model: The base model.
        inputs: Keyword arguments of its forward.

    Returns:
        `items here / num_items_in_batch`, or 1.
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
    """Whether a model's forward hands `num_items_in_batch` to its loss, judged by its source.

    Args:
        model_class: Class of the base model.

    Returns:
        True if the forward names the argument or calls `loss_function(..., **kwargs)`.
    """
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


def _called_name(call: ast.Call) -> str | None:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)


def shifts_labels(model: nn.Module) -> bool:
    """Whether position i of the logits answers for label i + 1, by the Trainer's own rule for counting items."""
    causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
