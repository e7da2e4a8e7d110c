"""What is here for replication only: the authors' settings of each method, and what only they ask of a law.

The fields `authors_horizon`, `learn_jitter`, `share_inducing`, `core_units="whitened"`, `init="random"` or `"authors"`
and `a_init="authors"` serve no purpose of their own: they are there for these presets and for studies of the papers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_HYPER = dict(r=8, embed_mode="slot", head="full", init="authors", a_init="authors", a_residual=False)
HYPER_MLP: dict[str, Any] = _HYPER | dict(lora_alpha=8, hyper_hidden=2048, hyper_depth=3, embed_dim=128)
HYPER_TRANSFORMER: dict[str, Any] = _HYPER | dict(hyper_arch="transformer", hyper_hidden=256, hyper_depth=2)
HYPER_TRANSFORMER |= dict(hyper_nhead=16, hyper_ffn=2048, hyper_dropout=0.1, embed_dim=64, lora_alpha=16)
HYPER_TRANSFORMER |= dict(noise_mode_a="add", noise_mode_b="add", noise_alpha=0.99, noise_anneal=True)
BAYESIAN: dict[str, Any] = dict(r=8, lora_alpha=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj", "lm_head"])
BAYESIAN |= dict(bayesian_modules=["q_proj", "k_proj", "lm_head"], inducing_rows=9, inducing_cols=9)
BAYESIAN |= dict(prior_std=0.1, prior_mean="zero", init="random", core_units="whitened", flow="maf")
BAYESIAN |= dict(init_sd=1e-3, max_sd=0.1, conditional_noise="matheron", learn_lambda=True, init_d=1e-3, learn_d=True)
BAYESIAN |= dict(learn_jitter=True, variance_lr_multiplier=1.0, kl_weight=0.6, kl_warmup=1 / 3)
CURVE: dict[str, Any] = dict(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "lm_head"])
CURVE |= dict(num_anchors=3, num_handles=2, flat_rho=0.25, flat_rho_schedule="cycles", flat_rho_cycles=50)


def jitter_variance(offset: torch.Tensor, dim: int) -> torch.Tensor:
    """Variance, summed over a row of Z, of what BayesianLoRA's authors add to it: `0.01 softplus(rho) U(0, 1)`."""
    amplitude = 0.01 * torch.nn.functional.softplus(math.log(math.expm1(1e-3)) + offset)
    return amplitude.square() * (dim / 12)
