"""Lets Accelerate shard a model over CPU processes, which it does for accelerators only."""

from accelerate import PartialState
from accelerate.utils import DistributedType


def allow() -> None:
    """Pass the gloo processes off as a kind that FSDP is offered to; devices and backend stay what they are."""
    state = PartialState(cpu=True)
    assert state.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
