"""What a CurveLoRA is like between its anchors: loss along it, barriers, lengths, and weights for its points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..calibration.answers import log_probabilities
from ..prediction import Prediction, curve_at, predict_dataset
from ..prediction.sources import active_holders
from ..tuners.curve_lora.law import CurveLaw
from ..tuners.laws import laws_of
from ..whole_numbers import is_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LossProfile:
    """Loss and accuracy of single points of a curve.

    Args:
        t: Points, float64 (M,).
        nll: Mean negative log-likelihood at each, nats, float64 (M,).
        accuracy: Accuracy at each, float64 (M,).
        anchors: Positions of the anchors among the points.

    Example:
        >>> t = torch.tensor([0.0, 0.5, 1.0])
        >>> round(LossProfile(t, torch.tensor([0.1, 0.4, 0.2]), torch.ones(3), (0, 2)).barrier, 6)
        0.2
    """

    t: torch.Tensor
    nll: torch.Tensor
    accuracy: torch.Tensor
    anchors: tuple[int, ...]

    @property
    def barrier(self) -> float:
        """Highest loss on the curve minus the highest at an anchor, nats; not negative."""
        return float(self.nll.max() - self.nll[list(self.anchors)].max())

    def plot(self, path: str | None = None, label: str = "negative log-likelihood (nats)") -> Figure:
        """Draw the loss along the curve, anchors marked.

        Args:
            path: Where to save the picture; not saved when `None`.
            label: Name of the vertical axis.

        Returns:
            A matplotlib figure of its own, independent of pyplot.
        """
        from ..calibration.report.plots import BLUE, GREY, VERMILLION, new_figure

        figure = new_figure(6.0, 3.6)
        axes = figure.subplots()
        axes.plot(self.t, self.nll, color=BLUE, linewidth=2, label="curve")
        places = list(self.anchors)
        axes.scatter(self.t[places], self.nll[places], color=VERMILLION, zorder=3, s=45, label="anchors")
        axes.axhline(float(self.nll[places].max()), color=GREY, linestyle="--", linewidth=1, label="worst anchor")
        axes.set_xlabel("t")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=min(0.0, float(self.nll.min())))
        axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def loss_profile(
    model: nn.Module, data: Any, points: int | Sequence[float] | None = None, **options: Any
) -> LossProfile:
    """Evaluate single points of a curve on labelled data; a row counts at most 87 nats, the reach of float32.

    Args:
        model: A model with an active CurveLoRA.
        data: As for `predict_dataset`, with labels.
        points: Points on [0, N_seg], or their number (equispaced); the grid of a prediction when `None`. Anchors are
            added where they are missing.
        options: Further arguments of `predict_dataset`, such as `batch_size`, `processing_class`, `label_tokens`.

    Returns:
        The profile.

    Raises:
        TypeError: If the model carries no CurveLoRA.
        ValueError: If the data has no labels, or a point is not on the curve.
    """
    shape = curve_law(model).shape
    inner = shape.grid(points) if points is None or is_whole(points) else torch.tensor(points, dtype=torch.float64)
    t = torch.cat([inner, torch.arange(shape.num_anchors, dtype=torch.float64)]).unique()
    nll, accuracy = [], []
    for point in t.tolist():
        with curve_at(model, point):
            prediction = predict_dataset(model, data, how="mean", **{"progress": False, **options})
        log_p = _log_likelihoods(prediction)[0]
        nll.append(-float(log_p.mean()))
        accuracy.append(float((prediction.predictions == prediction.labels).double().mean()))
    anchors = tuple(int(torch.nonzero(t == i)) for i in range(shape.num_anchors))
    return LossProfile(t, torch.tensor(nll).double(), torch.tensor(accuracy).double(), anchors)


def curve_weights(
    model: nn.Module, data: Any, temperature: float = 1.0, num_samples: int | None = None, **options: Any
) -> torch.Tensor:
    """Likelihood weights of a curve's grid points, `w_j proportional to p(D | t_j)^(1 / T)`.

    With T = 1 and training data the likelihood counts every row and settles on a single point; an infinite T is the
    method's own choice, equal weights.

    Args:
        model: A model with an active CurveLoRA.
        data: As for `predict_dataset`, with labels.
        temperature: T, positive; may be infinite.
        num_samples: Number of grid points; the curve's own grid when `None`.
        options: Further arguments of `predict_dataset`.

    Returns:
        float64 (M,), summing to one: the `weights` of `predict` and `predict_dataset`.

    Raises:
        TypeError: If the model carries no CurveLoRA.
        ValueError: If the temperature is not positive, or the data has no labels.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive (math.inf for equal weights), got {temperature!r}.")
    count = curve_law(model).default_num_samples if num_samples is None else num_samples
    if math.isinf(temperature):
        return torch.full((count,), 1 / count, dtype=torch.float64)
    prediction = predict_dataset(model, data, num_samples=count, **options)
    return (_log_likelihoods(prediction).sum(1) / temperature).softmax(0)


def arc_length(model: nn.Module, num_intervals: int = 256) -> float:
    """Length of the curve in the space of all factors, `integral ||zeta'(t)|| dt`, by the midpoint rule.

    Args:
        model: A model with an active CurveLoRA.
        num_intervals: Intervals a segment.

    Returns:
        The length; at least the distances between successive anchors, at most `control_polygon_length`.
    """
    law = curve_law(model)
    return float(law.speeds(num_intervals).sum() / num_intervals) if law.shape.num_segments else 0.0


def control_polygon_length(model: nn.Module) -> float:
    """Sum of the distances between successive control points in the space of all factors."""
    gram = curve_law(model).gram()
    steps = gram.diagonal()[1:] + gram.diagonal()[:-1] - 2 * gram.diagonal(offset=1)
    return float(steps.clamp_min(0).sqrt().sum())


@torch.no_grad()
def lipschitz_bound(model: nn.Module, segment: int, gradient_norm: float = 1.0) -> float:
    """An upper bound of `|dl/dt|` on one segment, for a loss whose gradient in the weights is bounded.

    With n the degree, `||dW/dt||_F <= s n (max ||B_{i+1} - B_i||_F max ||A_i||_2 + max ||B_i||_2 max ||A_{i+1} -
    A_i||_F)` for each adapted map, by the convex hull of the control points; maps add up as squares.

    Args:
        model: A model with an active CurveLoRA.
        segment: Which segment, from 0.
        gradient_norm: G, the largest Frobenius norm of the loss' gradient in all adapted weights on the segment.

    Returns:
        The bound; with G = 1 that of `||dW/dt||_F`.

    Raises:
        ValueError: If there is no such segment.
    """
    law = curve_law(model)
    if not 0 <= segment < law.shape.num_segments:
        raise ValueError(f"segment must be in 0 ... {law.shape.num_segments - 1}, got {segment!r}.")
    n, total = law.shape.degree, 0.0
    scaling = {group: [law.slots[i].scaling for i in indices] for group, indices in law.slots.groups.items()}
    for group, (A, B) in law.control_points().items():
        A, B = (stack[segment * n : segment * n + n + 1].double() for stack in (A, B))
        steps = [(stack[1:] - stack[:-1]).flatten(2).norm(dim=2).amax(0) for stack in (A, B)]
        sizes = [torch.linalg.matrix_norm(stack, ord=2).amax(0) for stack in (A, B)]
        bound = torch.tensor(scaling[group], dtype=torch.float64) * n
        total += float(((bound * (steps[1].cpu() * sizes[0].cpu() + sizes[1].cpu() * steps[0].cpu())) ** 2).sum())
    return gradient_norm * math.sqrt(total)


def curve_law(model: nn.Module) -> CurveLaw:
    """The active curve of a model; `TypeError` if there is none."""
    active_holders(model)  # says what is in the way where nothing is active
    for law in laws_of(model, active=True):
        if isinstance(law, CurveLaw):
            return law
    raise TypeError(f"{type(model).__name__} has no active CurveLoRA.")


def _log_likelihoods(prediction: Prediction) -> torch.Tensor:
    """Log-probability that each point gives to each label, float64 (M, N), at least float32's -87 nats."""
    if not isinstance(prediction, Prediction):
        raise ValueError("The loss along a curve is that of classes; this is a regression.")
    if prediction.labels is None:
        raise ValueError("The data has no labels: add a column `labels` (or `label`).")
    p = prediction.sample_probabilities.double()
    index = prediction.labels.long().expand(len(p), -1).unsqueeze(-1)
    return log_probabilities(p.gather(-1, index).squeeze(-1))
