"""The lower level of prediction: inside `draws`, a forward on B rows answers with K * B."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..tuners.asked import asked_of
from ..tuners.factors import Points
from ..tuners.modes import modes_of
from ..tuners.rows import count_rows, main_input_name, repeat_rows
from ..whole_numbers import check_whole
from .sources import CurvePoints, LawDraws, shared_root


@contextmanager
def draws(
    model: nn.Module, num_samples: int | None = None, seed: int = 0, first: int = 0, antithetic: bool = False
) -> Iterator[nn.Module]:
    """Evaluate K draws in every forward of the model: B rows in, K * B rows out, draw-major (row = k * B + b).

    Draw k is the same function for every row, token and layer, and in every later call with the same seed: the LoRA
    that `export_lora(model, path, num_samples=K, seed=seed)` writes to `draw-k`. The model is in evaluation mode
    inside and as it was afterwards. Gradients flow, unless switched off outside.

    Args:
        model: A model with an active adapter of this package.
        num_samples: Number of draws K; when `None` what the law suggests: 8, for a curve its grid. The draws of a
            curve are the equispaced points of a grid of `first + num_samples`.
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
        >>> from peft_calib import BayesianLoraConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(5, 2)), BayesianLoraConfig(r=2, target_modules=["0"]))
        >>> with torch.no_grad(), draws(model, num_samples=4):
        ...     model(torch.ones(3, 5)).shape
        torch.Size([12, 2])
    """
    source = LawDraws(model, seed, antithetic)
    num_samples = count_draws(source, num_samples, first)
    with evaluating(model, brief=False), source.use(first, num_samples, repeat=True), repeating(model, source):
        yield model


@contextmanager
def curve_at(model: nn.Module, t: float | torch.Tensor | Sequence[float | torch.Tensor]) -> Iterator[nn.Module]:
    """Put chosen points of a CurveLoRA in place: every forward inside is that of the LoRA at t.

    The model stays in the mode it is in; in training mode the loss carries no regulariser inside. Merging and
    `get_factors` work at the point too.

    Args:
        model: A model with an active CurveLoRA.
        t: A point in [0, N_seg], a number or a scalar tensor, which may require a gradient. Several points make a
            forward on B rows answer with K * B, point-major (row = k * B + b).

    Yields:
        The model.

    Raises:
        TypeError: If the model carries no CurveLoRA.
        ValueError: If a point is not on the curve, or the adapter is disabled, merged or inactive.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_calib import CurveLoraConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 2)), CurveLoraConfig(target_modules=["0"]))
        >>> with curve_at(model, 0.5):
        ...     model(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        >>> with curve_at(model, [0.0, 1.0]):
        ...     model(input=torch.ones(3, 4)).shape
        torch.Size([6, 2])
    """
    single = isinstance(t, numbers.Number) or (isinstance(t, torch.Tensor) and t.dim() == 0)
    points = Points((t,) if single else t)
    if not points.num_samples:
        raise ValueError("curve_at needs at least one point.")
    source = CurvePoints(model, points)
    with source.use(0, points.num_samples, repeat=True), repeating(model, source):
        yield model


def count_draws(source: LawDraws, num_samples: int | None, first: int = 0) -> int:
    """The number of draws asked for, or what the law suggests; a curve's are spread over the whole number."""
    num_samples = check_num_samples(source.default_num_samples if num_samples is None else num_samples)
    if source.available is not None and first + num_samples > source.available:
        raise ValueError(
            f"Draws {first} ... {first + num_samples - 1} were asked for, but there are {source.available}."
        )
    source.spread_over(first + num_samples)
    return num_samples


def check_num_samples(num_samples: object) -> int:
    """The number of draws; raise `ValueError` unless it is a positive integer."""
    return check_whole(num_samples, "num_samples", 1)


def evaluating(model: nn.Module, brief: bool = True) -> AbstractContextManager[None]:
    """Evaluation mode inside; `brief` leaves without waiting for another thread, so training forwards wait for it."""
    return modes_of(shared_root(model)).evaluation(model, brief)


@contextmanager
def repeating(model: nn.Module, source: LawDraws) -> Iterator[None]:
    """Repeat rows where they enter a wrapper of one mapping (`SentenceTransformer`), which pools over all draws."""
    asked = asked_of(source.root)
    takes_features = model is not source.root and not isinstance(model, (PeftModel, BaseTuner))
    if asked is None or asked.num_samples == 1 or not takes_features:
        yield
        return

    def repeat(_: nn.Module, args: tuple) -> tuple | None:
        if asked_of(source.root) is not asked or len(args) != 1 or not isinstance(args[0], Mapping):
            return None  # another call chain, or questions further in
        asked.repeated = True
        return (repeat_rows(args[0], asked.num_samples, count_rows(args[0], main_input_name(source.root))),)

    def end(*_: Any) -> None:
        if asked_of(source.root) is asked:
            asked.repeated = False

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(repeat).remove)
        stack.callback(model.register_forward_hook(end, always_call=True).remove)
        yield
