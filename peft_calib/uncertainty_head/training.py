"""The training of a head on features: all trials of a grid at once, each as if it were alone.

What a trial gives does not depend on the others: all see the rows in one order, keyed by the seed alone, and with the
same units dropped, so that trials differ by their settings and by nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.func import vmap
from torch.optim.lr_scheduler import OneCycleLR

from ..tuners.seeding import keyed_generator
from .copied import CopiedHead, squared_distances
from .features import FeatureSet
from .grid import HeadSettings, Trial
from .objective import objective
from .scores import base_score, uncertainty

#: The distance of T trials from the start: each trained tensor stacked, `(T, ...)`.
Deltas = list[torch.Tensor]
# Purposes of a seed.
_ORDER, _DROPOUT = 1, 2
# Share of the steps over which the learning rate rises.
_WARM_UP = 0.1
# Numbers held at once where items are scored.
_ENTRIES = 1 << 24


def training(
    head: CopiedHead, rows: FeatureSet, trials: Sequence[Trial], settings: HeadSettings, key: int = 0
) -> Iterator[Deltas]:
    """Train trials of equally many epochs; after each epoch, say where they are.

    Adam without weight decay under a one-cycle schedule stepped with every batch (cosine from `lr / 25` over the first
    tenth, then down to `lr / 250000`; its first momentum from .95 to .85 and back), over `objective`.

    Args:
        head: Where all start; it is not changed.
        rows: What is trained on.
        trials: Of the same number of epochs.
        settings: All but the grid.
        key: Of the order of rows and of dropout, beside the seed: which fold this is.

    Yields:
        The stacked distances of the trials, in their order.
    """
    (epochs,) = {trial.epochs for trial in trials}
    order = Order(rows.errors, settings, key)
    steps = epochs * -(-len(rows) // settings.batch_size)
    stack = _Stack(head, trials, steps)
    score = Scorer(head, rows, settings, _with_dropout(head.module, settings, key))
    errors, anchors = rows.errors.float(), anchors_of(rows, settings).float()
    for _ in range(epochs):
        for batch in order.next_epoch().split(settings.batch_size):
            stack.step(score, batch, errors[batch], anchors[batch])
        yield stack.deltas


def anchors_of(rows: FeatureSet, settings: HeadSettings) -> torch.Tensor:
    """The frozen model's own score of each item, `(N,)` float64."""
    return base_score(rows.logits.double(), settings.score, options=rows.options, aggregate=settings.aggregate)


class Scorer:
    """The scores of some items by stacked distances."""

    def __init__(
        self, head: CopiedHead, rows: FeatureSet, settings: HeadSettings, module: nn.Module | None = None
    ) -> None:
        self.head, self.options, self.module = head, rows.options, module
        self.features = rows.features.clone() if rows.features.is_inference() else rows.features
        self.how = {"score": settings.score, "sharpness": settings.sharpness, "aggregate": settings.aggregate}

    def __call__(self, deltas: Deltas, index: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`(T, M)` scores of the items at `index`; logits are float32, `dtype` is that of what is made of them."""
        features = self.features[:, index]
        # the same units are dropped in every trial
        answer = vmap(lambda *delta: self.head.answer(delta, features, self.module), randomness="same")
        options = None if self.options is None else self.options[index]
        return uncertainty(answer(*deltas).to(dtype), options=options, **self.how)

    @torch.no_grad()
    def all(self, deltas: Deltas, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`(T, N)` scores of all items."""
        size = max(1, _ENTRIES // (len(deltas[0]) * self.features.shape[0] * self.features.shape[2]))
        parts = torch.arange(self.features.shape[1]).split(size)
        return torch.cat([self(deltas, index, dtype) for index in parts], dim=1)


class Order:
    """The items of one epoch after the other: each once, shuffled, or errors and the rest equally often."""

    def __init__(self, errors: torch.Tensor, settings: HeadSettings, key: int) -> None:
        self.generator = keyed_generator(settings.seed, _ORDER, key)
        count = torch.bincount(errors.long(), minlength=2).double()
        self.weights = 1 / count[errors.long()] if settings.balance else None
        self.size = len(errors)

    def next_epoch(self) -> torch.Tensor:
        """`(N,)` indices."""
        if self.weights is None:
            return torch.randperm(self.size, generator=self.generator)
        return torch.multinomial(self.weights, self.size, replacement=True, generator=self.generator)


class _Stack:
    """Trials side by side, with the optimiser and the schedule of their learning rates."""

    def __init__(self, head: CopiedHead, trials: Sequence[Trial], steps: int) -> None:
        rates = sorted({trial.lr for trial in trials})
        # one tensor holds the trials of one learning rate, since an optimiser has one rate for a tensor
        members = [[i for i, trial in enumerate(trials) if trial.lr == rate] for rate in rates]
        places = torch.tensor([i for group in members for i in group])
        self.back = places.argsort()
        self.groups = [[_stacked(delta, len(group)) for delta in head.delta] for group in members]
        self.optimiser = torch.optim.Adam(
            [{"params": group, "lr": rate} for group, rate in zip(self.groups, rates, strict=True)]
        )
        steps = max(steps, 3)  # after its last step the schedule divides by the steps of its second phase less one
        warm_up = max(int(_WARM_UP * steps), 2) / steps
        self.schedule = OneCycleLR(self.optimiser, max_lr=rates, total_steps=steps, pct_start=warm_up)
        self.alpha = torch.tensor([trials[i].alpha for i in places])
        self.beta = torch.tensor([trials[i].beta for i in places])

    @property
    def deltas(self) -> Deltas:
        """Where the trials are, in the order they were given in."""
        return [delta.detach()[self.back] for delta in self._joined()]

    @torch.enable_grad()
    def step(self, score: Scorer, batch: torch.Tensor, errors: torch.Tensor, anchors: torch.Tensor) -> None:
        """One step of all trials on the items of a batch."""
        deltas = self._joined()
        distances = squared_distances(deltas)
        losses = objective(score(deltas, batch), errors, anchors, distances, self.alpha, self.beta)
        self.optimiser.zero_grad(set_to_none=True)
        losses.sum().backward()
        self.optimiser.step()
        self.schedule.step()

    def _joined(self) -> Deltas:
        return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*self.groups, strict=True)]


class KeyedDropout(nn.Module):
    """Dropout by a generator of its own."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.share, self.generator = share, generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.empty(x.shape).bernoulli_(1 - self.share, generator=self.generator)
        return x * kept.to(x) / (1 - self.share)


def _with_dropout(module: nn.Module, settings: HeadSettings, key: int) -> nn.Module | None:
    """A head with the dropout it was made with; None for the head as it is, which drops nothing."""
    if not settings.head_dropout:
        return None
    module, generator = copy.deepcopy(module), keyed_generator(settings.seed, _DROPOUT, key)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout) and 0 < child.p < 1:
                setattr(parent, name, KeyedDropout(child.p, generator))
    return module


def _stacked(delta: torch.Tensor, count: int) -> nn.Parameter:
    return nn.Parameter(delta.detach().expand(count, *delta.shape).clone())
