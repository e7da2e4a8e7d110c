"""A second copy of a classification head that can be trained while the first one goes on predicting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..prediction.draws import evaluating
from .located import Located, locate
from .plain import FirstToken, plain_head


class CopiedHead(nn.Module):
    """The heads of K functions, each moved by one shared, trainable distance from where it was.

    Parameters are `theta_k = theta0_k + delta`, with `delta` starting at zero: at the start the copy answers what the
    frozen heads answer, and `|theta - theta0|^2` is `|delta|^2` whatever K is.

    Args:
        module: A head in evaluation mode, float32; used for its computation and never changed.
        starts: The parameters and buffers of each head, by name; functions that share a head have one entry.
    """

    def __init__(self, module: nn.Module, starts: Sequence[Mapping[str, torch.Tensor]]) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that its parameters are not counted, moved or saved as ours
        self.trained = [name for name, _ in module.named_parameters()]
        self.starts = [{name: value.detach().clone() for name, value in start.items()} for start in starts]
        self.delta = nn.ParameterList(nn.Parameter(torch.zeros_like(starts[0][name])) for name in self.trained)

    @property
    def module(self) -> nn.Module:
        """The head whose computation this is."""
        return self._module[0]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(K, N, D)` features to `(K, N, C)` logits, in float32; one start serves all K functions."""
        return self.answer(tuple(self.delta), features)

    def answer(
        self, delta: Sequence[torch.Tensor], features: torch.Tensor, module: nn.Module | None = None
    ) -> torch.Tensor:
        """The same from another distance, and by another module of the same parameters where one is given."""
        starts = self.starts * len(features) if len(self.starts) == 1 else self.starts
        moved = [{**start, **{n: start[n] + d for n, d in zip(self.trained, delta, strict=True)}} for start in starts]
        by = self.module if module is None else module
        with torch.autocast(features.device.type, enabled=False):
            return torch.stack([functional_call(by, p, (rows,)) for p, rows in zip(moved, features, strict=True)])

    def squared_distance(self) -> torch.Tensor:
        """`sum_k |theta_k - theta0_k|^2` over all tensors, biases included: a number, not averaged."""
        return squared_distances([delta[None] for delta in self.delta])[0]


def squared_distances(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """`(T,)` squared distances from the start, of T stacked distances of each trained tensor, `(T, ...)`."""
    return torch.stack([delta.flatten(1).square().sum(1) for delta in deltas]).sum(0)


def copy_head(
    model: nn.Module,
    *,
    task: str = "auto",
    label_tokens: Sequence[int | str] | None = None,
    tokenizer: Any = None,
    head_module: str | None = None,
    num_samples: int | None = 1,
    seed: int = 0,
    dropout: float | None = None,
    adapter_names: Sequence[str] | None = None,
) -> CopiedHead:
    """Copy the classification head of a model, as it answers now.

    The copy takes the features of `extract_features` and answers with its logits. The arguments are those of
    `extract_features` and have to be the same.

    Args:
        model: A classifier with or without an adapter, or a language model with `label_tokens`.
        task: What the logits are.
        label_tokens: For a language model, the tokens that stand for the classes: their rows are copied.
        tokenizer: For texts among the label tokens.
        head_module: Name of the head in the base model, where it has another name than `classifier`, `score` ...
        num_samples: Number of functions K.
        seed: Key of the draws.
        dropout: Probability of Monte Carlo dropout.
        adapter_names: Adapters of the model that are the functions.

    Returns:
        The copy, float32 on the CPU; functions whose heads are equal share one start.

    Raises:
        ValueError: If no head is found, or it cannot be copied.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = BertForSequenceClassification(BertConfig(num_labels=3, **sizes))
        >>> copy_head(model)(torch.ones(1, 5, 8)).shape
        torch.Size([1, 5, 3])
    """
    ways: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "dropout": dropout}
    words: dict[str, Any] = {"task": task, "label_tokens": label_tokens, "tokenizer": tokenizer}
    return copied(locate(model, head_module=head_module, adapter_names=adapter_names, **ways, **words))


def copied(located: Located) -> CopiedHead:
    """The copy of a head that was found, one start for each of its functions unless they are equal."""
    predictor, rows = located.predictor, located.label_tokens
    count = predictor.num_samples
    adapters: Sequence[str | None] = located.adapters or [None] * count
    heads = []
    with torch.no_grad(), evaluating(predictor.source.model):
        for index, adapter in enumerate(adapters):
            with predictor.source.use(index, 1):
                heads.append(plain_head(located.module, adapter, rows))
    module = heads[0] if isinstance(heads[0], nn.Linear) or not _reads_first_token(heads[0]) else FirstToken(heads[0])
    starts = [{**dict(head.named_parameters()), **dict(head.named_buffers())} for head in heads]
    if module is not heads[0]:
        starts = [{f"head.{name}": value for name, value in start.items()} for start in starts]
    return CopiedHead(module, starts[:1] if _alike(starts) else starts)


def _alike(starts: Sequence[Mapping[str, torch.Tensor]]) -> bool:
    return all(torch.equal(start[name], value) for start in starts[1:] for name, value in starts[0].items())


def _reads_first_token(head: nn.Module) -> bool:
    """Whether a head takes the states of all tokens: it then answers for fewer axes than it was given."""
    width = next((module.in_features for module in head.modules() if isinstance(module, nn.Linear)), None)
    if width is None:
        raise ValueError(f"The head, a {type(head).__name__}, has no linear map. Name another one with head_module=.")
    try:
        return head(torch.zeros(1, 2, width)).dim() == 2
    except (RuntimeError, IndexError):
        return False
