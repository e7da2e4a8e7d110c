"""States at the upper end of a frozen trunk, computed once for each row and read in every later epoch.

Below the first layer that trains, a row's states are the same in every epoch. They are computed before the first step,
each row without padding among rows of its own length, in batches that follow from the data alone. So a state does not
depend on the batch that a step happens to draw, and a run that is resumed, or that is spread over several processes,
reads the very bits that one uninterrupted process reads.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..internals.torch import version_of
from .asked import forward_replaced
from .late import Trunk, asks_for_gradient, pass_on, trunk_of
from .laws import laws_of
from .modes import modes_of
from .objective import is_encoder_decoder, shifts_labels
from .shared_rows import mark_repeated

#: What a batch may hold: tokens, which the states follow from, and what the trunk does not read.
TOKENS = ("input_ids", "token_type_ids")
_READ = {*TOKENS, "attention_mask"}
_NOT_READ = {"labels", "num_items_in_batch", "return_dict", "use_cache"}
#: Rows of one length that are computed at once.
_ROWS = 32
#: How far states may lie from those in a padded batch, relative to the largest: rounding, in their precision.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}

#: By base model: what its training forwards read.
CACHES: weakref.WeakKeyDictionary[nn.Module, TrunkCache] = weakref.WeakKeyDictionary()


class CannotCacheError(ValueError):
    """Says why the states of a trunk cannot be kept."""


@dataclass(frozen=True)
class Row:
    """The tokens of one row without padding: inputs of the trunk by name, int64 (T,) on the CPU."""

    tokens: dict[str, torch.Tensor]

    @property
    def key(self) -> bytes:
        """What tells the row from others."""
        parts = (name.encode() + value.numpy().tobytes() for name, value in sorted(self.tokens.items()))
        return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()

    def __len__(self) -> int:
        return len(self.tokens["input_ids"])


class TrunkCache:
    """The states of rows at the upper end of a model's trunk; `CannotCacheError` where there is none to keep.

    They are kept in `dtype` (`None`: the base model's), and in a file in `folder` where they take over `max_bytes`.
    """

    def __init__(
        self,
        root: nn.Module,
        rows: Iterable[Row],
        dtype: torch.dtype | None = None,
        max_bytes: int = 2**31,
        folder: Path | None = None,
    ) -> None:
        trunk = trunk_of(root)
        if trunk is None:
            raise CannotCacheError("no layers lie below all that trains")
        if is_encoder_decoder(root) and not _in_encoder(root, trunk):
            raise CannotCacheError("layers of a decoder lie below, which read more than the tokens of a row")
        self.trunk = trunk
        self.stamp = _stamp(trunk)
        self.places: dict[bytes, slice] = {}
        different = {row.key: row for row in rows}
        total = 0
        for key, row in different.items():
            self.places[key] = slice(total, total + len(row))
            total += len(row)
        if not total:
            raise CannotCacheError("there are no rows")
        by_length: dict[int, list[bytes]] = {}
        for key, row in different.items():
            by_length.setdefault(len(row), []).append(key)
        parts = [same[i : i + _ROWS] for same in by_length.values() for i in range(0, len(same), _ROWS)]
        for part in parts:
            states = self._states(root, [different[key] for key in part])
            if part is parts[0]:
                self.dtype = states.dtype
                self.states = _store((total, states.shape[-1]), dtype or states.dtype, max_bytes, folder)
            for key, state in zip(part, states, strict=True):
                self.states[self.places[key]] = state.to("cpu", self.states.dtype)

    def _states(self, root: nn.Module, rows: list[Row]) -> torch.Tensor:
        """States (B, T, D) of rows of one length, as the trunk gives them."""
        device = next(root.parameters()).device
        inputs = {name: torch.stack([row.tokens[name] for row in rows]) for name in rows[0].tokens}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return self.run(root, send_to_device(inputs, device, non_blocking=True), len(rows))

    def run(self, root: nn.Module, inputs: Mapping[str, Any], rows: int, as_in_training: bool = False) -> torch.Tensor:
        """States (B, T, D) of a batch, computed now, without dropout unless `as_in_training`."""
        with _training(root) if as_in_training else modes_of(root).evaluation(root):
            try:
                prefix = self.trunk.run(root, inputs, rows)
            except ValueError as error:
                raise CannotCacheError(str(error)) from error
        if [block for block, _ in prefix.outputs] != self.trunk.blocks:
            raise CannotCacheError("its layers do not run one after the other")
        last = prefix.outputs[-1][1]
        self.wrapped = isinstance(last, tuple)
        states = last[0] if self.wrapped else last
        if not isinstance(states, torch.Tensor) or states.dim() != 3 or (self.wrapped and len(last) > 1):
            raise CannotCacheError("its layers hand on more than one state a token")
        return states

    def read(self, root: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """States (B, T, D) of a batch, zero at padding.

        `None` where a row is not known, the loss reads a state at padding, or the trunk has changed.
        """
        trunk = trunk_of(root)
        if trunk is None or trunk.blocks != self.trunk.blocks or _stamp(trunk) != self.stamp:
            return None
        if _loss_at_padding(root, inputs):
            return None
        try:
            rows = list(rows_of(inputs))
        except CannotCacheError:
            return None
        places = [self.places.get(row.key) for row, _ in rows]
        if any(place is None for place in places):
            return None
        ids = inputs["input_ids"]
        states = torch.zeros(*ids.shape, self.states.shape[-1], dtype=self.dtype)
        for state, place, (row, start) in zip(states, places, rows, strict=True):
            state[start : start + len(row)] = self.states[place]
        return states.to(ids.device)

    @contextmanager
    def replayed(self, states: torch.Tensor, num_samples: int) -> Iterator[None]:
        """Let the trunk answer with states, repeated K-fold."""
        repeated = mark_repeated(states.repeat(num_samples, 1, 1), states)
        answer = partial(_answer, repeated, self.wrapped)
        idle = dict.fromkeys(self.trunk.dropouts, pass_on)
        with forward_replaced({**dict.fromkeys(self.trunk.blocks, answer), **idle}):
            yield

    def check(self, root: nn.Module, batch: Mapping[str, Any]) -> None:
        """Refuse a trunk that gives other states in a padded batch: it is not deterministic, or padding moves them."""
        if _loss_at_padding(root, batch):
            raise CannotCacheError("the loss reads states at padding")
        states = self.read(root, batch)
        if states is None:
            raise CannotCacheError("a batch holds rows that the data set does not hold, or other inputs than tokens")
        inputs = {name: value for name, value in batch.items() if name in _READ}
        mask = batch.get("attention_mask")
        real = torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
        kept = states[real].float()
        self._compare(kept, self.run(root, inputs, len(real))[real], "change with the padding of its batch")
        self._check_above(root, inputs, states, real)
        # Where several functions are trained on each row, the trunk has no dropout anyway; see `late.trunk_replay`.
        if all(law.train_samples == 1 for law in laws_of(root, active=True)):
            devices = [root.device] if root.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                drawn = self.run(root, inputs, len(real), as_in_training=True)[real]
            self._compare(kept, drawn, "are drawn anew in every forward, by dropout below the layers that train")

    def _check_above(self, root: nn.Module, inputs: dict[str, Any], states: torch.Tensor, real: torch.Tensor) -> None:
        """Refuse layers above that read states at padding, which are not kept: a mean over all positions."""
        with modes_of(root).evaluation(root), torch.no_grad():
            now = root(**inputs)
            with self.replayed(states, 1):
                kept = root(**inputs)
        for name, value in now.items() if isinstance(now, Mapping) else enumerate(now):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
                rows = real if value.shape[:2] == real.shape else ...
                self._compare(kept[name][rows].float(), value[rows], "are read at padding by the layers above")

    def _compare(self, kept: torch.Tensor, now: torch.Tensor, fault: str) -> None:
        if kept.shape != now.shape:
            raise CannotCacheError(f"a row's states {fault}")
        tolerance = TOLERANCES.get(self.states.dtype, 0.03) * float(now.abs().max())
        if not float((kept.to(now.device) - now.float()).abs().max()) <= tolerance:
            raise CannotCacheError(f"a row's states {fault}")


def rows_of(inputs: Mapping[str, Any]) -> Iterator[tuple[Row, int]]:
    """The rows of a batch of tokens and a mask without their padding, and where each begins."""
    given = {name for name, value in inputs.items() if value is not None}
    ids = inputs.get("input_ids")
    if given - _READ - _NOT_READ or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise CannotCacheError(f"the model is given {', '.join(sorted(given - _NOT_READ))}, not tokens alone")
    tokens = {name: inputs[name].cpu() for name in TOKENS if inputs.get(name) is not None}
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(tokens["input_ids"]) if mask is None else mask.cpu()
    if mask.shape != tokens["input_ids"].shape:
        raise CannotCacheError("the attention mask says more than what is padding")
    starts, lengths = mask.long().argmax(1).tolist(), mask.long().sum(1).tolist()
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        real = slice(start, start + length)
        if not length or not bool(mask[number, real].all()):
            raise CannotCacheError("the attention mask has gaps")
        yield Row({name: value[number, real] for name, value in tokens.items()}), start


def cached_replay(root: nn.Module, inputs: Mapping[str, Any], num_samples: int) -> Any:
    """The context in which a forward's trunk answers from the cache; `None` where there is none, or it lacks a row."""
    cache = CACHES.get(root)
    states = None if cache is None else cache.read(root, inputs)
    return None if cache is None or states is None else cache.replayed(states, num_samples)


@contextmanager
def _training(root: nn.Module) -> Iterator[None]:
    """Training mode inside: a Trainer calls `train()` only when its first step begins."""
    before = {module: module.training for module in root.modules()}
    root.train()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _answer(states: torch.Tensor, wrapped: bool, *args: Any, **_: Any) -> Any:
    if asks_for_gradient(args):
        states.requires_grad_()
    return (states,) if wrapped else states


def _stamp(trunk: Trunk) -> tuple:
    """What changes when a weight of the trunk is written, moved or replaced."""
    tensors = [t for m in trunk.below for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    return tuple((t.data_ptr(), version_of(t)) for t in tensors)


def _in_encoder(root: nn.Module, trunk: Trunk) -> bool:
    encoder = getattr(root, "get_encoder", lambda: None)()
    inside = set() if encoder is None else {id(module) for module in encoder.modules()}
    return all(id(block) in inside for block in trunk.blocks)


def _loss_at_padding(root: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether labels stand at padding, or behind it where a state answers for the next token."""
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if not isinstance(labels, torch.Tensor) or mask is None or labels.shape != mask.shape:
        return False
    read = labels != -100
    if shifts_labels(root):
        read = torch.nn.functional.pad(read[:, 1:], (0, 1))
    return bool((read & (mask == 0)).any())


def _store(shape: tuple[int, int], dtype: torch.dtype, max_bytes: int, folder: Path | None) -> torch.Tensor:
    size = shape[0] * shape[1] * dtype.itemsize
    if size <= max_bytes:
        return torch.empty(shape, dtype=dtype)
    if folder is None:
        raise CannotCacheError(
            f"the states take {size / 2**20:.0f} MiB, more than the {max_bytes / 2**20:.0f} MiB that are allowed"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # a name of its own: other processes, and other runs, may keep theirs in the same folder
    handle, file = tempfile.mkstemp(prefix="trunk-states-", suffix=".bin", dir=folder)
    os.close(handle)
    try:
        return torch.from_file(file, shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)
    finally:
        with suppress(PermissionError):  # gone when nothing reads it any more, however the process ends
            os.unlink(file)
