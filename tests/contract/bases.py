"""Tiny random models of the architectures people adapt, each with a training batch; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import transformers as tf
from families import DECODER, ENCODER
from torch import nn

TOKENS = 64
DROPLESS = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def _ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(5, TOKENS, (2, 6), generator=torch.Generator().manual_seed(seed))


def _classes() -> dict[str, torch.Tensor]:
    ids = _ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])}


def _next_tokens() -> dict[str, torch.Tensor]:
    ids = _ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _answers() -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(), "labels": _ids(2)[:, :4].contiguous()}


def _pixels(size: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def _images() -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(8), "labels": torch.tensor([0, 2])}


def _sounds() -> dict[str, torch.Tensor]:
    sound = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    return {"input_features": sound, "labels": _ids(2)[:, :4].contiguous()}


def _image_and_text() -> dict[str, torch.Tensor]:
    ids = _ids()
    ids[:, :4] = 3  # stands for the four patches
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pixels(8), "labels": ids}


def _numbers() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), "labels": torch.tensor([0, 2, 1])}


class Plain(nn.Module):
    """A module that is none of transformers': a map without bias, one of width one, one used twice."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(5, 8, bias=False), nn.Linear(8, 8)
        self.gate, self.score = nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
        hidden = self.twice(self.twice(self.first(x).tanh()).tanh()).tanh()
        logits = self.score(hidden * self.gate(hidden).sigmoid())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


@dataclass(frozen=True)
class Base:
    """An architecture.

    Attributes:
        model: The model class.
        config: Makes its configuration.
        batch: Makes a training batch, labels among it.
        targets: What is adapted; all linear maps but the output where nothing else is said.
        task: PEFT's task type.
        fields: Further fields of an adapter's configuration.
    """

    model: type[nn.Module]
    config: Callable[[], Any]
    batch: Callable[[], dict[str, torch.Tensor]]
    targets: str | tuple[str, ...] = "all-linear"
    task: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.model(self.config()).eval()


def _encoder(model: type, config: type, **settings: Any) -> Base:
    return Base(model, lambda: config(**{**ENCODER, **settings}), _classes, task="SEQ_CLS")


def _decoder(model: type, config: type, **settings: Any) -> Base:
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Base(model, lambda: config(**{**DECODER, **ends, **settings}), _next_tokens, task="CAUSAL_LM")


def _llava() -> tf.LlavaConfig:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
    text = tf.LlamaConfig(**DECODER, pad_token_id=0)
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision), text_config=text, image_token_id=3, vision_feature_layer=-1
    )


_BART = {"d_model": 32, "vocab_size": TOKENS, "max_position_embeddings": 32, **DROPLESS}
_BART |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in {"layers": 2, "ffn_dim": 48}.items()}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}

BASES: dict[str, Base] = {
    "bert": _encoder(tf.BertForSequenceClassification, tf.BertConfig),
    "roberta": _encoder(tf.RobertaForSequenceClassification, tf.RobertaConfig, max_position_embeddings=32),
    "modernbert": _encoder(
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig,
        pad_token_id=0,
        global_attn_every_n_layers=2,
        local_attention=4,
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"), 0.0),
    ),
    "deberta-v2": _encoder(
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        pooler_hidden_size=32,
        pooler_dropout=0.0,
    ),
    "distilbert": Base(
        tf.DistilBertForSequenceClassification,
        lambda: tf.DistilBertConfig(
            vocab_size=TOKENS,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            dropout=0.0,
            seq_classif_dropout=0.0,
            attention_dropout=0.0,
            num_labels=3,
        ),
        _classes,
        ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        task="SEQ_CLS",
    ),
    "electra": _encoder(tf.ElectraForSequenceClassification, tf.ElectraConfig, embedding_size=16),
    "gpt2": Base(
        tf.GPT2LMHeadModel,
        lambda: tf.GPT2Config(
            n_layer=2,
            n_head=4,
            n_embd=32,
            vocab_size=TOKENS,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        _next_tokens,
        task="CAUSAL_LM",
    ),
    "opt": _decoder(
        tf.OPTForCausalLM, tf.OPTConfig, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=True, **DROPLESS
    ),
    "llama": _decoder(tf.LlamaForCausalLM, tf.LlamaConfig),
    "qwen2": _decoder(tf.Qwen2ForCausalLM, tf.Qwen2Config),
    "qwen3": _decoder(tf.Qwen3ForCausalLM, tf.Qwen3Config, head_dim=8),
    "gemma3": _decoder(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, head_dim=8, sliding_window=4),
    "mistral": _decoder(tf.MistralForCausalLM, tf.MistralConfig, sliding_window=4),
    "phi3": _decoder(tf.Phi3ForCausalLM, tf.Phi3Config),
    "mixtral": _decoder(tf.MixtralForCausalLM, tf.MixtralConfig, num_local_experts=2),
    "mamba": Base(
        tf.MambaForCausalLM,
        lambda: tf.MambaConfig(vocab_size=TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0),
        _next_tokens,
        ("in_proj",),
        task="CAUSAL_LM",
    ),
    "t5": Base(
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(
            num_layers=2,
            num_heads=4,
            d_model=32,
            d_kv=8,
            d_ff=48,
            vocab_size=TOKENS,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        ),
        _answers,
        task="SEQ_2_SEQ_LM",
    ),
    "bart": Base(tf.BartForConditionalGeneration, lambda: tf.BartConfig(**_BART), _answers, task="SEQ_2_SEQ_LM"),
    "vit": Base(
        tf.ViTForImageClassification,
        lambda: tf.ViTConfig(
            **{name: value for name, value in ENCODER.items() if name != "vocab_size"}, image_size=8, patch_size=4
        ),
        _images,
        fields={"modules_to_save": ["classifier"]},
    ),
    "whisper": Base(
        tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(
            **{name: value for name, value in _BART.items() if name != "max_position_embeddings"},
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        _sounds,
    ),
    "llava": Base(tf.LlavaForConditionalGeneration, _llava, _image_and_text),
    "plain": Base(Plain, dict, _numbers, ("first", "twice", "gate"), fields={"modules_to_save": ["score"]}),
}
