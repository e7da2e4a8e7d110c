"""Tiny randomly initialised models of real architectures, with a batch for each; equal calls give equal weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf

SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 64,
}
ENCODER = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
DECODER = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Family:
    """A config, the model class for it, and the modules to adapt."""

    model: type
    config: type
    settings: dict
    targets: tuple[str, ...]

    def build(self, seed: int = 0, **overrides) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model(self.config(**{**self.settings, **overrides})).eval()

    def batch(self, rows: int = 2) -> dict:
        generator = torch.Generator().manual_seed(1)
        if self.config is tf.ViTConfig:
            return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
        ids = torch.randint(3, 64, (rows, 6), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.config is tf.T5Config:
            batch["decoder_input_ids"] = ids[:, :4]
        return batch


FAMILIES = {
    "bert": Family(tf.BertForSequenceClassification, tf.BertConfig, ENCODER, ("query", "key", "dense")),
    "roberta": Family(tf.RobertaForSequenceClassification, tf.RobertaConfig, ENCODER, ("query", "value")),
    "gpt2": Family(
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 64, "n_positions": 32}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ("c_attn", "c_fc", "c_proj"),
    ),
    "llama": Family(tf.LlamaForCausalLM, tf.LlamaConfig, DECODER, ("q_proj", "k_proj", "down_proj", "up_proj")),
    "qwen2": Family(tf.Qwen2ForCausalLM, tf.Qwen2Config, DECODER, ("q_proj", "v_proj", "gate_proj")),
    "t5": Family(
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        {"num_layers": 2, "num_heads": 4, "d_model": 32, "d_kv": 8, "d_ff": 48, "vocab_size": 64}
        | {"decoder_start_token_id": 0, "dropout_rate": 0.0},
        ("q", "v", "wo"),
    ),
    "vit": Family(
        tf.ViTForImageClassification,
        tf.ViTConfig,
        {k: v for k, v in ENCODER.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4},
        ("q_proj", "v_proj", "query", "value"),
    ),
}


def logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Logits in evaluation, without gradients."""
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def perturb(model: torch.nn.Module, seed: int = 5, scale: float = 0.05) -> torch.nn.Module:
    """Move every trainable parameter off its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
