"""Configuration of HyperLoRA: a small generator network emits the LoRA factors of every slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import CalibLoraConfig
from ..replication import HYPER_MLP, HYPER_TRANSFORMER

_CHOICES = {
    "hyper_arch": ("mlp", "transformer"),
    "embed_mode": ("layer+type", "slot"),
    "head": ("rank", "full", "factored", "chunk"),
    "a_mode": ("generated", "fixed", "random"),
    "init": ("zero", "authors"),
    "a_init": ("lora", "authors"),
    "noise_mode_a": ("replace", "add", "multiply"),
    "noise_mode_b": ("replace", "add", "multiply"),
    "regenerate": ("forward", "step"),
    "gen_dtype": ("float32", "float64"),
}
_MOST = {"hyper_depth": 1024, "hyper_nhead": 4096, "head_rank": 2**20, "chunk_size": 2**24}
_MOST |= {"hyper_hidden": 2**17, "hyper_ffn": 2**20, "embed_dim": 2**17}
#: Used while training only, or kept with the weights.
_TRAINING = frozenset(
    "hyper_dropout noise_alpha noise_anneal noise_anneal_steps authors_horizon anchor_adapter regenerate cache_eval "
    "save_frozen_a".split()
)


@dataclass
class HyperLoraConfig(CalibLoraConfig):
    """HyperLoRA: LoRA factors generated from the place of a module (Trojan and Gębala, arXiv 2603.19278).

    The defaults are this package's own: they start at the base model's function, train at LoRA's learning rate and
    have fewer trainable parameters than the LoRA they replace on a 12-layer encoder. `paper_mlp` and
    `paper_transformer` give the authors' settings.

    Args:
        hyper_arch: Generator: `"mlp"` treats slots one by one, `"transformer"` lets them attend to each other.
        hyper_hidden: Width h of the generator.
        hyper_depth: Hidden layers of the MLP, or encoder layers of the transformer.
        hyper_nhead: Attention heads (transformer); must divide `hyper_hidden`.
        hyper_ffn: Feed-forward width (transformer).
        hyper_dropout: Dropout inside the transformer while training, in [0, 1).
        embed_mode: `"layer+type"` adds a layer and a module-type embedding; `"slot"` gives each slot its own row.
        embed_dim: Width of the embeddings.
        head: Map from the generator's output to a factor: `"rank"`, `"full"`, `"factored"` or `"chunk"`.
        head_rank: Inner width of `"factored"`.
        chunk_size: Chunk length of `"chunk"`.
        a_mode: A is `"generated"`, `"fixed"` at its initial draw, or drawn anew each training step (`"random"`).
        a_residual: Generated A is added to a frozen initial draw, so that slots start distinct.
        init: `"zero"` starts with B = 0; `"authors"` uses the framework's defaults.
        a_init: Scale of drawn A: `"lora"`, U(-1/sqrt(d_in), 1/sqrt(d_in)), or `"authors"`, U(-1/sqrt(r), 1/sqrt(r)).
        noise_mode_a: How A is blended with a LoRA-initialised anchor: `"replace"` (not), `"add"`, `"multiply"`.
        noise_mode_b: The same for B, whose anchor is zero unless `anchor_adapter` gives one.
        noise_alpha: Weight of the anchor under `"add"`, in [0, 1].
        noise_anneal: Whether a `RegularizerScheduleCallback` takes `noise_alpha` to 0 linearly.
        noise_anneal_steps: Optimiser steps until it is 0; the whole run when `None`.
        authors_horizon: Count the horizon in micro-batches, as the authors' code does (replication only).
        anchor_adapter: Folder of a trained LoRA adapter whose factors are the anchors (a warm start).
        regenerate: `"forward"` generates in every forward; `"step"` once an optimiser step, see `flush_grads`.
        cache_eval: Keep generated factors between forwards without gradients.
        gen_dtype: Lowest precision in which factors are generated.
        seed: Key of the start and of every draw. `None` takes PyTorch's seed (`set_seed`) and the adapter's name;
            merging or exporting `a_mode="random"` needs a seed that is named.
        save_frozen_a: Save drawn A; `False` draws it again from the seed on loading (smaller file).

    Raises:
        ValueError: For an unknown choice, a size that does not fit, or a combination that could never train.

    Example:
        >>> HyperLoraConfig(r=4, target_modules=["query", "value"]).head
        'rank'
    """

    hyper_arch: str = field(default="mlp", metadata={"help": "'mlp' or 'transformer'."})
    hyper_hidden: int = field(default=64, metadata={"help": "Width of the generator."})
    hyper_depth: int = field(default=2, metadata={"help": "Hidden (encoder) layers of the generator."})
    hyper_nhead: int = field(default=8, metadata={"help": "Attention heads (transformer)."})
    hyper_ffn: int = field(default=1024, metadata={"help": "Feed-forward width (transformer)."})
    hyper_dropout: float = field(default=0.0, metadata={"help": "Dropout in the transformer while training."})
    embed_mode: str = field(default="layer+type", metadata={"help": "'layer+type' or 'slot'."})
    embed_dim: int = field(default=64, metadata={"help": "Width of the embeddings."})
    head: str = field(default="rank", metadata={"help": "'rank', 'full', 'factored' or 'chunk'."})
    head_rank: int = field(default=32, metadata={"help": "Inner width of the factored head."})
    chunk_size: int = field(default=512, metadata={"help": "Chunk length of the chunk head."})
    a_mode: str = field(default="generated", metadata={"help": "'generated', 'fixed' or 'random'."})
    a_residual: bool = field(default=True, metadata={"help": "Add generated A to a frozen draw."})
    init: str = field(default="zero", metadata={"help": "'zero' or 'authors'."})
    a_init: str = field(default="lora", metadata={"help": "'lora' or 'authors'."})
    noise_mode_a: str = field(default="replace", metadata={"help": "'replace', 'add' or 'multiply'."})
    noise_mode_b: str = field(default="replace", metadata={"help": "'replace', 'add' or 'multiply'."})
    noise_alpha: float = field(default=0.0, metadata={"help": "Weight of the anchor, in [0, 1]."})
    noise_anneal: bool = field(default=False, metadata={"help": "Take noise_alpha to 0 while training."})
    noise_anneal_steps: int | None = field(default=None, metadata={"help": "Optimiser steps until it is 0."})
    authors_horizon: bool = field(default=False, metadata={"help": "Count the horizon in micro-batches."})
    anchor_adapter: str | None = field(default=None, metadata={"help": "LoRA adapter whose factors are the anchors."})
    regenerate: str = field(default="forward", metadata={"help": "'forward' or 'step'."})
    cache_eval: bool = field(default=True, metadata={"help": "Cache factors between forwards without gradients."})
    gen_dtype: str = field(default="float32", metadata={"help": "'float32' or 'float64'."})
    seed: int | None = field(default=None, metadata={"help": "Key of every draw; None follows PyTorch's seed."})
    save_frozen_a: bool = field(default=True, metadata={"help": "Save drawn A with the adapter."})

    peft_name: ClassVar[str] = "HYPERLORA"

    @property
    def training_fields(self) -> frozenset[str]:  # type: ignore[override]
        """The seed counts where A is drawn from it when the adapter is loaded or asked."""
        drawn = self.a_mode == "random" or not self.keeps_frozen_a
        fields = CalibLoraConfig.training_fields | _TRAINING | {"seed"}
        return fields - {"seed", "start_seed"} if drawn else fields

    def sizes_in(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, set[int]]:
        """Depth counted by names; widths among the sizes that occur."""
        layers = {name.split(".")[2] for name in shapes if name.startswith("trunk.layers.")}
        of_head = {"factored": ["head_rank"], "chunk": ["chunk_size"]}.get(self.head, [])
        widths = ["hyper_hidden", "embed_dim", *of_head]
        widths += ["hyper_ffn"] if self.hyper_arch == "transformer" else []
        sizes = {size for shape in shapes.values() for size in shape}
        return {"hyper_depth": {len(layers)}, **dict.fromkeys(widths, sizes)}

    def check_values(self) -> None:
        self.check_choices(_CHOICES)
        self.check_sizes({**_MOST, "noise_anneal_steps": None})
        if not 0 <= self.hyper_dropout < 1:
            raise ValueError(f"hyper_dropout is a probability in [0, 1), got {self.hyper_dropout!r}.")
        if not 0 <= self.noise_alpha <= 1:
            raise ValueError(f"noise_alpha is a weight in [0, 1], got {self.noise_alpha!r}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.hyper_arch == "transformer" and self.hyper_hidden % self.hyper_nhead:
            raise ValueError(
                f"hyper_hidden ({self.hyper_hidden}) is not divisible by hyper_nhead ({self.hyper_nhead}): each "
                "attention head takes an equal share. Change one of the two."
            )
        if self.noise_mode_b == "multiply" and self.anchor_adapter is None and self.slot_table is None:
            raise ValueError(
                'noise_mode_b="multiply" multiplies B by its anchor, and the anchor of a fresh LoRA is 0: output and '
                "gradient would be 0 for ever. Give anchor_adapter a trained LoRA, or use 'add' or 'replace'."
            )
        both_add = self.noise_mode_a == self.noise_mode_b == "add"
        if both_add and self.noise_alpha == 1 and not self.noise_anneal:
            raise ValueError(
                "noise_alpha=1 with 'add' on A and B leaves the anchors alone and gives the generator no gradient. "
                "Set noise_anneal=True, or noise_alpha below 1."
            )

    @property
    def keeps_frozen_a(self) -> bool:
        """Whether drawn A is saved; anchors from an adapter always are, since its folder may be gone."""
        return self.save_frozen_a or self.anchor_adapter is not None

    def to_dict(self) -> dict:
        """The fields as saved; the anchors are with the weights from then on, and are not read again."""
        fields = super().to_dict()
        if self.slot_table is not None:
            fields.update(save_frozen_a=self.keeps_frozen_a, anchor_adapter=None)
        return fields

    @classmethod
    def paper_mlp(cls, a_mode: str = "generated", **kwargs: Any) -> HyperLoraConfig:
        """The authors' MLP generator (21,249,024 parameters on RoBERTa-base q+v with fixed A; 33,838,080 generated).

        Args:
            a_mode: `"generated"`, `"fixed"` or `"random"`.
            kwargs: Further fields, which take precedence.
        """
        return cls(**{**HYPER_MLP, "a_mode": a_mode, **kwargs})

    @classmethod
    def paper_transformer(cls, a_mode: str = "generated", **kwargs: Any) -> HyperLoraConfig:
        """The authors' transformer generator (4,227,328 parameters on RoBERTa-base with fixed A; 4,228,864 generated).

        The horizon of the annealing counts optimiser steps; `authors_horizon=True` repeats the authors' count.

        Args:
            a_mode: `"generated"`, `"fixed"` or `"random"`.
            kwargs: Further fields, which take precedence.
        """
        return cls(**{**HYPER_TRANSFORMER, "a_mode": a_mode, **kwargs})
