"""Three laws and a LoRA on one model, in any order of operations: it answers as one that was built directly.

`MACHINE_ORDERS=200 pytest tests/contract/test_machine.py` tries 200 orders.
"""

import os
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import FAMILIES, logits, perturb
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig

BERT = FAMILIES["bert"]
BATCH = BERT.batch()
TARGETS = {"hyper": ["value", "output.dense"], "bayesian": ["value", "intermediate.dense"]}
TARGETS |= {"curve": ["query", "output.dense"], "lora": ["value", "dense"]}
CLASSES = {"hyper": HyperLoraConfig, "bayesian": BayesianLoraConfig, "curve": CurveLoraConfig, "lora": LoraConfig}
ADAPTERS = sorted(CLASSES)
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
ORDERS = int(os.environ.get("MACHINE_ORDERS", "12"))


@contextmanager
def quiet():
    """transformers tells of every adapter that is added beside another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base():
    """In double precision: what is merged can be thousands of times a weight, which rounds it when it is taken out."""
    return BERT.build().double()


def config(name: str):
    fields = {"num_train_examples": 100} if name == "bayesian" else {}
    return CLASSES[name](r=2, target_modules=TARGETS[name], **fields)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Each adapter, trained and saved from a model of its own."""
    made = {}
    for seed, name in enumerate(ADAPTERS):
        model = BERT.build()
        model.add_adapter(config(name), name)
        made[name] = tmp_path_factory.mktemp(name)
        perturb(model, seed=seed, scale=1.0).save_pretrained(made[name])
    return made


def built_directly(folders: dict[str, Path], active: frozenset[str]) -> torch.Tensor:
    model = base()
    with quiet():
        for name in sorted(active):
            model.load_adapter(str(folders[name]), name)
        if active:
            model.set_adapter(sorted(active))
    return logits(model, BATCH)


class Machine(RuleBasedStateMachine):
    """A model, and what is said of it: adapters in place, active ones, whether they are on, and in the weights."""

    folders: dict[str, Path]
    expected: dict[frozenset[str], torch.Tensor]

    @initialize()
    def start(self):
        self.model, self.loaded, self.active, self.on, self.merged = base(), set(), frozenset(), True, False

    def layers(self):
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    @precondition(lambda self: len(self.loaded) < len(ADAPTERS) and self.on and not self.merged)
    @rule(data=st.data())
    def load(self, data):
        name = data.draw(st.sampled_from(sorted(set(ADAPTERS) - self.loaded)))
        with quiet():
            self.model.load_adapter(str(self.folders[name]), name)
            self.loaded.add(name)
            self._activate(frozenset([name]))

    @precondition(lambda self: self.loaded and self.on and not self.merged)
    @rule(data=st.data())
    def switch(self, data):
        self._activate(data.draw(st.frozensets(st.sampled_from(sorted(self.loaded)), min_size=1)))

    def _activate(self, names):
        self.model.set_adapter(sorted(names))
        self.active = names

    @precondition(lambda self: self.active and self.on and not self.merged)
    @rule(safe=st.booleans())
    def merge(self, safe):
        for layer in self.layers():
            layer.merge(safe_merge=safe)
        self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        with quiet():
            for layer in self.layers():
                layer.unmerge()
        self.merged = False

    @precondition(lambda self: self.loaded)
    @rule()
    def switch_off_or_on(self):
        (self.model.disable_adapters if self.on else self.model.enable_adapters)()
        self.on, self.merged = not self.on, False  # what was merged is taken out at the next forward

    @precondition(lambda self: self.loaded and self.on and not self.merged)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        with quiet():
            self.model.delete_adapter(name)
        self.loaded.discard(name)
        left = self.active - {name}
        if self.loaded:
            self._activate(left or frozenset(sorted(self.loaded)[:1]))
        else:
            self.active = frozenset()

    @precondition(lambda self: len(self.active) == 1 and self.on and not self.merged)
    @rule()
    def save_and_load_again(self):
        (name,) = self.active
        with tempfile.TemporaryDirectory() as folder, quiet():
            self.model.save_pretrained(folder)
            self.model.delete_adapter(name)
            self.model.load_adapter(folder, name)
            self._activate(frozenset([name]))

    @precondition(lambda self: self.active and self.on and not self.merged)
    @rule()
    def train_forward(self):
        self.model.train()(**BATCH)

    @invariant()
    def it_answers_as_one_built_directly(self):
        active = self.active if self.on else frozenset()
        if active not in self.expected:
            self.expected[active] = built_directly(self.folders, active)
        torch.testing.assert_close(logits(self.model, BATCH), self.expected[active], rtol=1e-4, atol=2e-5)


def test_any_order_of_operations_gives_what_is_built_directly(folders):
    machine = type("OnThese", (Machine,), {"folders": folders, "expected": {}})
    steps = settings(max_examples=ORDERS, stateful_step_count=10, derandomize=ORDERS < 200, **COMMON)
    run_state_machine_as_test(machine, settings=steps)
    single = [machine.expected[key] for key in machine.expected if len(key) == 1]
    assert len(single) == len(ADAPTERS)
    assert all(not torch.allclose(a, b, atol=2e-3) for i, a in enumerate(single) for b in single[:i])
