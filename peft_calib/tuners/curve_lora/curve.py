"""Segmented Bezier curves: pure functions from a parameter t to weights of control points.

A curve through N anchors with m handles between neighbours is a chain of N - 1 Bezier segments of degree n = m + 1
that share their end points. Its control points are counted along the chain, so anchor i is control point i (m + 1),
and a point of the curve is `zeta(t) = sum_k c_k(t) theta_k` with at most m + 2 weights c_k(t) that are not zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...whole_numbers import check_whole


@dataclass(frozen=True)
class CurveShape:
    """N anchors, where one makes the curve a point, and M handles of each segment, where none makes it straight."""

    num_anchors: int
    num_handles: int

    def __post_init__(self) -> None:
        for name, least in (("num_anchors", 1), ("num_handles", 0)):
            object.__setattr__(self, name, check_whole(getattr(self, name), name, least))

    @property
    def degree(self) -> int:
        """Degree n = m + 1 of each segment."""
        return self.num_handles + 1

    @property
    def num_segments(self) -> int:
        """Segments, which is also the largest t."""
        return self.num_anchors - 1

    @property
    def num_control_points(self) -> int:
        """N_cp = N_seg (m + 1) + 1."""
        return self.num_segments * self.degree + 1

    @property
    def anchors(self) -> tuple[int, ...]:
        return tuple(range(0, self.num_control_points, self.degree))

    @property
    def handles(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_control_points) if i % self.degree)

    @property
    def num_grid_points(self) -> int:
        """M = 2 N_cp - 1: one for each control point and one between neighbours."""
        return 2 * self.num_control_points - 1

    def grid(self, num_points: int | None = None) -> torch.Tensor:
        """Equispaced points on [0, N_seg], both ends included, float64; M by default; a single one is the middle."""
        count = self.num_grid_points if num_points is None else num_points
        if count == 1:
            return torch.tensor([self.num_segments / 2], dtype=torch.float64)
        # k * N_seg / (count - 1) meets anchors exactly, where multiples of a rounded step would not
        return torch.arange(count, dtype=torch.float64) * self.num_segments / (count - 1)

    def check(self, t: torch.Tensor) -> None:
        """Raise `ValueError` unless all points lie on the curve."""
        outside = ~((t >= 0) & (t <= self.num_segments))
        if bool(outside.any()):
            raise ValueError(
                f"t must lie in [0, {self.num_segments}], the number of segments between {self.num_anchors} anchors; "
                f"got {t[outside].flatten()[:4].tolist()}."
            )

    def locate(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Segment k = min(floor(t), N - 2) and local coordinate tau = t - k of each point; the end has tau = 1."""
        segment = t.detach().floor().clamp(0, max(self.num_segments - 1, 0))
        return segment.long(), t - segment

    def coefficients(self, t: torch.Tensor) -> torch.Tensor:
        """Weights (K, N_cp) of the control points at points t (K,): Bernstein polynomials in the local coordinate.

        `b_{i,n}(tau) = C(n, i) (1 - tau)^(n - i) tau^i` with 0^0 = 1, so anchors give exact one-hot rows. Powers are
        repeated products, whose derivative is finite at both ends.
        """
        segment, tau = self.locate(t)
        return self._spread(segment, bernstein(tau, self.degree if self.num_segments else 0))

    def derivative_coefficients(self, t: torch.Tensor) -> torch.Tensor:
        """Weights (K, N_cp) in the velocity: `zeta'(t) = n sum_i b_{i,n-1} (theta_{i+1} - theta_i)`.

        At an anchor the velocity is that of the segment which starts there.
        """
        if not self.num_segments:
            return torch.zeros(len(t), 1, dtype=t.dtype)
        segment, tau = self.locate(t)
        hodograph = bernstein(tau, self.degree - 1) * self.degree
        zero = torch.zeros_like(hodograph[:, :1])
        return self._spread(segment, torch.cat([zero, hodograph], 1) - torch.cat([hodograph, zero], 1))

    def _spread(self, segment: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Put the weights of a segment's control points at their places along the chain."""
        places = segment.unsqueeze(1) * self.degree + torch.arange(weights.shape[1], device=weights.device)
        empty = weights.new_zeros(weights.shape[0], self.num_control_points)
        return empty.scatter(1, places, weights)


def bernstein(tau: torch.Tensor, degree: int) -> torch.Tensor:
    """Bernstein polynomials of a degree n at tau (K,), (K, n + 1)."""
    one = torch.ones_like(tau)
    rising, falling = [one], [one]
    for _ in range(degree):
        rising.append(rising[-1] * tau)
        falling.append(falling[-1] * (1 - tau))
    return torch.stack([math.comb(degree, i) * falling[degree - i] * rising[i] for i in range(degree + 1)], dim=1)
