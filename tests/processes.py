"""Processes of a test's own, started and ended so that nothing can hang.

They are forked from one server that has the libraries loaded and nothing else done: importing them costs five seconds
of CPU a process. Where what an interpreter has imported is the question, a test starts one itself.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: What the server loads; it is started with the first process that is asked for, once in each of pytest's workers.
LOADED = ["torch", "transformers", "peft", "datasets", "accelerate", "torch.distributed.fsdp", "peft_calib.predictor"]


def started(function: Callable, *args: object) -> mp.Process:
    """A process that runs a module-level function."""
    server = mp.get_context("forkserver")
    server.set_forkserver_preload(LOADED)
    process = server.Process(target=_as_here, args=(dict(os.environ), function, *args))
    process.start()
    return process


def _as_here(environment: dict[str, str], function: Callable, *args: object) -> None:
    """Run in the environment of the process that asks: that of the server is of the test which started it."""
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


def run_code(code: str, *words: str, cwd: Path | None = None, timeout: float = 240) -> None:
    """Run code in a process of its own, with `words` in `sys.argv` as behind `python -c`; it must end well."""
    process = started(_run, code, words, cwd)
    process.join(timeout)
    ended = process.exitcode
    process.kill()
    assert ended == 0, f"the process ended with {ended}"


def _run(code: str, words: tuple[str, ...], cwd: Path | None) -> None:
    torch.set_num_threads(1)
    sys.argv = ["-c", *words]
    os.chdir(cwd or ".")
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})


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
    mp.get_context("forkserver").set_forkserver_preload(LOADED)
    given = (dict(os.environ), function, args, port)
    context = mp.start_processes(_enter, given, nprocs=2, join=False, start_method="forkserver")
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=2):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} did not end within {timeout} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _enter(rank: int, environment: dict[str, str], function: Callable, args: tuple, port: int) -> None:
    os.environ.clear()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # as conftest.py does for the test: adapters without a seed start alike here and there
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {**environment, **place, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    function(rank, *args)
    dist.barrier()
    time.sleep(0.5)
    os._exit(0)  # what was computed is on disk, and gloo can hang while its objects are torn down
