"""Where an adapter starts: it follows PyTorch's seed, as LoRA does, and keeps what it took."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, logits, perturb
from methods import METHODS
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import set_seed

from peft_calib.tuners.memory import own_copy

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import run_ranks

BERT = FAMILIES["bert"]
# the other law of a method that is here twice has a seed of its own
FOLLOWING = {name: method for name, method in METHODS.items() if name != "hyper-random"}


@pytest.fixture(params=FOLLOWING)
def method(request):
    return FOLLOWING[request.param]


def named(method, seed: int) -> dict[str, int]:
    """A seed under the name that the method gives it."""
    return {"seed" if hasattr(method.config(), "seed") else "sample_seed": seed}


def build(method, torch_seed: int | None = None, adapter_name: str = "default", **fields):
    with torch.random.fork_rng(devices=[]):
        if torch_seed is not None:
            torch.manual_seed(torch_seed)
        return method.adapt(BERT, adapter_name, init_weights=False, **fields)


def start(method, model, adapter_name: str = "default") -> list[torch.Tensor]:
    return [own_copy(p.detach()) for p in method.law(model, adapter_name).parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def steps(model, count: int = 2) -> list[torch.Tensor]:
    """Logits of training forwards, which draw where the law is stochastic."""
    model.train()
    return [model(**BERT.batch()).logits.detach() for _ in range(count)]


def test_a_study_over_seeds_varies_the_start(method):
    one, same, other = (start(method, build(method, seed)) for seed in (1, 1, 2))
    assert equal(one, same)
    assert not equal(one, other)


def test_training_draws_follow_it_too(method):
    first, second = build(method, 1), build(method, 2)
    if not method.law(first).stochastic:
        return
    second.load_state_dict({k: v for k, v in first.state_dict().items() if "draw_seed" not in k}, strict=False)
    assert equal(start(method, first), start(method, second))
    assert not equal(steps(first), steps(second))


def test_set_seed_and_the_name_decide_and_the_random_states_stay(method):
    set_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    model = method.adapt(BERT, init_weights=False)
    method.adapt(BERT, "other")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    torch.rand(5)  # where the state stands does not matter, only where it began
    assert equal(start(method, model), start(method, method.adapt(BERT, init_weights=False)))


def test_two_adapters_of_one_configuration_differ(method):
    config = method.config(target_modules=list(BERT.targets), init_weights=False)
    model = build(method)
    for name in ("second", "third"):
        model.add_adapter(name, config)
    again = model.peft_config["default"]
    model.add_adapter("fourth", again)  # the object of an adapter that is there already
    starts = [start(method, model, name) for name in ("default", "second", "third", "fourth")]
    assert not any(equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


def test_a_seed_that_is_named_fixes_the_start(method):
    one, other = (build(method, seed, **named(method, 7)) for seed in (1, 2))
    assert equal(start(method, one), start(method, other))
    assert equal(steps(one), steps(other))
    assert one.peft_config["default"].start_seed is None
    second = build(method, 1, "another name", **named(method, 7))
    assert equal(start(method, one), start(method, second, "another name"))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reloaded_elsewhere_it_goes_on_as_it_would_have(method, tmp_path, low_cpu_mem_usage):
    model = perturb(build(method, 1))
    steps(model, 3)
    model.save_pretrained(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        again = PeftModel.from_pretrained(
            BERT.build(), tmp_path, "there", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
        )
    assert equal(steps(model), steps(again))


def test_a_resumed_run_continues_whatever_seed_its_process_has(method):
    """A trainer builds the adapter from its configuration and then loads the tensors of a checkpoint into it."""
    model, resumed = perturb(build(method, 1)), build(method, 2)
    steps(model, 3)
    set_peft_model_state_dict(resumed, get_peft_model_state_dict(model))
    assert equal(steps(model), steps(resumed))


def test_each_adapter_is_saved_with_its_own_seed(method, tmp_path):
    config = method.config(target_modules=list(BERT.targets), init_weights=False)
    model = build(method, 1)
    for name in ("second", "third"):
        model.add_adapter(name, config)
    model.save_pretrained(tmp_path)
    folders = [tmp_path, tmp_path / "second", tmp_path / "third"]
    seeds = [json.loads((folder / "adapter_config.json").read_text())["start_seed"] for folder in folders]
    assert len({*seeds}) == 3
    assert all(isinstance(seed, int) for seed in seeds)
    again = PeftModel.from_pretrained(BERT.build(), tmp_path / "second", "anything")
    assert again.peft_config["anything"].start_seed == seeds[1]
    assert equal(start(method, again, "anything"), start(method, model, "second"))


def test_saved_before_seeds_were_saved(method, tmp_path):
    """The configuration then said 0, or said nothing and meant it; the tensors held no seed."""
    model = perturb(build(method, **named(method, 0)))
    steps(model, 3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("draw_seed")}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["start_seed"], config["identity"]
    if "seed" in config:
        config["seed"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for low in (False, True):
        again = PeftModel.from_pretrained(BERT.build(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
        expected = PeftModel.from_pretrained(BERT.build(), tmp_path, is_trainable=True)
        assert equal(steps(again), steps(expected))
        assert method.law(again).start_seed in (None, 0)
    native = BERT.build()
    native.load_adapter(str(tmp_path), adapter_name="default")
    assert torch.equal(logits(native, BERT.batch()), logits(model, BERT.batch()))
    again = PeftModel.from_pretrained(BERT.build(), tmp_path, is_trainable=True)
    assert equal(steps(model), steps(again))


@pytest.mark.parametrize("value", [True, 1.5, "7", 2**64])
def test_what_is_no_seed_is_refused(method, value):
    for name in (*named(method, 0), "start_seed"):
        with pytest.raises(ValueError, match=rf"{name} (is .* must be a whole number|must be an integer)"):
            method.config(**{name: value})


# ----------------------------------------------------------------- processes with seeds of their own


def worker(rank, folder):
    torch.manual_seed(100 + rank)
    found = {}
    for name, method in FOLLOWING.items():
        model = method.adapt(BERT, init_weights=False)
        torch.nn.parallel.DistributedDataParallel(model)
        state = {key: value.clone() for key, value in model.state_dict().items() if method.tuner.prefix in key}
        found[name] = (state, steps(model) if name != "curve" else [])  # ranks of a curve take points of their own
    torch.save(found, folder / f"{rank}.pt")


def build_only(rank, folder):
    torch.manual_seed(100 + rank)
    found = {name: start(method, method.adapt(BERT, init_weights=False)) for name, method in FOLLOWING.items()}
    if rank == 0:  # what one process does alone must neither wait for the others nor confuse them
        METHODS["hyper"].adapt(BERT, "alone")
    torch.save(found, folder / f"{rank}.pt")


def test_ranks_with_different_seeds_start_and_draw_alike(tmp_path):
    run_ranks(worker, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, (state, outputs) in first.items():
        assert equal(list(state.values()), list(second[name][0].values()))
        assert equal(outputs, second[name][1])


def test_ranks_take_the_seed_of_the_first_without_any_wrapper(tmp_path):
    run_ranks(build_only, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(equal(tensors, second[name]) for name, tensors in first.items())
