"""An adapter's tensors during training: read, written, put back, told apart, also where a model is sharded."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_calib.files import replace_folder
from peft_calib.identity import Identity, active_adapter
from peft_calib.identity import digest_of_folder as digest_of_folder  # where others have it from
from peft_calib.tuners.config import CalibLoraConfig
from peft_calib.tuners.sealing import record_of

WEIGHTS = "adapter_model.safetensors"


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The active adapter's tensors under the names of its file, whole and on the CPU; every process has to call it."""
    return {name: whole(tensor).cpu().contiguous() for name, tensor in _live(model).items()}


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write the active adapter to a folder of its own, whole or not at all; every process has to call it."""
    tensors = adapter_tensors(model)

    def write(place: Path) -> None:
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        config = model.peft_config[active_adapter(model)]
        trains, config.inference_mode = config.inference_mode, True
        if isinstance(config, CalibLoraConfig):  # a sharded model has no record before its tensors are whole
            config.identity = record_of(Identity.of(config, tensors))
        config.save_pretrained(str(place))
        config.inference_mode = trains

    if not dist.is_initialized() or dist.get_rank() == 0:
        replace_folder(folder, write)
    barrier()


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Put an adapter's tensors back into the active adapter, unless the folder holds others than it needs."""
    saved, live = load_file(folder / WEIGHTS), _live(model)
    if set(saved) != set(live):
        raise ValueError(
            f"{folder} holds another adapter: tensors in one but not the other are "
            f"{sorted(set(saved) ^ set(live))[:4]}."
        )
    if not any(isinstance(tensor, DTensor) for tensor in live.values()):
        set_peft_model_state_dict(model, saved, adapter_name=active_adapter(model))
        return
    with torch.no_grad():
        for name, tensor in live.items():
            value = saved[name].to(tensor.device, tensor.dtype)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def check_readable(model: torch.nn.Module) -> None:
    """Refuse, before training, a model whose adapter a callback could not read at its end: under DeepSpeed ZeRO-3."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "DeepSpeed ZeRO-3 keeps the parameters partitioned, so a callback cannot read them. Use ZeRO-2, or the "
            "Trainer's own load_best_model_at_end with metric_for_best_model='eval_nll', greater_is_better=False."
        )


def _live(model: PeftModel) -> dict[str, torch.Tensor]:
    check_readable(model)
    return get_peft_model_state_dict(model, adapter_name=active_adapter(model), save_embedding_layers=False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, of all of it where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()
