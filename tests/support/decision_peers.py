"""What MAPIE and crepes answer on a few rows, for tests that run without either.

    pip install --target peers --no-deps mapie==1.6.0 crepes==0.9.1
    PYTHONPATH=peers python tests/support/decision_peers.py    # writes tests/data/decision_peers.json

Neither is a dependency, nor in the `test` extra: what is compared is a page of arithmetic that does not change with
our code. The versions stand in the file.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parents[1] / "data" / "decision_peers.json"
CONFIDENCE, SEED = 0.9, 5
#: Of labels: the share of wrong ones, and the thresholds that MAPIE is to try.
RISK, GRID = 0.35, np.arange(0.1, 0.98, 0.02).round(2)


class Given:
    """A classifier for scikit-learn whose probabilities are its inputs."""

    _estimator_type = "classifier"

    def __init__(self, num_classes: int = 4) -> None:
        self.num_classes = num_classes
        self.classes_, self.n_features_in_ = np.arange(num_classes), num_classes

    def fit(self, X: Any, y: Any) -> Given:
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        return np.asarray(X)

    def predict(self, X: Any) -> np.ndarray:
        return np.asarray(X).argmax(axis=1)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"num_classes": self.num_classes}

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression().__sklearn_tags__()


def rows(size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Over-confident rows of four classes, without ties."""
    p = generator.dirichlet([0.4] * 4, size)
    true = p**0.6
    labels = (generator.random((size, 1)) > (true / true.sum(axis=1, keepdims=True)).cumsum(axis=1)).sum(axis=1)
    return p, labels.clip(max=3)


def of_mapie(p: np.ndarray, y: np.ndarray, new: np.ndarray) -> dict[str, Any]:
    """Scores, quantiles and sets; both calls draw the same numbers, which are kept."""
    from mapie.classification import SplitConformalClassifier
    from mapie.conformity_scores.sets.raps import RAPSConformityScore

    found: dict[str, Any] = {}
    for score in ("lac", "aps"):
        sets = SplitConformalClassifier(Given(), CONFIDENCE, score, prefit=True, random_state=SEED)
        sets.conformalize(p, y)
        asked = {"include_last_label": "randomized"} if score == "aps" else None
        held = sets.predict_set(new, conformity_score_params=asked)[1][:, :, 0]
        inner = sets._mapie_classifier
        found[score] = {
            "scores": np.ravel(inner.conformity_scores_).tolist(),
            "quantile": float(np.ravel(inner.conformity_score_function_.quantiles_)[0]),
            "sets": held.astype(int).tolist(),
        }
    found["u_fit"] = np.random.RandomState(SEED).uniform(size=len(p)).tolist()
    found["u_new"] = np.random.RandomState(SEED).uniform(size=len(new)).tolist()
    plain, rank = RAPSConformityScore.get_true_label_cumsum_proba(y, p, np.arange(4))
    regular = RAPSConformityScore._regularize_conformity_score(np.array([1]), 0.05, plain, rank.reshape(-1, 1)[:, 0])
    found["plain aps scores"], found["raps scores"] = np.ravel(plain).tolist(), np.ravel(regular).tolist()
    return found


def label_rows(size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of three labels, over-confident, the last one rare; each row has one at least, as MAPIE demands."""
    z = generator.normal(0.0, 2.0, (3 * size, 3)) + np.array([1.0, 0.3, -1.5])
    p, labels = 1 / (1 + np.exp(-1.5 * z)), generator.random(z.shape) < 1 / (1 + np.exp(-z))
    kept = labels.any(axis=1)
    return p[kept][:size].round(9), labels[kept][:size].astype(int)


def of_mapie_labels(p: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """What its controllers say at each threshold of a grid: of rows of labels, of a label by itself, and of recall."""
    from mapie.risk_control import BinaryClassificationController, MultiLabelClassificationController

    how = {"target_level": 1 - RISK, "confidence_level": CONFIDENCE}
    rows = MultiLabelClassificationController(np.asarray, "precision", predict_params=GRID, **how).calibrate(p, y)
    found: dict[str, Any] = {"rows": {"risks": rows.r_hat.tolist(), "threshold": float(rows.best_predict_param[0])}}
    found["labels"] = []
    for k in range(p.shape[1]):
        both = {"list_predict_params": GRID, "fwer_method": "bonferroni", **how}
        one = BinaryClassificationController(lambda q: np.stack([1 - q[:, 0], q[:, 0]], 1), "precision", **both)
        one.calibrate(p[:, [k]], y[:, k])
        found["labels"].append({"p-values": one.p_values.ravel().tolist(), "valid": list(one.valid_predict_params)})
    held = np.sort(p[y[:, 0] == 1, 0])
    how = {"risk": "recall", "method": "crc", "target_level": CONFIDENCE, "predict_params": held}
    recall = MultiLabelClassificationController(np.asarray, **how).calibrate(
        held[:, None], np.ones((len(held), 1), int)
    )
    return found | {"recall": {"bounds": recall.r_hat_plus.tolist(), "threshold": float(recall.best_predict_param[0])}}


def of_crepes(p: np.ndarray, y: np.ndarray, new: np.ndarray) -> dict[str, Any]:
    """Sets of hinge scores, p-values smoothed and not, for all rows and class by class."""
    from crepes import ConformalClassifier
    from crepes.extras import hinge

    own, others = hinge(p, np.arange(4), y), hinge(new)
    found = {}
    for name, bins, new_bins in (("all", None, None), ("class by class", y, np.tile(np.arange(4), (len(new), 1)))):
        classifier = ConformalClassifier().fit(own, bins)
        if new_bins is None:
            values = [classifier.predict_p(others, None, smoothing=s, seed=SEED) for s in (False, True)]
        else:
            values = [
                np.stack([classifier.predict_p(others[:, [c]], new_bins[:, c], smoothing=s, seed=SEED)[:, 0]
                          for c in range(4)], axis=1)
                for s in (False, True)
            ]  # fmt: skip
        found[name] = {"p-values": values[0].tolist(), "sets": (values[0] >= 1 - CONFIDENCE).astype(int).tolist()}
        found[name]["smoothed p-values"] = values[1].tolist()
    return found


def main() -> None:
    """Write the file."""
    generator = np.random.default_rng(3)
    p, y = rows(118, generator)  # 119 / 10 is no whole number, of which crepes and the others make different things
    new, _ = rows(60, generator)
    answers = {"mapie": of_mapie(p, y, new), "crepes": of_crepes(p, y, new)}
    versions = {name: version(name) for name in ("mapie", "crepes", "numpy", "scikit-learn")}
    of_labels, held = label_rows(250, generator)
    several = {"probabilities": of_labels.tolist(), "labels": held.tolist(), "mapie": of_mapie_labels(of_labels, held)}
    answers["several labels"] = several
    content = {"versions": versions, "probabilities": p.tolist(), "labels": y.tolist(), "new": new.tolist(), **answers}
    FILE.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
