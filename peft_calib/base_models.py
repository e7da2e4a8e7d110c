"""The base model under an adapter: loaded as in training, known again later, and how much it can read."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .identity import unwrapped

#: Tokenizers without a limit of their own have one of 10^30.
NO_LIMIT = 10**9
#: Numbers of a tensor that enter a fingerprint; another training changes nearly all of them.
SAMPLED = 16
#: Parts of the name of what an adapter brings itself: wrappers around modules trained whole, and what they replace.
_OWN = {"modules_to_save", "original_module", "trainable_tokens_delta", "token_adapter"}


def able_to_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with a padding token; decoders often have none, and any serves, since padding is masked."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def seeded_base(
    load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, seed: int | None
) -> PreTrainedModel:
    """A base model, with what its checkpoint lacks made of a seed: the same in every training and ever after."""
    if seed is not None:
        set_seed(seed)
    base = load()
    base.config.pad_token_id = tokenizer.pad_token_id
    return base


def base_fingerprint(model: nn.Module) -> str | None:
    """The data types of a base model's parameters, and a digest of some numbers of each.

    Two checkpoints of one architecture differ in it, and so does what a checkpoint lacks and transformers makes fresh.
    Modules that the adapter trains whole, biases it trains and the embeddings, which PEFT saves along where a
    vocabulary was resized, do not count.

    Args:
        model: A model with adapters.

    Returns:
        `"float32:..."`; None for a model that is sharded or not loaded, and, with a warning, for one whose tensors
        cannot be read.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(2, 2))
        >>> model = get_peft_model(base, LoraConfig(target_modules=["0"]))
        >>> before = base_fingerprint(model)
        >>> model.base_model.model[0].base_layer.weight.data[0, 0] += 1
        >>> before == base_fingerprint(model)
        False
    """
    model = unwrapped(model)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    trains_biases = any(getattr(config, "bias", "none") != "none" for config in base_configs(model))
    tables = {id(table.weight) for table in _embeddings(base)}
    prefixes = tuple(prefix for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix)
    digest, dtypes = hashlib.sha256(), set()
    for name, parameter in base.named_parameters():
        own = any(part in _OWN or part.startswith(prefixes) for part in name.split("."))
        if own or id(parameter) in tables or (trains_biases and name.endswith("bias")):
            continue
        if isinstance(parameter, DTensor) or parameter.is_meta:
            return None
        try:
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].cpu().contiguous().view(torch.uint8).numpy()
        except Exception as error:  # tensors of quantisation libraries have their own idea of what can be done
            warnings.warn(
                f"The base model is not known again later: its tensor {name} cannot be read ({error}).",
                UserWarning,
                stacklevel=2,
            )
            return None
        plain = ".".join(part for part in name.split(".") if part != "base_layer")
        digest.update(f"{plain} {tuple(parameter.shape)} ".encode() + some.tobytes())
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
    return f"{'+'.join(sorted(dtypes))}:{digest.hexdigest()[:32]}"


def base_configs(model: nn.Module) -> list[Any]:
    """The configurations of a model's adapters."""
    return list(getattr(model, "peft_config", {}).values())


def is_other_base(recorded: str | None, found: str | None) -> bool:
    """Whether two fingerprints are of different models; those of other data types cannot be compared."""
    if recorded is None or found is None or recorded.partition(":")[0] != found.partition(":")[0]:
        return False
    return recorded != found


def _embeddings(base: nn.Module) -> list[nn.Module]:
    found = [ask() for name in ("get_input_embeddings", "get_output_embeddings") if (ask := _method(base, name))]
    return [table for table in found if isinstance(getattr(table, "weight", None), torch.Tensor)]


def _method(base: nn.Module, name: str) -> Callable[[], Any] | None:
    return getattr(base, name, None) if isinstance(base, PreTrainedModel) else None


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
