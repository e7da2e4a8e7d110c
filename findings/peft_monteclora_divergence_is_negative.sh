#!/usr/bin/env bash
# peft 0.21.2 (with torch 2.13.0), November 2026: `MontecloraConfig`, the Bayesian variant of LoRA, and the loss that its
# `MontecloraTrainerMixin` adds.
#
# What one expects: the term holds a Kullback-Leibler divergence of the samples' weights from their Dirichlet prior, so it
# is never negative, and is least at the prior. More samples are dearer, and "usually give smoother training" (its help).
# What was seen: the sum over the components has the wrong sign. With the default of 8 samples the term is -25 where the
# divergence is +10, and it is least at concentrations of 1.27 instead of the prior's .1, where the divergence is still 8.7.
# It is also made of gamma functions instead of their logarithms, which overflow in 32 bits: from about 20 samples on (with
# 32 for certain) the loss is infinite and its gradient not finite from the first step, whatever the data. Nothing is said.
#
# Exit status 0 while this is so; 1 when it has changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
	peft==0.21.2 2>&1 | grep -v "is ignored" || true

cat > "$scratch/look.py" <<'PYTHON'
import math
import sys

import peft
import torch
from peft import LoraConfig, MontecloraConfig, get_peft_model
from torch import nn
from torch.distributions import Dirichlet, kl_divergence


def adapted(samples: int) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], monteclora_config=MontecloraConfig(num_samples=samples))
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config).train()
    model(torch.ones(1, 16))
    return model


def divergence(sampler: nn.Module, concentration: torch.Tensor) -> torch.Tensor:
    """Of the Dirichlet over the samples' weights from its prior."""
    prior = torch.full_like(concentration, sampler.dirichlet_prior)
    return kl_divergence(Dirichlet(concentration), Dirichlet(prior))


sampler = adapted(8).base_model.model[0].lora_monteclora_sampler["default"]
logs = sampler.expert_weights_prior.detach().clone().requires_grad_()
term, true = float(sampler.dirichlet_kl(logs.exp())), float(divergence(sampler, logs.exp()))
optimizer = torch.optim.Adam([logs], lr=0.05)
for _ in range(400):
    optimizer.zero_grad()
    sampler.dirichlet_kl(logs.exp()).backward()
    optimizer.step()
least, there = logs.detach().exp(), float(divergence(sampler, logs.exp()))
print(f"peft {peft.__version__}, 8 samples: the term is {term:.1f}, the divergence {true:.1f}")
print(f"prior {sampler.dirichlet_prior}; the term is least at {least.min():.2f} to {least.max():.2f}, the divergence there {there:.1f}")

model = adapted(32)
loss = model.base_model._get_monteclora_loss()
loss.backward()
finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
print(f"32 samples: the loss is {float(loss)}, its gradient finite: {finite}")
sys.exit(0 if term < 0 < true and least.min() > 1 and there > 5 and math.isinf(float(loss)) and not finite else 1)
PYTHON

"$scratch/venv/bin/python" -W ignore "$scratch/look.py"
