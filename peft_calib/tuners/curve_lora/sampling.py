"""Which points of the curve a training forward evaluates, and which a prediction averages."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from ..seeding import keyed_generator
from .curve import CurveShape

_TRAIN, _SAMPLE = 1, 2  # purposes of a draw, first part of its key
_GOLDEN = (math.sqrt(5) - 1) / 2


def training_position(seed: int, step: int, stratified: bool, micro_batches: int) -> float:
    """Where on [0, 1) a training forward takes its point: uniform, and independent of the global random state.

    `step` counts the forwards of the whole training. A stratified position gives each micro-batch and rank of an
    optimiser step a stratum of its own and is uniform all the same, for the whole comb is shifted by one random number
    and its teeth change places.
    """
    together = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    if not stratified:
        return float(torch.rand((), generator=keyed_generator(seed, _TRAIN, step, rank), dtype=torch.float64))
    update, micro = divmod(step, micro_batches)
    teeth = micro_batches * world
    generator = keyed_generator(seed, _TRAIN, update)
    shift = float(torch.rand((), generator=generator, dtype=torch.float64))
    order = torch.randperm(teeth, generator=generator)
    return (shift + int(order[micro * world + rank]) / teeth) % 1.0


def opposite(t: torch.Tensor, shape: CurveShape) -> torch.Tensor:
    """The point half the curve away, `(t + N_seg / 2) mod N_seg`: as uniform as t is."""
    return (t + shape.num_segments / 2) % max(shape.num_segments, 1)


def sample_points(shape: CurveShape, seed: int, first: int, count: int, total: int | None) -> torch.Tensor:
    """Points of draws `first ... first + count - 1`, float64.

    They are the equispaced points of a prediction with `total` draws. Where drawing may stop at any time (`None`),
    those of a randomly shifted golden-ratio sequence, every beginning of which covers the curve evenly.
    """
    if total is not None:
        if first + count > total:
            raise ValueError(f"The curve was to be averaged over {total} points; draw {first + count - 1} is not one.")
        return shape.grid(total)[first : first + count]
    shift = torch.rand((), generator=keyed_generator(seed, _SAMPLE), dtype=torch.float64)
    index = torch.arange(first, first + count, dtype=torch.float64)
    return (shift + index * _GOLDEN) % 1.0 * shape.num_segments


def at_arc_length(positions: torch.Tensor, speeds: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Parameters at given parts of the length; `speeds` are `||zeta'||` amid equal intervals of [0, N_seg]."""
    lengths = torch.cat([speeds.new_zeros(1), speeds.cumsum(0)]).double()
    if not lengths[-1] > 0:
        return positions.double() * num_segments
    wanted = positions.double() * lengths[-1]
    interval = torch.searchsorted(lengths, wanted, right=True).clamp(1, len(speeds)) - 1
    inside = (wanted - lengths[interval]) / (lengths[interval + 1] - lengths[interval]).clamp_min(1e-300)
    return (interval + inside.clamp(0, 1)) * (num_segments / len(speeds))
