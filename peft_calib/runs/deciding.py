"""`peft-calib decide`: rules with a guarantee, fitted on rows that an adapter has not seen, and kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..artefact import ARTEFACT_FILE, DECISION_FILES, Artefact, place_of, read_artefact
from ..base_models import base_fingerprint
from ..console import quiet
from ..identity import folder_digest, read_config
from ..predictor import Predictor
from ..predictor.kinds import KINDS
from ..predictor.loading import answered_kind
from ..provenance.stored_decision import HEAD, PROBABILITY, FittedTo, StoredDecision, recalibration_of
from .folder import RunFolder
from .loading import head_folder, load_task
from .predicting import loaded_predictor
from .processes import processes
from .rows_to_decide import RowsToDecide, rows_for

#: Tasks whose rows are independent and have one class each, and those with another answer.
TASKS = ("seq-cls", "multiple-choice")
OTHER_TASKS = ("multi-label", "rerank", "regression", "token-cls")


@dataclass(frozen=True)
class Decided:
    """Rules that lie beside an adapter.

    `left_out` rows had been seen, by chance, and were not used, nor were `repeated` ones, whose input another row has.
    What the rules count is called `counted`.
    """

    folder: Path
    data: str
    stored: tuple[StoredDecision, ...]
    left_out: int = 0
    repeated: int = 0
    counted: str = "rows"

    def lines(self) -> list[str]:
        """What a user should know of them."""
        first = self.stored[0]
        lines = [f"Fitted on {first.num_rows} {self.counted} of {self.data}, for {first.to.way}."]
        if self.left_out:
            lines.append(f"{self.left_out} row(s) that were trained or calibrated on were left out.")
        if self.repeated:
            lines.append(f"{self.repeated} row(s) that repeat the input of another one were left out.")
        for one in self.stored:
            lines += ["", *one.told().splitlines()]
        files = " and ".join(DECISION_FILES[one.kind] for one in self.stored)
        return [*lines, "", f"Written to {self.folder}: {files}"]

    def to_dict(self) -> dict[str, Any]:
        """What `peft-calib decide --json` prints: the rules come without the hashes of their rows."""
        first = self.stored[0]
        rules = {
            one.kind: {"promise": one.rule.promise(), "by": one.to.by, **one.rule.to_dict()} for one in self.stored
        }
        rows = {"data": self.data, "rows": first.num_rows, "rows_left_out": self.left_out}
        rows |= {"rows_repeated": self.repeated}
        return {"folder": str(self.folder), **rows, "way": first.to.way, "rules": rules}


def decide(
    adapter: str | Path,
    data: Any = None,
    *,
    risk: float | None = None,
    target_coverage: float | None = None,
    costs: tuple[float, float] | None = None,
    per_class: bool = False,
    confidence: float | None = None,
    miss: float | None = None,
    each_label: bool = False,
    by: str = PROBABILITY,
    alpha: float | None = None,
    score: str | None = None,
    groups: str | None = None,
    randomized: bool = False,
    sets_confidence: float | None = None,
    how: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    batch_size: int | None = None,
    base_model: str | Path | None = None,
    **where: Any,
) -> Decided:
    """Fit a threshold, prediction sets or both on rows that an adapter has not seen, and keep them beside it.

    `peft_calib.load` then answers with `answered` and `sets`; `peft-calib evaluate` says what is reached on other
    rows. A promise holds for this adapter, its temperature and this way of predicting, and for rows drawn like these.
    It rests on independent rows, so equal inputs count as one; where their labels differ, one of these is drawn.

    Of labels, of which a row may have several, a threshold for each is fitted (`risk`, `miss`); of numbers how far
    an interval reaches (`alpha`); of entities a threshold on the probability of one (`risk`, `target_coverage`), on
    one entity a sentence, since those of one are right and wrong together.

    Args:
        adapter: Folder of a finished run, or of an adapter.
        data: Labelled rows that nothing was fitted on, and nothing will be reported on: a path, a Hub id or a table;
            of a run its own source, where a `split` of it is named.
        risk: Of what is answered at most this share is wrong, in (0, 1); 0.05 if nothing is asked for. Of labels: of
            the rows that are given one at most this share does not have it; 0.1.
        target_coverage: Instead: at least this share of the rows is answered.
        costs: Instead: costs of a wrong answer and of a row passed on.
        per_class: Whether the risk holds for what is answered as any one class.
        confidence: Probability with which a threshold's promise holds; 0.95 if not given.
        miss: Of labels: of the rows that have one at most this share is said not to; None: none is ruled out.
        each_label: Of labels: the promise is for each by itself, instead of for all at once.
        by: What a threshold goes by: `"probability"` of the predicted class, or `"head"`, 1 - P(error) of the
            uncertainty head beside the adapter.
        alpha: Highest share of prediction sets that may miss the label, in (0, 1); for sets beside a threshold that
            was asked for, or alone. Of numbers: the share of values outside their interval; 0.1.
        score: Of the sets: `"lac"` (the default), `"aps"` or `"raps"`. Of an interval: `"absolute"` (the default) or
            `"normalised"`, by the predicted standard deviation.
        groups: `"label"` or `"predicted"`, where the sets' coverage shall hold for each class.
        randomized: Whether chance decides at the edge of the sets.
        sets_confidence: Probability over calibration splits with which the sets' coverage holds; None: on average.
        how: Way of predicting, `"mean"`, `"sample"` or `"late"`; that of the adapter if not given.
        num_samples: Draws; as many as the temperature was fitted with if not given.
        seed: Key of the draws, and of what is left to chance. Draws of another seed are other functions, for which
            nothing is promised.
        overwrite: Replace rules of the same kind that lie there.
        progress: Show a bar.
        batch_size: Rows of a forward.
        base_model: Where the base model lies now, if it has moved.
        where: Which rows of the data: `split`, `subset`, `encoding`, `delimiter`, `drop_missing`, and for an adapter
            that is no run `text_column` and `label_column`.

    Returns:
        The rules, and where they lie.

    Raises:
        NoGuaranteeError: If the rows do not allow what is asked for; a ValueError that says how many it takes.
        FileExistsError: If a rule of the kind lies there.
        FileNotFoundError: If there is no adapter.
        ValueError: For bad arguments, or rows that the adapter was trained or calibrated on.
    """
    if by not in (PROBABILITY, HEAD):
        raise ValueError(f"--by must be one of {PROBABILITY}, {HEAD}, got {by!r}")
    if how == "linear":
        raise ValueError("a rule is for --how mean, sample or late; of linear there is no temperature")
    given: dict[str, Any] = {
        "risk": risk, "target_coverage": target_coverage, "costs": costs, "confidence": confidence, "alpha": alpha,
        "per_class": per_class, "miss": miss, "each_label": each_label, "score": score, "groups": groups,
        "randomized": randomized, "sets_confidence": sets_confidence, "by": None if by == PROBABILITY else by,
    }  # fmt: skip
    place = Path(adapter).absolute()
    folder, kind = _folder_of(place)
    asked = {name: value for name, value in given.items() if value is not None and value is not False}
    rules = KINDS[kind].unfitted(asked, seed)
    _check_free(folder, rules, overwrite)
    with quiet():
        read = rows_for(place, data, where, seed)
        predictor = loaded_predictor(adapter, {"base_model": base_model, "decisions": False})
        rows = read(predictor)
        making: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        found = predictor.predict_encoded(rows.encoded, num_samples, how, seed, **making)
        to = _fitted_to(predictor, found, seed, by)
        stored = tuple(_stored(predictor, found, rule, to, by, rows) for rule in rules)
        if processes().is_main_process:
            for one in stored:
                one.write(folder)
        processes().wait_for_everyone()
    return Decided(folder, rows.name, stored, rows.left_out, rows.repeated, KINDS[kind].counted)


# ---------------------------------------------------------------------------------------------------- where rules lie


def _folder_of(place: Path) -> tuple[Path, str]:
    """Where the rules of a run or an adapter lie, where its uncertainty head does; and what it answers with."""
    run = RunFolder(place)
    if run.finished.is_file():
        task = load_task(run)
        if task.config.task not in (*TASKS, *OTHER_TASKS):
            raise ValueError(
                f"a rule decides over rows that are independent, with one answer each; a run of --task "
                f"{task.config.task} answers with tokens. Decide over whole texts with "
                "peft_calib.calibration.SelectiveThreshold and input='confidence'"
            )
        return head_folder(run, task.config), task.answers
    if not any((place / name).is_file() for name in (CONFIG_NAME, ARTEFACT_FILE)):
        raise FileNotFoundError(
            f"{place} holds neither a finished run nor an adapter; a rule is written beside one, so name its folder"
        )
    artefact = read_artefact(place) or Artefact()
    return place, answered_kind(artefact, read_config(place_of(place, artefact.names[0])))


def _check_free(folder: Path, rules: Sequence[Any], overwrite: bool) -> None:
    kinds = [rule.kind for rule in rules]
    there = [DECISION_FILES[kind] for kind in kinds if (folder / DECISION_FILES[kind]).is_file()]
    if there and not overwrite:
        raise FileExistsError(f"{folder} holds {there[0]}; pass --overwrite to replace it")


# ------------------------------------------------------------------------------------------------------------- the fit


def _fitted_to(predictor: Predictor, found: Any, seed: int, by: str) -> FittedTo:
    """The way of predicting that a rule is fitted to."""
    if by == HEAD and found.error_probability is None:
        why = found.error_head or "there is no uncertainty head beside the adapter"
        raise ValueError(f"--by head goes by P(error), and {why}: fit one with peft-calib train-head")
    how = "mean" if found.how == "mean" else "sample"
    return FittedTo(
        how=how,
        num_samples=found.num_samples,
        seed=predictor.seed_of(how, seed),
        recalibration=recalibration_of(predictor.recalibration(how)[0]),
        by=by,
        head=predictor.error_head.digest if by == HEAD else None,
        label_tokens=predictor.artefact.label_tokens,
    )


def _stored(predictor: Predictor, found: Any, rule: Any, to: FittedTo, by: str, rows: RowsToDecide) -> StoredDecision:
    """A rule fitted to predictions, with what it belongs to."""
    names = predictor.artefact.names
    goes = predictor.kind.goes_by(rule, by)
    made = StoredDecision(
        rule=rule,
        to=replace(to, by=goes, head=to.head if goes == HEAD else None),
        adapters=tuple(folder_digest(place_of(predictor.folder, name)) for name in names),
        base=base_fingerprint(predictor.model),
        rows=rows.known,
        class_names=tuple(predictor.label_names),
    )
    predictor.kind.fit_rule(rule, found, rows.encoded.labels, goes)
    return made
