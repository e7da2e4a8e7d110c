"""Two gloo processes: the gradients of DDP and FSDP2 are those of one process."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, perturb
from peft import get_peft_model

from peft_calib import HyperLoraConfig


def build():
    bert = FAMILIES["bert"]
    return perturb(get_peft_model(bert.build(), HyperLoraConfig(r=4, target_modules="all-linear"))).train()


def batch():
    return {**FAMILIES["bert"].batch(rows=4), "labels": torch.tensor([0, 1, 2, 1])}


def gradients(model):
    return {
        n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def reference():
    model = build()
    model(**batch()).loss.backward()
    return gradients(model)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker(rank, port, kind, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = build()
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.get_base_model().bert.encoder.layer:
            fully_shard(block)
        wrapped = fully_shard(model)
    rows = slice(2 * rank, 2 * rank + 2)
    wrapped(**{k: v[rows] for k, v in batch().items()}).loss.backward()
    got = gradients(model)
    if rank == 0:
        torch.save(got, folder / "grads.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_equal_one_process(tmp_path, kind):
    mp.start_processes(worker, args=(free_port(), kind, tmp_path), nprocs=2, start_method="spawn")
    got = torch.load(tmp_path / "grads.pt")
    expected = reference()
    assert {n.replace("module.", "") for n in got} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
