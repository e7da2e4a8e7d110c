"""A law that is a distribution over factors: what training by the evidence lower bound takes, whatever the family.

A subclass says what the factors are for given normals, and what its divergence from the prior is. All that has to be
right beside the mathematics is here: private normals, keyed so that a draw is the same in every chunk, process and
resumed run, with mirror images; N, and the weight of the divergence; and all of that inside a compiled step.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .config import CalibLoraConfig
from .counting import CountingLaw
from .factors import Draw, Sample, SlotTable, Train
from .seeding import Normals, NormalSource, TracedSource, keyed_generator, sources_of_draws

#: N where neither the configuration nor a callback tells the number of training items.
FALLBACK_NUM_TRAIN_EXAMPLES = 1000
#: Purposes of normals, first part of their key; 0 is for what a law is built with.
TRAIN, SAMPLE = 1, 2


@dataclass
class PosteriorConfig(CalibLoraConfig):
    """Fields of a method whose law is a `Posterior`.

    Args:
        kl_weight: Weight of KL / N in the training loss; 1 is the evidence lower bound.
        kl_warmup: Part of the training over which a `RegularizerScheduleCallback` raises the weight linearly.
        num_train_examples: N, the number of items the loss would average over in one epoch: rows for classification,
            target tokens for language modelling. Set by the callback where it is `None`.
        sample_seed: Key of the initial values and of the draws made in training. `None` takes PyTorch's seed
            (`set_seed`) and the adapter's name.
        posterior_scale: What the normals of a prediction's draws are multiplied by: 1 for the posterior as it was
            trained, 0 for its mean. Chosen by `calibrate_posterior`; training always uses 1.
    """

    kl_weight: float = field(default=1.0, metadata={"help": "Weight of KL / N in the training loss."})
    kl_warmup: float = field(default=1 / 3, metadata={"help": "Part of the training with a rising weight."})
    num_train_examples: int | None = field(default=None, metadata={"help": "Number N of training items."})
    sample_seed: int | None = field(default=None, metadata={"help": "Key of all that is random; None: PyTorch's."})
    posterior_scale: float = field(default=1.0, metadata={"help": "Scale of the draws of a prediction."})

    training_fields: ClassVar[frozenset[str]] = CalibLoraConfig.training_fields | frozenset(
        "kl_weight kl_warmup num_train_examples sample_seed".split()
    )
    draws_differ: ClassVar[bool] = True

    def check_values(self) -> None:
        self.check_ranges({"kl_weight": (0, None), "posterior_scale": (0, None)})
        self.check_sizes({"num_train_examples": None})
        if not 0 <= self.kl_warmup <= 1:
            raise ValueError(f"kl_warmup is a part of the training in [0, 1], got {self.kl_warmup!r}.")


class Posterior(CountingLaw):
    """A distribution over the factors, with its divergence from a prior.

    `forward(draw)` forms the factors, from `self.normals(draw)` where draws are asked for and from the mean where that
    is `None`, and answers with `Factors(groups, self.evidence_term(draw))`.

    Args:
        config: The method's configuration.
        slots: The slots to answer for.
    """

    mirrors = True

    def __init__(self, config: PosteriorConfig, slots: SlotTable) -> None:
        super().__init__(slots, config.init_seed)
        self.config = config
        self.register_buffer("kl_factor", torch.ones(()))
        self.num_train_examples = config.num_train_examples
        self._warned = False

    @abstractmethod
    def kl(self) -> torch.Tensor:
        """Divergence of the posterior from the prior in nats, with a graph."""

    def normals(self, draw: Draw) -> Normals | None:
        """What makes the normals of the draws asked for; `None` where the mean is.

        Ask once a forward: a training forward is counted here, and its count is the key of what it draws.

        Args:
            draw: What `forward` was asked for.
        """
        if isinstance(draw, Sample):
            scale = self.config.posterior_scale
            return Normals(sources_of_draws(draw, SAMPLE), scale) if scale > 0 else None
        if not isinstance(draw, Train):
            return None
        self.count_generation()
        if torch.compiler.is_compiling():  # a graph cannot hold a generator: it reads the key anew each time it runs
            return Normals([TracedSource(self.draw_key(), TRAIN)])
        return Normals([NormalSource(keyed_generator(self.seed(), TRAIN, int(self.generations())))])

    def evidence_term(self, draw: Draw) -> torch.Tensor | None:
        """`kl_weight KL / N` as the regulariser of a training forward; `None` outside training."""
        return self.config.kl_weight * self.kl() * self.evidence_weight() if isinstance(draw, Train) else None

    def evidence_weight(self) -> torch.Tensor:
        """What a divergence is multiplied by beside a mean loss: the schedule's factor over N."""
        return self.kl_factor / self.num_items()

    @property
    def has_scale(self) -> bool:
        """Always: its normals have one."""
        return True

    @property
    def default_num_samples(self) -> int:
        """One where all draws are the mean."""
        return super().default_num_samples if self.config.posterior_scale > 0 else 1

    def num_items(self) -> int:
        """N, the items the loss averages over in one epoch; a guess, with a warning, where nobody has told."""
        if self.num_train_examples is not None:
            return self.num_train_examples
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self.config).__name__}.num_train_examples is not set, so the KL divergence is weighted as for "
                f"{FALLBACK_NUM_TRAIN_EXAMPLES} training items. Set it to the number of training items (rows, or "
                "target tokens for language modelling), or add peft_calib.trainer_callbacks."
                "RegularizerScheduleCallback.",
                stacklevel=2,
            )
        return FALLBACK_NUM_TRAIN_EXAMPLES

    @property
    def needs_num_train_examples(self) -> bool:
        return self.config.num_train_examples is None

    def set_num_train_examples(self, num_train_examples: int) -> None:
        if self.config.num_train_examples is None:
            self.num_train_examples = num_train_examples

    def set_progress(self, step: int, total_steps: int, accumulation_steps: int = 1) -> None:
        """Raise the weight of the KL linearly: `min(1, (t + 1) / (kl_warmup T))`, t and T in optimiser steps."""
        horizon = self.config.kl_warmup * total_steps
        with torch.no_grad():
            self.kl_factor.fill_(min(1.0, (step + 1) / horizon) if horizon > 0 else 1.0)
