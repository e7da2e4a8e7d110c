"""Configuration of BayesianLoRA: a Gaussian posterior over small inducing cores behind the LoRA factors."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..posterior import PosteriorConfig
from ..replication import BAYESIAN

_CHOICES = {
    "posterior": ("diagonal", "matrix_normal", "full"),
    "flow": ("none", "maf"),
    "conditional_noise": ("none", "projected", "matheron"),
    "init": ("lora", "random"),
    "core_units": ("lora", "whitened"),
    "prior_std_scaling": ("sqrt_fan_in", "none"),
    "prior_mean": ("learned", "initial", "zero"),
}
_MOST = {"inducing_rows": 2**16, "inducing_cols": 2**16, "flow_depth": 1024, "flow_hidden": 2**17}
#: Used while training only, or kept with the weights.
_TRAINING = frozenset("init init_from kl_conditional_weight".split())
_POSITIVE = ("init_sd", "max_sd", "init_lambda", "max_lambda", "init_d", "variance_lr_multiplier")


@dataclass
class BayesianLoraConfig(PosteriorConfig):
    """BayesianLoRA: a sparse-GP posterior over the LoRA factors (Lin et al. 2026, arXiv 2601.21003).

    The defaults are this package's own: they start at the base model's function, move as fast as LoRA does at LoRA's
    learning rate, and learn their variances in a stock Trainer. `paper` gives the authors' settings.

    Args:
        inducing_rows: Rows R of the core behind each factor; the slot's rank when `None`.
        inducing_cols: Columns C of it; the slot's rank when `None`. Below the rank they limit the rank of the update.
        bayesian_modules: Names (or a regular expression) of the target modules that get a posterior; the others are
            plain LoRA. All when `None`.
        bayesian_layers: Indices of the layers that get a posterior, negative ones from the end. All when `None`.
        prior_std: Prior standard deviation sigma of a factor's entries. `"auto"` is a quarter of the root mean square
            of the core that stands for LoRA's initial A (or the adapter's of `init_from`); a number is the authors'
            way.
        prior_std_scaling: `"sqrt_fan_in"` divides a numeric `prior_std` by the square root of the factor's columns.
        prior_mean: Mean of the core under the prior: `"learned"` by the evidence together with the bases, so that the
            divergence charges for the spread only; its `"initial"` value; or `"zero"` (the authors').
        posterior: Family of q(V): `"diagonal"`, `"matrix_normal"` or `"full"`.
        flow: `"maf"` puts a masked autoregressive flow on the rows of the core.
        flow_depth: Number of flow layers.
        flow_hidden: Width of a flow's conditioner.
        init_sd: Initial standard deviation of the core's entries (the prior's is 1).
        max_sd: Upper bound of it, approached smoothly.
        conditional_noise: What the core leaves open of a factor: left out (`"none"`), or drawn (`"projected"`,
            `"matheron"`) with weight lambda.
        init_lambda: Initial lambda.
        max_lambda: Upper bound of it, approached smoothly.
        learn_lambda: Train lambda.
        init_d: Initial square root D of the diagonal added to a kernel.
        learn_d: Train D.
        jitter: Diagonal added for the Cholesky factorisation, relative to the kernel's mean diagonal.
        learn_jitter: Train a further diagonal, the deterministic counterpart of the random jitter of the authors'
            code.
        init: `"lora"` embeds LoRA's initialisation exactly; `"random"` is the authors'.
        init_from: Folder of a trained LoRA adapter, embedded exactly: the posterior mean is that adapter.
        core_units: `"lora"` scales the core's mean so that LoRA's learning rate works; `"whitened"` trains it in the
            units of the prior (the authors').
        kl_conditional_weight: Weight of the KL of the conditional noise; `kl_weight` when `None`.
        share_inducing: A and B of a slot hang on one core (the paper's Algorithm 1) instead of one each.
        variance_lr_multiplier: How far an optimiser step of size one moves the logarithms of the standard deviations
            (and the entries that correlate the core), so that they learn in a single parameter group.

    Raises:
        ValueError: For an unknown choice, a scale that is not positive, or a combination that has no meaning.

    Example:
        >>> BayesianLoraConfig(r=8, target_modules=["query", "value"], num_train_examples=1000).posterior
        'diagonal'
    """

    inducing_rows: int | None = field(default=None, metadata={"help": "Rows R of the core; the rank when None."})
    inducing_cols: int | None = field(default=None, metadata={"help": "Columns C of the core; the rank when None."})
    bayesian_modules: list[str] | str | None = field(default=None, metadata={"help": "Targets with a posterior."})
    bayesian_layers: list[int] | None = field(default=None, metadata={"help": "Layers with a posterior."})
    prior_std: float | str = field(default="auto", metadata={"help": "Prior standard deviation, or 'auto'."})
    prior_std_scaling: str = field(default="sqrt_fan_in", metadata={"help": "'sqrt_fan_in' or 'none'."})
    prior_mean: str = field(default="learned", metadata={"help": "'learned', 'initial' or 'zero'."})
    posterior: str = field(default="diagonal", metadata={"help": "'diagonal', 'matrix_normal' or 'full'."})
    flow: str = field(default="none", metadata={"help": "'none' or 'maf'."})
    flow_depth: int = field(default=1, metadata={"help": "Number of flow layers."})
    flow_hidden: int = field(default=16, metadata={"help": "Width of a flow's conditioner."})
    init_sd: float = field(default=0.3, metadata={"help": "Initial standard deviation of the core."})
    max_sd: float = field(default=1.0, metadata={"help": "Upper bound of the core's standard deviation."})
    conditional_noise: str = field(default="none", metadata={"help": "'none', 'projected' or 'matheron'."})
    init_lambda: float = field(default=1e-3, metadata={"help": "Initial weight of the conditional noise."})
    max_lambda: float = field(default=0.03, metadata={"help": "Upper bound of it."})
    learn_lambda: bool = field(default=False, metadata={"help": "Train lambda."})
    init_d: float = field(default=1e-2, metadata={"help": "Initial square root of the kernels' diagonal."})
    learn_d: bool = field(default=False, metadata={"help": "Train the kernels' diagonal."})
    jitter: float = field(default=1e-5, metadata={"help": "Relative jitter of the Cholesky factorisation."})
    learn_jitter: bool = field(default=False, metadata={"help": "Train a further diagonal (replication)."})
    init: str = field(default="lora", metadata={"help": "'lora' or 'random'."})
    init_from: str | None = field(default=None, metadata={"help": "LoRA adapter that becomes the posterior mean."})
    core_units: str = field(default="lora", metadata={"help": "'lora' or 'whitened'."})
    kl_conditional_weight: float | None = field(default=None, metadata={"help": "Weight of the noise's KL."})
    share_inducing: bool = field(default=False, metadata={"help": "One core for A and B."})
    variance_lr_multiplier: float = field(default=30.0, metadata={"help": "Speed of the variances."})

    peft_name: ClassVar[str] = "BAYESIANLORA"

    @property
    def training_fields(self) -> frozenset[str]:  # type: ignore[override]
        """The seed counts where the mean is an average over draws that it keys."""
        fields = PosteriorConfig.training_fields | _TRAINING
        return fields if self.flow == "none" else fields - {"sample_seed"}

    def sizes_in(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, set[int]]:
        """Those of the cores; depth and width of the flow."""
        sizes = {size for shape in shapes.values() for size in shape}
        flow = {name.partition(".flow.")[2].split(".")[1] for name in shapes if ".flow.layers." in name}
        found = dict.fromkeys(("inducing_rows", "inducing_cols"), sizes)
        return found if self.flow == "none" else {**found, "flow_depth": {len(flow)}, "flow_hidden": sizes}

    def check_values(self) -> None:
        super().check_values()
        self.check_choices(_CHOICES)
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}.")
        self.check_sizes(_MOST)
        if self.prior_std != "auto" and (isinstance(self.prior_std, str) or self.prior_std <= 0):
            raise ValueError(f"prior_std must be 'auto' or a positive number, got {self.prior_std!r}.")
        self.check_ranges({"jitter": (0, None), "kl_conditional_weight": (0, None)})
        self._check_combinations()

    def _check_combinations(self) -> None:
        for start, bound in (("init_sd", "max_sd"), ("init_lambda", "max_lambda")):
            if getattr(self, start) >= getattr(self, bound):
                raise ValueError(
                    f"{start} ({getattr(self, start)}) must be below {bound} ({getattr(self, bound)}), which the "
                    "learned scale only approaches."
                )
        if self.init_from is not None and self.init != "lora":
            raise ValueError("init_from embeds a LoRA adapter, so it needs init='lora'.")
        if self.share_inducing and (self.init != "random" or self.init_from is not None):
            raise ValueError(
                "share_inducing gives A and B one core, and a LoRA (A not 0, B = 0 at the start) is not of that form. "
                "Set init='random', or leave share_inducing False."
            )

    def to_dict(self) -> dict:
        """The fields as saved; an embedded LoRA is with the weights from then on, and is not read again."""
        fields = super().to_dict()
        if self.slot_table is not None:
            fields["init_from"] = None
        return fields

    @classmethod
    def paper(cls, **kwargs: Any) -> BayesianLoraConfig:
        """The authors' released settings, with the same trainable parameters (418,690 more than LoRA on Llama-2-7B).

        q_proj and lm_head get a posterior and v_proj is plain LoRA, as in the runs behind the paper's 0.42 M. What
        made the released code random in other ways (a one-sided random jitter, dropout in the flow and in prediction)
        is not reproduced: the learned jitter enters by its variance, and the flow starts as the identity.

        Args:
            kwargs: Further fields, which take precedence.
        """
        return cls(**{**copy.deepcopy(BAYESIAN), **kwargs})
