"""How well a run predicts texts, token by token: what can be said of a vocabulary without its probability matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from ..calibration import log_probabilities
from ..calibration.recalibrate.temperature import BOUNDS, TemperatureFit
from ..prediction.draws import evaluating
from ..prediction.engine import choose_source
from .loading import FinishedRun
from .rows import TestRows
from .temperatures import text_temperature

RESAMPLES, LEVEL = 1000, 0.95
#: Temperatures tried, and how far around the best one the second round looks.
COARSE, FINE = np.geomspace(0.01, 100.0, 65), np.geomspace(0.86, 1.16, 61)


def text_report(run: FinishedRun, rows: TestRows, variants: dict[str, int], seed: int) -> dict[str, Any]:
    """Loss `-log mean_k p_k(token)`, perplexity and accuracy, before and after the temperature.

    Intervals resample whole texts, because the tokens of one text hang together.
    """
    reports = {}
    tokens = 0
    for variant, count in variants.items():
        temperature = run.text_temperature(variant)
        scored = _scored(run, rows.rows, variant, count, seed, np.array([1.0, temperature]))
        tokens = int(scored[:, 0].sum())
        stages = {"before": scored[:, [0, 1, 2]], "after": scored[:, [0, 1, 3]]}
        reports[variant] = {
            "num_samples": count,
            "temperature": temperature,
            "temperature_fit": run.temperature_fit(variant),
            **{stage: {**_scores(sums), "intervals": _intervals(sums, seed)} for stage, sums in stages.items()},
        }
    return {"items": tokens, "variants": reports}


def fit_text_temperature(run: FinishedRun, rows: Dataset, variant: str, count: int) -> TemperatureFit:
    """The temperature of least loss a token, to half a percent, without keeping the vocabulary's probabilities."""
    coarse = _scored(run, rows, variant, count, 0, COARSE)[:, 2:]
    fine = np.clip(float(COARSE[coarse.sum(0).argmin()]) * FINE, *BOUNDS)
    tried, losses = np.r_[COARSE, fine], np.c_[coarse, _scored(run, rows, variant, count, 0, fine)[:, 2:]]
    return text_temperature(tried, losses)


def _scored(
    run: FinishedRun, rows: Dataset, variant: str, count: int, seed: int, temperatures: np.ndarray
) -> np.ndarray:
    """(N, 2 + len(temperatures)): tokens and correct predictions of each text, then its loss at each temperature."""
    parts = []
    for log_p, targets, kept in _distributions(run, rows, variant, count, seed):
        chosen = targets.clamp_min(0).unsqueeze(-1)
        columns = [kept.sum(1).double(), ((log_p.argmax(-1) == targets) & kept).sum(1).double()]
        for temperature in temperatures.tolist():
            scaled = log_p / temperature
            loss = scaled.logsumexp(-1) - scaled.gather(-1, chosen).squeeze(-1)
            columns.append(torch.where(kept, loss, 0.0).double().sum(1))
        parts.append(torch.stack(columns, dim=1).cpu().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def _distributions(
    run: FinishedRun, rows: Dataset, variant: str, count: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each batch: log of the mean probabilities (B, T, V), the tokens (B, T), and which of them count."""
    names = list(run.adapter_names[:count]) if len(run.adapter_names) > 1 else None
    source = choose_source(run.model, variant, seed, adapter_names=names)
    source.spread_over(count)
    device = next(run.model.parameters()).device
    encoded = run.task.encode_prediction(rows, run.tokenizer)
    collate = run.task.collator(run.tokenizer)
    for batch in DataLoader(encoded, batch_size=run.task.config.batch_size, collate_fn=collate):
        inputs = {name: value.to(device) for name, value in batch.items()}
        targets = inputs.pop("labels")[:, 1:]
        mean: torch.Tensor | None = None
        with evaluating(run.model):
            for k in range(count):
                with source.use(k, 1):
                    logits = run.model(**inputs, use_cache=False).logits[:, :-1]
                p = logits.float().softmax(-1) / count
                mean = p if mean is None else mean + p
        assert mean is not None
        yield log_probabilities(mean), targets, targets != -100


def _scores(sums: np.ndarray) -> dict[str, float]:
    """Of (N, 3): tokens, correct predictions and summed loss of each text."""
    tokens, correct, loss = sums.sum(0)
    return {"nll": loss / tokens, "perplexity": float(np.exp(loss / tokens)), "accuracy": correct / tokens}


def _intervals(sums: np.ndarray, seed: int) -> dict[str, list[float]]:
    """Percentile bootstrap over texts."""
    rng = np.random.default_rng(seed)
    drawn = [_scores(sums[rng.integers(len(sums), size=len(sums))]) for _ in range(RESAMPLES)]
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return {name: np.quantile([values[name] for values in drawn], tails).tolist() for name in drawn[0]}
