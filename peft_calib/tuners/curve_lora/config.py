"""Configuration of CurveLoRA: how many control points, how t is drawn, and what regularises the curve."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..config import CalibLoraConfig
from ..replication import CURVE
from .curve import CurveShape

_CHOICES = {
    "curve_mode": ("free", "anchored"),
    "handle_init": ("random_a_zero_b", "linear"),
    "t_sampling": ("uniform", "stratified", "arc_length"),
    "flat_rho_schedule": ("cycles", "constant", "flat_lora"),
    "flat_noise": ("dense", "local"),
    "gauge_align": ("none", "procrustes"),
}
_MOST = {"num_anchors": 2**12, "eval_points": 2**20, "flat_rho_cycles": 2**30}
#: Used while training only, or kept with the weights.
_TRAINING = frozenset(
    "anchor_adapters handle_init t_sampling jsd_weight jsd_margin jsd_label_tokens flat_rho flat_rho_schedule "
    "flat_rho_cycles flat_noise gauge_align save_anchors sample_seed".split()
)


@dataclass
class CurveLoraConfig(CalibLoraConfig):
    """CurveLoRA: a low-loss curve through the space of LoRA factors (Dold et al. 2026, arXiv 2605.29580).

    Every point of the curve is a LoRA of rank r. Training draws a fresh point for each forward; prediction averages
    the probabilities of equispaced points.

    Args:
        num_anchors: N, the points that the curve is certain to pass through; it has N - 1 segments.
        num_handles: M, further control points of each segment, which bend it; its degree is m + 1.
        curve_mode: `"free"` trains all control points from scratch. `"anchored"` freezes the anchors, trained LoRA
            adapters, and trains the handles between them.
        anchor_adapters: Folders of N LoRA adapters, in the order in which the curve is to visit them.
        anchor_hashes: Written with the adapter: SHA-256 of the anchors' weights. Not for users.
        handle_init: `"random_a_zero_b"` starts handles like a fresh LoRA, for diversity; `"linear"` on the chord
            between the anchors.
        t_sampling: `"uniform"`: t independent and uniform; `"stratified"`: uniform, but spread evenly over the
            micro-batches and ranks of an optimiser step; `"arc_length"`: uniform along the length of the curve.
        jsd_weight: Weight lambda of the diversity term `max(jsd_margin - JSD, 0)`, for which each training forward
            evaluates two opposite points of the curve; 0 evaluates one. The paper uses 0.2.
        jsd_margin: Margin of that term, in nats.
        jsd_label_tokens: For a language model that answers with one of a few tokens: their ids, to which the
            distributions are restricted; the whole vocabulary at labelled positions when `None`.
        flat_rho: Size rho of the Gaussian perturbation of the weights in training, `std = rho ||W_i|| / sqrt(d_in)`
            for row i; 0 switches it off. The paper uses 0.25.
        flat_rho_schedule: How rho moves when a `RegularizerScheduleCallback` drives it: `"cycles"`
            (`rho (1 - cos(2 pi f progress))`, mean rho), `"constant"`, or `"flat_lora"` (one rise to rho).
        flat_rho_cycles: Number f of cycles.
        flat_noise: `"dense"` draws the whole perturbation of a weight (the paper); `"local"` draws its effect on each
            output instead: the same law for one token, independent between tokens, cheap, fit for quantised bases.
        eval_t: The point that `.eval()`, merging and a plain export use: a number in [0, N - 1], or `"middle"`. `None`
            means that there is none: a point must be chosen with `curve_at`.
        eval_points: Number of grid points of a prediction; `2 N_cp - 1` when `None`.
        gauge_align: `"procrustes"` balances the anchors' factors and rotates them to the first anchor's, which leaves
            every anchor's function as it is; a control for claims about straight lines between adapters.
        curve_modules_to_save: Modules trained whole (a new head) are part of the curve, one copy a control point, with
            the same weights; otherwise all points share one copy.
        save_anchors: Save the anchors with the adapter; `False` saves their folders, as
            seen from the curve's, and hashes only.
        sample_seed: Key of the initial values, of t and of the perturbation. `None` takes PyTorch's seed (`set_seed`)
            and the adapter's name.

    Raises:
        ValueError: For an unknown choice, a number out of its range, or a combination that has no meaning.

    Example:
        >>> CurveLoraConfig(num_anchors=3, num_handles=2, target_modules=["query", "value"]).shape.num_control_points
        7
    """

    lora_alpha: int | float = field(default=16, metadata={"help": "Numerator of the scaling lora_alpha / r."})
    num_anchors: int = field(default=3, metadata={"help": "Number of anchors N."})
    num_handles: int = field(default=2, metadata={"help": "Handles of each segment."})
    curve_mode: str = field(default="free", metadata={"help": "'free' or 'anchored'."})
    anchor_adapters: list[str] | None = field(default=None, metadata={"help": "Folders of the anchors."})
    anchor_hashes: list[str] | None = field(default=None, metadata={"help": "Written with the adapter."})
    handle_init: str = field(default="random_a_zero_b", metadata={"help": "'random_a_zero_b' or 'linear'."})
    t_sampling: str = field(default="uniform", metadata={"help": "'uniform', 'stratified' or 'arc_length'."})
    jsd_weight: float = field(default=0.0, metadata={"help": "Weight of the diversity term."})
    jsd_margin: float = field(default=0.05, metadata={"help": "Margin of the diversity term, nats."})
    jsd_label_tokens: list[int] | None = field(default=None, metadata={"help": "Token ids of the classes."})
    flat_rho: float = field(default=0.0, metadata={"help": "Size of the perturbation of the weights."})
    flat_rho_schedule: str = field(default="cycles", metadata={"help": "'cycles', 'constant' or 'flat_lora'."})
    flat_rho_cycles: int = field(default=50, metadata={"help": "Cycles of the perturbation's size."})
    flat_noise: str = field(default="dense", metadata={"help": "'dense' or 'local'."})
    eval_t: float | str | None = field(default="middle", metadata={"help": "The point of evaluation."})
    eval_points: int | None = field(default=None, metadata={"help": "Grid points of a prediction."})
    gauge_align: str = field(default="none", metadata={"help": "'none' or 'procrustes'."})
    curve_modules_to_save: bool = field(default=False, metadata={"help": "Heads are part of the curve."})
    save_anchors: bool = field(default=True, metadata={"help": "Save the anchors with the adapter."})
    sample_seed: int | None = field(default=None, metadata={"help": "Key of all that is random; None: PyTorch's."})

    peft_name: ClassVar[str] = "CURVELORA"
    draws_differ: ClassVar[bool] = True
    training_fields: ClassVar[frozenset[str]] = CalibLoraConfig.training_fields | _TRAINING

    def check_values(self) -> None:
        self.check_choices(_CHOICES)
        shape = self.shape
        self.check_ranges(
            {"num_handles": (0, 2**12), **dict.fromkeys(("jsd_weight", "jsd_margin", "flat_rho"), (0, None))}
        )
        inside = isinstance(self.eval_t, (int, float)) and 0 <= self.eval_t <= shape.num_segments
        if self.eval_t not in ("middle", None) and not inside:
            raise ValueError(
                f"eval_t must be a number in [0, {shape.num_segments}] for {shape.num_anchors} anchors, 'middle' or "
                f"None; got {self.eval_t!r}."
            )
        if self.jsd_label_tokens is not None and len(set(self.jsd_label_tokens)) < 2:
            raise ValueError(f"jsd_label_tokens needs two different token ids, got {self.jsd_label_tokens!r}.")
        self.check_sizes(_MOST)
        self._check_mode()

    def _check_mode(self) -> None:
        adapters = self.anchor_adapters
        if self.curve_mode == "free":
            if adapters is not None:
                raise ValueError("anchor_adapters are the anchors of curve_mode='anchored'; a free curve has none.")
            return
        if self.slot_table is not None:
            return  # a saved curve carries its anchors, and may have been free when it was trained
        if self.bias != "none":
            raise ValueError(
                f"An anchored curve takes LoRA adapters without biases, so bias={self.bias!r} is refused."
            )
        if isinstance(adapters, (str, bytes)) or adapters is None or len(adapters) != self.num_anchors:
            given = adapters if adapters is None or isinstance(adapters, (str, bytes)) else len(adapters)
            raise ValueError(
                f"curve_mode='anchored' needs anchor_adapters, a list of num_anchors = {self.num_anchors} folders of "
                f"LoRA adapters; got {given!r}."
            )
        self.anchor_adapters = [str(folder) for folder in adapters]

    def sizes_in(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, set[int]]:
        """The number of anchors that makes as many control points as there are."""
        moving = next((shape[0] for name, shape in shapes.items() if name.startswith("control_A.") and shape), 0)
        fixed = next((shape[0] for name, shape in shapes.items() if name.startswith("anchor_A_") and shape), 0)
        if self.curve_mode == "anchored" and not fixed:
            fixed = self.num_anchors  # in folders of their own
        segments, rest = divmod(moving + fixed - 1, self.shape.degree)
        return {"num_anchors": {segments + 1} if not rest else set()}

    @property
    def leaves_anchors_out(self) -> bool:
        """Whether the anchors stay in their own folders when the curve is saved."""
        return not self.save_anchors and self.curve_mode == "anchored" and self.anchor_adapters is not None

    def to_dict(self) -> dict:
        """The fields as saved; anchors that are with the weights are not read again."""
        fields = super().to_dict()
        if self.slot_table is not None and not self.leaves_anchors_out:
            fields["anchor_adapters"] = None
        return fields

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration; where the anchors lie is written as seen from its folder, not from the root."""
        before = self.anchor_adapters
        if self.leaves_anchors_out:
            self.anchor_adapters = [os.path.relpath(folder, save_directory) for folder in before or ()]
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.anchor_adapters = before

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, **kwargs):
        """Load the configuration; anchors are looked for as seen from its folder, or where they were saved before."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        here = Path(pretrained_model_name_or_path) / (subfolder or "")
        if isinstance(config, cls) and config.leaves_anchors_out and here.is_dir():
            config.anchor_adapters = [str(here / folder) for folder in config.anchor_adapters or ()]
        return config

    @property
    def shape(self) -> CurveShape:
        return CurveShape(self.num_anchors, self.num_handles)

    @property
    def evaluation_point(self) -> float | None:
        """`eval_t` as a number; `None` if there is none."""
        return self.shape.num_segments / 2 if self.eval_t == "middle" else self.eval_t

    @classmethod
    def paper(cls, **kwargs: Any) -> CurveLoraConfig:
        """The authors' settings: rank 8, scaling 2, all with the dense perturbation of size 0.25.

        Their training recipe beside it: AdamW with weight decay 1e-3, 10,000 steps at batch 4, a one-cycle schedule
        with peak 1e-4; anchors 5,000 steps at half that rate.

        Args:
            kwargs: Further fields, which take precedence.
        """
        return cls(**{**CURVE, **kwargs})
