"""The configuration fields that all three methods share: LoRA's names with LoRA's meanings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


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
        bias: `"none"`, `"all"`, or the method's `"<prefix>_only"`.
        fan_in_fan_out: Whether the base weight is stored (in, out), as in `Conv1D`; corrected with a warning.
        init_weights: `False` draws moderate non-zero factors instead of starting at the base model's function.
        slot_table: Written when the adapter is saved, compared when it is loaded. Not for users.
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
    bias: str = field(default="none", metadata={"help": "'none', 'all' or '<prefix>_only'."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Base weight is stored (in, out)."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the base model's function."})
    slot_table: list | None = field(default=None, metadata={"help": "Written with the adapter; not for users."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # only the table of a saved adapter must fit; one written when a model is saved must not bind the object
        self._slots_to_match = self.slot_table
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"The rank of {name!r} must be a positive integer, got {rank!r}.")
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

    def check_choices(self, allowed: dict[str, tuple[str, ...]]) -> None:
        """Raise `ValueError` for the first field whose value is not among its allowed ones."""
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")

    def scaling(self, r: int, lora_alpha: float) -> float:
        """The factor s of `s * B A` for a slot of rank `r`."""
        return lora_alpha / math.sqrt(r) if self.use_rslora else lora_alpha / r

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, **kwargs):
        """Load the configuration, after checking that a local folder holds readable safetensors weights.

        PEFT reads the configuration first, so a damaged folder is refused before the base model is touched.

        Raises:
            ValueError: If the folder holds pickled weights only, or its safetensors file is truncated or damaged.
        """
        check_adapter_file(Path(pretrained_model_name_or_path) / (subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def check_adapter_file(folder: str | Path) -> None:
    """Refuse a local adapter folder whose weights cannot be read completely; Hub ids pass.

    Args:
        folder: Adapter folder.

    Raises:
        ValueError: If there are only pickled weights, or the safetensors file is truncated or damaged.
    """
    folder = Path(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists():
        if (folder / WEIGHTS_NAME).exists():
            raise ValueError(
                f"{folder} holds pickled weights ({WEIGHTS_NAME}) only. peft_calib loads safetensors, never pickle: "
                "save the adapter again with save_pretrained(..., safe_serialization=True)."
            )
        return
    try:
        with safe_open(weights, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is truncated or damaged and cannot be read ({error}). Copy or download the adapter again."
        ) from error
