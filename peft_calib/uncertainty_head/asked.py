"""How a model is asked where a head is fitted and where it is used: the same way, of the same adapter."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..base_models import base_fingerprint, is_other_base
from ..identity import active_adapter, adapter_digest, adapter_form, digest_of_folder, folder_digest, tensor_hash
from ..json_files import Fields
from ..prediction.heads import TASKS
from ..provenance.splits import RowSet, check_unseen, read_split
from .copied import CopiedHead
from .located import locate


@dataclass(frozen=True)
class Asked:
    """The arguments of `extract_features` and `copy_head` that decide what a head is fitted to.

    Attributes:
        task: What the logits are.
        label_tokens: Ids of the tokens that stand for the classes of a language model.
        head_module: Name of the head where it is not a usual one.
        num_samples: Functions K; 1 for the deterministic model.
        seed: Key of the draws.
        dropout: Probability of Monte Carlo dropout.
        adapter_names: Adapters of the model that are the functions.
    """

    task: str = "auto"
    label_tokens: tuple[int, ...] | None = None
    head_module: str | None = None
    num_samples: int | None = 1
    seed: int = 0
    dropout: float | None = None
    adapter_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, model: nn.Module, label_tokens: Sequence[int | str] | None, tokenizer: Any, **how: Any) -> Asked:
        """The same with texts among the label tokens as their ids, and with as many functions as there will be."""
        located = locate(model, label_tokens=label_tokens, tokenizer=tokenizer, **how)
        names, tokens = how.pop("adapter_names", None), located.label_tokens
        how["num_samples"] = int(located.predictor.num_samples)
        return cls(
            label_tokens=None if tokens is None else tuple(tokens),
            adapter_names=None if names is None else tuple(names),
            **how,
        )

    @property
    def words(self) -> dict[str, Any]:
        """As arguments."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> Asked:
        """The inverse of `words`, checked."""
        tokens, names = fields.listing("label_tokens", int, None), fields.listing("adapter_names", str, None)
        return cls(
            task=fields.text("task", among=TASKS),
            label_tokens=None if tokens is None else tuple(tokens),
            head_module=fields.text("head_module", default=None),
            num_samples=fields.integer("num_samples", least=1),
            seed=fields.integer("seed"),
            dropout=fields.number("dropout", least=0, most=1, default=None),
            adapter_names=None if names is None else tuple(names),
        )


@dataclass(frozen=True)
class Belonging:
    """What a head belongs to: adapters by their digests, the base model, and the parameters that it starts at.

    Attributes:
        adapters: Digest of each adapter that is a function; one where one adapter is all of them, none without one.
        base: Fingerprint of the base model; None where it has none.
        start: Hash of the frozen heads' parameters.
        forms: What of each adapter stays in other data types (`identity.adapter_form`).
    """

    adapters: tuple[str, ...]
    base: str | None
    start: str
    forms: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: nn.Module, asked: Asked, head: CopiedHead, folders: Mapping[str, Path] | None = None
    ) -> Belonging:
        """Of a live model; its adapters by the folders that they were just loaded from, where these are known."""
        if not getattr(model, "peft_config", None):
            return cls((), base_fingerprint(model), start_hash(head))
        names = asked.adapter_names or (active_adapter(model),)
        digests = (adapter_digest(model, name) if folders is None else folder_digest(folders[name]) for name in names)
        forms = tuple(adapter_form(model, name) for name in names)
        return cls(tuple(digests), base_fingerprint(model), start_hash(head), forms)

    def is_rounded(self, found: Belonging) -> bool:
        """Whether adapters differ in the data types of their tensors, so that values cannot be held against values."""
        ours, theirs = ([form.partition(":") for form in one.forms] for one in (self, found))
        alike = bool(ours) and [form[2] for form in ours] == [form[2] for form in theirs]
        return self.adapters != found.adapters and alike and ours != theirs

    def difference(self, found: Belonging) -> str | None:
        """In words, what is another one; None if all is the same, or as far as other data types let it be told."""
        if self.adapters != found.adapters and not self.is_rounded(found):
            return "another adapter, or one that has been trained on, edited or replaced since"
        if is_other_base(self.base, found.base):
            return "another base model"
        # of another data type the parameters are rounded otherwise, and the base model could not be compared
        same_type = None not in (self.base, found.base) and self._dtype == found._dtype
        return "other parameters of the classification head" if same_type and self.start != found.start else None

    @property
    def _dtype(self) -> str:
        return (self.base or "").partition(":")[0]

    @classmethod
    def from_fields(cls, fields: Fields) -> Belonging:
        """The inverse of `asdict`, checked."""
        adapters = tuple(fields.listing("adapters", str))
        forms = fields.listing("forms", str, None) or ()  # earlier heads have none
        return cls(adapters, fields.text("base", default=None), fields.text("start"), tuple(forms))


def start_hash(head: CopiedHead) -> str:
    """A hash of the parameters that a copied head starts at."""
    digest = hashlib.sha256()
    for start in head.starts:
        for name in sorted(start):
            digest.update(f"{name} {tensor_hash(start[name])} ".encode())
    return f"sha256:{digest.hexdigest()}"


def check_belongs(recorded: Belonging, found: Belonging, allow_other: bool) -> None:
    """Refuse a model that a head does not belong to, or warn of it where that was asked for."""
    other = recorded.difference(found)
    if other is not None:
        _refuse(f"The uncertainty head was not fitted for this model, which has {other}", allow_other)
    elif recorded.is_rounded(found):
        here, there = (" and ".join(form.partition(":")[0] for form in one.forms) for one in (found, recorded))
        warnings.warn(
            f"The tensors of this model's adapter are {here}, and were {there} where the uncertainty head was fitted: "
            "it is an adapter of the same configuration and shapes, but that its values are the same cannot be told. "
            "Load the base model in the data type of the fit to be sure.",
            UserWarning,
            stacklevel=4,
        )


def check_folder(recorded: Belonging, folder: Path, allow_other: bool, called: str | None = None) -> None:
    """The same for the adapter that lies in a folder, if one does and it is the only one of the head."""
    if len(recorded.adapters) == 1 and digest_of_folder(folder) not in (None, *recorded.adapters):
        place = f"in {folder}" if called is None else f"for {called}"
        _refuse(f"The uncertainty head {place} was fitted for another adapter than lies there now", allow_other)


def _refuse(told: str, allow_other: bool) -> None:
    if not allow_other:
        raise ValueError(
            f"{told}. Its P(error) would be about other predictions: fit it again, load the adapter that it was "
            "fitted for, or pass allow_other=True."
        )
    warnings.warn(f"{told}; it is used all the same.", UserWarning, stacklevel=4)


def refuse_trained_on(model: nn.Module, rows: Any, purpose: str) -> None:
    """Refuse rows that the adapter is known to have been trained on, as far as they can be told."""
    if isinstance(rows, Mapping) or not getattr(model, "peft_config", None):
        return
    try:
        known = RowSet.of(getattr(rows, "dataset", rows))
    except TypeError:
        return
    if known.kind in read_split(model).trained_on:
        check_unseen(model, known, purpose, fitting=True)
