"""The law of CurveLoRA: factors of all slots at points of a segmented Bezier curve through factor space."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..counting import CountingLaw
from ..factors import Draw, Factors, Mean, Pair, Points, Sample, ShapeGroup, SlotTable, Train, stacked
from ..heads import HeadTensors
from ..seeding import keyed_generator, uniform
from .anchors import Anchors
from .config import CurveLoraConfig
from .curved_modules import HeadPoints, Parts, combined, put
from .diversity import class_logits, diversity_term
from .sampling import at_arc_length, opposite, sample_points, training_position
from .weight_noise import BaseNorms, WeightNoise, scheduled_rho

_INIT = 0  # purpose of a draw, first part of its key
#: Intervals by which the length of a segment is measured.
_INTERVALS = 32


@torch.library.custom_op("peft_calib::curve_position", mutates_args=())
def _position(key: torch.Tensor, stratified: bool, micro_batches: int) -> torch.Tensor:
    """`training_position` as an operation, so that a compiled training step draws anew each time."""
    seed, step = key.tolist()
    position = training_position(seed, step, stratified, micro_batches)
    return torch.tensor([position], dtype=torch.float64)


@_position.register_fake
def _(key: torch.Tensor, stratified: bool, micro_batches: int) -> torch.Tensor:
    return torch.empty(1, dtype=torch.float64)


class CurveLaw(CountingLaw):
    """Control points of all slots, `A(t) = sum_k c_k(t) A_k` and `B(t) = sum_k c_k(t) B_k`.

    Control points are stacked by shape group, (points, slots, ...). Free: all are parameters. Anchored: handles are
    parameters, anchors are buffers, so that neither gradient nor weight decay can move them; without `anchors` these
    are left to be loaded. `heads` are tensors of the modules that are part of the curve.
    """

    method = "CurveLoRA"
    has_points = True

    def __init__(
        self,
        config: CurveLoraConfig,
        slots: SlotTable,
        anchors: Anchors | None = None,
        heads: HeadTensors | None = None,
    ) -> None:
        super().__init__(slots, config.init_seed)
        self.config, self.shape = config, config.shape
        self.anchored = config.curve_mode == "anchored"
        self.control_A, self.control_B = nn.ParameterDict(), nn.ParameterDict()
        generator = keyed_generator(config.init_seed, _INIT)
        self.moving = self.shape.handles if self.anchored else tuple(range(self.shape.num_control_points))
        for group, indices in slots.groups.items():
            self._add_group(group, indices, anchors, generator)
        of_anchors = None if anchors is None else anchors.heads
        self.heads = HeadPoints(config, heads, of_anchors, self.moving) if heads else None
        self.register_buffer("rho", torch.tensor(float(config.flat_rho)))
        self.micro_batches = 1
        self._norms = BaseNorms()
        self.last_t: torch.Tensor | None = None
        self.last_jsd: torch.Tensor | None = None

    def _add_group(
        self, group: ShapeGroup, indices: tuple[int, ...], anchors: Anchors | None, generator: torch.Generator
    ) -> None:
        count, bound = len(indices), group.in_features**-0.5
        A = uniform((self.shape.num_control_points, count, group.r, group.in_features), bound, generator)
        B = torch.zeros(self.shape.num_control_points, count, group.out_features, group.r)
        if not self.config.init_weights:
            B = uniform(B.shape, bound, generator)
        if self.anchored:
            if anchors is None:
                fixed = tuple(torch.zeros(len(self.shape.anchors), *stack.shape[1:]) for stack in (A, B))
            else:
                fixed = stacked([stacked([pairs[i] for i in indices]) for pairs in anchors.pairs])
            self.register_buffer(f"anchor_A_{group.key}", fixed[0])
            self.register_buffer(f"anchor_B_{group.key}", fixed[1])
            A, B = (self._handles(*pair) for pair in zip((A, B), fixed, strict=True))
        if len(A):
            self.control_A[group.key], self.control_B[group.key] = nn.Parameter(A), nn.Parameter(B)

    def _handles(self, fresh: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Initial handles: fresh ones, or points of the chord between their anchors."""
        if self.config.handle_init == "linear":
            chord = torch.arange(self.shape.num_control_points, dtype=torch.float64) / self.shape.degree
            straight = type(self.shape)(self.shape.num_anchors, 0).coefficients(chord).float()
            fresh = torch.tensordot(straight, anchors, 1)
        return fresh[list(self.moving)].clone()

    @torch.no_grad()
    def control_points(self) -> dict[ShapeGroup, Pair]:
        """All control points along the chain, A (N_cp, n, r, d_in) and B (N_cp, n, d_out, r) by shape group."""
        return self._along_chain(torch.eye(self.shape.num_control_points))

    def _along_chain(self, coefficients: torch.Tensor) -> dict[ShapeGroup, Pair]:
        """Combine control points, (K, N_cp) -> (K, n, ...); anchors and handles are never copied together."""
        return {g: tuple(combined(self._parts(g, side), coefficients) for side in "AB") for g in self.slots.groups}

    def _parts(self, group: ShapeGroup, side: str) -> Parts:
        parts, trained = [], getattr(self, f"control_{side}")
        if group.key in trained:
            parts.append((trained[group.key], self.moving))
        if self.anchored:
            parts.append((getattr(self, f"anchor_{side}_{group.key}"), self.shape.anchors))
        return parts

    def forward(self, draw: Draw) -> Factors:
        """The factors at the points a draw asks for."""
        t, noise = self._points(draw), None
        coefficients = self.shape.coefficients(t)
        if isinstance(draw, Train):
            if self.config.flat_rho > 0:
                noise = WeightNoise(self.rho, self.draw_key(), self.config.flat_noise, self._norms)
            self.last_t = t.detach()
            self.count_generation()
        heads = {} if self.heads is None else self.heads.at(coefficients)
        return Factors(self._along_chain(coefficients), perturbation=noise, heads=heads)

    def _points(self, draw: Draw) -> torch.Tensor:
        if draw.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {draw.num_samples}.")
        if isinstance(draw, Mean):
            self.check_exportable()
            return torch.tensor([self.config.evaluation_point], dtype=torch.float64)
        if isinstance(draw, Points):
            t = draw.values()
            self.shape.check(t)
            return t
        if isinstance(draw, Sample):
            return sample_points(self.shape, draw.seed, draw.first, draw.num_samples, draw.total)
        config = self.config
        micro = self.micro_batches if config.t_sampling == "stratified" else 1
        position = _position(self.draw_key(), config.t_sampling == "stratified", micro)
        if config.t_sampling == "arc_length":
            t = at_arc_length(position, self.speeds(), self.shape.num_segments)
        else:
            t = position * self.shape.num_segments
        return t if draw.num_samples == 1 else torch.cat([t, opposite(t, self.shape)])

    def check_points(self, t: torch.Tensor) -> None:
        self.shape.check(t)

    @torch.no_grad()
    def velocity(self, t: torch.Tensor) -> dict[ShapeGroup, Pair]:
        """Derivatives A'(t) (K, n, r, d_in) and B'(t) (K, n, d_out, r) by shape group."""
        return self._along_chain(self.shape.derivative_coefficients(t))

    @torch.no_grad()
    def converted(self, config: CurveLoraConfig) -> CurveLaw:
        """The same curve in the mode of another configuration of the same shape; no control point changes."""
        heads = None if self.heads is None else self.heads.at(torch.eye(self.shape.num_control_points))
        first = {m: {n: t[0] for n, t in tensors.items()} for m, tensors in heads.items()} if heads else None
        law = CurveLaw(config, self.slots, heads=first)
        for group, stacks in self.control_points().items():
            for side, stack in zip("AB", stacks, strict=True):
                put(law._parts(group, side), stack)
        if heads:
            law.heads.put(heads)
        law.go_on_from(self)
        law.rho.copy_(self.rho)
        return law

    @torch.no_grad()
    def gram(self) -> torch.Tensor:
        """Inner products of the control points as vectors of all factors, float64 (N_cp, N_cp)."""
        total = torch.zeros(self.shape.num_control_points, self.shape.num_control_points, dtype=torch.float64)
        for pair in self.control_points().values():
            for stack in pair:
                flat = stack.reshape(self.shape.num_control_points, -1)
                total += (flat @ flat.T).to(total)
        return total

    def speeds(self, intervals: int = _INTERVALS) -> torch.Tensor:
        """`||zeta'||` in the middle of equal intervals of each segment, from the Gram matrix of the control points."""
        count = intervals * max(self.shape.num_segments, 1)
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / intervals
        velocity = self.shape.derivative_coefficients(middles.clamp(max=self.shape.num_segments))
        return ((velocity @ self.gram()) * velocity).sum(1).clamp_min(0).sqrt()

    @property
    def train_samples(self) -> int:
        """Two points a forward where the diversity term compares them."""
        return 2 if self.config.jsd_weight > 0 and self.shape.num_segments else 1

    def output_term(self, model: nn.Module, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """`jsd_weight max(jsd_margin - JSD, 0)` between the two points of a training forward."""
        logits = class_logits(model, outputs, inputs, self.config.jsd_label_tokens)
        term, self.last_jsd = diversity_term(logits, self.config.jsd_margin, self.config.jsd_weight)
        return term

    def set_progress(self, step: int, total_steps: int, accumulation_steps: int = 1) -> None:
        """Set the size of the perturbation for the coming step, and the number of strata."""
        config = self.config
        factor = scheduled_rho(config.flat_rho_schedule, step / max(total_steps, 1), config.flat_rho_cycles)
        with torch.no_grad():
            self.rho.fill_(config.flat_rho * factor)
        self.micro_batches = accumulation_steps

    @property
    def default_num_samples(self) -> int:
        return self.config.eval_points or self.shape.num_grid_points

    def check_exportable(self, draw: Draw | None = None) -> None:
        chosen = isinstance(draw, Points) and draw.num_samples == 1
        if not chosen and self.config.evaluation_point is None:
            raise ValueError(
                "eval_t=None: the curve has no point of evaluation. Choose one with peft_calib.curve_at(model, t) "
                "around the call, with export_lora(model, path, t=...), or set eval_t in the configuration."
            )
