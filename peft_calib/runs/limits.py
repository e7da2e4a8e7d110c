"""What follows from the base model and the number of rows, where the settings leave it open."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from ..base_models import position_limit
from .settings import RunConfig
from .tasks.base import load_model_config

#: Optimiser steps that training needs before a fresh head and adapter have learned anything from a few hundred rows,
#: and the fewest and most passes over the rows. docs/command-line.md says how these were measured.
STEPS, LEAST_EPOCHS, MOST_EPOCHS = 120, 3, 10


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
