"""Names that torch keeps private, as read in torch 2.11 to 2.13."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad

# --------------------------------------------------------------------- tensors


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place; the writes of fused optimisers and those by `.data` do not count."""
    return tensor._version


def is_functorch_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the stand-in of another inside a transform (`torch.func`), without memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def in_forward_ad() -> bool:
    """Whether the caller runs inside `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


# --------------------------------------------------------------------- backward


def in_backward() -> bool:
    """Whether the caller runs inside a backward pass, as a checkpointed block does that is recomputed."""
    return torch._C._current_graph_task_id() != -1


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Have the engine call a function once, when the backward that is under way is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def inside_checkpoint() -> bool:
    """Whether the caller runs inside the first, gradient-free pass of a reentrant checkpoint.

    Nothing in torch tells; but that pass has the checkpoint's `forward` among its callers (torch's file, or that of
    DeepSpeed and FairScale), which an ordinary forward without gradients has not.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename.endswith(("checkpoint.py", "checkpointing.py")):
            return True
        frame = frame.f_back
    return False


# --------------------------------------------------------------------- modules and their wrappers


def has_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """Whether a function is registered as a forward pre-hook."""
    return hook in module._forward_pre_hooks.values()


def remove_hooks(module: nn.Module, *hooks: Callable[..., Any]) -> None:
    """Take functions off a module's hooks; the handles that registering returned do not know a copy of the module."""
    flags = (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_hooks_with_kwargs,
    )
    for registered in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in registered.items() if hook in hooks]:
            del registered[key]
            for flag in flags:
                flag.pop(key, None)


def remove_all_hooks(module: nn.Module) -> None:
    """Take everybody's functions off the forward hooks of a copy of a module and of its parts."""
    for part in module.modules():
        remove_hooks(part, *part._forward_pre_hooks.values(), *part._forward_hooks.values())


class MovesAlong(nn.Module):
    """A module that takes others along when it is moved or cast, without holding them as parts of itself."""

    def companions(self) -> Iterable[nn.Module]:
        return ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MovesAlong:
        for module in self.companions():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)


def is_replica(module: nn.Module) -> bool:
    """Whether a module is one of `DataParallel`'s copies."""
    return getattr(module, "_is_replica", False)


def compiled_inner(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` has wrapped, or `None`."""
    return getattr(module, "_orig_mod", None)


def without_compiler(name: str) -> str:
    """A module's name without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "")


def without_fsdp(name: str) -> str:
    """A module's name without what FSDP puts before it, as its state dicts have it."""
    return name.removeprefix("_fsdp_wrapped_module.")


# --------------------------------------------------------------------- processes


def default_store() -> dist.Store:
    """The store that all processes of the default group share."""
    return dist.distributed_c10d._get_default_store()
