"""What a prediction says, how sure it is, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import datasets
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import fill_folder, write_atomically
from ..json_files import Fields, read_json

_TENSORS, _FACTS = "prediction.safetensors", "prediction.json"


class NotFiniteError(ValueError):
    """A model answered with NaN or infinity (`wrong`, bool (K, N)), of which no prediction can be made."""

    def __init__(self, wrong: torch.Tensor, where: str = "") -> None:
        self.wrong = wrong
        rows = wrong.any(0).nonzero().flatten().tolist()
        draws = wrong.any(1).nonzero().flatten().tolist()
        super().__init__(
            f"The model's answers are not finite (NaN or infinity) for {len(rows)} of {wrong.shape[1]} items{where} "
            f"({_some(rows)}), in {len(draws)} of {len(wrong)} draws ({_some(draws)}), so nothing can be predicted "
            "for them. Where half precision overflows, load the model in bfloat16 or float32; where training "
            "diverged, take an earlier checkpoint or a lower learning rate; or leave these items out."
        )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


@dataclass(frozen=True, eq=False)
class DrawnResult:
    """What classification and regression share: rows, where they come from, and saving."""

    num_forwards: float
    how: str = "sample"
    seed: int | None = None
    antithetic: bool = False
    draws_per_row: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    #: Name of the tensor (K, N, ...) with one entry for each draw and item.
    samples_name: ClassVar[str]
    #: Further tensors of a kind, one entry for each item.
    item_tensors: ClassVar[tuple[str, ...]] = ()
    #: Such that a result may lack.
    optional_item_tensors: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        wrong = ~torch.isfinite(self._samples) & self._made
        if bool(wrong.any()):
            raise NotFiniteError(wrong.flatten(2).any(-1) if wrong.dim() > 2 else wrong)

    def __repr__(self) -> str:
        facts = [f"{self.num_samples} draws of {len(self)} items", f"how={self.how!r}", f"seed={self.seed}"]
        facts += ["antithetic"] if self.antithetic else []
        facts += [f"{self.average_num_samples:.1f} draws an item"] if self.draws_per_row is not None else []
        facts += ["weighted"] if self.weights is not None else []
        facts += [f"cost of {self.num_forwards:g} forwards", *self._facts()]
        return f"{type(self).__name__}({', '.join(facts)})"

    def _facts(self) -> list[str]:
        """What else a line about the result should say."""
        return []

    def __len__(self) -> int:
        return self._samples.shape[1]

    @property
    def _samples(self) -> torch.Tensor:
        return getattr(self, self.samples_name)

    def _padded(self, num_samples: int) -> torch.Tensor:
        if num_samples == self.num_samples:
            return self._samples
        missing = self._samples.new_full((num_samples - self.num_samples, *self._samples.shape[1:]), float("nan"))
        return torch.cat([self._samples, missing])

    @property
    def num_samples(self) -> int:
        """Number of draws K (of the row with the most)."""
        return self._samples.shape[0]

    @property
    def average_num_samples(self) -> float:
        """Mean number of draws of a row."""
        return float(self.num_samples if self.draws_per_row is None else self.draws_per_row.double().mean())

    @cached_property
    def _made(self) -> torch.Tensor:
        """Which draws were made, (K, N, 1)."""
        return (torch.arange(self.num_samples)[:, None] < self._counts).unsqueeze(-1)

    @property
    def _counts(self) -> torch.Tensor:
        return torch.full((len(self),), self.num_samples) if self.draws_per_row is None else self.draws_per_row

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the draws that were made of float64 values (K, N, C)."""
        if self.weights is not None:
            return torch.tensordot(self._shares, values, 1)
        return torch.where(self._made, values, 0).sum(0) / self._counts.unsqueeze(-1)

    @property
    def _shares(self) -> torch.Tensor:
        """Weights of the draws, float64 (K,), summing to one."""
        weights = torch.ones(self.num_samples) if self.weights is None else self.weights
        return weights.double() / weights.double().sum()

    @property
    def _made_by(self) -> dict[str, Any]:
        return {"how": self.how, "seed": self.seed, "antithetic": self.antithetic}

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {name: getattr(self, name) for name in self._tensor_names()}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    @classmethod
    def _tensor_names(cls) -> tuple[str, ...]:
        own = (cls.samples_name, *cls.item_tensors, *cls.optional_item_tensors)
        return (*own, "draws_per_row", "positions", "labels", "weights")

    @classmethod
    def _read_facts(cls, facts: Fields) -> dict[str, Any]:
        """What `_made_by` says, out of a file."""
        return {
            "how": facts.text("how"),
            "seed": facts.integer("seed", default=None),
            "antithetic": facts.flag("antithetic", False),
        }

    def save(self, path: str | Path) -> Path:
        """Write the prediction to a folder, as safetensors and JSON; nothing half written takes a good one's place.

        Args:
            path: The folder; made if missing.

        Returns:
            The folder.
        """
        folder = Path(path)
        facts = {"kind": type(self).__name__, "num_forwards": self.num_forwards, **self._made_by}

        def write(place: Path) -> None:
            save_file(self._tensors(), place / _TENSORS)
            write_atomically(place / _FACTS, json.dumps(facts, indent=2) + "\n")

        fill_folder(folder, write, _FACTS)
        return folder

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a prediction back.

        Args:
            path: A folder written by `save`.

        Returns:
            The prediction.

        Raises:
            ValueError: If the folder holds none, or one of another kind.
        """
        folder = Path(path)
        if not (folder / _FACTS).is_file() or not (folder / _TENSORS).is_file():
            raise ValueError(f"{folder} holds no saved prediction ({_FACTS} and {_TENSORS}).")
        facts = read_json(folder / _FACTS, "Predict and save again")
        if facts.text("kind", default="") != cls.__name__:
            raise ValueError(f"{folder} holds no {cls.__name__}. Load it with the class that saved it.")
        fields: dict[str, Any] = {"num_forwards": facts.number("num_forwards", least=0), **cls._read_facts(facts)}
        try:
            tensors = load_file(folder / _TENSORS)
        except SafetensorError as error:
            raise ValueError(f"{folder / _TENSORS} is damaged ({error}). Predict and save again.") from error
        names, needed = set(cls._tensor_names()), {cls.samples_name, *cls.item_tensors}
        if not needed <= tensors.keys() <= names:
            raise ValueError(
                f"{folder / _TENSORS} holds {sorted(tensors)}, but must hold {sorted(needed)} and at most "
                f"{sorted(names)}. Predict and save again."
            )
        return cls(**tensors, **fields)

    @classmethod
    def concatenate(cls, parts: Sequence[Self], batch_rows: Sequence[int] | None = None) -> Self:
        """Predictions of several batches as one; the cost is their mean, weighted by their rows.

        Args:
            parts: Predictions made in the same way, in order.
            batch_rows: Number of batch rows behind each part, to number the rows of token predictions through.

        Returns:
            One prediction.

        Raises:
            ValueError: If there is none.
        """
        if not parts:
            raise ValueError("There is no prediction to concatenate.")
        K = max(part.num_samples for part in parts)
        rows = list(batch_rows or map(len, parts))
        fields: dict[str, Any] = {
            "num_forwards": sum(p.num_forwards * n for p, n in zip(parts, rows, strict=True)) / max(sum(rows), 1),
            "weights": parts[0].weights,
            cls.samples_name: torch.cat([part._padded(K) for part in parts], dim=1),
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in cls.item_tensors},
        }
        if any(part.draws_per_row is not None or part.num_samples < K for part in parts):
            fields["draws_per_row"] = torch.cat([part._counts for part in parts])
        for name in ("labels", *cls.optional_item_tensors):
            known = [getattr(part, name) for part in parts if getattr(part, name) is not None]
            if len(known) == len(parts):
                fields[name] = torch.cat(known)
        starts = [sum(rows[:i]) for i in range(len(rows))]
        placed = [(p.positions, start) for p, start in zip(parts, starts, strict=True) if p.positions is not None]
        if len(placed) == len(parts):
            fields["positions"] = torch.cat([where + torch.tensor([start, 0]) for where, start in placed])
        return cls(**fields, **parts[0]._made_by)

    @classmethod
    def stack_draws(cls, parts: Sequence[Self]) -> Self:
        """Predictions of the same rows with successive draws as one with all draws."""
        changed: dict[str, Any] = {cls.samples_name: torch.cat([part._samples for part in parts])}
        if parts[0].weights is not None:
            changed["weights"] = torch.cat([part.weights for part in parts])
        return replace(parts[0], num_forwards=sum(part.num_forwards for part in parts), **changed)

    def select(self, items: torch.Tensor) -> Self:
        """Some of the items, or all of them in another order.

        Args:
            items: Their places, int64.

        Returns:
            Their prediction.
        """
        names = ("draws_per_row", "positions", "labels", *self.item_tensors, *self.optional_item_tensors)
        changed = {name: getattr(self, name)[items] for name in names if getattr(self, name) is not None}
        return replace(self, **{self.samples_name: self._samples[:, items]}, **changed)

    def _columns(self) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        if self.positions is not None:
            columns |= {"row": self.positions[:, 0].tolist(), "position": self.positions[:, 1].tolist()}
        if self.draws_per_row is not None:
            columns["num_samples"] = self.draws_per_row.tolist()
        if self.labels is not None:
            columns["label"] = self.labels.tolist()
        return columns


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DrawnProbabilities(DrawnResult):
    """What results of probabilities share: those of the draws, and their mean, which is never that of logits."""

    samples_name: ClassVar[str] = "sample_probabilities"
    sample_probabilities: torch.Tensor

    @cached_property
    def _p(self) -> torch.Tensor:
        return torch.where(self._made, self.sample_probabilities.double(), 0)

    @cached_property
    def _predictive(self) -> torch.Tensor:
        return self._mean(self._p)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Prediction(DrawnProbabilities):
    """Probabilities of K draws and what follows from them. All tensors are on the CPU.

    The predictive distribution is the mean of the draws' probabilities, never of their logits. Its entropy splits into
    what the draws agree is uncertain and what they disagree on: `H[p] = E_k H[p_k] + MI`, where the mutual information
    `MI = E_k KL(p_k || p)` (Houlsby et al. 2011, arXiv 1112.5745) is 0 when all draws say the same.

    Args:
        sample_probabilities: Float32 (K, N, C); NaN for draws that an adaptive prediction did not make, and nowhere
            else.
        num_forwards: Cost in units of one deterministic forward of the batch.
        how: How it was made.
        seed: Key of the draws.
        antithetic: Whether they were made in mirrored pairs.
        draws_per_row: Int64 (N,), number of draws of each item, where they differ.
        positions: Int64 (N, 2), row and token position of each item, where items are tokens.
        labels: Labels of the items, if the batch had them.
        weights: Float64 (K,), weights of the draws in every mean; equal when `None`.

    Example:
        >>> p = Prediction(sample_probabilities=torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), num_forwards=2)
        >>> p.probabilities.tolist(), round(float(p.mutual_information[0]), 4)
        ([[0.5, 0.5]], 0.6931)
    """

    def _facts(self) -> list[str]:
        if not len(self):
            return []
        means = {"confidence": self.confidence, "mutual information": self.mutual_information}
        told = [f"mean {name} {float(values.mean()):.3f}" for name, values in means.items()]
        return [f"{self._samples.shape[-1]} classes", *told]

    @cached_property
    def probabilities(self) -> torch.Tensor:
        """Mean of the draws' probabilities, float32 (N, C)."""
        return self._predictive.float()

    @property
    def predictions(self) -> torch.Tensor:
        """Most probable class, int64 (N,)."""
        return self._predictive.argmax(-1)

    @property
    def confidence(self) -> torch.Tensor:
        """Probability of the most probable class, float32 (N,)."""
        return self._predictive.amax(-1).float()

    @cached_property
    def entropy(self) -> torch.Tensor:
        """Entropy of the predictive distribution, nats, float64 (N,)."""
        return torch.special.entr(self._predictive).sum(-1)

    @cached_property
    def expected_entropy(self) -> torch.Tensor:
        """Mean entropy of the draws' distributions, nats, float64 (N,)."""
        return self._mean(torch.special.entr(self._p).sum(-1, keepdim=True)).squeeze(-1)

    @cached_property
    def mutual_information(self) -> torch.Tensor:
        """Mean divergence of the draws from the predictive distribution, nats, float64 (N,); 0 for one draw."""
        divergence = torch.xlogy(self._p, self._p) - torch.xlogy(self._p, self._predictive)
        return self._mean(divergence.sum(-1, keepdim=True)).squeeze(-1).clamp_min(0)

    def to_dataset(self) -> datasets.Dataset:
        """One row for each item: probabilities, prediction, confidence and the entropies.

        Returns:
            A `datasets.Dataset`, for tokens with their `row` and `position`.
        """
        columns = self._columns() | {"probabilities": self.probabilities.tolist()}
        columns["prediction"] = self.predictions.tolist()
        for name in ("confidence", "entropy", "expected_entropy", "mutual_information"):
            columns[name] = getattr(self, name).tolist()
        return datasets.Dataset.from_dict(columns)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RegressionPrediction(DrawnResult):
    """Values of K draws, their mean and their variance. All tensors are on the CPU.

    The variance is that of the function over the draws; the noise of the observations is not part of it.

    Args:
        sample_values: Float32 (K, N, D); NaN for draws that were not made.
        num_forwards: Cost in units of one deterministic forward of the batch.
        how: How it was made.
        seed: Key of the draws.
        antithetic: Whether they were made in mirrored pairs.

    Example:
        >>> p = RegressionPrediction(sample_values=torch.tensor([[[1.0]], [[3.0]]]), num_forwards=2)
        >>> p.mean.tolist(), p.variance.tolist()
        ([[2.0]], [[2.0]])
    """

    samples_name: ClassVar[str] = "sample_values"
    sample_values: torch.Tensor

    @cached_property
    def _mean_value(self) -> torch.Tensor:
        return self._mean(self.sample_values.double())

    @property
    def mean(self) -> torch.Tensor:
        """Predictive mean, float32 (N, D)."""
        return self._mean_value.float()

    @cached_property
    def variance(self) -> torch.Tensor:
        """Unbiased variance over the draws, float32 (N, D); 0 for one draw."""
        if self.weights is not None:
            spread = self._mean((self.sample_values.double() - self._mean_value) ** 2)
            lost = float((self._shares**2).sum())
            return (spread / (1 - lost) if lost < 1 else spread).float()
        squares = torch.where(self._made, (self.sample_values.double() - self._mean_value) ** 2, 0).sum(0)
        return (squares / (self._counts - 1).clamp_min(1).unsqueeze(-1)).float()

    def to_dataset(self) -> datasets.Dataset:
        """One row for each item: mean and variance.

        Returns:
            A `datasets.Dataset`.
        """
        columns = {"mean": self.mean.tolist(), "variance": self.variance.tolist()}
        return datasets.Dataset.from_dict(self._columns() | columns)
