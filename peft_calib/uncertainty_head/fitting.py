"""A head fitted to features: checked items, the chosen trial, the map to P(error), and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..calibration.fingerprint import SplitFingerprint
from ..calibration.recalibrate.base import Recalibrator
from ..calibration.recalibrate.fitted import MAX_OVERLAP
from .copied import CopiedHead
from .copies import num_different, row_groups, share_of_copies
from .features import FeatureSet
from .fresh import fresh_head, from_frozen
from .grid import HeadSettings
from .mapping import fit_map, with_prior
from .reading import TOLERANCES
from .report import HeadReport, TrialResult
from .selection import Candidates, held_part, on_held_rows, over_folds, refit
from .training import Deltas, Scorer, anchors_of
from .verdict import Verdict, judge

# How far the logits of a copied head may lie from a model's, as a share of the largest: those of a model in bfloat16.
_ROUNDING = max(TOLERANCES.values())


@dataclass(frozen=True, eq=False)
class Fitted:
    """What fitting gives.

    Attributes:
        deltas: How far each trained tensor is from its start; None where the base score stayed.
        prior: Share of errors that scores trained on balanced batches are corrected for; None where none were.
        calibration: The map to P(error); None for the score itself.
        report: What was fitted, on what, and what it is worth.
    """

    deltas: Deltas | None
    prior: float | None
    calibration: Recalibrator | None
    report: HeadReport


def fit_rows(
    head: CopiedHead,
    train: FeatureSet | None,
    validation: FeatureSet,
    settings: HeadSettings,
    calibration: FeatureSet | None = None,
) -> Fitted:
    """Fit a head to checked features; see `UncertaintyHead.fit_features`."""
    fitted, held = _split(train, validation, settings)
    frozen, head = head, fresh_head(head, settings.seed) if settings.init == "random" else head
    why = _too_few(fitted, held, settings)
    found = best = None
    if why is None:
        cross = settings.split == "cross"
        found = over_folds(head, held, settings) if cross else on_held_rows(head, fitted, held, settings)
        best = found.best(settings.keep_base)
        if best is None:
            why = f"no trial ranks the errors better than it does (AUROC {found.base_auroc:.4f})."
    if found is None or best is None:
        deltas, prior, verdict = None, None, None
        judged = held if calibration is None else calibration
        scores = anchors_of(judged, settings).numpy()
    else:
        deltas = _deltas(best, found, head, fitted, settings)
        prior = float(fitted.errors.double().mean()) if settings.balance else None
        judged, scores, verdict = _judged(best, found, head, deltas, calibration, settings)
        deltas = deltas if head is frozen else from_frozen(deltas, head, frozen)
    mapped, told = fit_map(settings.calibrate, with_prior(scores, prior), judged.errors.numpy(), settings.fewest)
    report = HeadReport(
        split=settings.split,
        num_fit=len(fitted),
        num_fit_errors=int(fitted.errors.sum()),
        num_held=len(held),
        num_held_errors=int(held.errors.sum()),
        why_base=why,
        chosen=best,
        trials=() if found is None else _results(found),
        verdict=verdict,
        calibration=told,
    )
    return Fitted(deltas, prior, mapped, report)


def check_rows(head: CopiedHead, **sets: FeatureSet | None) -> None:
    """Refuse features that cannot be fitted to: impossible labels, other shapes or adapters, the same items twice.

    Args:
        head: That is to be fitted.
        sets: The features by what they are called in a message; the fitted ones first.

    Raises:
        ValueError: The first that is wrong.
    """
    given = {name: rows for name, rows in sets.items() if rows is not None}
    for name, rows in given.items():
        _check_labels(name, rows)
        check_shapes(name, rows, head)
    names = list(given)
    for place, name in enumerate(names):
        for other in names[:place]:
            _check_pair(other, given[other], name, given[name])


def check_shapes(name: str, rows: FeatureSet, head: CopiedHead) -> None:
    """Refuse features that a head cannot take, or that do not reproduce the logits that came with them."""
    functions = len(head.starts)
    if functions not in (1, len(rows.features)):
        raise ValueError(
            f"The {name} features are of {len(rows.features)} functions, but the head has those of {functions}. "
            "Extract them with the same num_samples and seed."
        )
    some = torch.arange(min(len(rows), 64))
    with torch.no_grad():
        try:
            logits = head.answer([torch.zeros_like(d) for d in head.delta], rows.features[:, some])
        except RuntimeError as error:
            raise ValueError(
                f"The head cannot take the {name} features of shape {tuple(rows.features.shape)} ({error}). Give the "
                "head that these were extracted for."
            ) from error
    wanted = rows.logits[:, some]
    if logits.shape != wanted.shape:
        raise ValueError(
            f"The head answers the {name} features with logits of shape {tuple(logits.shape)}, but those that came "
            f"with them are {tuple(wanted.shape)}. Give the head that they were extracted for."
        )
    apart = float((logits - wanted).abs().nan_to_num(torch.inf).max()) if len(rows) else 0.0
    if apart > _ROUNDING * max(1.0, float(wanted.abs().max())):
        raise ValueError(
            f"The head's answers are up to {apart:.3g} from the logits that came with the {name} features: these are "
            "not the features it reads. Give the head that they were extracted for."
        )


def _check_labels(name: str, rows: FeatureSet) -> None:
    if not len(rows):
        raise ValueError(f"The {name} rows hold no item; nothing can be fitted or chosen by them.")
    if rows.labels is None:
        raise ValueError(f"The {name} rows have no labels, so that errors are unknown. Give labelled rows.")
    low, high = int(rows.labels.min()), int(rows.labels.max())
    if low < 0 or high >= rows.num_classes:
        raise ValueError(
            f"The {name} labels run from {low} to {high}, but the model has the classes 0 to {rows.num_classes - 1}. "
            "Map them to the ids in the model's config.label2id, and leave out rows without a label."
        )


def _check_pair(first: str, a: FeatureSet, second: str, b: FeatureSet) -> None:
    if a.adapter != b.adapter:
        raise ValueError(f"The {first} and the {second} features were extracted with different adapters.")
    if a.hashes is None or b.hashes is None:
        return
    # hashes know rows of a fit at other places, too; features know rows that occur here and there in other numbers
    shared = max(SplitFingerprint.of_hashes(a.hashes).seen(b.hashes), share_of_copies(a, b))
    if shared > MAX_OVERLAP:
        raise ValueError(
            f"{shared:.0%} of the {second} items are among the {first} items. A head must be chosen and calibrated on "
            "items that it was not fitted on: hold out other rows."
        )


def _split(train: FeatureSet | None, validation: FeatureSet, settings: HeadSettings) -> tuple[FeatureSet, FeatureSet]:
    """The items to fit on, and those to choose by."""
    if settings.split == "cross":
        return validation, validation
    if settings.split == "validation":
        held = held_part(validation, settings)
        return validation.select(~held), validation.select(held)
    if train is None:
        raise ValueError("split='train' fits on the training rows: give them, or choose split='cross'.")
    return train, validation


def _too_few(fitted: FeatureSet, held: FeatureSet, settings: HeadSettings) -> str | None:
    """Why a head cannot be fitted, in words."""
    for rows, what in ((fitted, "to fit on"), (held, "to choose by")):
        groups, wrong = row_groups(rows), rows.errors.numpy()
        for these, name in ((wrong, "errors"), (~wrong, "correct items")):
            count = num_different(groups, rows, these)
            if count < settings.fewest:
                copies = "" if count == these.sum() else ", copies counted once,"
                return (
                    f"{count} {name} among the {len(rows)} items {what} ({_PLACES[settings.split]}){copies} are fewer "
                    f"than the {settings.fewest} that a head needs."
                )
    if settings.split == "cross" and (different := len(np.unique(row_groups(held)))) < settings.folds:
        return f"{different} different rows cannot be dealt to {settings.folds} folds."
    return None


_PLACES = {"cross": "validation rows", "train": "split='train'", "validation": "split='validation'"}


def _deltas(best: int, found: Candidates, head: CopiedHead, fitted: FeatureSet, settings: HeadSettings) -> Deltas:
    if found.deltas is not None:
        return [delta[best].clone() for delta in found.deltas]
    return refit(head, fitted, found.trials[best], int(found.epochs[best]), settings)


def _judged(
    best: int, found: Candidates, head: CopiedHead, deltas: Deltas, calibration: FeatureSet | None,
    settings: HeadSettings,
) -> tuple[FeatureSet, np.ndarray, Verdict]:  # fmt: skip
    """The items that judge a head, its scores of them, and whether it helps."""
    if calibration is None:
        others = found.all_scores
        could_be = np.concatenate([found.base[None], others]) if settings.keep_base else others
        scores = found.scores[best]
        return found.held, scores, _judge(found.held, found.base, scores, could_be, settings)
    scores = Scorer(head, calibration, settings).all([delta[None] for delta in deltas])[0].numpy()
    base = anchors_of(calibration, settings).numpy()
    return calibration, scores, _judge(calibration, base, scores, None, settings)


def _judge(
    rows: FeatureSet, base: np.ndarray, scores: np.ndarray, could_be: np.ndarray | None, settings: HeadSettings
) -> Verdict:
    folds = settings.folds if settings.split == "cross" and could_be is not None else None
    return judge(rows.errors.numpy(), base, scores, could_be, row_groups(rows), folds, settings.seed)


def _results(found: Candidates) -> tuple[TrialResult, ...]:
    columns = (found.epochs.tolist(), found.aurocs.tolist(), found.distances.tolist())
    return tuple(map(TrialResult, found.trials, *columns))
