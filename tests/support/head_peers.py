"""What lm-polygraph and torch-uncertainty answer on a few rows, for tests that run without either.

    pip install --target peers --no-deps lm-polygraph==0.7.0 torch-uncertainty==0.13.0 omegaconf
    PYTHONPATH=peers python tests/support/head_peers.py    # writes tests/data/head_peers.json

Neither is a dependency: their requirements pin other versions of torch and transformers, so only the modules that hold
the formulas are loaded, without what their packages import. The versions stand in the file.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

FILE = Path(__file__).parents[1] / "data" / "head_peers.json"
DIMENSIONS, CLASSES, FUNCTIONS = 24, 3, 5


def items(seed: int = 7) -> dict[str, np.ndarray]:
    """Features of three classes with a common, uneven spread, some of them strays, and logits of five functions."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(DIMENSIONS, DIMENSIONS)) / DIMENSIONS**0.5

    def features(size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = generator.integers(0, CLASSES, size)
        phi = generator.normal(size=(size, DIMENSIONS)) @ mixing + 3.0 * np.eye(CLASSES, DIMENSIONS)[labels]
        phi[::17] += 2.0
        return phi, labels

    train, labels = features(400)
    new, _ = features(20)
    return {
        "train": train,
        "labels": labels,
        "new": new,
        "logits": 3 * generator.normal(size=(FUNCTIONS, 20, CLASSES)),
    }


def bare(package: str, *parts: str) -> None:
    """A package, and packages in it, of which modules can be imported without what it imports itself."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0])
    for name in ("", *parts):
        module = ModuleType(f"{package}.{name}".rstrip("."))
        module.__path__ = [str(path.joinpath(*name.split(".")))] if name else [str(path)]
        sys.modules[module.__name__] = module


def of_polygraph(train: np.ndarray, new: np.ndarray) -> dict[str, Any]:
    """Both sequence estimators, with all classes together; what they take is float32, what RDE takes is float64."""
    bare("lm_polygraph", "estimators", "utils")
    mahalanobis = importlib.import_module("lm_polygraph.estimators.mahalanobis_distance")
    rde = importlib.import_module("lm_polygraph.estimators.rde")

    def stats(dtype: type) -> dict[str, np.ndarray]:
        return {"embeddings_decoder": new.astype(dtype), "train_embeddings_decoder": train.astype(dtype)}

    distance = mahalanobis.MahalanobisDistanceSeq()(stats(np.float32))
    density = rde.RDESeq()(stats(np.float64))
    return {"mahalanobis": distance.tolist(), "rde": density.tolist()}


def of_torch_uncertainty(logits: np.ndarray) -> dict[str, Any]:
    """Criteria of `(K, N, C)` probabilities of an ensemble."""
    bare("torch_uncertainty", "metrics", "metrics.classification")
    metrics = sys.modules["torch_uncertainty.metrics"]
    for name, module in (("MutualInformation", "mutual_information"), ("VariationRatio", "variation_ratio")):
        found = importlib.import_module(f"torch_uncertainty.metrics.classification.{module}")
        setattr(metrics, name, getattr(found, name))
    criteria = importlib.import_module("torch_uncertainty.ood_criteria")
    p = torch.from_numpy(logits).softmax(-1)
    by_row = p.transpose(0, 1)  # what all but the mutual information take
    return {
        "msp": criteria.MaxSoftmaxCriterion()(p.mean(0)).tolist(),
        "entropy": criteria.EntropyCriterion()(by_row).tolist(),
        "mutual_information_functions_first": criteria.MutualInformationCriterion()(p).tolist(),
        "mutual_information_rows_first": criteria.MutualInformationCriterion()(by_row).tolist(),
    }


def main() -> None:
    given = items()
    found = {
        "versions": {name: version(name) for name in ("lm-polygraph", "torch-uncertainty", "scikit-learn", "numpy")},
        "lm-polygraph": of_polygraph(given["train"], given["new"]),
        "torch-uncertainty": of_torch_uncertainty(given["logits"]),
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
