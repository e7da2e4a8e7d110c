"""The draws every user compares with: Monte Carlo dropout on a stock LoRA, and a list of adapters as an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..tuners.asked import forward_replaced, only_here
from ..tuners.rows import check_divides
from ..tuners.seeding import keyed_generator
from .sources import DrawSource, ask_everywhere, check_in_place, tuner_layers

_DROPOUT = 7  # purpose of the masks, first part of their key


class DropoutDraws(DrawSource):
    """Monte Carlo dropout (Gal and Ghahramani 2016, arXiv 1506.02142) on the inputs of a stock LoRA.

    A draw masks the same input features (of a convolution: channels) for every row and token (arXiv 1512.05287): one
    function, a LoRA with masked columns of A, that depends neither on the batch nor on padding. A LoRA that does not
    pass its input through its dropout in evaluation, such as DoRA, is refused: all draws would be one function.
    """

    def __init__(self, model: nn.Module, dropout: float, seed: int) -> None:
        super().__init__(model)
        if not isinstance(dropout, float) or not 0 < dropout < 1:
            raise ValueError(f"dropout must be a probability between 0 and 1, both excluded; got {dropout!r}.")
        layers: list[Any] = [m for m in self.root.modules() if isinstance(m, LoraLayer)]
        self.layers = [layer for layer in layers if any(name in layer.lora_A for name in layer.active_adapters)]
        if not self.layers:
            raise TypeError(
                f"{type(model).__name__} has no active stock LoRA, on which dropout= acts. For an adapter of "
                "peft_calib leave it out."
            )
        check_in_place(self.layers)
        self.dropout, self.seed = dropout, seed

    @contextmanager
    def use(self, first: int, count: int, repeat: bool = False) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(ask_everywhere(self.model, {}, count if repeat else 1))
            here = stack.enter_context(only_here())
            for index, layer in enumerate(self.layers):
                mask, masked = self._mask(layer.in_features, index, first, count), set[nn.Module]()
                dropouts = {name: layer.lora_dropout[name] for name in layer.active_adapters if name in layer.lora_A}
                for name, dropout in dropouts.items():
                    channels = layer.lora_A[name].weight.dim() > 2
                    hook = here(partial(_apply_mask, mask=mask, channels=channels, masked=masked))
                    stack.callback(dropout.register_forward_hook(hook).remove)
                hook = here(partial(_check_masked, dropouts=dropouts, masked=masked))
                stack.callback(layer.register_forward_hook(hook).remove)
            yield

    def _mask(self, features: int, index: int, first: int, count: int) -> torch.Tensor:
        """(count, features), 0 or 1 / (1 - p)."""
        keys = (keyed_generator(self.seed, _DROPOUT, first + k, index) for k in range(count))
        kept = torch.stack([torch.rand(features, generator=key) >= self.dropout for key in keys])
        return kept / (1 - self.dropout)

    def varying_modules(self, num_samples: int) -> list[nn.Module]:
        return list(self.layers) if num_samples > 1 else []


def _apply_mask(
    module: nn.Module,
    args: tuple,
    output: torch.Tensor,
    mask: torch.Tensor,
    channels: bool,
    masked: set[nn.Module],
) -> torch.Tensor:
    masked.add(module)
    mask = mask.to(output.device, output.dtype)
    check_divides(output, len(mask))
    by_draw = output.unflatten(0, (len(mask), -1))
    shape = [len(mask), *[1] * (by_draw.dim() - 1)]
    shape[2 if channels else -1] = mask.shape[1]  # a convolution has its channels behind the rows
    return (by_draw * mask.view(shape)).flatten(0, 1)


def _check_masked(
    layer: nn.Module, args: tuple, output: Any, dropouts: dict[str, nn.Module], masked: set[nn.Module]
) -> None:
    """Refuse a layer that answered without what its dropouts let through."""
    without = [name for name, dropout in dropouts.items() if dropout not in masked]
    if without:
        raise TypeError(
            f"dropout= masks what a LoRA reads, and the adapter {without[0]!r} does not pass that through its dropout "
            "in evaluation (DoRA and target_parameters do not), so all draws would be one function. Use a plain LoRA."
        )


def _with_names(names: list[str], forward: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    check_divides(x, len(names))
    rows = [name for name in names for _ in range(len(x) // len(names))]
    return forward(x, *args, **{**kwargs, "adapter_names": rows})


def _own_copies(names: list[str], wrapper: ModulesToSaveWrapper, _: Callable[..., Any], x: torch.Tensor) -> Any:
    """The rows of each draw through what its adapter trained whole; stock PEFT mixes in single layers only."""
    check_divides(x, len(names))
    own = dict(wrapper.modules_to_save.items())
    copies = [own.get(name, wrapper.original_module) for name in names]
    return torch.cat([copy(part) for copy, part in zip(copies, x.chunk(len(names)), strict=True)])


class AdapterDraws(DrawSource):
    """Several adapters of one model as draws, run as one mixed batch of stock PEFT (`adapter_names` of its layers)."""

    def __init__(self, model: nn.Module, adapter_names: Sequence[str]) -> None:
        super().__init__(model)
        if not isinstance(model, PeftModel):
            raise TypeError(f"adapter_names= needs a PeftModel, got {type(model).__name__}.")
        unknown = [name for name in adapter_names if name not in model.peft_config]
        if isinstance(adapter_names, str) or unknown or not adapter_names:
            raise ValueError(
                f"adapter_names must be a list of adapters of the model, which has {sorted(model.peft_config)}; got "
                f"{adapter_names!r}. Load others with model.load_adapter(folder, name)."
            )
        self.names = list(adapter_names)
        self.available = self.default_num_samples = len(self.names)
        check_in_place(tuner_layers(model, set(self.names)))

    @contextmanager
    def use(self, first: int, count: int, repeat: bool = False) -> Iterator[None]:
        """Tell the layers the adapter of each row, draw-major; PEFT's own hooks every thread would run into."""
        names = self.names[first : first + count]
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        for module in self.root.modules():
            if isinstance(module, ModulesToSaveWrapper):
                replaced[module] = partial(_own_copies, names, module)
            elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                replaced[module] = partial(_with_names, names)
        with ask_everywhere(self.model, {}, count if repeat else 1), forward_replaced(replaced):
            yield

    def varying_modules(self, num_samples: int) -> list[nn.Module]:
        """The layers of the adapters, and the modules they trained whole."""
        if len(set(self.names[:num_samples])) == 1:
            return []
        whole = [m for m in self.root.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        return [*tuner_layers(self.root, set(self.names)), *whole]
