"""The uncertainty head: how likely each prediction of a frozen classifier is to be wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..files import write_atomically
from ..provenance.companions import attach_file
from .answer import ErrorPrediction
from .asked import Asked, Belonging, check_folder, refuse_trained_on
from .bound import BoundHead, errors_of
from .copied import CopiedHead, copy_head
from .features import FeatureSet, extract_features
from .fitting import check_rows, check_shapes, fit_rows
from .grid import HeadSettings
from .report import HeadReport
from .stored import StoredHead, adapter_there, folder_of_head, upload


class UncertaintyHead:
    """A second copy of a classification head, trained to say how likely the first one is wrong (AdUE, ALIEN).

    The model, its adapter and its predictions stay as they are. The copy starts at the frozen head; its score U of a
    prediction (see `scores.uncertainty`) is trained towards the errors, kept near the frozen model's own score, and
    mapped to P(error) on items that it was not fitted on. Where no trial ranks held-out errors better than the frozen
    model's own score, or there are too few errors, that score stays; `report` says why.

    Made by `fit`, `fit_features` or `from_pretrained`.

    Args:
        stored: What fitting gave.
        head: The copy, at its start; None until a model is given.
        allow_other: Whether a model that the head was not fitted for is a warning instead of an error.
    """

    def __init__(self, stored: StoredHead, head: CopiedHead | None = None, allow_other: bool = False) -> None:
        self.stored, self.head, self.allow_other = stored, head, allow_other

    @property
    def settings(self) -> HeadSettings:
        """How it was fitted."""
        return self.stored.settings

    @property
    def report(self) -> HeadReport:
        """What was fitted, on what, and what it is worth; print it."""
        return self.stored.report

    def __repr__(self) -> str:
        kept = "base score" if self.stored.deltas is None else "trained head"
        return f"UncertaintyHead({self.settings.score!r}, {kept})\n{self.report}"

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        train_dataset: Any,
        validation_dataset: Any,
        score: str | None = None,
        *,
        paper: str | None = None,
        calibration_dataset: Any = None,
        task: str = "auto",
        label_tokens: Sequence[int | str] | None = None,
        tokenizer: Any = None,
        head_module: str | None = None,
        num_samples: int | None = 1,
        dropout: float | None = None,
        adapter_names: Sequence[str] | None = None,
        seed: int = 0,
        batch_size: int = 32,
        collate_fn: Callable[[list], Mapping[str, Any]] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> UncertaintyHead:
        """Fit a head for a model with an adapter (or without one); nothing about the model changes.

        Features are read once, in one pass of the frozen model over each data set; all trials are fitted to them.

        Args:
            model: A classifier, or a language model with `label_tokens`.
            train_dataset: The rows that the adapter was trained on; read only for `split="train"`, as in the papers,
                and may be None otherwise.
            validation_dataset: Labelled rows that it was not trained on.
            score: `"entropy"` (default), `"sr_norm"` or `"sr_raw"`.
            paper: `"v1"` or `"v2"` for the settings of AdUE or ALIEN, see `HeadSettings.of`.
            calibration_dataset: Further such rows, on which P(error) is mapped and the head is judged; the validation
                rows when None.
            task: As for `extract_features`, like the next six.
            label_tokens: For a language model, the tokens that stand for the classes.
            tokenizer: Pads the rows of a batch.
            head_module: Name of the head in the base model.
            num_samples: Functions K, for draws of an adapter of this package.
            dropout: Monte Carlo dropout on a stock LoRA.
            adapter_names: Adapters of the model that are the functions.
            seed: Of draws, orders, folds and resampling.
            batch_size: Rows of a forward.
            collate_fn: Makes a batch of a list of rows.
            progress: Show bars.
            options: Further fields of `HeadSettings`, such as `split`, `lr` or `balance`.

        Returns:
            The head; print its `report`, which says whether it helps.

        Raises:
            ValueError: For a model without a classification head, features that do not reproduce the logits, labels
                out of range, rows that the adapter is known to have been trained on or that occur in two of the data
                sets, or an unknown option. Too few errors are no error: the base score stays.

        Example:
            >>> head = UncertaintyHead.fit(model, train, validation)  # doctest: +SKIP
            >>> head.predict(model, batch).error_probability  # doctest: +SKIP
        """
        settings = HeadSettings.of(score, paper, seed=seed, **options)
        how = {"task": task, "head_module": head_module, "num_samples": num_samples, "seed": settings.seed}
        asked = Asked.of(model, label_tokens, tokenizer, dropout=dropout, adapter_names=adapter_names, **how)
        refuse_trained_on(model, validation_dataset, "choose an uncertainty head by")
        refuse_trained_on(model, calibration_dataset, "calibrate an uncertainty head on")
        read = partial(
            _read, model, asked, tokenizer=tokenizer, batch_size=batch_size, collate_fn=collate_fn, progress=progress
        )
        train = read(train_dataset) if settings.split == "train" else None
        sets = (train, read(validation_dataset), read(calibration_dataset))
        head = copy_head(model, **asked.words)
        return cls._fitted(settings, sets, head, asked, Belonging.of(model, asked, head))

    @classmethod
    def fit_features(
        cls,
        train: FeatureSet | None,
        validation: FeatureSet,
        head: CopiedHead,
        score: str | None = None,
        *,
        paper: str | None = None,
        calibration: FeatureSet | None = None,
        **options: Any,
    ) -> UncertaintyHead:
        """Fit a head to features that were extracted before, such as for several settings.

        Args:
            train: Of training rows; needed for `split="train"` only.
            validation: Of rows that the adapter was not trained on.
            head: The copied head that the features are the input of, by `copy_head`.
            score: `"entropy"` (default), `"sr_norm"` or `"sr_raw"`.
            paper: `"v1"` or `"v2"`, see `HeadSettings.of`.
            calibration: Of further rows, on which P(error) is mapped and the head is judged; the validation rows
                when None.
            options: Fields of `HeadSettings`, such as `split`, `lr`, `balance` or `seed`.

        Returns:
            The head, which predicts features.

        Raises:
            ValueError: For labels or shapes that cannot be, the same rows in two of the sets, or an unknown option.
        """
        settings = HeadSettings.of(score, paper, **options)
        return cls._fitted(settings, (train, validation, calibration), head, None, None)

    @classmethod
    def _fitted(
        cls,
        settings: HeadSettings,
        sets: tuple[FeatureSet | None, FeatureSet | None, FeatureSet | None],
        head: CopiedHead,
        asked: Asked | None,
        belongs: Belonging | None,
    ) -> UncertaintyHead:
        train, validation, calibration = sets
        if validation is None:
            raise ValueError("Validation rows are needed: trials are chosen by rows that they were not fitted on.")
        check_rows(head, training=train, validation=validation, calibration=calibration)
        found = fit_rows(head, train, validation, settings, calibration)
        deltas = None if found.deltas is None else dict(zip(head.trained, found.deltas, strict=True))
        stored = StoredHead(settings, asked, belongs, deltas, found.prior, found.calibration, found.report)
        return cls(stored, head)

    def predict(
        self,
        model: nn.Module,
        batch: Any,
        *,
        tokenizer: Any = None,
        batch_size: int = 32,
        collate_fn: Callable[[list], Mapping[str, Any]] | None = None,
        options: Any = None,
        progress: bool = False,
    ) -> ErrorPrediction:
        """How likely the predictions of a model are wrong, from one forward that predicts.

        Args:
            model: The model that the head was fitted for.
            batch: One batch (a mapping of tensors), or a data set as for `predict_dataset`. Labels are not used, but
                for the tokens of a token classification that have one.
            tokenizer: Pads the rows of a batch of a data set.
            batch_size: Rows of a batch of a data set.
            collate_fn: Makes a batch of a list of rows.
            options: Answers that an item can have, see `extract_features`.
            progress: Show a bar.

        Returns:
            P(error), the scores it was made of, and the predictions, in the order of the rows.

        Raises:
            ValueError: If the model is another one than it was fitted for, or for what `extract_features` refuses.
        """
        read = {"tokenizer": tokenizer, "batch_size": batch_size, "collate_fn": collate_fn, "progress": progress}
        return self.bind(model).read(batch, options=options, **read)[1]

    def predict_features(self, features: FeatureSet, head: CopiedHead | None = None) -> ErrorPrediction:
        """How likely the predictions behind features are wrong.

        Args:
            features: Extracted as those that were fitted to; labels are not needed.
            head: The copied head that the head was fitted with, where it was loaded without a model.

        Returns:
            P(error) and the scores it was made of.

        Raises:
            ValueError: If they are not the features of that head, or no head is known.
        """
        head = head or self.head
        if head is None:
            raise ValueError("This head was loaded without a model. Give head=copy_head(model), or use predict.")
        check_shapes("given", features, head)
        return errors_of(self.stored, features, head)

    def bind(self, model: nn.Module) -> BoundHead:
        """The head on a model, held against it once, for many predictions; `predict` does it every time.

        Args:
            model: That the head was fitted for; it must be neither trained on nor moved while it is bound.

        Raises:
            ValueError: If the head was fitted for another model, or to features.
        """
        return BoundHead(self.stored, model, self.allow_other)

    def attach(self, model: nn.Module, name: str = "default") -> None:
        """Have the head saved and pushed with the active adapter of a model, whoever saves it.

        Args:
            model: That it was fitted for.
            name: Of the head, where an adapter has several; `peft_calib.load` answers with `"default"`.

        Raises:
            ValueError: If it does not belong to the model.
        """
        self.bind(model)
        for file, content in self.stored.files(name).items():
            attach_file(model, file, content)

    def save_pretrained(self, folder: str | Path, name: str = "default") -> None:
        """Write the head beside an adapter: `uncertainty_head.safetensors` and `.json`, which PEFT does not look at.

        Args:
            folder: Of the adapter, or any other one.
            name: Of the head, where an adapter has several; it stands in the names of the files.
        """
        for file, content in self.stored.files(name).items():
            write_atomically(Path(folder) / file, content)

    def push_to_hub(self, repo_id: str, name: str = "default", *, token: str | bool | None = None, **hub: Any) -> Any:
        """Upload the head into an adapter's repository on the Hub, in one commit.

        An adapter that lies there is held against the head first: beside another one, who loads it would be refused.

        Args:
            repo_id: Of the adapter.
            name: Of the head.
            token: For the Hub.
            hub: `private` for a new repository, and further arguments of `HfApi.create_commit`: `revision`,
                `commit_message`, `create_pr`.

        Returns:
            What the Hub says of the commit.

        Raises:
            ValueError: If the head was fitted for another adapter than lies there; nothing is uploaded. With
                `allow_other=True` at loading it is a warning.
        """
        if self.stored.belongs is not None:
            place = adapter_there(repo_id, token, hub.get("revision"))
            if place is not None:
                check_folder(self.stored.belongs, place, self.allow_other, repo_id)
        return upload(self.stored.files(name), repo_id, token, **hub)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: nn.Module | None = None,
        name: str = "default",
        *,
        allow_other: bool = False,
        **hub: Any,
    ) -> UncertaintyHead:
        """Load a head that lies beside an adapter.

        Args:
            folder: Of the adapter, or a Hub id.
            model: With that adapter; where it is given it is held against the head at once, else when it is used.
            name: Of the head, where an adapter has several.
            allow_other: Use the head for another adapter than it was fitted for; a warning says so.
            hub: Arguments of `snapshot_download`: `revision`, `token`, `cache_dir`.

        Returns:
            The head.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If a file is damaged, or the head was fitted for another adapter than `model` has or than lies
                in the folder.
        """
        place = folder_of_head(folder, name, **hub)
        stored = StoredHead.read(place, name)
        if stored.belongs is not None:
            check_folder(stored.belongs, place, allow_other)
        head = cls(stored, allow_other=allow_other)
        if model is not None and head.stored.asked is not None:
            head.head = head.bind(model).head
        return head


def _read(model: nn.Module, asked: Asked, rows: Any, **how: Any) -> FeatureSet | None:
    if rows is None:
        return None
    found = extract_features(model, rows, **asked.words, **how)
    if found.labels is None and asked.label_tokens is not None:
        raise ValueError(
            "The rows have no class ids, so that errors are unknown. With label_tokens= a row's `labels` is one whole "
            f"number: which of the {len(asked.label_tokens)} label tokens is its answer, 0 ... "
            f"{len(asked.label_tokens) - 1}, and not the ids of its tokens as for training."
        )
    return found
