"""Two gloo processes for a test, started and ended so that nothing can hang."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable, *args: object, timeout: float = 240) -> None:
    """Run `function(rank, *args)` in two processes that form a process group.

    Args:
        function: Module-level function; its results go to files.
        args: Further arguments.
        timeout: Seconds after which the processes are killed and the test fails.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.start_processes(_enter, args=(function, args, port), nprocs=2, join=False, start_method="spawn")
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=2):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} did not end within {timeout} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _enter(rank: int, function: Callable, args: tuple, port: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # as conftest.py does for the test: adapters without a seed start alike here and there
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {**place, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    function(rank, *args)
    dist.barrier()
    time.sleep(0.5)
    os._exit(0)  # what was computed is on disk, and gloo can hang while its objects are torn down
