"""Tiny models under laws that really vary."""

import sys
from pathlib import Path

from peft import PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tuners"))
from families import Family, perturb

from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig


def bayesian(family: Family, targets=None, seed: int = 0, overrides=None, dtype=None, **fields) -> PeftModel:
    """A model of a family under a posterior that is wide enough to see, with everything off its start."""
    settings = {"r": 4, "target_modules": list(targets or family.targets), "init_sd": 0.5, "num_train_examples": 100}
    base = family.build(seed, **(overrides or {}))
    model = get_peft_model(base if dtype is None else base.to(dtype), BayesianLoraConfig(**{**settings, **fields}))
    return perturb(model, scale=0.1).eval()


def random_a(family: Family, **fields) -> PeftModel:
    """HyperLoRA with a random A: the second stochastic law."""
    config = HyperLoraConfig(r=4, target_modules=list(family.targets), a_mode="random", **fields)
    return perturb(get_peft_model(family.build(), config), scale=0.1).eval()


def curve(family: Family, **fields) -> PeftModel:
    """CurveLoRA, whose draws are points of a grid."""
    config = CurveLoraConfig(**{"r": 4, "target_modules": list(family.targets), **fields})
    return perturb(get_peft_model(family.build(), config), scale=0.1).eval()
