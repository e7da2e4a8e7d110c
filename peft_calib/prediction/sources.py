"""Where the K functions of a prediction come from, and how a few of them are put in place for one forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..tuners.asked import asking
from ..tuners.factors import Draw, Law, Points, Sample
from ..tuners.heads import StackedModule
from ..tuners.holder import FactorHolder
from ..tuners.laws import holders_of
from ..tuners.layer import FactorLinear


class DrawSource(ABC):
    """K functions on one model. While `use` lasts, a forward on `count * B` draw-major rows evaluates `count`."""

    #: Number of draws there are; `None` where there is no end.
    available: int | None = None
    #: Number of draws of a prediction that names none.
    default_num_samples: int = 8
    #: Whether draws come in mirrored pairs.
    antithetic: bool = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.root = root_module(model)
        #: Whether base models repeat the rows they are given while `use(..., repeat=True)` lasts, or the caller does.
        self.repeats = bool(holders_of(model))

    @abstractmethod
    def use(self, first: int, count: int, repeat: bool = False) -> AbstractContextManager[None]:
        """Put draws `first ... first + count - 1` in place; `repeat` has the base model repeat its rows for them."""

    @abstractmethod
    def varying_modules(self, num_samples: int) -> list[nn.Module]:
        """The modules whose function differs between the first `num_samples` draws."""

    def spread_over(self, total: int) -> None:  # noqa: B027  (most sources draw on without an end in view)
        """Say how many draws the whole prediction has, for a source that spreads them evenly."""

    def prefer_pairs(self) -> None:  # noqa: B027  (most draws have no mirror image)
        """Make the draws in mirrored pairs, if they have mirror images and nothing else was asked for."""


class LawDraws(DrawSource):
    """The draws of this package's active adapters; `antithetic` None leaves mirrored pairs to the prediction."""

    def __init__(self, model: nn.Module, seed: int, antithetic: bool | None = None) -> None:
        super().__init__(model)
        self.holders = active_holders(model)
        self.draw = Sample(seed=seed, antithetic=bool(antithetic))
        self._undecided = antithetic is None
        if antithetic and (unpaired := self._without_mirror_images()):
            raise ValueError(
                f"antithetic=True mirrors draws from a posterior; those of {unpaired} have no mirror image."
            )

    @property
    def antithetic(self) -> bool:  # type: ignore[override]
        return self.draw.antithetic

    def prefer_pairs(self) -> None:
        if self._undecided and not self._without_mirror_images():
            self.draw = replace(self.draw, antithetic=True)

    def _without_mirror_images(self) -> list[str]:
        return sorted({law.method for _, law in self._laws() if not law.mirrors})

    @property
    def available(self) -> int | None:  # type: ignore[override]
        """Number of draws that all active laws have; `None` where there is no end."""
        return min((law.num_draws for _, law in self._laws() if law.num_draws is not None), default=None)

    @property
    def default_num_samples(self) -> int:  # type: ignore[override]
        """What the active laws suggest, at most what they have."""
        suggested = max(law.default_num_samples for _, law in self._laws())
        return suggested if self.available is None else min(suggested, self.available)

    def _laws(self) -> list[tuple[FactorHolder, Law]]:
        """The active laws, with their holders."""
        names = {name for layer in self.layers() for name in layer.active_adapters}
        return [(holder, law) for holder in self.holders for name, law in holder.laws.items() if name in names]

    def spread_over(self, total: int) -> None:
        """Lay the points of a curve evenly."""
        self.draw = replace(self.draw, total=total)

    def use(self, first: int, count: int, repeat: bool = False) -> AbstractContextManager[None]:
        return self.answering(replace(self.draw, first=first, num_samples=count), count if repeat else 1)

    def answering(self, draw: Draw | None, repeat: int = 1) -> AbstractContextManager[None]:
        """Make the laws answer with `draw`, and the others with their mean; rows are repeated `repeat` times."""
        return ask_everywhere(self.model, {id(holder): draw for holder in self.holders}, repeat)

    def varying_modules(self, num_samples: int) -> list[nn.Module]:
        found: list[nn.Module] = []
        with torch.no_grad(), self.use(0, num_samples):
            for layer in self.layers():
                active = [name for name in layer.active_adapters if name in layer.factor_slots]
                if num_samples > 1 and any(self._varies(layer, name) for name in active):
                    found.append(layer)
            heads = [head for head in self.own_heads() if num_samples > 1 and head.varies()]
        return [*found, *heads]

    def own_heads(self) -> list[StackedModule]:
        """The modules trained whole of which each draw has one of its own: heads, or what lies below the layers."""
        heads = [m for m in self.root.modules() if isinstance(m, StackedModule) and m.holder in self.holders]
        active = {name for layer in self.layers() for name in layer.active_adapters}
        return [head for head in heads if head.adapter in active]

    def layers(self) -> list[FactorLinear]:
        found = [m for m in self.root.modules() if isinstance(m, FactorLinear) and m.holder in self.holders]
        return [layer for layer in found if any(name in layer.factor_slots for name in layer.active_adapters)]

    @staticmethod
    def _varies(layer: FactorLinear, adapter: str) -> bool:
        index: Any = layer.factor_slots[adapter].index
        pair = layer.holder.generation(adapter).pairs[index]
        return any(
            factor.stride(0) != 0 and not torch.equal(factor[1:], factor[:1].expand_as(factor[1:])) for factor in pair
        )


class CurvePoints(LawDraws):
    """Chosen points of a CurveLoRA as draws."""

    def __init__(self, model: nn.Module, points: Points) -> None:
        super().__init__(model, seed=0)
        laws = self._laws()
        curves = [law for _, law in laws if law.has_points]
        if not curves:
            raise TypeError(
                f"{type(model).__name__} has no active CurveLoRA, so there is no curve to choose points of."
            )
        for law in curves:
            law.check_points(points.values().detach())
        self.holders = [holder for holder, law in laws if law.has_points]
        self.points = points

    def use(self, first: int, count: int, repeat: bool = False) -> AbstractContextManager[None]:
        """Put points `first ... first + count - 1` in place."""
        return self.answering(Points(self.points.points[first : first + count]), count if repeat else 1)


class TheModel(DrawSource):
    """One deterministic function: the model as it is in evaluation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if holders_of(model):
            active_holders(model)

    def use(self, first: int, count: int, repeat: bool = False) -> AbstractContextManager[None]:
        """Put draws around the prediction out of force; one point of a curve stays chosen, several are refused."""
        chosen: dict[int, Draw | None] = {}
        for holder in holders_of(self.model):
            draw = holder.draw
            if isinstance(draw, Points):
                if draw.num_samples > 1:
                    raise ValueError(
                        f"how='mean' asks for one function, but curve_at has put {draw.num_samples} points in place. "
                        "Predict outside of it, with one point, or with how='sample'."
                    )
                chosen[id(holder)] = draw
        return ask_everywhere(self.model, chosen, count if repeat else 1)

    def varying_modules(self, num_samples: int) -> list[nn.Module]:
        return []


@contextmanager
def ask_everywhere(model: nn.Module, draws: Mapping[int, Draw | None], repeat: int) -> Iterator[None]:
    """Ask for draws, by the id of their holder, on every base model inside a model; others answer with their mean."""
    with ExitStack() as stack:
        for module in list(model.modules()):
            own = [child for child in module.children() if isinstance(child, FactorHolder)]
            if own:
                asked = {id(holder): draws.get(id(holder)) for holder in own}
                stack.enter_context(asking(module, asked, repeat))
        yield


def root_module(model: nn.Module) -> nn.Module:
    """The base model, which sees the whole batch; prompt learning, which adds rows of its own, is refused."""
    peft_model = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if peft_model is not None and not holders_of(model) and peft_model.active_peft_config.is_prompt_learning:
        raise TypeError(
            f"{peft_model.active_peft_config.peft_type.value} is a prompt-learning adapter; draws are made of LoRA "
            "factors. Use an adapter of peft_calib, or a stock LoRA."
        )
    return shared_root(model)


def shared_root(model: nn.Module) -> nn.Module:
    """The module that two wrappers of one model share: its base model, where it can be told."""
    owners = (m for m in model.modules() if any(isinstance(child, FactorHolder) for child in m.children()))
    peft_model = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    return next(owners, model if peft_model is None else peft_model.get_base_model())


def active_holders(model: nn.Module) -> list[FactorHolder]:
    """The holders of this package's active adapters, checked to be in place."""
    root_module(model)  # a prompt-learning adapter is refused with its own message
    holders = holders_of(model)
    if not holders:
        raise TypeError(
            f"{type(model).__name__} carries no adapter of peft_calib, so there are no draws to make. For a stock "
            "LoRA pass dropout= (Monte Carlo dropout) or adapter_names= (an ensemble), or predict with how='mean'."
        )
    layers = [module for module in model.modules() if isinstance(module, FactorLinear)]
    check_in_place(layers)
    active = [h for h in holders if any(n in h.laws for layer in layers for n in layer.active_adapters)]
    if not active:
        raise ValueError(
            f"No adapter of peft_calib is active; the model has {sorted({n for h in holders for n in h.laws})}. "
            "Call set_adapter first."
        )
    return active


def check_in_place(layers: list[Any]) -> None:
    """Raise `ValueError` if tuner layers are disabled or merged."""
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("The adapter is disabled, so there is nothing to predict with. Enable it first.")
    if any(layer.merged for layer in layers):
        raise ValueError("The adapter is merged into the base weights. Call unmerge_adapter() first, or do not merge.")


def tuner_layers(model: nn.Module, adapters: set[str]) -> list[Any]:
    """The tuner layers of a model that hold one of some adapters."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    held = ({name for part in layer.adapter_layer_names for name in getattr(layer, part)} for layer in layers)
    return [layer for layer, names in zip(layers, held, strict=True) if adapters & names]
