"""The configuration fields that all three methods share: LoRA's names with LoRA's meanings."""

from __future__ import annotations

import math
import tempfile
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from ..files import write_atomically
from ..identity import ADAPTER_MENDS, open_weights, stamp_weights
from ..json_files import check_fields, read_json
from ..registry import ensure_peft_type
from ..whole_numbers import check_whole, plain_whole
from .lora_options import check_no_options_of_lora
from .sealing import check_fields_recorded, check_folder, embeddings_beside
from .seeding import seed_of_adapter

#: Fields of the three methods that steer where an adapter goes; the slot table says where that is. The seed that was
#: taken has gone into the tensors.
_PLACEMENT = frozenset("target_modules layers_to_transform layers_pattern fan_in_fan_out start_seed".split())

#: Stands in every saved configuration: without this package PEFT stops with a KeyError that names the type alone.
REMEDY = (
    "PEFT alone does not know this adapter and stops with a KeyError that names its type: `pip install peft-calib`, "
    "and `import peft_calib` before it is loaded."
)


@dataclass
class CalibLoraConfig(PeftConfig):
    """Fields common to `HyperLoraConfig`, `BayesianLoraConfig` and `CurveLoraConfig`.

    Args:
        r: Rank of the low-rank update, at least 1.
        lora_alpha: Numerator of the scaling `s = lora_alpha / r`.
        lora_dropout: Probability with which inputs of the update are dropped in training, in [0, 1).
        use_rslora: Scale by `lora_alpha / sqrt(r)` instead.
        target_modules: Names (or a regular expression) of the linear maps to adapt; `"all-linear"` for all of them;
            `None` for PEFT's default of the architecture.
        exclude_modules: Names (or a regular expression) of maps to leave alone.
        layers_to_transform: Layer index or indices to adapt; all when `None`.
        layers_pattern: Name of the module list that holds the layers, where PEFT does not know it.
        rank_pattern: Rank of particular modules, by name or regular expression.
        alpha_pattern: `lora_alpha` of particular modules, likewise.
        modules_to_save: Further modules that are trained and saved whole, such as a new head.
        trainable_token_indices: Tokens whose embeddings are trained and saved beside the law; by the name of the
            embedding where it is not the input's.
        bias: `"none"`, `"all"`, or the method's `"<prefix>_only"`.
        fan_in_fan_out: Whether the base weight is stored (in, out), as in `Conv1D`; corrected with a warning.
        init_weights: `False` draws moderate non-zero factors instead of starting at the base model's function.
        slot_table: Written when the adapter is saved, compared when it is loaded. Not for users.
        identity: Likewise: what the adapter is, field by field and tensor by tensor. Not for users.
        start_seed: Written when an adapter is added whose configuration names no seed: the seed that was taken, from
            PyTorch's and the adapter's name. Not for users.
        how_to_load: For whoever opens the file because PEFT stopped at it.

    Attributes:
        peft_name: The method's name in PEFT's enum, upper-case.
        training_fields: Fields that change nothing in what a trained adapter computes.
        draws_differ: Whether a prediction with several draws says more than one with the mean, by default.
    """

    r: int = field(default=8, metadata={"help": "Rank of the low-rank update."})
    lora_alpha: int | float = field(default=8, metadata={"help": "Numerator of the scaling lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the update's input while training."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear maps to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear maps to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "Rank of particular modules."})
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "lora_alpha of particular modules."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained."}
    )
    bias: str = field(default="none", metadata={"help": "'none', 'all' or '<prefix>_only'."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is stored (in, out)."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the base model's function."})
    slot_table: list | None = field(default=None, metadata={"help": "Written with the adapter; not for users."})
    identity: dict | None = field(
        default=None, repr=False, metadata={"help": "Written with the adapter; not for users."}
    )

    start_seed: int | None = field(default=None, metadata={"help": "Written with the adapter; not for users."})
    how_to_load: str = field(default=REMEDY, repr=False, metadata={"help": "Written with the adapter; not for users."})

    peft_name: ClassVar[str | None] = None
    training_fields: ClassVar[frozenset[str]] = _PLACEMENT
    draws_differ: ClassVar[bool] = False

    def __new__(cls, *args: Any, **given: Any) -> CalibLoraConfig:
        check_no_options_of_lora(cls.__name__, (one.name for one in fields(cls)), given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_name is not None:
            self.peft_type = ensure_peft_type(self.peft_name)
        for one in fields(self):
            setattr(self, one.name, plain_whole(getattr(self, one.name)))  # what is saved as JSON
        for name, rank in {"r": self.r, **(self.rank_pattern or {})}.items():
            check_whole(rank, f"The rank of {name!r}", 1)
        for owner in reversed(type(self).__mro__):
            if issubclass(owner, CalibLoraConfig):
                check_fields(self, owner, type(self).__name__ if self.slot_table is None else CONFIG_NAME)
        # only the table of a saved adapter must fit; one written when a model is saved must not bind the object
        self._slots_to_match = self.slot_table
        #: Whether the tensors that are loaded next have still to be held against `identity`.
        self.unverified = self.identity is not None
        # likewise: the seed of a saved adapter is its own, but another adapter added with this object takes another
        self._saved_seed = self.start_seed
        for name in ("start_seed", "seed", "sample_seed"):
            seed = getattr(self, name, None)
            if seed is not None and not -(2**63) <= seed < 2**63:
                raise ValueError(f"{name} must be an integer of at most 64 bits, got {seed!r}.")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            where = name if name == "lora_alpha" else f"alpha_pattern[{name!r}]"
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise ValueError(f"{where} must be a finite number above 0, got {alpha!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is a probability in [0, 1), got {self.lora_dropout!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform: set both, or neither.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be combined with target_modules given as a regular expression.")
        if self.bias not in ("none", "all") and not self.bias.endswith("_only"):
            raise ValueError(f"bias must be 'none', 'all' or '<prefix>_only', got {self.bias!r}.")
        self.check_values()
        if self.peft_type is not None:
            check_fields_recorded(self)

    def check_values(self) -> None:
        """Raise `ValueError` for values that a method cannot work with; types are checked already. A method's hook."""

    def check_choices(self, allowed: dict[str, tuple[str, ...]]) -> None:
        """Raise `ValueError` for the first field whose value is not among its allowed ones."""
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")

    def check_sizes(self, most: dict[str, int | None]) -> None:
        """Raise `ValueError` for the first field below 1 or beyond all use, before anything is built of it."""
        for name, bound in most.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
            if value is not None and bound is not None and value > bound:
                raise ValueError(f"{name} must be at most {bound}, got {value!r}.")

    def check_ranges(self, ranges: dict[str, tuple[float, float | None]]) -> None:
        """Raise `ValueError` for the first field that is not within its least and largest value."""
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and (value < least or (most is not None and value > most)):
                expected = "not be negative" if most is None and not least else f"lie in [{least}, {most}]"
                raise ValueError(f"{name} must {expected}, got {value!r}.")

    def sizes_in(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, set[int]]:
        """The values that size fields may have, given the shapes of a law's tensors; a method names its own."""
        return {}

    def scaling_of(self, module: str) -> float:
        """The factor s of a slot, by the name of its module."""
        return self.scaling(self.rank_of(module), self.alpha_of(module))

    def rank_of(self, module: str) -> int:
        """The rank of a slot, by the name of its module."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), module), self.r)

    def alpha_of(self, module: str) -> float:
        """`lora_alpha` of a slot, by the name of its module."""
        return self.alpha_pattern.get(get_pattern_key(self.alpha_pattern.keys(), module), self.lora_alpha)

    @property
    def given_seed(self) -> int | None:
        """The seed that the user has named, in `seed` or `sample_seed`; `None` where it is to follow PyTorch's."""
        return getattr(self, "seed", getattr(self, "sample_seed", None))

    @property
    def init_seed(self) -> int:
        """Key of everything random in an adapter: the seed given, else the one taken when it was added, else 0."""
        return self.start_seed or 0 if self.given_seed is None else self.given_seed

    def take_seed(self, adapter_name: str) -> None:
        """Fill in `start_seed` for an adapter that is being added under a name, unless a seed is given."""
        if self.given_seed is not None:
            self.start_seed = None
        elif self._saved_seed is None and self._slots_to_match is not None:
            self.start_seed = 0  # saved by a version in which None stood for 0
        else:
            self.start_seed = seed_of_adapter(adapter_name) if self._saved_seed is None else self._saved_seed

    def scaling(self, r: int, lora_alpha: float) -> float:
        """The factor s of `s * B A` for a slot of rank `r`."""
        return lora_alpha / math.sqrt(r) if self.use_rslora else lora_alpha / r

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, whole or not at all, and mark the weights beside it as its own."""
        place = Path(save_directory)
        if place.is_file():
            raise NotADirectoryError(f"{place} is a file; name a folder.")
        place.mkdir(parents=True, exist_ok=True)
        beside = embeddings_beside(self, place)
        before = self.identity
        if beside is not None:
            self.identity = {**(before or {}), "embeddings": beside}
        try:
            with tempfile.TemporaryDirectory() as scratch:
                super().save_pretrained(scratch, **kwargs)
                text = (Path(scratch) / CONFIG_NAME).read_text(encoding="utf-8")
        finally:
            self.identity = before
        write_atomically(place / CONFIG_NAME, text)
        if beside is not None:
            stamp_weights(place / SAFETENSORS_WEIGHTS_NAME, self.identity["digest"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, **kwargs):
        """Load the configuration, after holding it against the weights in a local folder.

        PEFT reads the configuration first, so a folder that is damaged, or is not what was saved, is refused before
        the base model is touched.

        Raises:
            ValueError: If the folder holds pickled weights only, its safetensors file is truncated or damaged, or the
                configuration or a tensor is not the one that was saved.
            TypeError: If the file holds no PEFT configuration.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        check_adapter_file(folder)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (ValueError, TypeError) as error:
            if CONFIG_NAME in str(error):
                raise
            # A TypeError of a wrong value says nothing to who loads a file; a file that is no configuration at all is
            # PEFT's own TypeError, which its users catch.
            kind = TypeError if "missing required keys" in str(error) else ValueError
            raise kind(f"{folder / CONFIG_NAME}: {error} {ADAPTER_MENDS}.") from error
        if isinstance(config, CalibLoraConfig) and (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            check_folder(config, folder)
            config.unverified = False
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields of a file; `ValueError` names it where it is no JSON mapping."""
        content = dict(read_json(path_json_file, ADAPTER_MENDS).content)
        content.pop("runtime_config", None)
        if content.get("slot_table") is not None and "lora_alpha" not in content:
            warnings.warn(
                f"{path_json_file} lacks lora_alpha, which scales the adapter; the default is taken, which may not be "
                "what it was trained with. Restore the file as save_pretrained wrote it.",
                UserWarning,
                stacklevel=3,
            )
        return content


def check_adapter_file(folder: str | Path) -> None:
    """Refuse a local adapter folder whose weights are pickled, truncated or damaged; Hub ids pass."""
    folder = Path(folder)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).exists():
        if (folder / WEIGHTS_NAME).exists():
            raise ValueError(
                f"{folder} holds pickled weights ({WEIGHTS_NAME}) only. peft_calib loads safetensors, never pickle: "
                "save the adapter again with save_pretrained(..., safe_serialization=True)."
            )
        return
    with open_weights(folder) as file:
        file.keys()
