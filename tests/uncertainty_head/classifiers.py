"""Tiny classifiers of many families, built from configurations, with a stock LoRA whose values are not zero."""

from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_SHARED = {"vocab_size": 50, "max_position_embeddings": 40, "pad_token_id": 1}


def _build(config: type, model: type, **fields) -> Callable[..., nn.Module]:
    return lambda **more: model(config(**(_SIZES | _SHARED | fields | more)))


#: Builder of the model, its LoRA targets, and whether its head reads the last token.
CLASSIFIERS = {
    "bert": (_build(BertConfig, BertForSequenceClassification), ["query", "value"], False),
    "roberta": (_build(RobertaConfig, RobertaForSequenceClassification), ["query", "value"], False),
    "electra": (
        _build(ElectraConfig, ElectraForSequenceClassification, embedding_size=16),
        ["query", "value"],
        False,
    ),
    "distilbert": (
        _build(DistilBertConfig, DistilBertForSequenceClassification, dim=16, hidden_dim=24, n_layers=2, n_heads=2),
        ["q_lin", "v_lin"],
        False,
    ),
    "deberta": (
        _build(DebertaV2Config, DebertaV2ForSequenceClassification, pooler_hidden_size=16),
        ["query_proj", "value_proj"],
        False,
    ),
    "modernbert": (
        _build(
            ModernBertConfig,
            ModernBertForSequenceClassification,
            bos_token_id=0,
            cls_token_id=0,
            eos_token_id=2,
            sep_token_id=2,
            attn_implementation="eager",
        ),
        ["Wqkv"],
        False,
    ),
    "llama": (
        _build(LlamaConfig, LlamaForSequenceClassification, num_key_value_heads=2),
        ["q_proj", "v_proj"],
        True,
    ),
    "qwen": (
        _build(Qwen2Config, Qwen2ForSequenceClassification, num_key_value_heads=2),
        ["q_proj", "v_proj"],
        True,
    ),
}


def classifier(family: str, num_labels: int = 3, seed: int = 0, adapt: bool = True, **fields) -> nn.Module:
    """A tiny classifier in evaluation mode; with `adapt` under a LoRA that changes its answers, and its own head."""
    build, targets, _ = CLASSIFIERS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(num_labels=num_labels, **fields)
        if adapt:
            config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, lora_alpha=16)
            model = vary(get_peft_model(model, config))
    return model.eval()


def vary(model: PeftModel) -> PeftModel:
    """Give what an adapter trains values that are far from where they start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rows(count: int = 12, num_labels: int = 3, seed: int = 0, left: bool = False) -> list[dict]:
    """Labelled rows of token ids, padded with 1 to one length on the right or left."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(3, 50, (length,), generator=generator).tolist()
        pad, mask = [1] * (9 - length), [1] * length
        tokens = {"input_ids": pad + ids if left else ids + pad}
        tokens["attention_mask"] = [0] * len(pad) + mask if left else mask + [0] * len(pad)
        found.append(tokens | {"labels": int(torch.randint(num_labels, (), generator=generator))})
    return found
