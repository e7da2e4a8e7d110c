"""`ConformalSets`: for each row a set of classes that holds the right one as often as was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...json_files import Fields
from ...whole_numbers import check_whole
from ..answers import as_given
from ..bins import top_label
from ..grouping import Grouping, exact, names_of
from ..inputs import as_numpy, check_seed, checked_weights
from ..recalibrate.temperature import TemperatureScaling
from .base import DecisionRule, Taken
from .bounds import check_share, percent
from .groups import BY_LABEL, BY_NAME, BY_PREDICTION, as_classes, as_names, grouping_of, places_in
from .selective_report import named
from .set_part import SetPart, fit_part, read_part
from .set_report import CoverageLaw, SetReport, report_on
from .set_scores import Cut, check_kind_of_score, class_scores, uniforms
from .weighted_cut import WeightedCut, weights_of_new


class ConformalSets(DecisionRule):
    """Split-conformal prediction sets: the label is in the set with probability `1 - alpha` at least.

    The probability is over the rows of the fit and the new one, for any model, if all are drawn alike; it is not that
    of each row, nor, without `groups`, of each class. Over calibration splits the coverage follows a Beta law
    (`coverage_law`), which every report shows; `confidence` asks for the level in that share of splits.

    Args:
        alpha: Highest share of rows whose set may miss the label.
        score: `"lac"` (the smallest sets on average), `"aps"` (sets that follow the difficulty of a row) or `"raps"`
            (APS with fewer large sets).
        groups: For which parts of the rows the coverage holds, each having a cut of its own (Vovk's Mondrian
            predictors): None for all together, `"label"` for each class, `"predicted"` for each predicted class, or
            `(N,)` names (texts, numbers, booleans, tuples of them) for the rows of `fit`, given here or there.
        randomized: Whether chance decides what is in at the edge, which makes the coverage exact: APS and RAPS take
            off a random part of a class's own probability, LAC smooths its p-values. Without it sets are larger.
        seed: Of the chances. A row has the same in every batch; among equal rows it goes by their order in the batch.
        allow_empty: Whether a set may be empty, where no class fits; otherwise it then holds the likeliest class.
        confidence: Probability over calibration splits with which the coverage is at least `1 - alpha`; None for the
            coverage on average over splits.
        penalty: Of RAPS, for each rank beyond `free_ranks`.
        free_ranks: Of RAPS; with no more classes than that it is APS.
        temperature: Divides the logarithms of the probabilities first; a number or a fitted `TemperatureScaling`, from
            other rows than those of `fit`.

    Attributes:
        parts: The cuts with their groups, rows and coverage laws.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> p = generator.dirichlet([1, 1, 1], 500)
        >>> labels = (generator.random((500, 1)) > p.cumsum(axis=1)).sum(axis=1)
        >>> sets = ConformalSets(alpha=0.1).fit(p, labels)
        >>> sets.predict([[0.9, 0.06, 0.04], [0.4, 0.35, 0.25]]).astype(int)
        array([[1, 0, 0],
               [1, 1, 1]])
    """

    kind = "sets"

    def __init__(
        self,
        alpha: float = 0.1,
        score: str = "lac",
        groups: Any = None,
        *,
        randomized: bool = False,
        seed: int = 0,
        allow_empty: bool = True,
        confidence: float | None = None,
        penalty: float = 0.01,
        free_ranks: int = 5,
        temperature: float | TemperatureScaling | None = None,
    ) -> None:
        super().__init__(temperature)
        self.alpha = check_share(alpha, "alpha", 0.1)
        self.score = check_kind_of_score(score)
        self.grouping, self._given_groups = grouping_of(groups)
        self.randomized, self.allow_empty = bool(randomized), bool(allow_empty)
        self.seed = check_seed(seed)
        self.confidence = None if confidence is None else check_share(confidence, "confidence", 0.95)
        if self.confidence is not None and self.randomized and self.score == "lac":
            raise ValueError("`confidence` goes with a cut at one of the scores: leave out `randomized`, or take APS.")
        if not isinstance(penalty, (int, float)) or not 0.0 <= penalty < np.inf:
            raise ValueError(f"`penalty` must be a number of at least 0, got {penalty!r}.")
        self.penalty, self.free_ranks = float(penalty), check_whole(free_ranks, "`free_ranks`", 0)
        self.parts: tuple[SetPart, ...] = ()

    def fit(
        self,
        probabilities: Any,
        labels: Any,
        *,
        groups: Any = None,
        input: str = "probabilities",
        mask: Any = None,
        ignore_index: int | None = -100,
        sample_weight: Any = None,
    ) -> ConformalSets:
        """Finds the cuts on labelled rows that the model was not trained on.

        Args:
            probabilities: `(N, C)` rows (the mean over draws, say), or `(N,)` for the probability of class 1; numpy,
                torch or lists. Logits if `input="logits"`.
            labels: `(N,)` integer class ids.
            groups: `(N,)` names of the rows' groups, if not given to the constructor.
            input: `"probabilities"` or `"logits"`.
            mask: Boolean; False leaves the row out.
            ignore_index: Label of rows to leave out, or None.
            sample_weight: How much oftener a row like this will come than it did, a known density ratio up to a
                factor. The coverage is then that of the rows to come (Tibshirani et al., 2019), on average over
                splits, and `predict` takes the ratio of each new row.

        Returns:
            The object itself.

        Raises:
            NoGuaranteeError: If there are too few rows for `alpha`, altogether or in a group or class; a ValueError
                that says which, and how many it takes.
            ValueError: For bad input, or a temperature that was fitted on these rows.
        """
        if groups is not None and self.grouping in (BY_LABEL, BY_PREDICTION):
            raise ValueError(f"These sets have groups={self.grouping!r}; leave `groups` out of fit.")
        grouping = self.grouping if groups is None else BY_NAME
        weights, mask = checked_weights(sample_weight, labels, mask)
        if weights is not None and (grouping is not None or self.confidence is not None):
            name = "confidence" if grouping is None else "groups"
            raise ValueError(
                f"With `sample_weight` the coverage is that of all rows, on average over splits: leave out `{name}`."
            )
        options = {"input": input, "mask": mask, "ignore_index": ignore_index}
        taken = self._take(probabilities, labels, **options)
        scores = self._scores(taken.values)[np.arange(len(taken.labels)), taken.labels]
        given = self._given_groups if groups is None else groups
        wanted: dict[str, Any] = {"alpha": self.alpha, "confidence": self.confidence, "smoothed": self._smoothed}
        rows = _groups_of(grouping, taken, given, labels)
        if weights is not None:
            weights = weights if taken.kept is None else weights[taken.kept]
            cut = WeightedCut.of(scores, weights, self.alpha, self._smoothed)
            parts: tuple[SetPart, ...] = (SetPart(None, len(scores), cut, None),)
        elif rows is None:
            parts = (fit_part(scores, None, None, **wanted),)
        else:  # every class has to have a cut where the coverage is that of classes
            known = range(taken.values.shape[1]) if grouping == BY_LABEL else rows.values
            place = places_in(known, rows, grouping)
            parts = tuple(fit_part(scores[place == k], name, grouping, **wanted) for k, name in enumerate(known))
        self._remember(taken, probabilities, labels, options)
        self.grouping, self.parts = grouping, parts
        return self

    @property
    def _smoothed(self) -> bool:
        """Whether chance decides at the cut, and not in the scores."""
        return self.randomized and self.score == "lac"

    def _scores(self, values: np.ndarray) -> np.ndarray:
        u = uniforms(values, self.seed) if self.randomized and not self._smoothed else None
        return class_scores(values, self.score, u, self.penalty, self.free_ranks)

    def predict(
        self, probabilities: Any, *, groups: Any = None, input: str = "probabilities", sample_weight: Any = None
    ) -> Any:
        """The set of each row.

        Args:
            probabilities: As for `fit`, of any rows.
            groups: `(N,)` names of their groups, where the rule was fitted with names; of the same type.
            input: `"probabilities"` or `"logits"`.
            sample_weight: `(N,)` weights of the rows, or one for all, where the fit had weights.

        Returns:
            `(N, C)` booleans: a torch tensor on the device of a torch tensor, numpy otherwise.

        Raises:
            ValueError: If the rule is not fitted, was for another number of classes, or has not seen a group.
        """
        values = self._unlabelled(probabilities, input)
        self._check_groups(groups)
        place = None if groups is None else self._places(as_names(groups, np.zeros(len(values), np.int64)))
        weights = weights_of_new(sample_weight, len(values), self.is_weighted)
        return as_given(self._sets(values, place, weights), probabilities)

    def _sets(self, values: np.ndarray, place: np.ndarray | None, weights: np.ndarray | None = None) -> np.ndarray:
        """`(N, C)` sets; `place` is that of each row's group among `parts`, where groups have names."""
        scores = self._scores(values)
        chances = np.full_like(scores, np.nan)
        if self.grouping == BY_LABEL:
            for k, part in enumerate(self.parts):
                chances[:, k] = part.chance(scores[:, k])
        else:
            if place is None:
                is_all = self.grouping is None
                place = np.zeros(len(values), np.int64) if is_all else self._places(as_classes(top_label(values)[1]))
            for k, part in enumerate(self.parts):
                mine = place == k
                chances[mine] = part.chance(scores[mine], None if weights is None else weights[mine])
        assert not np.isnan(chances).any(), "a row without a cut"
        # One number a row, for all its classes: they come in or stay out in the order of their scores.
        sets = chances > (uniforms(values, self.seed)[:, None] if self._smoothed else 0.0)
        if not self.allow_empty:
            sets[np.arange(len(sets)), top_label(values)[1]] |= ~sets.any(axis=1)
        return sets

    def _check_groups(self, groups: Any) -> None:
        if self.grouping == BY_NAME and groups is None:
            raise ValueError("These sets were fitted with groups: pass `groups`, the group of every row.")
        if self.grouping != BY_NAME and groups is not None:
            raise ValueError("These sets were fitted without names of groups; leave `groups` out.")

    def _places(self, rows: Grouping) -> np.ndarray:
        """`(N,)` the part of each row; a ValueError for groups that have none."""
        return places_in([part.group for part in self.parts], rows, self.grouping)

    def evaluate(
        self,
        probabilities: Any,
        labels: Any,
        *,
        groups: Any = None,
        input: str = "probabilities",
        mask: Any = None,
        ignore_index: int | None = -100,
        confidence_level: float = 0.95,
        sample_weight: Any = None,
    ) -> SetReport:
        """Coverage and sizes on rows that the rule was not fitted on, with the band that coverage should lie in.

        Args:
            probabilities: As for `fit`.
            labels: As for `fit`.
            groups: As for `predict`.
            input: As for `fit`.
            mask: Boolean; False leaves the row out.
            ignore_index: Label of rows to leave out, or None.
            confidence_level: Of interval and bands.
            sample_weight: As for `predict`; the rows are like those to come, and count the same.

        Raises:
            ValueError: If more than 5 % of the rows were fitted on: such a report would flatter.
        """
        level = check_share(confidence_level, "confidence_level", 0.95)
        taken = self._unseen(probabilities, labels, input, mask, ignore_index)
        self._check_groups(groups)
        place = self._places_of(taken, groups, labels)
        weights = weights_of_new(sample_weight, as_numpy(labels, "labels").size, self.is_weighted)
        if weights is not None and taken.kept is not None:
            weights = weights[taken.kept]
        sets = self._sets(taken.values, place, weights)
        if place is None:
            return report_on(sets, taken.labels, self.alpha, level, self.parts[0].law, [])
        named = [(part.group, place == k, part.law) for k, part in enumerate(self.parts)]
        return report_on(sets, taken.labels, self.alpha, level, None, [one for one in named if one[1].any()])

    def _places_of(self, taken: Taken, groups: Any = None, labels: Any = None) -> np.ndarray | None:
        """`(N,)` the part of each labelled row; None without groups."""
        rows = _groups_of(self.grouping, taken, groups, labels)
        return None if rows is None else self._places(rows)

    @property
    def num_rows(self) -> int:
        """Rows it was fitted on."""
        return sum(part.num_rows for part in self.parts)

    @property
    def is_weighted(self) -> bool:
        """Whether it was fitted with weights."""
        return any(isinstance(part.cut, WeightedCut) for part in self.parts)

    @property
    def threshold(self) -> Any:
        """The score up to which a class is in the set; `(G,)` with groups."""
        self._check_fitted()
        if self.is_weighted:
            raise ValueError("These sets were fitted with weights: every weight of a new row has a cut of its own.")
        lows = [part.cut.low for part in self.parts if isinstance(part.cut, Cut)]
        return lows[0] if self.grouping is None else np.array(lows)

    @property
    def coverage_law(self) -> CoverageLaw | None:
        """The law of the coverage over calibration splits; None with groups, where each of `parts` has its own."""
        self._check_fitted()
        return self.parts[0].law if self.grouping is None else None

    def promise(self) -> str:
        """What the sets guarantee, in one sentence."""
        held = {None: "", BY_LABEL: " of every class", BY_PREDICTION: " of every predicted class"}
        whose = held.get(self.grouping, " of every group")
        if self.is_weighted:
            whose = " of rows drawn as their weights say"
        how = "on average over calibration splits"
        if self.confidence is not None:
            how = f"for this calibration split, with {percent(self.confidence)} confidence"
        return f"At least {percent(1.0 - self.alpha)} of the sets{whose} hold the label, {how}."

    def to_markdown(self, class_names: Sequence[str] | None = None) -> str:
        """The promise, how far it goes, and what is not promised; classes by their names, if these are given."""
        self._check_fitted()
        chance = ", randomized" if self.randomized else ""
        lines = [f"{self.promise()} {self.score.upper()}{chance}, fitted on {self.num_rows} rows."]
        if self.is_weighted:
            lines += ["", "The cut of a new row hangs on its weight, by the density ratio that the fit was given."]
        elif self.grouping is None:
            assert self.parts[0].law is not None
            low, high = self.parts[0].law.interval(0.95)
            lines += ["", f"A single split of that size covers {percent(low)} to {percent(high)} (95 % of splits)."]
        else:
            lines += ["", "| group | rows | covers, 95 % of splits |", "|---|---:|---:|"]
            groups = [part.group for part in self.parts]
            by_class = class_names is not None and self.grouping != BY_NAME
            names = [named(group, class_names) for group in groups] if by_class else names_of(groups)
            for name, part in zip(names, self.parts, strict=True):
                assert part.law is not None
                low, high = part.law.interval(0.95)
                lines.append(f"| {name} | {part.num_rows} | {percent(low)} to {percent(high)} |")
        divided = "" if self.temperature is None else f" Probabilities are taken at T = {self.temperature:.4g}."
        lines += ["", f"This holds for rows drawn like those it was fitted on, not row by row.{divided}"]
        return "\n".join(lines)

    def _settings(self) -> dict[str, Any]:
        names = "alpha score grouping randomized seed allow_empty confidence penalty free_ranks".split()
        return {name: getattr(self, name) for name in names}

    def _fitted(self) -> dict[str, Any]:
        return {"parts": [part.to_dict() for part in self.parts]}

    @classmethod
    def _from_fields(
        cls, settings: Fields, fitted: Fields, num_classes: int, temperature: float | None
    ) -> ConformalSets:
        sets = cls(
            settings.number("alpha"),
            settings.text("score"),
            settings.text("grouping", default=None),
            randomized=settings.flag("randomized"),
            seed=settings.integer("seed", least=0),
            allow_empty=settings.flag("allow_empty"),
            confidence=settings.number("confidence", default=None),
            penalty=settings.number("penalty", least=0.0),
            free_ranks=settings.integer("free_ranks", least=0),
            temperature=temperature,
        )
        parts = fitted.listing("parts", dict)
        fits = {None: len(parts) == 1, BY_LABEL: len(parts) == num_classes}.get(sets.grouping, len(parts) >= 1)
        if not fits:
            raise fitted.wrong("parts", "a cut for all rows, or one for each class or group")
        sets.parts = tuple(
            read_part(
                Fields(part, fitted.source, fitted.mend, f"{fitted.prefix}parts[{k}]."),
                sets.grouping,
                sets.alpha,
                sets._smoothed,
            )
            for k, part in enumerate(parts)
        )
        groups = [exact(part.group) for part in sets.parts]
        classes = [exact(k) for k in range(num_classes)]
        if groups != (classes if sets.grouping == BY_LABEL else list(dict.fromkeys(groups))):
            raise fitted.wrong("parts", "the cuts of different groups; of classes all of them, in order")
        return sets


def _groups_of(grouping: str | None, taken: Taken, given: Any, labels: Any) -> Grouping | None:
    """The group of each row that is left, or None."""
    if grouping is None:
        return None
    if grouping == BY_NAME:
        return as_names(given, labels, taken.kept)
    return as_classes(taken.labels if grouping == BY_LABEL else top_label(taken.values)[1])
