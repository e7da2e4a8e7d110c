"""The decision rules beside exported draws, for the plugin of vLLM: which rows to answer, and sets of classes.

As `peft_calib_vllm`, this imports nothing of the package. Tests hold it to `SelectiveThreshold` and `ConformalSets`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: What counts as a probability of zero, as in `peft_calib.calibration`.
SMALLEST = float(np.finfo(np.float32).tiny)
FILES = {"threshold": "decision.threshold.json", "sets": "decision.sets.json"}
RULES = ("SelectiveThreshold", "ConformalSets")
NONE = "No decision rule lies beside the draws: peft-calib decide fits one, and an export carries it along."
OTHER_TOKENS = "The decision rules are for the stored answers, and this request names others."


def tempered(p: np.ndarray, temperature: float | None) -> np.ndarray:
    """softmax(log(p) / T) over the last axis; p itself where there is no T."""
    if temperature is None:
        return p
    logits = np.log(np.maximum(p, SMALLEST)) / temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Threshold:
    """Rows of at least this confidence are answered: `(1,)`, or `(C,)` by the predicted class."""

    thresholds: np.ndarray
    temperature: float | None

    @classmethod
    def of(cls, rule: dict[str, Any]) -> Threshold:
        """From what `SelectiveThreshold` stores."""
        found = [part["threshold"] for part in rule["fitted"]["parts"]]
        expected = rule["num_classes"] if rule["settings"]["per_class"] else 1
        if len(found) != expected:
            raise ValueError(f"it has {len(found)} thresholds, and {expected} are expected")
        numbers = [math.inf if value is None else float(value) for value in found]
        return cls(np.array(numbers), rule["settings"]["temperature"])

    def decide(self, p: np.ndarray) -> np.ndarray:
        """`(N,)` whether rows of probabilities `(N, C)` are answered."""
        p = tempered(p, self.temperature)
        by_class = np.broadcast_to(self.thresholds, p.shape[-1:])
        return p.max(-1) >= by_class[p.argmax(-1)]


@dataclass(frozen=True, eq=False)
class Sets:
    """Classes whose score lies below a cut: low, chance there, chance up to high, high, chance there."""

    settings: dict[str, Any]
    cuts: np.ndarray  # `(G, 5)`: of all rows, or of each class or predicted class
    groups: tuple[int, ...]  # `(G,)` those classes

    @classmethod
    def of(cls, rule: dict[str, Any]) -> Sets | str:
        """From what `ConformalSets` stores; in words, why it cannot be applied here."""
        settings, parts = rule["settings"], rule["fitted"]["parts"]
        if settings["grouping"] not in (None, "label", "predicted"):
            return "goes by groups of rows, which a request does not name"
        if any(isinstance(part["cut"], dict) for part in parts):
            return "goes by weights of rows, which a request does not name"
        cuts = np.array([[math.inf if value is None else value for value in part["cut"]] for part in parts], float)
        if cuts.shape != (len(parts), 5) or settings["score"] not in ("lac", "aps", "raps"):
            raise ValueError("its cuts are five numbers of a score lac, aps or raps")
        groups = tuple(0 if part["group"] is None else int(part["group"]) for part in parts)
        if settings["grouping"] is not None and sorted(groups) != list(range(rule["num_classes"])):
            return "has no cut for some of the classes"
        return cls(settings, cuts, groups)

    def decide(self, p: np.ndarray) -> np.ndarray:
        """`(N, C)` whether classes of rows of probabilities `(N, C)` are in their sets."""
        p, asked = tempered(p, self.settings["temperature"]), self.settings
        smoothed = asked["randomized"] and asked["score"] == "lac"
        u = uniforms(p, asked["seed"]) if asked["randomized"] else None
        scores = class_scores(p, asked["score"], None if smoothed else u, asked["penalty"], asked["free_ranks"])
        place = np.zeros(p.shape, int)
        if asked["grouping"] is not None:
            group = np.arange(p.shape[1]) if asked["grouping"] == "label" else p.argmax(-1)[:, None]
            place = np.argsort(self.groups)[group]
        low, at_low, between, high, at_high = np.moveaxis(self.cuts[np.broadcast_to(place, p.shape)], -1, 0)
        above = np.where(scores < high, between, np.where(scores == high, at_high, 0.0))
        chances = np.where(scores < low, 1.0, np.where(scores == low, at_low, above))
        sets = chances > (u[:, None] if smoothed and u is not None else 0.0)
        if not asked["allow_empty"]:
            sets[np.arange(len(p)), p.argmax(-1)] |= ~sets.any(-1)
        return sets


def class_scores(p: np.ndarray, kind: str, u: np.ndarray | None, penalty: float, free_ranks: int) -> np.ndarray:
    """`(N, C)` scores of LAC, APS or RAPS, larger where a class fits worse."""
    if kind == "lac":
        return 1.0 - p
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=1)
    scores = np.cumsum(ranked, axis=1)
    ranked /= scores[:, -1:]
    scores /= scores[:, -1:].copy()
    if u is not None:
        scores -= u[:, None] * ranked
    if kind == "raps":
        scores += penalty * np.maximum(np.arange(1, p.shape[1] + 1) - free_ranks, 0)
    found = np.empty_like(scores)
    np.put_along_axis(found, order, scores, axis=1)
    return found


def uniforms(p: np.ndarray, seed: int) -> np.ndarray:
    """`(N,)` numbers in [0, 1), keyed by `seed`, by what the row is, and by how many like it come before it."""
    alike = _hashes(p, np.full(len(p), seed, np.int64))
    seen: dict[int, int] = {}
    before = np.empty(len(p))
    for place, key in enumerate(alike.tolist()):
        before[place] = seen.get(key, 0)
        seen[key] = seen.get(key, 0) + 1
    return (_hashes(before[:, None], alike) >> np.uint64(11)) * 2.0**-53


def _hashes(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """`(N,)` uint64 of rows at float32's resolution (splitmix64)."""
    words = [*rows.astype("<f4").view("<u4").astype(np.uint64).T, keys.astype(np.uint64)]
    state = np.full(len(keys), 0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            x = state ^ (word + np.uint64(0x9E3779B97F4A7C15))
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = x ^ (x >> np.uint64(31))
    return state


@dataclass(frozen=True)
class Rules:
    """What lies beside draws and is for them, and in words what it promises, or why there is none."""

    threshold: Threshold | None = None
    sets: Sets | None = None
    told: str = NONE

    @classmethod
    def beside(
        cls,
        folder: Path,
        read: Callable[[Path], dict[str, Any] | None],
        adapters: Sequence[str] | None,
        way: dict[str, Any] | None,
        label_tokens: Sequence[int] | None,
    ) -> Rules:
        """The rules in a folder of draws.

        Args:
            folder: The folder.
            read: Reads a JSON file, None where there is none.
            adapters: Digests of the draws by their index.
            way: The recalibration of draws that is stored there.
            label_tokens: That stand for the classes.

        Raises:
            ValueError: If a file is damaged.
        """
        applied = None if way is None else {key: way[key] for key in ("method", "parameters")}
        found: dict[str, Any] = {}
        told: list[str] = []
        for kind, name in FILES.items():
            stored = read(folder / name)
            if stored is None:
                continue
            if is_changed(stored):
                raise ValueError(f"{folder / name} was changed after the rule in it was fitted. Fit it again.")
            try:
                why = _unlike(stored, adapters, applied, label_tokens)
                rule = stored["rule"]
                made = why or (Threshold.of(rule) if kind == "threshold" else Sets.of(rule))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise ValueError(f"{folder / name} is damaged: {type(error).__name__} {error}.") from error
            if isinstance(made, str):
                told.append(f"The rule in {name} {made}.")
            else:
                found[kind] = made
                told.append(str(stored.get("promise") or f"{name} is applied."))
        return cls(**found, told=" ".join(told) or NONE)

    def rows(self, p: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
        """`answered` and `label_set` (the most probable class first) of each row, where there is a rule for it."""
        rows: list[dict[str, Any]] = [{} for _ in p]
        if self.threshold is not None:
            for row, answered in zip(rows, self.threshold.decide(p).tolist(), strict=True):
                row["answered"] = answered
        if self.sets is not None:
            order = np.argsort(-p, axis=-1, kind="stable").tolist()
            for row, likely, held in zip(rows, order, self.sets.decide(p).tolist(), strict=True):
                row["label_set"] = [labels[k] for k in likely if held[k]]
        return rows


def is_changed(content: dict[str, Any]) -> bool:
    """Whether a file with a digest says something else than when it was written."""
    return "digest" in content and content["digest"] != seal_of(content)


def seal_of(content: dict[str, Any]) -> str:
    """SHA-256 of a file's content without its digest, in the spelling of the package."""
    said = {name: _spelled(value) for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spelled(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_spelled(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unlike(
    stored: dict[str, Any], adapters: Sequence[str] | None, way: dict[str, Any] | None, tokens: Sequence[int] | None
) -> str | None:
    """In words, why a rule is not for these draws; None where it is."""
    to = stored["fitted_to"]
    if stored["format_version"] != 1 or stored["rule"]["format_version"] != 1:
        return "has a format that this plugin does not read"
    if stored["rule"]["rule"] not in RULES:
        return f"is a {stored['rule']['rule']}, which this plugin does not apply"
    if list(stored["adapters"]) != list(adapters or ()):
        return "was fitted for other weights than these draws: peft-calib export writes the draws with their rule"
    if to["how"] != "sample" or to["num_samples"] != len(stored["adapters"]):
        return "was fitted for another way of predicting than these draws"
    if to["by"] != "probability":
        return "goes by P(error) of an uncertainty head, which is not served"
    if to["recalibration"] != way:
        return "was fitted with another recalibration"
    if (to["label_tokens"] or None) != (list(tokens) if tokens else None):
        return "was fitted for other label tokens"
    return None
