"""Moments of parameters along a training, and draws around where it ended (SWAG, arXiv 1902.02476)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .heads import head_key
from .seeding import Normals
from .transfer import to_device

#: What is kept of each parameter.
KINDS = ("mean", "squares", "deviations")


class Moments(nn.Module):
    """Mean, sum of squared deviations and R of the last deviations of parameters, kept step by step.

    They are buffers beside the parameters, so that they are saved, resumed and loaded with the adapter. The mean and
    the squares follow Welford's recurrence, which loses nothing where a parameter moves little around a large value.

    Args:
        parameters: What is followed, by name; all of it has the members in front, (members, ...).
        rank: How many deviations are kept, R.

    Example:
        >>> moments = Moments({"w": torch.zeros(1, 2)}, rank=2)
        >>> moments.keep({"w": torch.ones(1, 2)}, left=0, steps=1)
        >>> moments.kept()
        1
    """

    #: Steps kept, and deviations among them.
    num_steps: torch.Tensor
    num_columns: torch.Tensor

    def __init__(self, parameters: Mapping[str, torch.Tensor], rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_columns", torch.zeros((), dtype=torch.int64))
        for name, parameter in parameters.items():
            like = torch.zeros_like(parameter, requires_grad=False)
            for kind, shape in zip(KINDS, (like.shape, like.shape, (rank, *like.shape)), strict=True):
                self.register_buffer(head_key(kind, name), like.new_zeros(shape))
        self._count: int | None = None
        self.register_load_state_dict_post_hook(_read_again)

    def kept(self) -> int:
        """Steps that were kept; read from the device once."""
        if self._count is None:
            self._count = int(self.num_steps)
        return self._count

    def of(self, kind: str, name: str) -> torch.Tensor:
        """What is kept of a parameter, one of `KINDS`."""
        return self.get_buffer(head_key(kind, name))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget what was kept."""
        for tensor in self.buffers():
            tensor.zero_()
        self._count = None

    @torch.no_grad()
    def keep(self, parameters: Mapping[str, torch.Tensor], left: int, steps: int) -> None:
        """Take in the parameters after a step: into mean and squares, and evenly R times among the deviations.

        Args:
            parameters: As at the beginning.
            left: How many steps are still to come.
            steps: How many are kept in all.
        """
        stride = max(1, steps // self.rank)
        column = left // stride if left % stride == 0 and left // stride < self.rank else None
        self.num_steps += 1
        self.num_columns += column is not None
        self._count = None
        for name, value in parameters.items():
            mean, squares = self.of("mean", name), self.of("squares", name)
            before = value.to(mean) - mean
            mean += before / self.num_steps
            after = value.to(mean) - mean
            squares += before * after
            if column is not None:
                self.of("deviations", name)[column] = after

    def drawn(
        self, name: str, around: torch.Tensor, members: Sequence[int], normals: Normals, shared: torch.Tensor
    ) -> torch.Tensor:
        """K draws of a parameter: `w + sd z / sqrt(2) + D u / sqrt(2 (C - 1))`, C deviations as columns of D.

        Their covariance is half the diagonal of variances and half that of the deviations, as in SWAG; they lie around
        what the training ended with, not around the mean of its steps, which lags where it still moves.

        Args:
            name: Of the parameter.
            around: The parameter w (members, ...).
            members: For each draw, which member it is drawn around.
            normals: Where the z of this parameter come from.
            shared: Normals u (K, R), the same for all parameters of a draw.

        Returns:
            (K, ...).
        """
        squares, columns = self.of("squares", name), self.of("deviations", name)
        sd = (squares / (self.num_steps - 1).clamp_min(1)).clamp_min(0).sqrt() / 2**0.5
        u = to_device(shared, sd.device, sd.dtype) / (2 * (self.num_columns - 1).clamp_min(1)).sqrt()
        z = normals.of(tuple(sd.shape[1:]), sd.dtype, sd.device)
        drawn = [
            around[member] + sd[member] * z[k] + torch.tensordot(u[k], columns[:, member], dims=1)
            for k, member in enumerate(members)
        ]
        return torch.stack(drawn)


def _read_again(moments: Moments, _: Any) -> None:
    moments._count = None
