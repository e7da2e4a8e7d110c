"""Two gloo processes: the gradients of DDP and FSDP2 are those of one process."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from families import FAMILIES, perturb
from peft import get_peft_model
from processes import run_ranks

from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig, curve_at

CONFIGS = {
    "hyper": (HyperLoraConfig, {}),
    # a training draw is keyed by a counter, so that every rank uses the same function
    "bayesian": (BayesianLoraConfig, {"num_train_examples": 50, "init_sd": 0.5}),
}


def build(method):
    bert, (config_class, fields) = FAMILIES["bert"], CONFIGS[method]
    return perturb(get_peft_model(bert.build(), config_class(r=4, target_modules="all-linear", **fields))).train()


def batch():
    return {**FAMILIES["bert"].batch(rows=4), "labels": torch.tensor([0, 1, 2, 1])}


def gradients(model):
    return {
        n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def reference(method):
    model = build(method)
    model(**batch()).loss.backward()
    return gradients(model)


def wrap(model, kind):
    """The model in DDP, or sharded by FSDP2 block by block."""
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.get_base_model().bert.encoder.layer:
        fully_shard(block)
    return fully_shard(model)


def worker(rank, kind, method, folder):
    model = build(method)
    wrapped = wrap(model, kind)
    rows = slice(2 * rank, 2 * rank + 2)
    wrapped(**{k: v[rows] for k, v in batch().items()}).loss.backward()
    got = gradients(model)
    if rank == 0:
        torch.save(got, folder / "grads.pt")


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_equal_one_process(tmp_path, kind, method):
    run_ranks(worker, kind, method, tmp_path)
    got = torch.load(tmp_path / "grads.pt")
    expected = reference(method)
    assert {n.replace("module.", "") for n in got} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------- a curve: each rank at a point of its own


def curve(t_sampling):
    config = CurveLoraConfig(r=4, target_modules="all-linear", t_sampling=t_sampling)
    return perturb(get_peft_model(FAMILIES["bert"].build(), config)).train()


def curve_worker(rank, kind, t_sampling, folder):
    model = curve(t_sampling)
    wrapped = wrap(model, kind)
    rows = slice(2 * rank, 2 * rank + 2)
    wrapped(**{k: v[rows] for k, v in batch().items()}).loss.backward()
    torch.save((gradients(model), model.base_model.get_law().last_t), folder / f"{rank}.pt")


@pytest.mark.parametrize(("kind", "t_sampling"), [("ddp", "stratified"), ("fsdp2", "uniform")])
def test_ranks_of_a_curve_take_their_own_points(tmp_path, kind, t_sampling):
    run_ranks(curve_worker, kind, t_sampling, tmp_path)
    (got, first), (same, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first != second
    if t_sampling == "stratified":
        assert abs(float(first) - float(second)) == pytest.approx(1.0)  # half of two segments apart
    model = curve(t_sampling)
    for rank, t in enumerate((first, second)):
        rows = slice(2 * rank, 2 * rank + 2)
        with curve_at(model, float(t)):
            (model(**{k: v[rows] for k, v in batch().items()}).loss / 2).backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(got[name.replace("module.", "")], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(got[name], same[name])
