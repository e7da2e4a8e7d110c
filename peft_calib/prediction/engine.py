"""One prediction call with a dial from cheap to thorough, whose cost is part of the answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..tuners.late import Prefix, run_prefix, share_of
from ..tuners.one_by_one import run_repeated, runs_one_by_one
from ..tuners.padding import numbered, numbers_places, takes_one_row
from ..tuners.rows import SharedRowsError, count_rows, main_input_name, repeat_rows
from .adaptive import FIRST, FIRST_PAIRED, STEP, STEP_PAIRED, check_adaptive, pair_means
from .baselines import AdapterDraws, DropoutDraws
from .budget import draws_per_pass
from .draws import check_num_samples, evaluating
from .heads import Head, Items, TokenHead, check_label_tokens, choose_head, logits_of, media_tokens
from .labels import LabelsPrediction
from .linear import linear_logits
from .result import Prediction, RegressionPrediction
from .sources import DrawSource, LawDraws, TheModel

HOW = ("mean", "sample", "late", "linear")
How = Literal["mean", "sample", "late", "linear"]


def predict(
    model: nn.Module,
    batch: Mapping[str, Any],
    how: How = "sample",
    num_samples: int | Literal["auto"] | None = None,
    seed: int = 0,
    *,
    weights: Sequence[float] | torch.Tensor | None = None,
    tolerance: float = 0.02,
    max_samples: int = 16,
    antithetic: bool | None = None,
    dropout: float | None = None,
    adapter_names: Sequence[str] | None = None,
    task: str = "auto",
    label_tokens: Sequence[int | str] | None = None,
    tokenizer: Any = None,
    memory_budget: int | None = None,
) -> Prediction | LabelsPrediction | RegressionPrediction:
    """Predict one batch with K draws of an adapter, and say what it cost.

    Draw k is the same function for every row of every batch: the LoRA that `export_lora(..., num_samples=K,
    seed=seed)` writes to `draw-k`. Neither dropout nor the global random state takes part.

    Args:
        model: A model with an active adapter of this package. With `how="mean"` any model will do.
        batch: What the model takes, by name; `labels` are passed on to the result and compute no loss.
        how: `"mean"`: one forward of the deterministic adapter. `"sample"`: K draws in as few forwards as memory
            allows; the members of an EnsembleLoRA as with `"late"`. `"late"`: the same answer, but the layers before
            the first that varies run only once (choose the last layers with `layers_to_transform`, or
            `bayesian_layers` of a `BayesianLoraConfig`). `"linear"`: the logits linearised around the mean, one
            forward and one backward a class for any number of draws.
        num_samples: Number of draws K; 8 when `None`, for a curve its grid (the draws of a curve are K equispaced
            points), for an ensemble all members. `"auto"` stops drawing for a row once its class and its probability
            are settled, see `adaptive.settled`; needs `how="sample"` and one item a row.
        seed: Key of the draws.
        weights: Weights of the K draws in the predictive mean, such as `peft_calib.curve_weights`; equal when `None`.
        tolerance: For `"auto"`, the half-width of the 95 % interval of the probability of the predicted class.
        max_samples: For `"auto"`, the largest number of draws of a row.
        antithetic: Make the draws in mirrored pairs (2j, 2j + 1): the mean of an even number of draws varies less from
            seed to seed where the model is near to linear in the draws. `"auto"` then judges by the means of the pairs
            and needs fewer draws; it does so by itself, unless this is `False`, where draws have mirror images and
            `max_samples` is even.
        dropout: Monte Carlo dropout on a stock LoRA with this probability, instead of an adapter of this package.
        adapter_names: Adapters of the model that are the draws (a deep ensemble), instead of one adapter's law.
        task: What the logits are: `"classification"`, `"labels"` (a sigmoid each), `"regression"`, `"token"`,
            `"next_token"`, or `"auto"`.
        label_tokens: For a language model, the tokens that stand for the classes: ids, or texts of one token each.
        tokenizer: For texts among the label tokens.
        memory_budget: Bytes for the activations of one forward; see `budget.draws_per_pass`. Where an accelerator
            runs out of memory all the same, the pass is halved and tried again.

    Returns:
        A `Prediction`, for labels a `LabelsPrediction`, for regression a `RegressionPrediction`, on the CPU.

    Raises:
        TypeError: If draws are asked of a model that has no adapter of this package.
        ValueError: For an unknown `how` or `task`, `num_samples` below 1, an adapter that is merged, disabled or
            inactive, an empty batch, label tokens that are not single tokens, `"late"` on a model it does not fit, or
            a model that answers with NaN or infinity.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_calib import BayesianLoraConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(5, 2)), BayesianLoraConfig(r=2, target_modules=["0"]))
        >>> predict(model, {"input": torch.ones(3, 5)}, num_samples=4).probabilities.shape
        torch.Size([3, 2])
    """
    source = choose_source(model, how, seed, dropout, adapter_names, antithetic)
    options: dict[str, Any] = {"task": task, "label_tokens": label_tokens, "tokenizer": tokenizer}
    options |= {"budget": memory_budget, "weights": weights}
    options |= {"tolerance": tolerance, "max_samples": max_samples}
    return BatchPredictor(source, how, num_samples, seed, **options)(batch)


def choose_source(
    model: nn.Module,
    how: str,
    seed: int,
    dropout: float | None = None,
    adapter_names: Sequence[str] | None = None,
    antithetic: bool | None = None,
) -> DrawSource:
    """Where the draws of a prediction come from; the arguments are those of `predict`."""
    check_how(how)
    if antithetic and (dropout is not None or adapter_names is not None):
        raise ValueError("antithetic=True mirrors draws from a posterior; dropout and ensembles have no mirror image.")
    if dropout is not None and adapter_names is not None:
        raise ValueError("dropout= and adapter_names= are two sources of draws; give one of them.")
    if how == "mean":
        if adapter_names is not None:
            raise ValueError("An ensemble has no mean adapter, so how='mean' does not go with adapter_names=.")
        return TheModel(model)
    if dropout is not None:
        return DropoutDraws(model, dropout, seed)
    return LawDraws(model, seed, antithetic) if adapter_names is None else AdapterDraws(model, adapter_names)


def check_how(how: object) -> None:
    """Raise `ValueError` unless `how` is known."""
    if how not in HOW:
        raise ValueError(f"how must be one of {HOW}, got {how!r}.")


class BatchPredictor:
    """A prediction set up once and made for many batches; `first` and `total` say which part of a whole it is."""

    def __init__(
        self,
        source: DrawSource,
        how: str,
        num_samples: int | str | None,
        seed: int | None,
        *,
        first: int = 0,
        total: int | None = None,
        weights: Sequence[float] | torch.Tensor | None = None,
        tolerance: float = 0.02,
        max_samples: int = 16,
        task: str = "auto",
        label_tokens: Sequence[int | str] | None = None,
        tokenizer: Any = None,
        budget: int | None = None,
    ) -> None:
        check_how(how)
        num_samples = source.default_num_samples if num_samples is None else num_samples
        self.adaptive = num_samples == "auto" and how != "mean"
        if num_samples == "auto":
            check_adaptive(tolerance, max_samples)
            if how in ("late", "linear"):
                raise ValueError("num_samples='auto' draws row by row, which needs how='sample'.")
            if max_samples % 2 == 0:
                source.prefer_pairs()
            if source.antithetic and max_samples % 2:
                raise ValueError(f"Antithetic draws come in pairs, so max_samples must be even; got {max_samples}.")
            num_samples = max_samples if source.available is None else min(max_samples, source.available)
        num_samples = check_num_samples(num_samples)
        self.tolerance = tolerance
        if how != "mean" and source.available is not None and first + num_samples > source.available:
            raise ValueError(f"{num_samples} draws were asked for, but there are {source.available}.")
        self.source, self.how, self.seed, self.first, self.budget = source, how, seed, first, budget
        self.num_samples = 1 if how == "mean" else num_samples
        total = first + self.num_samples if total is None else total
        if not self.adaptive:
            source.spread_over(total)
        self.weights = None if weights is None else self._own_weights(weights, total)
        root = source.root
        if label_tokens is not None:
            vocabulary = getattr(getattr(root, "config", None), "vocab_size", None)
            label_tokens = check_label_tokens(label_tokens, tokenizer, vocabulary)
        self.head: Head = choose_head(root, task, label_tokens)
        self.device = next((p.device for p in root.parameters()), torch.device("cpu"))
        self.numbers_places = numbers_places(root)
        self.no_cache = "use_cache" in inspect.signature(root.forward).parameters

    def __call__(self, batch: Mapping[str, Any]) -> Prediction | LabelsPrediction | RegressionPrediction:
        with torch.no_grad(), evaluating(self.source.model):
            items = self.prepare(batch)
            if self.adaptive:
                values, counts = self._adaptive_values(items)
                return self.result(values, items, num_forwards=float(counts.double().mean()), draws_per_row=counts)
            values, cost = self.answers(items)
        return self.result(values, items, num_forwards=cost)

    def _own_weights(self, weights: Sequence[float] | torch.Tensor, total: int) -> torch.Tensor:
        values = torch.as_tensor(weights, dtype=torch.float64)
        valid = values.shape == (total,) and bool((values >= 0).all()) and 0 < float(values.sum()) < float("inf")
        if self.adaptive or not valid:
            raise ValueError(
                f"weights must be {total} finite numbers, one for each draw, not negative and not all zero (and "
                f"num_samples a number); got {values.shape} with sum {float(values.sum())}."
            )
        return values[self.first : self.first + self.num_samples]

    def prepare(self, batch: Mapping[str, Any]) -> Items:
        """Check a batch, move it to the model and find its items."""
        if not isinstance(batch, Mapping):
            texts = isinstance(batch, str) or (isinstance(batch, Sequence) and any(isinstance(x, str) for x in batch))
            hint = " Tokenise texts first: tokenizer(texts, padding=True, return_tensors='pt')." if texts else ""
            raise TypeError(
                f"The batch must be a mapping of input names to tensors, got {type(batch).__name__}.{hint}"
            )
        inputs = send_to_device(dict(batch), self.device, non_blocking=True)
        rows = count_rows(inputs, main_input_name(self.source.root))
        if self.numbers_places:
            inputs = numbered(inputs)
        if self.no_cache:
            inputs["use_cache"] = False  # rows of different draws share no cache, and nothing is generated
        items = self.head.items(inputs, rows)
        items.media_tokens = media_tokens(self.source.root)
        return items

    def result(
        self, values: torch.Tensor, items: Items, **facts: Any
    ) -> Prediction | LabelsPrediction | RegressionPrediction:
        """Wrap the values (K, N, C) of a batch."""
        facts = facts if self.weights is None else {"weights": self.weights, **facts}
        common = {"how": self.how, "seed": None if self.how == "mean" else self.seed, **facts}
        common["antithetic"] = self.source.antithetic
        labels = None if items.labels is None else items.labels.cpu()
        kind = self.head.answers
        if isinstance(self.head, TokenHead):
            common["positions"] = None if items.positions is None else items.positions.cpu()
        return kind(**{kind.samples_name: values}, labels=labels, **common)

    def answers(self, items: Items) -> tuple[torch.Tensor, float]:
        """What the head reads of K draws of a batch, (K, N, C) on the CPU, and what that cost in forwards."""
        K = self.num_samples
        if self.how == "linear":
            return self._linear_values(items, K)
        # nobody wants to run the trunk of an ensemble for each of its members
        members = isinstance(self.source, LawDraws) and self.source.available is not None and K > 1
        prefix = self._prefix(items, K) if self.how == "late" or members else None
        if prefix is None or not prefix.outputs:
            return self.passes(items, self.first, K), float(K)
        share = share_of(prefix, self.source.root, self.head.share_of_positions(items))
        return self.passes(items, self.first, K, prefix), share + K * (1 - share)

    def _linear_values(self, items: Items, num_samples: int) -> tuple[torch.Tensor, float]:
        """One forward and as many backwards as classes; with frozen weights a backward costs about a forward."""
        if not isinstance(self.source, LawDraws):
            raise ValueError(
                "how='linear' expands around the mean of an adapter of peft_calib; use how='sample' here."
            )
        logits = linear_logits(self.source, self.head, items, self.first, num_samples).float()
        return self.head.values(logits).cpu(), 1.0 + logits.shape[-1]

    def _adaptive_values(self, items: Items) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw in rounds, each time only for the rows that are not settled; NaN where nothing was drawn."""
        if not items.one_a_row:
            raise ValueError(
                "num_samples='auto' decides row by row, which needs one item a row. Give a number of draws."
            )
        open_rows, made = torch.arange(items.rows), 0
        counts = torch.zeros(items.rows, dtype=torch.int64)
        rounds: list[torch.Tensor] = []
        while made < self.num_samples and len(open_rows):
            first, step = (FIRST_PAIRED, STEP_PAIRED) if self.source.antithetic else (FIRST, STEP)
            count = min(step if made else first, self.num_samples - made)
            part = items if len(open_rows) == items.rows else items.select(open_rows)
            drawn = self.passes(part, self.first + made, count)
            whole = drawn.new_full((count, items.rows, drawn.shape[-1]), float("nan"))
            whole[:, open_rows] = drawn
            rounds.append(whole)
            made += count
            counts[open_rows] = made
            so_far = torch.cat(rounds)[:, open_rows]
            independent = pair_means(so_far) if self.source.antithetic else so_far
            open_rows = open_rows[~self.head.settled(independent, self.tolerance)]
        return torch.cat(rounds), counts

    def _prefix(self, items: Items, num_samples: int) -> Prefix | None:
        """What all draws share; `None` where nothing varies and there is one function only."""
        varying = self.source.varying_modules(self.first + num_samples)
        if not varying:
            return None
        with self.source.use(self.first, 1), self.head.reading(self.source.root, items):
            call = partial(self.source.model, **items.inputs)
            try:
                return run_prefix(call, self.source.root, varying, items.rows)
            except ValueError:  # the model cannot be cut
                if self.how == "late":
                    raise
                return None

    def passes(self, items: Items, first: int, num_samples: int, prefix: Prefix | None = None) -> torch.Tensor:
        """Evaluate draws in as few forwards as memory allows, (K, N, C) on the CPU; `prefix` is what they share."""
        size = draws_per_pass(self.source.root, items.inputs, items.rows, num_samples, self.budget)
        one_row = items.rows == 1 and takes_one_row(self.source.root)
        size = 1 if one_row or runs_one_by_one(self.source.root) else size
        done: list[torch.Tensor] = []
        last = first + num_samples
        while first < last:
            count = min(size, last - first)
            try:
                done.append(self._pass(items, first, count, prefix))
            except SharedRowsError:
                if count == 1:
                    raise
                size = 1
                continue
            except torch.OutOfMemoryError:
                if count == 1:
                    done.append(self._by_halves(items, first, prefix))
                else:
                    size = count // 2
                    torch.cuda.empty_cache()
                    continue
            first += count
        return torch.cat(done)

    def _pass(self, items: Items, first: int, count: int, prefix: Prefix | None) -> torch.Tensor:
        forward = partial(self._forward, items, first, prefix=prefix)
        if self.source.repeats or count == 1:  # a base model that repeats its rows looks at them itself
            return forward(count)
        varying = self.source.varying_modules(first + count)
        return run_repeated(self.source.root, varying, count, partial(forward, count), partial(forward, 1))

    def _forward(self, items: Items, first: int, count: int, prefix: Prefix | None) -> torch.Tensor:
        source, root = self.source, self.source.root
        inputs = items.inputs
        if not source.repeats:
            inputs = repeat_rows(inputs, count, items.rows)
        with ExitStack() as stack:
            stack.enter_context(source.use(first, count, repeat=True))
            stack.enter_context(self.head.reading(root, items))
            if prefix is not None:
                stack.enter_context(prefix.replayed(count))
            logits = logits_of(source.model(**inputs))
            values = self.head.read(logits, items, count).float()
        return self.head.values(values).cpu()

    def _by_halves(self, items: Items, first: int, prefix: Prefix | None) -> torch.Tensor:
        """One draw on a batch that does not fit at once: each half of its rows on its own."""
        if items.rows == 1 or prefix is not None or not items.one_a_row:
            raise torch.OutOfMemoryError(
                f"One draw of a batch of {items.rows} rows does not fit into memory. Use smaller batches."
            )
        torch.cuda.empty_cache()
        halves = torch.arange(items.rows).tensor_split(2)
        return torch.cat([self.passes(items.select(rows), first, 1) for rows in halves], dim=1)
