"""The lower level of prediction: inside `draws`, a forward on B rows answers with K * B."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from ..tuners.objective import named_inputs
from ..tuners.rows import count_rows, main_input_name, repeat_rows
from .sources import LawDraws


@contextmanager
def draws(
    model: nn.Module, num_samples: int = 8, seed: int = 0, first: int = 0, antithetic: bool = False
) -> Iterator[nn.Module]:
    """Evaluate K draws in every forward of the model: B rows in, K * B rows out, draw-major (row = k * B + b).

    Draw k is the same function for every row, token and layer, and in every later call with the same seed: the LoRA
    that `export_lora(model, path, num_samples=K, seed=seed)` writes to `draw-k`. The model is in evaluation mode
    inside and as it was afterwards. Gradients flow, unless switched off outside.

    Args:
        model: A model with an active adapter of this package.
        num_samples: Number of draws K.
        seed: Key of the draws.
        first: Index of the first draw.
        antithetic: Make the draws in mirrored pairs (2j, 2j + 1).

    Yields:
        The model.

    Raises:
        TypeError: If the model carries no adapter of this package.
        ValueError: If `num_samples` is below 1, or the adapter is disabled, merged or inactive.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from peft_calib import BayesianLoraConfig
        >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> base = BertForSequenceClassification(BertConfig(**sizes))
        >>> model = get_peft_model(base, BayesianLoraConfig(r=2, target_modules=["query"]))
        >>> with torch.no_grad(), draws(model, num_samples=4):
        ...     model(input_ids=torch.ones(3, 5, dtype=torch.long)).logits.shape
        torch.Size([12, 2])
    """
    check_num_samples(num_samples)
    source = LawDraws(model, seed, antithetic)
    with evaluating(model), source.use(first, num_samples), repeating(source.root, num_samples):
        yield model


def check_num_samples(num_samples: object) -> int:
    """The number of draws; raise `ValueError` unless it is a positive integer."""
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"num_samples must be an integer of at least 1, got {num_samples!r}.")
    return num_samples


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def repeating(root: nn.Module, num_samples: int) -> Iterator[None]:
    """Repeat the rows of whatever `root` is called with, draw-major."""
    hook = partial(_repeat_inputs, num_samples=num_samples)
    # first, so that hooks which look at the batch see all rows
    handle = root.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _repeat_inputs(root: nn.Module, args: tuple, kwargs: dict, num_samples: int) -> tuple[tuple, dict] | None:
    if num_samples == 1:
        return None
    inputs = named_inputs(root, args, kwargs)
    return (), repeat_rows(inputs, num_samples, count_rows(inputs, main_input_name(root)))
