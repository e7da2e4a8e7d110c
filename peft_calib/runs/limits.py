"""What follows from the base model and the number of rows, where the settings leave it open."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedTokenizerBase

from .settings import RunConfig
from .tasks.base import load_model_config

#: Optimiser steps that training needs before a fresh head and adapter have learned anything from a few hundred rows,
#: and the fewest and most passes over the rows. docs/command-line.md says how these were measured.
STEPS, LEAST_EPOCHS, MOST_EPOCHS = 120, 3, 10
#: Tokenizers without a limit of their own have one of 10^30.
NO_LIMIT = 10**9


def epochs_for(num_rows: int, config: RunConfig) -> float:
    """Passes over the rows that make enough steps."""
    steps = -(-num_rows // (config.batch_size * config.gradient_accumulation_steps))
    return float(min(max(-(-STEPS // steps), LEAST_EPOCHS), MOST_EPOCHS))


def settled(config: RunConfig, num_rows: int, tokenizer: PreTrainedTokenizerBase) -> tuple[RunConfig, list[str]]:
    """The settings with what was left open decided, and a line for each that is not what was asked for."""
    notes = []
    limit = position_limit(load_model_config(config), tokenizer, config.max_length)
    if config.task == "multiple-choice" and limit is not None:
        limit -= 1  # the answer stands behind the question
    if limit is not None and config.max_length > limit:
        notes.append(f"rows are cut to {limit} tokens instead of {config.max_length}: {config.model} takes no more")
        config = replace(config, max_length=limit)
    if config.epochs is None:
        config = replace(config, epochs=epochs_for(num_rows, config))
    return config, notes


def position_limit(model: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int | None:
    """The most tokens that a model can be given; None where there is no bound.

    RoBERTa and its kin count positions from behind the padding token's, so that a table of 514 serves 512 tokens; only
    the embedding says so, and it is looked at where fewer than `wanted` might remain.
    """
    limits = [length for length in (tokenizer.model_max_length,) if 0 < length < NO_LIMIT]
    positions = getattr(model, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        closely = wanted > positions - 64  # no model reserves more
        limits.append(positions - (_reserved(model, positions) if closely else 0))
    return min(limits, default=None)


def _reserved(model: PreTrainedConfig, positions: int) -> int:
    """Rows of the table of positions that no token gets."""
    try:
        with torch.device("meta"):
            body = AutoModel.from_config(model)
    except (ValueError, TypeError, RuntimeError):  # built by other means than from its configuration alone
        return 0
    tables = (m for name, m in body.named_modules() if isinstance(m, nn.Embedding) and "position" in name)
    marks = [table.padding_idx for table in tables if table.num_embeddings == positions]
    return max((mark + 1 for mark in marks if mark is not None), default=0)
