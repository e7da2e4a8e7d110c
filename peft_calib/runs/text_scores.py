"""How well a run predicts texts, token by token: what can be said of a vocabulary without its probability matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from peft_calib.prediction.draws import evaluating
from peft_calib.prediction.engine import choose_source

from .loading import FinishedRun
from .rows import TestRows

__all__ = ["text_report"]

RESAMPLES, LEVEL = 1000, 0.95


def text_report(
    run: FinishedRun, rows: TestRows, variants: dict[str, int], seed: int, progress: bool
) -> dict[str, Any]:
    """Loss, perplexity and accuracy of the next token, with intervals over texts.

    The loss is `-log mean_k p_k(token)`: draws are averaged as probabilities. Intervals resample whole texts, because
    the tokens of one text hang together.

    Args:
        run: a run of causal language modelling.
        rows: texts.
        variants: ways of predicting.
        seed: key of the draws and of the intervals.
        progress: unused; texts are scored without a bar.

    Returns:
        `items` (number of tokens) and `variants`.
    """
    encoded = run.task.encode_prediction(rows.rows, run.tokenizer)
    collate = run.task.collator(run.tokenizer)
    batches = DataLoader(encoded, batch_size=run.task.config.batch_size, collate_fn=collate)
    reports = {}
    tokens = 0
    for variant, count in variants.items():
        sums = np.concatenate([_scored(run, dict(batch), variant, count, seed) for batch in batches])
        tokens = int(sums[:, 0].sum())
        values, intervals = _scores(sums), _intervals(sums, seed)
        reports[variant] = {"num_samples": count, "before": {**values, "intervals": intervals}}
    return {"items": tokens, "variants": reports}


@torch.no_grad()
def _scored(run: FinishedRun, batch: dict[str, Any], variant: str, count: int, seed: int) -> np.ndarray:
    """(B, 3): tokens, summed loss and correct predictions of each text."""
    names = list(run.adapter_names[:count]) if len(run.adapter_names) > 1 else None
    source = choose_source(run.model, variant, seed, adapter_names=names)
    device = next(run.model.parameters()).device
    targets = batch.pop("labels")[:, 1:].to(device)
    inputs = {name: value.to(device) for name, value in batch.items()}
    kept = targets != -100
    mean: torch.Tensor | float = 0.0
    with evaluating(run.model):
        for k in range(count):
            with source.use(k, 1):
                extra = source.forward_arguments(k, 1, len(targets))
                logits = run.model(**inputs, use_cache=False, **extra).logits[:, :-1]
            mean = mean + logits.float().softmax(-1) / count
    assert isinstance(mean, torch.Tensor)
    chosen = mean.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    loss = -torch.where(kept, chosen.clamp_min(torch.finfo(torch.float32).tiny), 1.0).double().log().sum(1)
    correct = ((mean.argmax(-1) == targets) & kept).sum(1)
    return torch.stack([kept.sum(1).double(), loss, correct.double()], dim=1).cpu().numpy()


def _scores(sums: np.ndarray) -> dict[str, float]:
    tokens, loss, correct = sums.sum(0)
    return {"nll": loss / tokens, "perplexity": float(np.exp(loss / tokens)), "accuracy": correct / tokens}


def _intervals(sums: np.ndarray, seed: int) -> dict[str, list[float]]:
    """Percentile bootstrap over texts."""
    rng = np.random.default_rng(seed)
    drawn = [_scores(sums[rng.integers(len(sums), size=len(sums))]) for _ in range(RESAMPLES)]
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return {name: np.quantile([values[name] for values in drawn], tails).tolist() for name in drawn[0]}
