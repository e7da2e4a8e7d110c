"""Runs whose settings differ in the seed alone are replicates of one method: which they are, and their comparison."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..calibration import compare_groups
from ..calibration.resampling.groups import GroupComparison
from .aligned import Aligned
from .settings import RunConfig


def replicates_among(configs: Mapping[str, RunConfig]) -> dict[str, list[str]] | None:
    """Names of runs by what they have in common, where there are several methods and several runs of each; else None.

    The runs of a method come in the order of their seeds.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(configs, key=lambda name: configs[name].seed):
        groups.setdefault(json.dumps(_without_seed(configs[name]), sort_keys=True), []).append(name)
    if len(groups) < 2 or min(map(len, groups.values())) < 2:
        return None
    order = list(configs)
    members = sorted(groups.values(), key=lambda names: min(order.index(name) for name in names))
    return dict(zip(_called([configs[names[0]] for names in members]), members, strict=True))


def compare_replicates(
    aligned: Aligned, groups: Mapping[str, Sequence[str]], configs: Mapping[str, RunConfig], **options: Any
) -> list[GroupComparison]:
    """Compare methods by several runs each.

    Runs of one seed share a split, so they are paired where every method has the same seeds, once each.

    Args:
        aligned: Predictions of all runs on the same items.
        groups: Names of runs by method, in the order of their seeds.
        configs: The runs' settings.
        options: For `compare_groups`.
    """
    seeds = {tuple(configs[name].seed for name in names) for names in groups.values()}
    paired = len(seeds) == 1 and all(len(set(of)) == len(of) for of in seeds)
    runs = {method: [aligned.predictions[name] for name in names] for method, names in groups.items()}
    return compare_groups(runs, aligned.labels, paired=paired, **options)


def _without_seed(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in ("seed", "metrics")}


def _called(configs: Sequence[RunConfig]) -> list[str]:
    """A name for each method; where two are alike also the settings that only it has."""
    times = Counter(config.method for config in configs)
    names = []
    for config in configs:
        alike = [other.to_dict() for other in configs if other is not config and other.method == config.method]
        differing = {k: v for k, v in _without_seed(config).items() if any(other[k] != v for other in alike)}
        told = ", ".join(f"{name}={value}" for name, value in differing.items())
        names.append(config.method if times[config.method] == 1 else f"{config.method} ({told})")
    return names
