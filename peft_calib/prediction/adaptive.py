"""When enough has been drawn for a row: its class is decided and its probability is known to a tolerance."""

from __future__ import annotations

import torch
from scipy.special import stdtrit

from ..whole_numbers import check_whole

#: Draws before the first decision, and between two.
FIRST, STEP = 4, 4
#: The same for mirrored pairs, whose means are what is independent.
FIRST_PAIRED, STEP_PAIRED = 4, 2


def half_width(samples: torch.Tensor) -> torch.Tensor:
    """Half-width of the 95 % interval of a mean over draws (n, ...), by Student's t."""
    n = len(samples)
    return float(stdtrit(n - 1, 0.975)) * samples.std(dim=0) / n**0.5


def settled_numbers(samples: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Which rows need no further draw, bool (N,): whose numbers, or labels' probabilities, (n, N, D) are known."""
    return (half_width(samples.double()) <= tolerance).all(-1)


def settled(samples: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Which rows need no further draw, bool (N,), by probabilities of classes (n, N, C).

    A class is settled when the interval of its lead over the runner-up excludes zero, or is known to the tolerance;
    the probability when its interval is. The intervals hold at each look; over several the coverage is a little lower.
    """
    samples = samples.double()
    top, second = samples.mean(0).topk(2, dim=-1).indices.unbind(-1)
    of_top, of_second = (
        samples.gather(-1, i.expand(len(samples), -1).unsqueeze(-1)).squeeze(-1) for i in (top, second)
    )
    lead = of_top - of_second
    decided = (lead.mean(0) > half_width(lead)) | (half_width(lead) <= tolerance)
    return decided & (half_width(of_top) <= tolerance)


def pair_means(samples: torch.Tensor) -> torch.Tensor:
    """Means of draws 2j and 2j + 1, (n, ...) -> (n / 2, ...): what is independent of antithetic draws."""
    return samples.unflatten(0, (-1, 2)).mean(1)


def check_adaptive(tolerance: object, max_samples: object) -> None:
    """Raise `ValueError` unless there is something to decide and a tolerance to decide by."""
    if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool) or not tolerance > 0:
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}.")
    check_whole(max_samples, "max_samples", 2)
