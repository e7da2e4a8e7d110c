"""One plain LoRA that answers, in one forward, what many draws answer on average."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from scipy.special import rel_entr
from transformers import TrainingArguments

from ..calibration.recalibrate.base import Recalibrator
from ..console import own_random_state
from ..identity import unwrapped
from ..json_files import parse_json, read_json, sealed
from ..prediction import Prediction, predict_dataset
from ..prediction.dataset import model_columns
from ..provenance.companions import attach_file, attached_file
from ..provenance.row_hashes import hash_rows
from ..provenance.splits import held_out_rows
from ..tuners.laws import laws_of
from .student import start_of, train_student, training_arguments

DISTILLATION_FILE = "distillation.json"
#: Columns of labels.
LABELS = ("labels", "label", "label_ids")
MEND = "Restore it from a copy, or distil again"
#: Share of the rows that a student is not trained on, so that it can be held against its teacher there.
HELD_OUT = 0.1
#: What a probability that underflowed counts as: the smallest normal number of 32 bits.
SMALLEST = float(np.finfo(np.float32).tiny)
#: Fewer rows say nothing of how close a student came.
FEWEST_ROWS = 20


@dataclass(frozen=True)
class Distillation:
    """How a student answers beside its teacher, on rows that neither its training nor its choice has seen.

    Attributes:
        num_rows: Rows the student was trained on.
        num_held_out: Rows it was held against its teacher on.
        num_samples: Draws of the teacher, whose probabilities were averaged.
        seed: Of the draws and of the training.
        divergence: Mean `KL(teacher || student)`, nats a row; a probability that is exactly 0 counts as 1.2e-38.
        start_divergence: The same before the training: what the student's starting point, the teacher's mean or first
            member, leaves of it.
        agreement: Share of rows with the same predicted class.
        distance: Mean total variation, `0.5 * sum_c |p_c - q_c|`.
    """

    num_rows: int
    num_held_out: int
    num_samples: int
    seed: int
    divergence: float
    start_divergence: float
    agreement: float
    distance: float

    def to_json(self) -> str:
        """The text of its file."""
        return json.dumps(sealed(dataclasses.asdict(self)), indent=2) + "\n"

    def __str__(self) -> str:
        return (
            f"Trained on {self.num_rows:,} rows. On {self.num_held_out:,} others it diverges from the mean of "
            f"{self.num_samples} draws by {self.divergence:.4f} nats a row ({self.start_divergence:.4f} before), "
            f"predicts the same class for {self.agreement:.1%}, and lies {self.distance:.4f} apart in total variation."
        )


def distill(
    model: PeftModel,
    rows: Any,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    recalibration: Recalibrator | None = None,
    adapter_names: Sequence[str] | None = None,
    arguments: TrainingArguments | Mapping[str, Any] | None = None,
    batch_size: int = 32,
    processing_class: Any = None,
    collate_fn: Callable[[list], Mapping[str, Any]] | None = None,
    task: str = "auto",
    label_tokens: Sequence[int | str] | None = None,
    progress: bool = False,
) -> PeftModel:
    """Train one plain LoRA to answer what the draws of an adapter answer on average.

    K draws cost up to K forwards a prediction; the student costs one, and whatever serves a LoRA serves it. It is
    trained on rows without labels to have the averaged probabilities of its teacher, by cross-entropy against them
    (Hinton et al., arXiv 1503.02531, with temperature 1: probabilities are what matters here). What it cannot have is
    the disagreement between draws: one function has no mutual information.

    It starts from the teacher's deterministic function (for members: the first), so a share of the work is done before
    the first step. Take rows like those that will be asked; rows that the teacher was trained on show only how sure it
    is there. Nothing of the teacher changes, and the frozen base model is shared with it, not copied.

    Args:
        model: The teacher: a model whose active adapter has draws (BayesianLoRA, CurveLoRA, EnsembleLoRA, or a law of
            your own), or, with `adapter_names`, several adapters.
        rows: Tokenised rows, as for `predict_dataset`; labels are not looked at. At least 20.
        num_samples: Draws K of the teacher; by default as for `predict`, all members of an ensemble.
        seed: Of the draws, of the rows held out and of the training.
        recalibration: A fitted `TemperatureScaling` (or other recalibration) of the teacher's averaged probabilities.
            The student then learns the calibrated probabilities and needs no temperature of its own where it serves.
        adapter_names: Names of adapters of one model which together are the teacher.
        arguments: `TrainingArguments`, or a mapping of some of their fields in the place of `ARGUMENTS`.
        batch_size: Rows of a forward while the teacher predicts.
        processing_class: Tokenizer or processor that pads the rows of a batch.
        collate_fn: Makes a batch of a list of rows.
        task: As for `predict`; one item a row: `"classification"` or `"next_token"`.
        label_tokens: As for `predict`.
        progress: Show bars.

    Returns:
        A `PeftModel` with a plain LoRA under the teacher's adapter name, in evaluation mode. How close it came says
        `distillation_of(student)`; `save_pretrained` writes that beside it.

    Raises:
        TypeError: If the model carries nothing with draws.
        ValueError: If all draws are one function, the task has no classes or several items a row, or there are too
            few rows.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from peft_calib import EnsembleLoraConfig
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}
        >>> base = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes))
        >>> config = EnsembleLoraConfig(task_type="SEQ_CLS", num_members=2, target_modules=["query"])
        >>> teacher = get_peft_model(base, config)
        >>> rows = [{"input_ids": torch.tensor([i % 20, 2])} for i in range(40)]
        >>> student = distill(teacher, rows, arguments={"num_train_epochs": 1})
        >>> distillation_of(student).num_rows
        36
    """
    given = {
        "processing_class": processing_class,
        "collate_fn": collate_fn,
        "task": task,
        "label_tokens": label_tokens,
    }
    asked = {**given, "batch_size": batch_size, "progress": progress}
    training = training_arguments(arguments, seed, progress)  # refuses what it does not know before anything is run
    held, kept = _parts(rows, seed)
    _check_varies(model, adapter_names)
    if isinstance(rows, Dataset):
        rows = model_columns(rows, unwrapped(model))
    with own_random_state():
        taught = predict_dataset(model, rows, "sample", num_samples, seed, adapter_names=adapter_names, **asked)
        targets = _targets(taught, recalibration, len(rows))
        student = start_of(model, adapter_names, seed)
        others = _Part(rows, held)
        before = predict_dataset(student, others, "mean", **asked)
        train_student(student, _Part(rows, kept), targets[kept], training, **given)
        after = predict_dataset(student, others, "mean", **asked)
    found = _measured(targets[held], before, after, len(kept), taught.num_samples, seed)
    attach_file(student, DISTILLATION_FILE, found.to_json())
    return student


def distillation_of(student: PeftModel | str | Path) -> Distillation:
    """Read what `distill` measured, from the student or from the folder it was saved in.

    Args:
        student: What `distill` returned, or the folder of its `save_pretrained`.

    Returns:
        The record.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    if isinstance(student, (str, Path)):
        file = Path(student) / DISTILLATION_FILE
        fields = read_json(file, MEND) if file.is_file() else None
    else:
        text = attached_file(student, DISTILLATION_FILE)
        fields = None if text is None else parse_json(text, DISTILLATION_FILE, MEND)
    if fields is None:
        raise ValueError(f"There is no {DISTILLATION_FILE}: this adapter was not made by peft_calib.distill.")
    kinds = {field.name: fields.integer if field.type == "int" else fields.number for field in _FIELDS}
    found = Distillation(**{name: read(name) for name, read in kinds.items()})
    fields.check_seal("the student")
    return found


_FIELDS = dataclasses.fields(Distillation)


class _Part:
    """Some rows of a table of any kind, without their labels."""

    def __init__(self, rows: Any, index: Sequence[int]) -> None:
        self.rows, self.index = rows, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[self.index[number]]
        return {name: value for name, value in row.items() if name not in LABELS}


def _parts(rows: Any, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows that are held out, and of those to train on."""
    if not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        raise TypeError(f"rows must be a datasets.Dataset or another map-style dataset, got {type(rows).__name__}.")
    if len(rows) < FEWEST_ROWS:
        raise ValueError(f"{len(rows)} rows are too few to distil on; give at least {FEWEST_ROWS}, better 1,000.")
    hashes = hash_rows(rows)[1]
    if (hashes == hashes[0]).all():
        raise ValueError("The rows are too much alike: give at least 20 different ones.")
    is_held = held_out_rows(hashes, HELD_OUT, seed)
    return np.flatnonzero(is_held).tolist(), np.flatnonzero(~is_held).tolist()


def _check_varies(model: PeftModel, adapter_names: Sequence[str] | None) -> None:
    """Raise unless there are several functions to learn the mean of; what has no draws at all, `predict` refuses."""
    laws = list(laws_of(model, active=True))
    if adapter_names is None and laws and not any(law.varies for law in laws):
        raise ValueError(
            f"All draws of this {laws[0].method} are one function already: write it as a plain LoRA with "
            "peft_calib.export_lora(model, folder)."
        )


def _targets(taught: Any, recalibration: Recalibrator | None, count: int) -> torch.Tensor:
    """`(N, C)` probabilities to learn."""
    if not isinstance(taught, Prediction):
        raise ValueError("distill needs a teacher that answers with classes; this one answers with numbers.")
    if len(taught.probabilities) != count:
        raise ValueError(
            f"The teacher has {len(taught.probabilities)} items in {count} rows; distill learns one answer a row "
            "(task='classification' or 'next_token'), not tokens."
        )
    if recalibration is None:
        return taught.probabilities.float().cpu()
    return torch.as_tensor(recalibration.transform(taught.probabilities, input="probabilities")).float().cpu()


def _measured(targets: torch.Tensor, before: Any, after: Any, count: int, num_samples: int, seed: int) -> Distillation:
    p = targets.double().numpy()
    start, q = (np.maximum(of.probabilities.double().cpu().numpy(), SMALLEST) for of in (before, after))
    return Distillation(
        num_rows=count,
        num_held_out=len(p),
        num_samples=num_samples,
        seed=seed,
        divergence=float(rel_entr(p, q).sum(1).mean()),
        start_divergence=float(rel_entr(p, start).sum(1).mean()),
        agreement=float((p.argmax(1) == q.argmax(1)).mean()),
        distance=float(0.5 * np.abs(p - q).sum(1).mean()),
    )
