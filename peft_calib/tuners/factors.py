"""What passes between a law and the layers: slots in, stacked LoRA factors out.

Every method of this package ends, at each adapted linear map, in `y = W0 x + s * B A x`. A *slot* is one such map; a
*law* says where A and B of all slots come from. Laws keep their parameters stacked by shape group and answer for all
slots at once, so the number of operations they add to a forward does not grow with the depth of the model.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import nn

from .slots import ShapeGroup, SlotTable

#: A (r, d_in) and B (d_out, r) of one slot, or stacks of several slots' (and draws').
Pair = tuple[torch.Tensor, torch.Tensor]


class NoFactorsError(ValueError):
    """A law has no factors, for its parameters are not finite or too badly scaled."""


@dataclass(frozen=True)
class Draw:
    """Which functions a law is asked for: one of `Mean`, `Train`, `Sample` and `Points`.

    Args:
        num_samples: Number of functions K.
    """

    num_samples: int = 1

    @property
    def mode(self) -> str:
        """The kind as a word (`"mean"`, `"train"`, `"sample"`, `"points"`), for laws that compare words."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Mean(Draw):
    """The deterministic answer of `.eval()`."""


@dataclass(frozen=True)
class Train(Draw):
    """What a training step needs: a fresh sample of a stochastic law, K of them where it trains on several."""


@dataclass(frozen=True)
class Sample(Draw):
    """Draws `first ... first + num_samples - 1` keyed by `seed`.

    Args:
        num_samples: Number of draws K.
        seed: Key of the draws.
        first: Index of the first draw, so that chunks of a larger K give the same draws.
        total: Number of draws of the whole prediction, which a law needs that spreads its draws evenly; `None` where
            drawing may stop at any time.
        antithetic: Whether draw 2j + 1 is the mirror image of draw 2j, made of the same normals with the other sign,
            which takes a law that `mirrors`. Draws with even index are those without it.
    """

    seed: int = 0
    first: int = 0
    total: int | None = None
    antithetic: bool = False


@dataclass(frozen=True, init=False)
class Points(Draw):
    """The functions that are named by points, of a law that `has_points` (a curve).

    Args:
        points: K points, numbers or scalar tensors.
    """

    points: tuple[float | torch.Tensor, ...]

    def __init__(self, points: Iterable[float | torch.Tensor]) -> None:
        points = tuple(points)
        for point in points:
            if not _is_number(point):
                raise ValueError(f"A point must be a number or a scalar tensor of one, got {point!r}.")
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "num_samples", len(points))

    def values(self) -> torch.Tensor:
        """The points, float64 (K,) on the CPU, with their graphs."""
        return torch.stack([torch.as_tensor(point, dtype=torch.float64).reshape(()).cpu() for point in self.points])


def _is_number(point: object) -> bool:
    if isinstance(point, torch.Tensor):
        return point.numel() == 1 and point.dtype != torch.bool and not point.is_complex()
    return isinstance(point, numbers.Real) and not isinstance(point, (bool, np.bool_))


class Perturbation(Protocol):
    """Something a law adds to the output of every adapted map in training, such as noise on the weights."""

    def __call__(self, layer: nn.Module, adapter: str, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> Any:
        """The addition (N, ..., d_out) for one layer, its input and its factors; `None` for nothing."""


@dataclass
class Factors:
    """The answer of a law: factors of all slots and draws, stacked by shape group.

    Args:
        groups: For each group with n slots the pair A of shape (K, n, r, d_in) and B of shape (K, n, d_out, r), where
            K is the number of draws, or 1 where the factor is the same for every draw.
        regularizer: Scalar to be added to the training loss, or `None`.
        perturbation: What is added to the output of every adapted map beside the low-rank update, or `None`.
        heads: Tensors (K, ...) that take the place of those of modules trained whole, by module and tensor name.
    """

    groups: dict[ShapeGroup, Pair]
    regularizer: torch.Tensor | None = field(default=None)
    perturbation: Perturbation | None = field(default=None)
    heads: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def per_slot(self, slots: SlotTable, num_samples: int = 1) -> list[Pair]:
        """Split the stacks into one pair (A, B) a slot, as views made by one operation a stack.

        Args:
            slots: The table the law was built with.
            num_samples: Number of draws K.

        Returns:
            In slot order, pairs of shape (r, d_in) and (d_out, r) when K is 1, else (K, r, d_in) and (K, d_out, r).
        """
        pairs: list[Pair] = [None] * len(slots)  # type: ignore[list-item]
        for group, indices in slots.groups.items():
            stacks = (stack.expand(num_samples, *stack.shape[1:]) for stack in self.groups[group])
            views = (stack.squeeze(0).unbind(0) if num_samples == 1 else stack.unbind(1) for stack in stacks)
            for index, pair in zip(indices, zip(*views, strict=True), strict=True):
                pairs[index] = pair
        return pairs


def stacked(pairs: list[Pair]) -> Pair:
    """A (n, r, d_in) and B (n, d_out, r) of slots of one shape."""
    A, B = (torch.stack(side) for side in zip(*pairs, strict=True))
    return A, B


class Law(nn.Module, ABC):
    """Where the LoRA factors of all slots come from.

    A law owns its parameters, stacked by shape group, and is called once per forward of the base model, outside any
    checkpointed block. It must give the same answer to the same `Draw` and must not touch the global random state.

    Args:
        slots: The slots it answers for.
    """

    #: "forward": generate in the graph of every training forward. "step": see `FactorHolder.flush_grads`.
    regenerate: Literal["forward", "step"] = "forward"
    #: Whether factors are kept between forwards without gradients.
    cache: bool = True
    #: Functions that a training forward evaluates on each row; above one, `output_term` compares them.
    train_samples: int = 1
    #: Whether these have parameters of their own, so that a loss on one's answers leaves the others as they are. Every
    #: parameter then has the functions in front.
    trains_members: bool = False
    #: Whether a backward of such a law was looked at, see `objective.one_member_watch`.
    watched: bool = False
    #: Whether such a law answered in a compiled training forward, see `objective.settle_members`.
    compiled: bool = False
    #: Number of draws of a prediction that names none.
    default_num_samples: int = 8
    #: The seed that was taken for it where its configuration names none; saved with the configuration.
    start_seed: int | None = None
    #: Whether `Sample.antithetic` gives mirrored pairs.
    mirrors: ClassVar[bool] = False
    #: Tensors that adapters saved by earlier versions may lack; the law then keeps those it was built with.
    optional_tensors: ClassVar[tuple[str, ...]] = ()
    #: Whether its functions can be named by `Points`.
    has_points: ClassVar[bool] = False

    def __init__(self, slots: SlotTable) -> None:
        super().__init__()
        self.slots = slots

    @abstractmethod
    def forward(self, draw: Draw) -> Factors:
        """Return the factors of all slots for the draws asked for."""

    # ----------------------------------------------------------------- what others ask instead of looking at its class

    @property
    def method(self) -> str:
        """Name of the method in messages; a subclass may simply set it."""
        return type(self).__name__

    @property
    def stochastic(self) -> bool:
        """Whether two training forwards may use different factors at equal parameters."""
        return False

    @property
    def num_draws(self) -> int | None:
        """Number of different draws there are, as in an ensemble of members; `None` where there is no end."""
        return None

    @property
    def varies(self) -> bool:
        """Whether the functions of a `Sample` differ."""
        return self.stochastic or self.num_draws is not None

    @property
    def has_scale(self) -> bool:
        """Whether `posterior_scale` of its configuration says how far its draws lie apart."""
        return False

    def spread_parameters(self) -> list[nn.Parameter]:
        """The parameters that say how far draws lie apart, and nothing else."""
        return []

    def scales(self) -> dict[str, torch.Tensor]:
        """Standard deviations over their start values by name, for a log; `"noise"` are those beside the posterior."""
        return {}

    # ----------------------------------------------------------------- what it may say and be told

    def output_term(self, model: nn.Module, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """A term of the training loss that is formed of the outputs, after a forward with `train_samples` draws.

        Args:
            model: The base model.
            outputs: What it answered for `train_samples` times the rows, draw-major.
            inputs: Its arguments by name, repeated likewise.
        """
        return None

    def check_points(self, t: torch.Tensor) -> None:
        """Raise `ValueError` for a point that names no function, in a law that `has_points`.

        Args:
            t: Points, float64 (K,).
        """

    def check_exportable(self, draw: Draw | None = None) -> None:
        """Raise `ValueError` if no single pair of factors represents the law (nothing to merge or export).

        Args:
            draw: What a context has put in place of the deterministic answer.
        """

    def invalidate(self) -> None:
        """Drop what is cached between calls; called when the adapter is deactivated or edited through `.data`."""

    @property
    def needs_num_train_examples(self) -> bool:
        """Whether the regulariser waits to be told the number of training items."""
        return False

    def set_num_train_examples(self, num_train_examples: int) -> None:
        """Tell the law the number N of items the loss averages over in one epoch."""

    def set_progress(self, step: int, total_steps: int, accumulation_steps: int = 1) -> None:
        """Tell the law where training stands; schedules (blending, KL warm-up) are functions of these numbers.

        Args:
            step: Optimiser steps completed.
            total_steps: Optimiser steps planned.
            accumulation_steps: Micro-batches in one optimiser step.
        """
