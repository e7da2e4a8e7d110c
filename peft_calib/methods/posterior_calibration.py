"""How far a posterior's draws should lie apart: two numbers, chosen together on calibration rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from peft import PeftModel
from scipy import stats

from ..calibration import TemperatureScaling, log_probabilities
from ..identity import active_adapter
from ..prediction import Prediction, predict_dataset
from ..provenance.companions import attach_recalibration
from ..provenance.splits import RowSet, check_unseen, record_split
from ..tuners.factors import Law
from ..tuners.model import FactorModel

#: Multiples of the trained spread that are tried; 0, what the draws lie around, always is.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
#: Probability of leaving the mean for draws that are no better.
ERROR = 0.05


@dataclass(frozen=True)
class Candidate:
    """One scale on the calibration rows.

    Attributes:
        scale: What the draws' normals are multiplied by; 0 for the mean.
        temperature: Fitted on the averaged probabilities at that scale, 1 where the rows support none.
        nll: Mean negative log-likelihood of the rows after it, nats.
        gain: How much lower that is than at scale 0.
        lower: Lower end of a one-sided 95 % interval of the gain, over rows, corrected for the number of scales.
    """

    scale: float
    temperature: float
    nll: float
    gain: float
    lower: float


@dataclass(frozen=True)
class PosteriorCalibration:
    """Scale of the spread and temperature of an adapter.

    Attributes:
        scale: What its draws' normals are multiplied by from now on; 0 where the draws do not help.
        temperature: For the mean of the draws' probabilities at that scale.
        scaling: That temperature, fitted; `scaling.transform(prediction.probabilities, input="probabilities")`.
        candidates: What was tried, the mean first.
        reason: One sentence with the decision and what it rests on.
    """

    scale: float
    temperature: float
    scaling: TemperatureScaling
    candidates: tuple[Candidate, ...]
    reason: str


def calibrate_posterior(
    model: PeftModel,
    rows: Any,
    *,
    num_samples: int = 8,
    scales: Sequence[float] = SCALES,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> PosteriorCalibration:
    """Choose the scale of a posterior's spread together with a temperature, and store both with the adapter.

    A trained posterior may be too narrow to change a prediction, or so wide that it harms. For each scale the
    probabilities of the draws are averaged and a temperature is fitted; the scale of least negative log-likelihood is
    taken, if its rows show that it is better than the mean: the lower end of a one-sided 95 % interval of the paired
    gain, corrected for the number of scales, lies above zero. Else the scale is 0, and the adapter predicts with its
    mean from then on, in one forward; an EnsembleLoRA with moments predicts with its members. (The search is that of
    training-free Bayesianisation, arXiv 2412.05723, with a temperature on either side and a test.)

    The scale is written into the adapter's configuration (`posterior_scale`), the temperature into
    `predictor.json` beside the adapter; `save_pretrained` and `push_to_hub` take both along.

    Args:
        model: A model whose active adapter is a posterior: BayesianLoRA, EnsembleLoRA with `moments`, or a law of
            your own that derives from `Posterior`.
        rows: Held-out rows with labels, as for `predict_dataset`: ten at least, none of them trained on.
        num_samples: Draws K of a prediction, at scale 0 of EnsembleLoRA its members.
        scales: Scales to try beside 0.
        seed: Of the draws; predict with the same.
        progress: Show a bar for each scale.
        options: Further arguments of `predict_dataset`: `batch_size`, `processing_class`, `collate_fn`, `task`,
            `label_tokens`, ...

    Returns:
        Scale, temperature, what was tried, and the reason in words.

    Raises:
        TypeError: If the adapter is no posterior.
        ValueError: For scales that are not positive, rows that were trained on, or too few rows.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from peft_calib import BayesianLoraConfig
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> base = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes))
        >>> config = BayesianLoraConfig(task_type="SEQ_CLS", target_modules=["query"], num_train_examples=20)
        >>> model = get_peft_model(base, config)
        >>> rows = [{"input_ids": torch.tensor([i % 20, 2]), "labels": i % 2} for i in range(20)]
        >>> calibrate_posterior(model, rows, num_samples=2).scale  # B is zero: all draws are the mean
        0.0
    """
    name = active_adapter(model)
    law = _posterior_of(model, name)
    tried, before = _checked_scales(scales), model.peft_config[name].posterior_scale  # type: ignore[attr-defined]
    calibrated_on = _refuse_seen(model, rows)
    options = {"num_samples": num_samples, "seed": seed, "progress": progress, **options}
    try:
        measured = [_measured(model, rows, scale, options) for scale in (0.0, *tried)]
    except BaseException:
        _set_scale(model, name, before)
        raise
    _set_scale(model, name, 0.0)
    found = _chosen(measured, "mean is" if law.num_draws is None else "members are")
    _set_scale(model, name, found.scale)
    record_split(model, calibrated_on=calibrated_on)
    about = {"num_samples": law.num_draws or num_samples, "seed": seed, "posterior_scale": found.scale}
    attach_recalibration(model, found.scaling.state(), **about)
    return found


@dataclass(frozen=True)
class _Measured:
    """A scale with its temperature, and the negative log-likelihood of each row after it."""

    scale: float
    scaling: TemperatureScaling
    row_nll: np.ndarray


def _measured(model: PeftModel, rows: Any, scale: float, options: dict[str, Any]) -> _Measured:
    _set_scale(model, active_adapter(model), scale)
    law = _posterior_of(model, active_adapter(model))
    if scale == 0:  # one forward where all draws are the mean; the members where there are some
        how = {"how": "mean"} if law.num_draws is None else {"how": "sample", "num_samples": law.num_draws}
        options = {**options, **how}
    prediction = predict_dataset(model, rows, **{"how": "sample", **options})
    if not isinstance(prediction, Prediction) or prediction.labels is None:
        raise ValueError("calibrate_posterior needs rows with labels, of a model that answers with classes.")
    labels, logits = prediction.labels.numpy(), log_probabilities(prediction.probabilities)
    kept = labels != -100
    scaling = TemperatureScaling().fit(logits[kept], labels[kept])
    scaled = np.asarray(scaling.transform(logits[kept]), np.float64)
    return _Measured(scale, scaling, -np.log(scaled[np.arange(kept.sum()), labels[kept]]))


def _chosen(measured: Sequence[_Measured], centre: str) -> PosteriorCalibration:
    """The scale of least NLL where the rows show that it is better than the centre of the draws, else that centre."""
    mean, *others = measured
    level = 1 - ERROR / len(others)
    candidates = [_candidate(found, mean, level) for found in measured]
    best = min(range(1, len(measured)), key=lambda i: candidates[i].nll)
    told = candidates[best]
    told_best = (
        f"the best scale, {told.scale:g}, gains {told.gain:.4f} nats over the {centre.split()[0]} on "
        f"{len(mean.row_nll)} rows"
    )
    if told.lower > 0:
        reason = f"{told_best}, at least {told.lower:.4f} with 95 % confidence: it is applied."
    else:
        best = 0
        reason = f"{told_best}, which may be chance (lower end {told.lower:.4f}): the {centre} used, scale 0."
    used = measured[best]
    text = reason[0].upper() + reason[1:]
    return PosteriorCalibration(used.scale, used.scaling.temperature, used.scaling, tuple(candidates), text)


def _candidate(found: _Measured, mean: _Measured, level: float) -> Candidate:
    gains = mean.row_nll - found.row_nll
    half = stats.t.ppf(level, len(gains) - 1) * stats.sem(gains)
    nll, gain = float(found.row_nll.mean()), float(gains.mean())
    return Candidate(found.scale, found.scaling.temperature, nll, gain, gain - float(half))


def _posterior_of(model: PeftModel, name: str) -> Law:
    tuner = model.base_model
    law = tuner.get_law(name) if isinstance(tuner, FactorModel) else None
    if law is None or not law.has_scale:
        kept = getattr(model.peft_config[name], "moments", 0)
        mend = (
            "Moments were asked for and none were kept: train with RegularizerScheduleCallback."
            if kept
            else "It takes BayesianLoRA, or EnsembleLoRA with moments."
        )
        raise TypeError(
            f"calibrate_posterior needs draws whose distance can be scaled; those of {name!r} "
            f"({model.peft_config[name].peft_type.value}) have no scale. {mend}"
        )
    return law


def _set_scale(model: PeftModel, name: str, scale: float) -> None:
    model.peft_config[name].posterior_scale = scale  # type: ignore[attr-defined]
    model.base_model.invalidate_factors()


def _checked_scales(scales: Sequence[float]) -> list[float]:
    given = list(scales)
    if not given or not all(isinstance(s, (int, float)) and np.isfinite(s) and s > 0 for s in given):
        raise ValueError(f"scales must be positive numbers, at least one; 0 is always tried. Got {scales!r}.")
    return [float(scale) for scale in given]


def _refuse_seen(model: PeftModel, rows: Any) -> RowSet | None:
    """The rows as a set for the adapter's record; `None` where they are in no form that could be held against one."""
    try:
        known = RowSet.of(getattr(rows, "dataset", rows))
    except TypeError:
        return None
    check_unseen(model, known, "calibrated on", fitting=True)
    return known
